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
                study.interests(model, protocol, 0, clusters=5, components=2)
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
    for run in (run for run in finished.runs if "mixture_recall@50" in run):
        assert 1 <= run["mixture_clusters@50"] <= 5


def test_nothing_is_trained_twice(gowalla, finished, monkeypatch):
    before = (finished.out / gowalla.RESULTS).read_text()
    monkeypatch.setattr(gowalla.models, "build", lambda *_: pytest.fail("trained again"))
    again = gowalla.Study(finished.out, None)
    for model in gowalla.MODELS:
        again.run(model, "published", 0)
    again.interests(gowalla.MODELS[3], "published", 0, clusters=5, components=2)
    assert (finished.out / gowalla.RESULTS).read_text() == before
    json.loads(before)


def test_the_table(gowalla, finished):
    gowalla.report(finished)
    text = (finished.out / gowalla.TABLE).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(gowalla.MODELS) + 1 + 2
    widths = {line.count("|") for line in rows}
    assert widths == {10}
    run = finished.find(model="EASE", protocol="held-out")[0]
    assert f"{run['recall@20']:.4f} / {run['ndcg@20']:.4f}" in text
    assert ".1765" in text


def test_unknown_names(gowalla, monkeypatch, capsys):
    for option, sentence in (("--models", "is none of popularity; ItemKNN"), ("--protocols", "is none of published")):
        monkeypatch.setattr("sys.argv", ["gowalla.py", option, "nothing"])
        with pytest.raises(SystemExit):
            gowalla.main()
        assert sentence in capsys.readouterr().err
