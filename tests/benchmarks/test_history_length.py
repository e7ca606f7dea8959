"""The study of history length on a small generated log: what it trains, remembers, measures and writes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "history_length.py"
SMALL = {"rows": 2000, "n_users": 20, "history_length": 200}


@pytest.fixture(scope="module")
def history_length():
    spec = importlib.util.spec_from_file_location("recfast_history_length_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        module.LENGTHS = (10, 50, 200)
        yield module


@pytest.fixture(scope="module")
def finished(history_length, tmp_path_factory):
    """A study of all models at one length, and of two at another, with one seed."""
    study = history_length.Study(tmp_path_factory.mktemp("study"), dim=4, cache=tmp_path_factory.mktemp("c"), own=SMALL)
    study.limit()
    for model in history_length.MODELS:
        study.run(model, 10, 0)
    for model in history_length.MODELS[1:3]:
        study.run(model, 200, 0)
    return study


def test_every_model_is_measured(history_length, finished):
    assert len(finished.runs) == len(history_length.MODELS) + 3
    for run in finished.runs:
        assert 0 < run["auc"] < 1
        if run["model"] != "the truth":
            assert 0 < run["score_ms"] < run["train_ms"]
    truth = finished.find(model="the truth")[0]
    assert all(run["auc"] < truth["auc"] for run in finished.runs if run is not truth)


def test_nothing_is_trained_twice(history_length, finished, monkeypatch, tmp_path):
    before = finished.path.read_text()
    again = history_length.Study(finished.out, dim=4, own=SMALL)
    monkeypatch.setattr(history_length, "one_epoch", lambda *_: pytest.fail("trained again"))
    again.limit()
    for model in history_length.MODELS:
        again.run(model, 10, 0)
    assert finished.path.read_text() == before
    # A line that was cut off is a run that was not done.
    (tmp_path / history_length.RUNS).write_text(before[:-30])
    assert history_length.Study(tmp_path, dim=4).runs == finished.runs[:-1]
    assert (tmp_path / history_length.RUNS).read_text().splitlines() == before.splitlines()[:-1]


def test_the_row_without_history_has_none(history_length, finished):
    model = history_length.MODELS[0]
    assert not model.reads
    assert history_length.built(model, finished.generated, 10, 4, 0).schema.sequences == []


def test_the_report_says_what_was_measured(history_length, finished):
    history_length.report(finished, 3)
    text = (finished.out / history_length.TABLE).read_text()
    for model in history_length.MODELS:
        assert f"| {model.name} (" in text
    din = finished.find(model="DIN", length=200)[0]
    row = next(line for line in text.splitlines() if line.startswith("| DIN"))
    assert f"{din['auc']:.4f}" in row
    assert f"{din['logloss']:.4f}" in row
    assert "behind each cell: 1. Mean" in text, "how many seeds there are, not how many were asked for"
    first = dict(finished.find(model="DIN", length=10)[0], seed=1)
    more = dataclasses.replace(finished, runs=[*finished.runs, first])
    more.runs.append(first)
    assert history_length.counts(more, 3) == "1 to 2 at L = 10; 1 at L = 200"
    best = max(finished.find(length=200), key=lambda run: run["auc"])
    assert f"**{best['auc']:.4f}**" in text
    assert (finished.out / history_length.PLOT).read_bytes().startswith(b"\x89PNG")


def test_runs_are_added_to(history_length, finished):
    lines = [json.loads(line) for line in finished.path.read_text().splitlines()]
    assert lines == finished.runs
