"""The main job, end to end: what it writes, that it measures rightly, goes on, refuses, and reaches what it must."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from recfast import Pipeline, cascade, data, rerank
from recfast.errors import InputError
from recfast.models import DIN
from recfast.train import RunConfig


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def result(tiny_run):
    return json.loads((tiny_run / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture
def settings(tiny_overrides, data_cache, tmp_path):
    """Settings of the tiny run in a folder of the test's own, with changes."""

    def make(*changes):
        return cascade.settings(overrides=[*tiny_overrides, f"out='{tmp_path / 'run'}'", *changes])

    return make


def test_what_the_folder_holds(tiny_run):
    assert {p.name for p in tiny_run.iterdir()} == {
        "config.toml",
        "metrics.json",
        "report.html",
        "pipeline",
        "retriever",
        "ranker",
        "second_ranker",
    }
    assert not [p for p in tiny_run.rglob("*") if p.suffix in (".pkl", ".pt", ".pickle") or ".partial" in p.name]
    for stage in ("retriever", "ranker", "second_ranker"):
        assert {"config.toml", "schema.json", "model.safetensors", "state.json", "log.jsonl"} <= {
            p.name for p in (tiny_run / stage).iterdir()
        }
    assert RunConfig.load(tiny_run / "config.toml").data.options["rows"] == 3000


def test_figures_are_sane(result):
    table = {row["name"]: row for row in result["retriever"]["table"]}
    assert len(table) == 4
    for row in table.values():
        values = [row[f"recall@{k}"] for k in (10, 20, 50, 100)]
        assert values == sorted(values)
        assert all(0 <= value <= 1 for value in (*values, row["ndcg@10"]))
    curve = result["retriever"]["recall_curve"]
    for name in ("exact", "codes", "item_knn", "popularity"):
        assert len(curve[name]) == len(curve["k"])
        assert curve[name] == sorted(curve[name])
    assert result["retriever"]["codes"]["equal_to_brute_force"] is True
    for row in result["ranking_table"]:
        assert 0 < row["auc"] < 1
        assert 0 < row["logloss"] < 2
        assert row["precision"] == "int8"
    for name in ("retriever_order", "before", "after"):
        row = result["rerank"][name]
        assert all(0 <= row[key] <= 1 for key in ("ndcg", "recall", "ild", "coverage"))
        assert 1 <= row["genres"] <= 10 * 3
    change = result["rerank"]["change"]
    assert change["ild"] == pytest.approx(result["rerank"]["after"]["ild"] / result["rerank"]["before"]["ild"] - 1)
    grid = result["rerank"]["validation"]
    assert grid[0]["diversity"] == 0
    wanted = (1 + RunConfig().reranker.gain) * grid[0]["ild"]
    enough = [point["diversity"] for point in grid if point["ild"] >= wanted]
    assert result["rerank"]["diversity"] == (enough[0] if enough else 1.0)
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in result["time"].values())
    assert sum(result["time"].values()) <= result["seconds"]
    rows = [result["data"]["splits"][split]["rows"] for split in ("train", "valid", "test")]
    assert sum(rows) == 3000


def test_every_kind_is_measured(result):
    kinds = result["rerank"]["kinds"]
    assert set(kinds) == set(rerank.KINDS)
    for points in kinds.values():
        assert [point["diversity"] for point in points] == list(cascade.FEW_DIVERSITIES)
        first = {key: value for key, value in points[0].items() if key != "diversity"}
        assert first == result["rerank"]["before"]
        assert points[-1]["ild"] > points[0]["ild"]
    # The run's own kind is the curve that is drawn beside it.
    own = {point["diversity"]: point for point in result["rerank"]["curve"]["personal"]}
    assert kinds["DPP"] == [own[d] for d in cascade.FEW_DIVERSITIES]


def test_another_kind_of_reranker(tmp_path, settings):
    with pytest.raises(InputError, match=r"rerank: XQuAD has no option 'gamma', expected one of diversity, "):
        cascade.run(settings("reranker.kind=XQuAD", "reranker.options.gamma=0.5"))
    with pytest.raises(InputError, match=r"run: reranker.options.personal is set, expected reranker.personal"):
        cascade.run(settings("reranker.options.personal=0.5"))
    assert not (tmp_path / "run").exists()
    out = cascade.run(settings("reranker.kind=XQuAD", "reranker.options.window=8", "reranker.recent=2"))
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["rerank"]
    assert found["kind"] == "XQuAD"
    assert found["after"]["ild"] > found["before"]["ild"]
    served = Pipeline.load(out / "pipeline")
    assert type(served.reranker) is rerank.XQuAD
    assert (served.reranker.window, served.reranker.diversity, served.recent) == (8, found["diversity"], 2)
    assert "XQuAD, trade-off" in (out / "report.html").read_text(encoding="utf-8")


