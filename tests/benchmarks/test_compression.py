"""The study of compression on a small generated log: what it trains, remembers, chooses and writes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from recfast import data

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compression.py"


@pytest.fixture(scope="module")
def compression():
    spec = importlib.util.spec_from_file_location("recfast_compression_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        module.LR = (0.05, 0.1)
        yield module


@pytest.fixture(scope="module")
def finished(compression, data_cache, tmp_path_factory):
    """A study of three methods with two seeds, done."""
    out = tmp_path_factory.mktemp("study")
    dataset = data.load("synthetic", rows=2000)
    study = compression.Study(dataset, out, 8, 512, 4, 2)
    methods = [method for method in compression.METHODS if method.name in ("float32", "ROBE", "LPT")]
    methods[2] = dataclasses.replace(methods[2], points=("8",), grid={"8": methods[2].grid["8"][:2]})
    study.everything(["DeepFM"], methods, 2)
    return study, methods


def test_nothing_is_trained_twice(compression, finished, monkeypatch, tmp_path):
    study, methods = finished
    before = study.path.read_text()
    again = compression.Study(study.dataset, study.out, 8, 512, 4, 2)
    monkeypatch.setattr(again, "_train", lambda *_: pytest.fail("trained again"))
    again.everything(["DeepFM"], methods, 2)
    assert study.path.read_text() == before
    # A line that was cut off is a run that was not done; what is whole stays.
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "runs.jsonl").write_text(before[:-30])
    left = compression.Study(study.dataset, cut, 8, 512, 4, 2).runs
    assert left == study.runs[:-1]
    assert (cut / "runs.jsonl").read_text().splitlines() == before.splitlines()[:-1]
    # Another length of training is another run.
    other = compression.Study(study.dataset, study.out, 8, 512, 5, 2, trains=False)
    assert other.run("DeepFM", methods[0], "32", 0, {"lr": 0.1}) is None


def test_the_choice_looks_at_validation_only(finished, compression):
    study, methods = finished
    spoilt = compression.Study(study.dataset, study.out, 8, 512, 4, 2, trains=False)
    assert len(spoilt.runs) == len(study.path.read_text().splitlines())
    chosen = [spoilt.choose("DeepFM", method, method.points[0]) for method in methods]
    for run in spoilt.runs:
        run["test_auc"], run["test_logloss"] = 1 - run["test_auc"], 9.0
    assert [spoilt.choose("DeepFM", method, method.points[0]) for method in methods] == chosen
    for run in spoilt.runs:
        run["valid_auc"] = 1 - run["valid_auc"]
    assert spoilt.choose("DeepFM", methods[0], "32") != chosen[0]
    # The learning rate of the tables in bits is that of float32, or that halved some times.
    halvings = chosen[0]["lr"] / chosen[2]["lr"]
    assert halvings in (1, 2, 4, 8)


def test_bytes_and_epochs(finished, compression):
    study, _ = finished
    rows = sum(study.dataset.schema.rows(column.name) for column in study.dataset.schema.categorical)
    budgets = {"32": 32 * rows, "8": 12 * rows, "4": 8 * rows, "2": 8 * rows}
    for run in study.runs:
        budget = budgets[run["point"]]
        assert 0.97 * budget < run["bytes"] <= budget, run
        assert run["training_bytes"] > run["bytes"]
        assert 1 <= run["epoch"] <= 4 or run["trained"] == 0
    names = {(run["method"], run["point"]) for run in study.runs}
    assert ("post-training, best step", "2") in names
    assert ("post-training, largest step", "8") in names
    # 8 bits after training lose next to nothing.
    by_name = {(run["method"], run["point"]): run for run in study.runs if run["seed"] == 1}
    gap = by_name["float32", "32"]["test_auc"] - by_name["post-training, best step", "8"]["test_auc"]
    assert abs(gap) < 0.01


def test_table_and_plot(finished, compression, tmp_path, monkeypatch):
    study, methods = finished
    monkeypatch.setattr(compression, "METHODS", methods)
    silent = compression.Study(study.dataset, study.out, 8, 512, 4, 2, trains=False)
    cells = compression.collect(silent, ["DeepFM"], 2)
    assert {name for _, name, _ in cells} == {"float32", "ROBE", "LPT", *(n for n, _ in compression.AFTERWARDS)}
    text = compression.markdown(cells, ["DeepFM"], 2, silent)
    row = next(line for line in text.splitlines() if "| LPT" in line)
    options = silent.choose("DeepFM", methods[2], "8")
    aucs = [
        run["test_auc"]
        for run in map(json.loads, study.path.read_text().splitlines())
        if run["method"] == "LPT" and run["options"] == options
    ]
    assert len(aucs) == 2
    deviation = abs(aucs[0] - aucs[1]) / 2**0.5
    assert f"{sum(aucs) / 2:.4f} ± {deviation:.4f}" in row
    assert row.count("|") == text.splitlines()[text.splitlines().index(row) - 1].count("|")
    compression.plot(cells, ["DeepFM"], 8, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    # A method of which a seed is missing says so.
    silent.runs = [run for run in silent.runs if (run["method"], run["seed"]) != ("ROBE", 1)]
    text = compression.markdown(compression.collect(silent, ["DeepFM"], 2), ["DeepFM"], 2, silent)
    assert [("(1 of 2 seeds)" in line) for line in text.splitlines() if "| ROBE" in line] == [True] * 3
