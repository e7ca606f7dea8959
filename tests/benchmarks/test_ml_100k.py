"""The held-out study of ml-100k on a small log: what it tries, chooses, remembers and writes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recfast import data

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ml_100k.py"
SMALL = {"MF-CCL": {"num_negatives": 20, "dim": 8}, "SimpleX": {"num_negatives": 20, "dim": 8}, "two-tower": {"dim": 8}}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("recfast_ml_100k_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        module.MODELS = [
            dataclasses.replace(
                model,
                choices=[{**options, **SMALL.get(model.name, {})} for options in model.choices],
                settings=model.settings and {**model.settings, "epochs": 2},
            )
            for model in module.MODELS
        ]
        yield module


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    frames = []
    for begin, steps in ((0, 12), (12, 2), (14, 2)):
        user = np.repeat(np.arange(40), steps)
        step = begin + np.tile(np.arange(steps), 40)
        item = user % 4 * 30 + (user // 4 * 7 + step) % 30
        frames.append(pl.DataFrame({"user": user, "item": item, "time": step, "label": 1}))
    columns = [
        data.Categorical("user", role="user"),
        data.Categorical("item", role="item"),
        data.Sequence("history", of="item", max_length=10),
    ]
    schema = data.Schema(columns, label="label", time="time")
    dataset = data.prepare(schema, *frames, cache=tmp_path_factory.mktemp("walks"))
    study = script.Study(tmp_path_factory.mktemp("study"), dataset)
    for model in script.MODELS:
        study.run(model, 2)
    return study


def test_only_what_is_chosen_is_tested(script, finished):
    for model in script.MODELS:
        tried = finished.find(kind="choice", model=model.name)
        assert [run["options"] for run in tried] == model.choices
        assert {run["seed"] for run in tried} == {0}
        best = max(tried, key=lambda run: run[script.CHOICE])
        tested = finished.find(kind="test", model=model.name)
        assert [run["seed"] for run in tested] == ([0, 1] if model.settings else [0])
        assert all(run["options"] == best["options"] for run in tested)
        assert tested[0]["cpu_seconds"] == best["cpu_seconds"], "seed 0 was trained again"


def test_nothing_is_done_twice(script, finished, monkeypatch):
    before = (finished.out / script.RESULTS).read_text()
    monkeypatch.setattr(script.models, "build", lambda *_: pytest.fail("trained again"))
    again = script.Study(finished.out, None)
    for model in script.MODELS:
        again.run(model, 2)
    assert (finished.out / script.RESULTS).read_text() == before
    assert json.loads(before)


def test_the_table(script, finished):
    script.report(finished)
    rows = [line for line in (finished.out / script.TABLE).read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(script.MODELS)
    (run,) = finished.find(kind="test", model="EASE")
    row = next(line for line in rows if line.startswith("| EASE |"))
    assert f"ridge {run['options']['ridge']}, of 3 | {run['recall@20']:.4f} | {run['ndcg@20']:.4f}" in row
    assert "±" in next(line for line in rows if line.startswith("| SimpleX |"))


def test_unknown_names(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ml_100k.py", "--models", "nothing"])
    with pytest.raises(SystemExit):
        script.main()
    assert "is none of popularity; ItemKNN" in capsys.readouterr().err