def test_measured_lists_are_measured_again_by_hand(tiny_run, tiny_overrides, result):
    """From the saved pipeline and the data, without the code of the cascade: NDCG and diversity of the final lists."""
    from recfast import Pipeline

    config = RunConfig.load(tiny_run / "config.toml")
    dataset = data.load("synthetic", **config.data.options)
    pipeline = Pipeline.load(tiny_run / "pipeline")
    pipeline.catalogue = pipeline.catalogue.upto(dataset, "valid")
    history, excluded = dataset.history("valid"), pipeline.excluded()
    relevant = {}
    for user, item, label in zip(
        dataset.test.column("user").tolist(),
        dataset.test.column("item").tolist(),
        dataset.test.label.tolist(),
        strict=True,
    ):
        old = [] if excluded is None else excluded.row(user).tolist()
        if label and user and item and len(history.row(user)) and item not in old:
            relevant.setdefault(user, set()).add(item)
    users = sorted(relevant)
    assert len(users) == result["retriever"]["users"]
    raw = dataset.vocabulary["user"].decode(users)
    frame = pipeline.recommend(raw, k=10)
    total, spread = 0.0, []
    genres = dataset.item_features()
    for user, name in zip(users, raw, strict=True):
        got = dataset.vocabulary["item"].encode(frame.filter(frame["user"] == name)["item"]).tolist()
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(got) if item in relevant[user])
        total += gain / sum(1 / math.log2(place + 2) for place in range(min(10, len(relevant[user]))))
        unit = genres[got] / np.linalg.norm(genres[got], axis=1, keepdims=True)
        alike = unit @ unit.T
        spread.append(1 - (alike.sum() - np.trace(alike)) / (len(got) * (len(got) - 1)))
    assert result["rerank"]["after"]["ndcg"] == pytest.approx(total / len(users), abs=1e-6)
    assert result["rerank"]["after"]["ild"] == pytest.approx(np.mean(spread), abs=1e-5)


def test_the_same_again_is_the_same(tiny_run, result, tmp_path, settings):
    """A finished run is measured again, not trained again; nothing that it found changes."""
    shutil.copytree(tiny_run, tmp_path / "run")
    before = (tmp_path / "run" / "ranker" / "log.jsonl").read_bytes()
    cascade.run(settings())
    again = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    for key in ("data", "ranking_table", "rerank", "users"):
        assert again[key] == result[key], key
    assert again["retriever"]["table"] == result["retriever"]["table"]
    assert (tmp_path / "run" / "ranker" / "log.jsonl").read_bytes() == before


def test_other_settings_are_refused_unless_overwritten(tiny_run, tmp_path, settings):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "notes.txt").write_text("mine")
    before = snapshot(run)
    with pytest.raises(InputError, match="holds a run with other settings; choose another --out, or give --overwrite"):
        cascade.run(settings("seed=1"))
    assert snapshot(run) == before
    # What is wrong with the new settings shows before the earlier run is removed.
    for wrong, sentence in [
        ("ranker.model='DINN'", "model 'DINN' is unknown"),
        ("ranker.options.dimm=3", "DIN has no option 'dimm'"),
        ("ranker={model='TwoTower'}", r"ranker.model = TwoTower is for retrieval, expected a model for ranking"),
        ("data.options.rows=3", "rows"),
        ("data.name='nothing'", "there is no data set 'nothing'"),
    ]:
        with pytest.raises(InputError, match=sentence):
            cascade.run(settings("seed=1", wrong), overwrite=True)
        assert snapshot(run) == before
    cascade.run(settings("seed=1", "second_ranker.train.epochs=0"), overwrite=True)
    assert json.loads((run / "metrics.json").read_text())["seed"] == 1
    assert (run / "notes.txt").read_text() == "mine"


def test_a_foreign_folder_is_refused(tmp_path, settings):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no run"):
            cascade.run(settings(), overwrite=overwrite)
    (run / "config.toml").write_text("[tool]\nname = 'another program'\n")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"config\.toml is not of a run of recfast"):
            cascade.run(settings(), overwrite=overwrite)
    assert {p.name for p in run.iterdir()} == {"thesis.tex", "config.toml"}
    shutil.rmtree(run)
    run.write_text("a file")
    with pytest.raises(InputError, match="is a file, expected a new or empty folder"):
        cascade.run(settings())


