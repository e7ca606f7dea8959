"""The study of SparCode and two towers on a small log: what it trains on, remembers, chooses and writes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recfast import data
from recfast.train.evaluate import held_out

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sparcode.py"


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> data.Dataset:
    """40 users walk around four rings of items."""
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
    return data.prepare(schema, *frames, cache=tmp_path_factory.mktemp("walks"))


@pytest.fixture(scope="module")
def sparcode(walks):
    """The script, with small settings for the log in both its forms."""
    spec = importlib.util.spec_from_file_location("recfast_sparcode_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)

    def task(name, split, ordered):
        before = {"valid": "train", "test": "valid"}[split]
        users, truth = held_out(getattr(walks, split), walks.seen(before))
        history = walks.history("train"), walks.history(before)
        return module.Task(name, walks.schema, *history, walks.seen(before), users, truth, ordered, walks)

    # dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        module.ROWS = 16
        module.QUERY_CODES = ((2, 4), (4, 64))
        module.PQ_BOOKS, module.PQ_CODES, module.TIMED = 4, 8, 5
        module.TUNED = ("ml-100k", "gowalla")
        small = {"tokens": 2, "token_dim": 4, "codes": 4, "shared_codebooks": False}
        for name, ordered in (("ml-100k", True), ("gowalla", False)):
            module.TOPS[name] = (5, 200)
            module.TASKS[name] = lambda path, split, cache, name=name, ordered=ordered: task(name, split, ordered)
            module.COMMON[name] = {"dim": 8, "hidden": [8]}
            module.SETTINGS[name] = [
                module.Setting("two towers", {}, 2),
                module.Setting("two towers", {"dropout": 0.5}, 2),
                module.Setting("SparCode", small, 4, free=2),
                module.Setting("two towers", {}, 2, group="GRU"),
                module.Setting("SparCode", small, 2, group="GRU"),
            ]
        yield module


@pytest.fixture(scope="module")
def finished(sparcode, tmp_path_factory):
    study = sparcode.Study(tmp_path_factory.mktemp("study"), models=tmp_path_factory.mktemp("models"))
    for name in sparcode.SETTINGS:
        for group in sparcode.groups_of(name):
            study.tune(name, Path("nowhere"), group)
            for side in ("two towers", "SparCode"):
                study.test(name, Path("nowhere"), side, 0, group)
    study.coded_queries("ml-100k", Path("nowhere"))
    return study


@pytest.mark.parametrize("name", ["ml-100k", "gowalla"])
def test_a_history_never_holds_what_it_is_to_predict(sparcode, walks, name):
    task = sparcode.TASKS[name](None, "valid", None)
    train = walks.history("train")
    batches = sparcode.SharedPositives(task, 16, 0, window=5, share=0.5)
    positives = 0
    for _ in range(3):
        steps = 0
        for batch in batches:
            steps += 1
            history, offsets = batch.sequences["history"], batch.candidate_offsets
            assert len(history.offsets) == len(offsets)
            for row in range(len(offsets) - 1):
                targets = batch.column("item")[offsets[row] : offsets[row + 1]].tolist()
                (user,) = set(batch.column("user")[offsets[row] : offsets[row + 1]].tolist())
                seen, all_of = history.row(row).tolist(), train.row(user).tolist()
                assert len(targets) >= 1
                assert not set(targets) & set(seen)
                if task.ordered:
                    # The next ones, after all that came before.
                    assert all_of[: len(seen) + len(targets)] == seen + targets
                else:
                    assert sorted(seen + targets) == sorted(all_of)
                positives += len(targets)
        assert abs(steps - len(batches)) <= 1
    share = positives / 3 / len(train.values)
    assert 0.6 < share < 0.95 if task.ordered else 0.4 < share < 0.6


def test_both_sides_are_measured(sparcode, finished):
    for name in sparcode.SETTINGS:
        towers, coded = (finished.find(kind="test", data=name, side=side)[0] for side in ("two towers", "SparCode"))
        assert set(towers["indexes"]) == {"DenseIndex flat", "CodeIndex"}
        rows, whole = "CodeRows, 5 best of a row", "CodeRows, 200 best of a row"
        assert set(coded["indexes"]) == {rows, whole}
        assert coded["indexes"][rows]["bytes"] < coded["indexes"][whole]["bytes"]
        flat = towers["indexes"]["DenseIndex flat"]
        for metric in ("recall@20", "ndcg@50"):
            assert 0 <= coded["indexes"][rows][metric] <= 1
            # The flat index is exact, so it finds what scoring all items finds.
            if name == "ml-100k":
                assert flat[metric] == pytest.approx(towers["exact"][metric], abs=1e-6)
                # Rows that hold all items are exact too.
                assert coded["indexes"][whole][metric] == pytest.approx(coded["exact"][metric], abs=1e-6)
        for run in (towers, coded):
            for index in run["indexes"].values():
                assert 0 < index["query_us"] <= index["query_us_median"]
                assert index["bytes"] > 0


def test_no_epoch_before_the_codes_is_chosen(sparcode, finished):
    for run in finished.find(kind="tuning", side="SparCode"):
        assert run["best"]["epoch"] > run["free"]


def test_the_choice_looks_at_validation_alone(sparcode, finished, tmp_path):
    study = sparcode.Study(tmp_path)
    assert study.best("ml-100k", "two towers") is None
    study.runs = [dict(run) for run in finished.runs]
    tuning = study.find(kind="tuning", data="ml-100k", side="two towers", group="mean")
    for run, value in zip(tuning, (0.2, 0.3), strict=True):
        run["best"] = {**run["best"], "ndcg@50": value, "epoch": 1}
    setting, epoch = study.best("ml-100k", "two towers")
    assert (setting.options, epoch) == ({"dropout": 0.5}, 1)


def test_nothing_is_trained_twice(sparcode, finished, monkeypatch, tmp_path):
    before = finished.path.read_text()
    again = sparcode.Study(finished.out)
    monkeypatch.setattr(sparcode, "train", lambda *_: pytest.fail("trained again"))
    for name in sparcode.SETTINGS:
        again.tune(name, Path("nowhere"))
        again.test(name, Path("nowhere"), "SparCode", 0)
    again.coded_queries("ml-100k", Path("nowhere"))
    assert finished.path.read_text() == before
    # A line that was cut off is a run that was not done.
    (tmp_path / sparcode.RUNS).write_text(before[:-30])
    assert sparcode.Study(tmp_path).runs == finished.runs[:-1]
    assert (tmp_path / sparcode.RUNS).read_text().splitlines() == before.splitlines()[:-1]


def test_encoders_are_compared_with_themselves(sparcode, finished, monkeypatch):
    """Each group has its encoder on both sides, is tuned by itself, and tells of nobody else's runs."""
    for side in ("two towers", "SparCode"):
        (run,) = finished.find(kind="test", data="ml-100k", side=side, group="GRU")
        assert run["epochs"] <= 2
        setting, _ = finished.best("ml-100k", side, "GRU")
        task = sparcode.TASKS["ml-100k"](None, "test", None)
        model = sparcode.built(setting, task, 0, sparcode.SharedPositives(task, 16, 0))
        assert model.config()["encoder"] == "gru"
    # Runs of before there were groups are of the mean.
    old = [{key: value for key, value in run.items() if key != "group"} for run in finished.find(group="mean")]
    study = sparcode.Study(finished.out / "old")
    study.runs = old
    assert study.find(group="mean") == old
    assert study.best("ml-100k", "SparCode") == finished.best("ml-100k", "SparCode")


