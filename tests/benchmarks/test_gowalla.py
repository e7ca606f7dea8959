"""The study of Gowalla on small files of its form: what it trains, remembers and writes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gowalla.py"
SMALL = {
    "MF-CCL": {"num_negatives": 20, "margin": 0.4, "weight": 5.0},
    "MF-CCL, shared negatives": {"num_negatives": 20, "margin": 0.4, "weight": 5.0},
    "SimpleX": {"num_negatives": 20, "margin": 0.4, "weight": 5.0, "dim": 8},
    "GF-CF": {"rank": 4, "iterations": 5},
    "two-tower": {"num_negatives": 20, "dim": 8},
    "LightGCN, 5 epochs": {"dim": 8},
}
GRID = [{"own": own, "clusters": 5, "components": 2} for own in (0.0, 0.5, 1.0)]


@pytest.fixture(scope="module")
def gowalla():
    spec = importlib.util.spec_from_file_location("recfast_gowalla_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        module.MODELS = [
            dataclasses.replace(
                model,
                options={**model.options, **SMALL.get(model.name, {})},
                settings=model.settings and {**model.settings, "epochs": 2, "batch_size": 64},
            )
            for model in module.MODELS
        ]
        yield module


@pytest.fixture(scope="module")
def finished(gowalla, tmp_path_factory):
    """A study of all models in both protocols, with one seed."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    lines = {"train": [], "test": []}
    for user in range(60):
        items = user % 3 * 30 + random.permutation(30)
        lines["train"].append(" ".join(map(str, (user, *items[:10]))))
        lines["test"].append(" ".join(map(str, (user, *items[10:13]))))
    for name, text in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n")
    study = gowalla.Study(tmp_path_factory.mktemp("study"), folder, tmp_path_factory.mktemp("cache"))
    for model in gowalla.MODELS:
        for protocol in gowalla.PROTOCOLS:
            study.run(model, protocol, 0)
            if model.name == "MF-CCL":
                study.interests(model, protocol, 0, GRID, (20, 30))
    return study


def test_every_model_is_measured(gowalla, finished):
    runs = [run for run in finished.runs if "recall@20" in run]
    assert len(runs) == 2 * len(gowalla.MODELS)
    for run in runs:
        assert 0 < run["recall@20"] <= 1
        assert run["train_rows"] == (600 if run["protocol"] == "published" else 540)
        assert run["users"] == 60
        if "epochs" in run:
            assert (run["epochs"], len(run["curve"])) == (2, 2)
    for run in finished.find(kind="interests"):
        assert 1 <= run["mixture_clusters@50"] <= 5


def test_interests_are_chosen_on_other_users(gowalla, finished, monkeypatch):
    (run,) = finished.find(kind="interests", protocol="held-out")
    assert run["users"] == [20, 30]
    assert [{key: entry[key] for key in GRID[0]} for entry in run["tried"]] == GRID
    best = max(run["tried"], key=lambda entry: entry["recall@50"])
    assert run["options"] == {key: best[key] for key in GRID[0]}
    # With its own vector alone every interest asks what the one query asks.
    alone = next(entry for entry in run["tried"] if entry["own"] == 1.0)
    assert alone["recall@50"] == pytest.approx(run["tried_one"])
    # Nobody who chose is told of.
    asked = []
    again = gowalla.Study(finished.out / "again", finished.path)
    monkeypatch.setattr(again, "find", lambda **wanted: [] if "kind" in wanted else [True])
    monkeypatch.setattr(again, "remember", lambda run: None)
    monkeypatch.setattr(again, "dataset", finished.dataset)
    monkeypatch.setattr(again, "folder", finished.folder)
    top = gowalla.top_items
    monkeypatch.setattr(
        gowalla, "top_items", lambda model, users, *a, **k: asked.append(users) or top(model, users, *a, **k)
    )
    again.interests(next(m for m in gowalla.MODELS if m.name == "MF-CCL"), "held-out", 0, GRID, (20, 30))
    choosing, *told = (set(users.tolist()) for users in asked)
    assert (len(choosing), [len(users) for users in told]) == (20, [30, 30])
    assert all(not choosing & users for users in told)


def test_nothing_is_trained_twice(gowalla, finished, monkeypatch):
    before = (finished.out / gowalla.RESULTS).read_text()
    monkeypatch.setattr(gowalla.models, "build", lambda *_: pytest.fail("trained again"))
    again = gowalla.Study(finished.out, None)
    for model in gowalla.MODELS:
        again.run(model, "published", 0)
    again.interests(gowalla.MODELS[3], "published", 0, GRID, (20, 30))
    assert (finished.out / gowalla.RESULTS).read_text() == before
    json.loads(before)


def test_the_table(gowalla, finished):
    gowalla.report(finished)
    text = (finished.out / gowalla.TABLE).read_text()
    first, second = text.split("## Several interests")
    rows = [line for line in first.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(gowalla.MODELS)
    assert {line.count("|") for line in rows} == {10}
    rows = [line for line in second.splitlines() if line.startswith("| MF-CCL with kNN-Embed")]
    # Two protocols: two lengths each, and what was tried beside the one query.
    assert [line.count("|") for line in rows] == [10] * 4 + [6] * 8
    run = finished.find(model="EASE", protocol="held-out")[0]
    assert f"{run['recall@20']:.4f} / {run['ndcg@20']:.4f}" in text
    assert ".1765" in text


def test_unknown_names(gowalla, monkeypatch, capsys):
    for option, sentence in (("--models", "is none of popularity; ItemKNN"), ("--protocols", "is none of published")):
        monkeypatch.setattr("sys.argv", ["gowalla.py", option, "nothing"])
        with pytest.raises(SystemExit):
            gowalla.main()
        assert sentence in capsys.readouterr().err