def test_an_interrupted_run_goes_on(tiny_run, result, tmp_path, settings, monkeypatch):
    """Stopped in the middle of the ranker's training; the retriever is not trained again, the figures are the same."""
    loss, calls = DIN.loss, []

    def stopped(self, output, batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(self, output, batch)

    changes = ("ranker.train.batch_size=256",)
    monkeypatch.setattr(DIN, "loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        cascade.run(settings(*changes))
    monkeypatch.undo()
    run = tmp_path / "run"
    assert not (run / "metrics.json").exists()
    retriever = (run / "retriever" / "log.jsonl").read_bytes()
    cascade.run(settings(*changes))
    assert (run / "retriever" / "log.jsonl").read_bytes() == retriever
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert found["retriever"]["table"] == result["retriever"]["table"]
    shutil.rmtree(run)
    cascade.run(settings(*changes))
    whole = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert found["ranking_table"] == whole["ranking_table"]
    assert found["rerank"] == whole["rerank"]


def test_a_damaged_checkpoint_stops_the_run(tiny_run, tmp_path, settings):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for stage in ("retriever", "ranker"):
        for name in ("optimizer.safetensors", "model.safetensors"):
            path = run / stage / name
            content = path.read_bytes()
            for wrong in (content[: len(content) // 2], content[:-8] + b"\0\xff" * 4):
                path.write_bytes(wrong)
                before = snapshot(run)
                with pytest.raises(InputError, match=rf"checkpoint: .*{stage}.{name} is (truncated or )?damaged"):
                    cascade.run(settings())
                assert snapshot(run) == before
            path.write_bytes(content)


def test_float_and_8_bit_tables_are_compared(tmp_path, settings):
    cascade.run(settings("compare_seeds=2", "seed=3"))
    tables = json.loads((tmp_path / "run" / "metrics.json").read_text())["tables"]
    assert tables["seeds"] == [3, 4]
    for name in ("int8", "float32"):
        assert len(tables[name]["auc"]) == 2
        assert tables[name]["mean"] == pytest.approx(np.mean(tables[name]["auc"]))
    assert tables["int8"]["table_bytes"] < 0.5 * tables["float32"]["table_bytes"]
    assert tables["difference"] == pytest.approx(tables["int8"]["mean"] - tables["float32"]["mean"])


def test_no_held_out_like_is_one_sentence(tmp_path, data_cache):
    """A test split in which nobody likes anything new cannot be measured."""
    import polars as pl

    folder = tmp_path / "log"
    folder.mkdir()
    rows = [(f"u{u}", f"i{(u * 7 + i) % 30}", int(i % 2), i) for u in range(20) for i in range(12)]
    log = pl.DataFrame(rows, schema=["user", "item", "click", "time"], orient="row")
    columns = [data.Categorical("user", role="user"), data.Categorical("item", role="item")]
    schema = data.Schema([*columns, data.Sequence("history", of="item")], label="click", time="time")
    schema.save(folder / "schema.json")
    log.filter(pl.col("time") < 8).write_csv(folder / "train.csv")
    log.filter(pl.col("time").is_between(8, 9)).write_csv(folder / "valid.csv")
    log.filter(pl.col("time") > 9).with_columns(user=pl.lit("new") + pl.col("user")).write_csv(folder / "test.csv")
    config = cascade.settings(
        data="folder",
        overrides=[
            f"data.path='{folder}'",
            f"out='{tmp_path / 'run'}'",
            "retriever.train.epochs=1",
            "ranker.train.epochs=1",
            "ranker.model='DeepFM'",
        ],
    )
    with pytest.raises(InputError, match="no known user likes a new item in the test split"):
        cascade.run(config)


# -- the targets -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def movielens(shared_data, tmp_path_factory, data_cache):
    out = tmp_path_factory.mktemp("movielens") / "run"
    config = cascade.settings(
        data="ml-100k",
        overrides=[f"data.path='{shared_data / 'ml-100k'}'", f"out='{out}'", "compare_seeds=3"],
    )
    cascade.run(config)
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_movielens_retrieval(movielens):
    exact, codes, knn, popular = (row["recall@50"] for row in movielens["retriever"]["table"])
    assert exact > knn
    assert exact > popular
    assert codes > max(knn, popular)
    assert movielens["retriever"]["codes"]["equal_to_brute_force"]


@pytest.mark.slow
def test_movielens_diversity(movielens):
    rerank = movielens["rerank"]
    assert rerank["personal"]
    assert rerank["change"]["ild"] >= 0.20
    assert rerank["change"]["ndcg"] >= -0.03


@pytest.mark.slow
def test_movielens_8_bit_tables(movielens):
    tables = movielens["tables"]
    assert len(tables["seeds"]) == 3
    print({name: tables[name]["auc"] for name in ("int8", "float32")})
    assert abs(tables["difference"]) <= 0.002
    assert tables["int8"]["mean"] > 0.7


def test_brute_force_check_can_fail(tiny_run):
    """The cascade's own comparison is no formality: it finds an index of other codes."""
    from recfast import Pipeline
    from recfast.index import CodeIndex

    pipeline = Pipeline.load(tiny_run / "pipeline")
    users = (pipeline.catalogue.history.lengths() > 0).nonzero()[:5, 0]
    assert cascade._equals_brute_force(pipeline, users, 20)
    right = pipeline.index

    class Wrong(CodeIndex):
        def search(self, table, k, mask=None):
            scores, ids = super().search(table, k, mask)
            return scores, torch.roll(ids, 1, dims=1)

    pipeline.index = Wrong(right.codes, n_codes=right.n_codes, ids=right.ids)
    assert not cascade._equals_brute_force(pipeline, users, 20)


def test_describe_names_what_matters(result):
    text = cascade.describe(result)
    for wanted in ("recall@50", "CodeIndex is equal to brute force", "AUC", "NDCG@10", "diversity"):
        assert wanted in text
    changed = {**result, "rerank": {**result["rerank"], "change": dict.fromkeys(result["rerank"]["change"])}}
    assert "–" in cascade.describe(changed)