def test_what_seed_0_learnt_in_tuning_is_what_it_would_learn_again(sparcode, finished, monkeypatch):
    monkeypatch.setattr(finished, "models", None)
    setting, epochs = finished.best("ml-100k", "SparCode")
    task = sparcode.TASKS["ml-100k"](None, "test", None)
    kept, _ = finished.trained(setting, task, 0, epochs)
    again, _ = sparcode.train(setting, task, 0, epochs, None)
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), again.state_dict().values(), strict=True))
    assert any(kept is model for model, _ in finished.kept.values())


def test_kept_models_are_measured_again_without_training(sparcode, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(sparcode, "train", lambda *_: pytest.fail("trained again"))
    study = sparcode.Study(tmp_path, models=finished.models)
    study.runs = finished.find(kind="tuning")
    study.test("ml-100k", Path("nowhere"), "SparCode", 0)
    again, before = (s.find(kind="test", data="ml-100k", side="SparCode")[0] for s in (study, finished))
    assert again["seconds"] == before["seconds"]
    assert again["exact"] == before["exact"]


def test_tables(sparcode, finished):
    sparcode.report(finished)
    text = (finished.out / sparcode.TABLE).read_text()
    assert json.loads((finished.out / sparcode.RESULTS).read_text()) == finished.runs
    for name in sparcode.SETTINGS:
        for group in ("mean", "GRU"):
            assert text.count(f"| {name} | {group} | two towers | DenseIndex flat | 1 |") == 1
            assert text.count(f"| {name} | {group} | SparCode | CodeRows, 5 best of a row | 1 |") == 1
            assert text.count(f"| {name} | {group} | SparCode, test | as they are |") == 1
    assert text.count(" times the query time.") == 8
    assert text.count("quantised from epoch 3") == 2
    flat, free = (
        finished.find(kind="test", data="ml-100k", side=side, group="GRU")[0] for side in ("two towers", "SparCode")
    )
    flat, free = flat["indexes"]["DenseIndex flat"]["ndcg@50"], free["unquantised"]["ndcg@50"]
    assert f"{free:.4f} against {flat:.4f} (GRU)" in " ".join(text.split())
    assert text.count("coded after training, 2 x 4 (4 bits)") == 1


def test_gains_are_relative_to_the_exact_search(sparcode, tmp_path):
    study = sparcode.Study(tmp_path)
    metric = {"recall@20": 0.1, "recall@50": 0.2, "ndcg@20": 0.3, "ndcg@50": 0.4, "query_us": 50}
    towers = {"kind": "test", "data": "ml-100k", "side": "two towers", "indexes": {"DenseIndex flat": metric}}
    better = {**metric, "recall@20": 0.11, "ndcg@50": 0.3, "query_us": 25}
    ours = {"kind": "test", "data": "ml-100k", "side": "SparCode", "indexes": {"rows": better}}
    study.runs = [towers, ours]
    assert sparcode.gains(study) == (
        "- ml-100k, mean, rows: Recall@20 +10.0 %, Recall@50 +0.0 %, NDCG@20 +0.0 %, NDCG@50 -25.0 %; "
        "0.50 times the query time."
    )
    study.runs = [
        {**run, "seed": seed, "indexes": {name: {**cell, "ndcg@50": cell["ndcg@50"] + move}}}
        for run in (towers, ours)
        for seed, move in ((0, -0.02), (1, 0.02))
        for name, cell in run["indexes"].items()
    ]
    # Each mean has a variance of .0008 / 2: an error of sqrt(.0008) of .4.
    assert "NDCG@50 -25.0 % (± 7.1); " in sparcode.gains(study)


def test_more_bits_lose_less(finished):
    codes = finished.find(kind="coded queries", data="ml-100k")[0]["codes"]
    assert [entry["bits"] for entry in codes.values()] == [256, 4, 24]
    assert codes["2 x 4"]["ndcg@50"] <= codes["4 x 64"]["ndcg@50"] + 0.05


def test_unquantised_scores_are_those_of_many_codes(sparcode, walks):
    """With as many codes as tokens the two agree; the comparison of the two is of nothing but the codes."""
    task = sparcode.TASKS["ml-100k"](None, "valid", None)
    setting = dataclasses.replace(sparcode.SETTINGS["ml-100k"][2], options={"tokens": 2, "token_dim": 4, "codes": 64})
    model, _ = sparcode.train(setting, task, 0, 3, None)
    histories, users = task.known.take(task.users[:8]), torch.from_numpy(task.users[:8])
    with torch.no_grad():
        tokens = model.tokens.unquantized(model.encoder(histories, users))
        free = sparcode.Unquantised(model).scores(histories, users)[:, 1:]
        model.tokens.quantizer.codebooks[:, :16] = tokens.flatten(0, 1).unflatten(1, (2, 2)).transpose(0, 1)
        coded = model.scores(histories, users)[:, 1:]
    torch.testing.assert_close(coded, free, rtol=1e-4, atol=1e-4)
