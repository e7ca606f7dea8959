"""The real command line: what it prints where, its exit codes, and one sentence for everything that is wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

import recfast
from recfast import Pipeline, cli, data

COLUMNS = ("user", "item", "click", "time")


@pytest.fixture(scope="session")
def some_users(tiny_run):
    catalogue = Pipeline.load(tiny_run / "pipeline").catalogue
    return catalogue.vocabulary["user"].decode((catalogue.history.lengths() > 0).nonzero()[:3, 0])


@pytest.fixture
def own_log(tmp_path):
    """A log of one's own: schema.json and three CSV files; some genres and titles."""
    folder = tmp_path / "shop"
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for user in range(40):
        for time, item in enumerate(random.permutation(60)[:25]):
            rows.append((f"u{user}", f"i{item}", int((user % 3 == item % 3) != (random.random() < 0.2)), time))
    log = pl.DataFrame(rows, schema=list(COLUMNS), orient="row")
    schema = data.Schema(
        [
            data.Categorical("user", role="user"),
            data.Categorical("item", role="item"),
            data.Sequence("history", of="item", max_length=10),
        ],
        label="click",
        time="time",
    )
    schema.save(folder / "schema.json")
    for name, (first, last) in {"train": (0, 16), "valid": (17, 20), "test": (21, 24)}.items():
        log.filter(pl.col("time").is_between(first, last)).write_csv(folder / f"{name}.csv")
    return folder


def own_run(folder, out, *more):
    small = ["retriever.train.epochs=1", "ranker.train.epochs=1"]
    return ["run", "--data", "folder", "--path", folder, "--out", out, *(x for s in small for x in ("-o", s)), *more]


# -- what it prints ----------------------------------------------------------------------------------------------


def test_version_and_help(command):
    assert command("--version") == (0, f"{recfast.__version__}\n", "")
    code, out, _ = command("--help")
    assert code == 0
    for name in ("run", "recommend", "evaluate", "doctor"):
        assert name in out


def test_recommend_prints_a_table(command, tiny_run, some_users):
    code, out, err = command("recommend", tiny_run, "--users", f"{some_users[0]}, {some_users[1]}", "--k", 5)
    assert (code, err) == (0, "")
    frame = pl.read_csv(io.StringIO(out), separator="\t", quote_char=None)
    assert frame.columns == ["user", "rank", "item", "score", "title"]
    assert frame["user"].to_list() == [some_users[0]] * 5 + [some_users[1]] * 5
    expected = Pipeline.load(tiny_run / "pipeline").recommend(some_users[:2], k=5)
    assert frame["item"].to_list() == expected["item"].to_list()
    assert np.allclose(frame["score"], expected["score"], atol=5.1e-5)


def test_recommend_prints_json(command, tiny_run, some_users):
    code, out, _ = command("recommend", tiny_run, "--users", some_users[2], "--k", 4, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() == {"user", "rank", "item", "score", "title"}


def test_recommend_leaves_out_what_is_asked(command, tiny_run, some_users):
    catalogue = Pipeline.load(tiny_run / "pipeline").catalogue
    user = int(catalogue.vocabulary["user"].encode([some_users[0]])[0])
    for exclude, lists in (("seen", catalogue.seen), ("liked", catalogue.history), ("nothing", None)):
        arguments = ("recommend", tiny_run, "--users", some_users[0], "--k", 1000, "--json", "--exclude", exclude)
        code, out, _ = command(*arguments)
        assert code == 0
        excluded = [] if lists is None else catalogue.vocabulary["item"].decode(lists.row(user))
        assert not {row["item"] for row in json.loads(out)} & set(excluded)
        assert len(json.loads(out)) == catalogue.vocabulary["item"].size - len(set(excluded) - {None})


def test_unknown_users(command, refused, tiny_run, some_users):
    sentence = refused("recommend", tiny_run, "--users", f"{some_users[0]},nobody")
    assert sentence.startswith("recfast: recommend: user 'nobody' is not in the training data, expected a user with")
    assert "--cold popular" in sentence
    code, out, _ = command("recommend", tiny_run, "--users", "nobody", "--cold", "popular", "--k", 3, "--json")
    assert code == 0
    assert [row["user"] for row in json.loads(out)] == ["nobody"] * 3


def test_an_empty_history(command, refused, own_log, tmp_path):
    """A user who was met and liked nothing."""
    with open(own_log / "train.csv", "a", encoding="utf-8") as file:
        file.write("shy,i1,0,3\nshy,i2,0,4\n")
    assert command(*own_run(own_log, tmp_path / "run"))[0] == 0
    sentence = refused("recommend", tmp_path / "run", "--users", "shy")
    assert "user 'shy' has liked nothing yet, so there is no history, expected" in sentence
    code, out, _ = command("recommend", tmp_path / "run", "--users", "shy", "--cold", "popular", "--json", "--k", 99)
    assert code == 0
    assert len(json.loads(out)) == 58
    assert not {row["item"] for row in json.loads(out)} & {"i1", "i2"}


def test_evaluate_prints_what_was_measured(command, refused, tiny_run, tmp_path):
    code, out, _ = command("evaluate", tiny_run)
    assert code == 0
    assert "recall@50" in out
    code, out, _ = command("evaluate", tiny_run, "--json")
    assert json.loads(out) == json.loads((tiny_run / "metrics.json").read_text())
    assert "metrics.json is missing" in refused("evaluate", tmp_path)
    (tmp_path / "metrics.json").write_text('{"auc": 1')
    assert "metrics.json is damaged, expected a JSON object" in refused("evaluate", tmp_path)
    assert "metrics.json is not of a finished run" in refused("evaluate", tiny_run / "ranker")


# -- run ---------------------------------------------------------------------------------------------------------


def test_run_on_a_log_of_ones_own(command, own_log, tmp_path):
    """Progress on standard error, results on standard output; --json for a program."""
    code, out, err = command(*own_run(own_log, tmp_path / "run", "--json"))
    assert code == 0, err
    assert json.loads(out) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads(out)["name"] == "shop"
    assert "training DIN" in err
    assert "wrote" in err.splitlines()[-1]
    code, out, _ = command("recommend", tmp_path / "run", "--users", "u1", "--k", 3)
    assert code == 0
    assert out.splitlines()[0] == "user\trank\titem\tscore"


def test_run_from_a_file_of_settings(command, tiny_run, tmp_path):
    config = tmp_path / "mine.toml"
    shutil.copy(tiny_run / "config.toml", config)
    code, out, err = command("run", "--config", config, "--out", tmp_path / "run", "--seed", 5, "-o", "pipeline.k=7")
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (result["seed"], result["rerank"]["k"]) == (5, 7)
    assert "NDCG@7" in out
    assert result["command"].startswith("recfast run --config")
    # The written settings are the whole truth: the same again from them alone.
    code, _, err = command("run", "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again")
    assert code == 0, err
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["rerank"] == result["rerank"]
    assert again["ranking_table"] == result["ranking_table"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-o", "ranker.train.epoch=3"], "the key ranker.train.epoch is unknown, did you mean ranker.train.epochs?"),
        (["-o", "rankr.model=DIN"], "the key rankr is unknown, did you mean ranker?"),
        (["-o", "ranker.train.lr=-1"], "ranker.train.lr = -1"),
        (["-o", "seed"], "expected dotted.key=value"),
        (["-o", "ranker.model=DIM"], "model 'DIM' is unknown"),
        (["-o", "data.options.row=5"], "row"),
        (["--data", "ml-100"], "there is no data set 'ml-100'"),
        (["--data", "ml-100k"], "ml-100k needs path=; expected a folder with u.data"),
        (["--data", "ml-100k", "--path", "nowhere"], "nowhere is not a folder"),
        (["--data", "synthetic", "--config", "x.toml"], "--data and --config were both given"),
        (["--config", "nowhere.toml"], "nowhere.toml: no such file, expected settings in TOML"),
        (["--data", "folder"], "folder needs path="),
    ],
)
def test_wrong_settings(refused, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused("run", *arguments)
    assert os.listdir(tmp_path) == []


def test_wrong_words_in_a_file_of_settings(refused, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[ranker.trian]\nlr = 1\n")
    assert "the key ranker.trian is unknown, did you mean ranker.train?" in refused("run", "--config", path)
    path.write_text("[ranker\n")
    assert "is not TOML" in refused("run", "--config", path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--users", "1", "--cold", "warm"], "--cold must be error or popular, got warm"),
        (["--users", "1", "--exclude", "some"], "--exclude must be seen, liked or nothing, got some"),
        (["--users", " , "], "names nobody, expected raw user ids"),
    ],
)
def test_wrong_options_of_recommend(refused, tiny_run, arguments, sentence):
    assert sentence in refused("recommend", tiny_run, *arguments)


def test_what_the_parser_refuses_is_wrong_input_too(command, tiny_run):
    for arguments in (["recommend"], ["recommend", tiny_run, "--users", "1", "--k", "0"], ["runn"], ["run", "--nope"]):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert err


# -- bad data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column(refused, own_log, tmp_path, column):
    for name in ("train", "test"):
        path = own_log / f"{name}.csv"
        content = path.read_bytes()
        pl.read_csv(path).drop(column).write_csv(path)
        sentence = refused(*own_run(own_log, tmp_path / "run"))
        assert str(path) in sentence
        assert repr(column) in sentence
        path.write_bytes(content)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "schema.json").unlink(), "schema.json does not exist"),
        (lambda folder: (folder / "schema.json").write_text("{"), "is not a readable JSON file"),
        (lambda folder: (folder / "train.csv").unlink(), "holds no train table, expected train.csv"),
        (lambda folder: (folder / "train.csv").write_text(""), "train.csv"),
        (lambda folder: (folder / "train.csv").write_text("user,item,click,time\n"), "no rows"),
        (lambda folder: (folder / "test.csv").unlink(), "has no test split, expected train, valid and test"),
        (lambda folder: (folder / "valid.tsv").write_text("user\n"), "holds both valid.csv and valid.tsv"),
        (lambda folder: (folder / "valid.csv").write_text("user,item,click,time\nu1,i1,2,3\n"), "label"),
    ],
    ids=["no-schema", "bad-schema", "no-train", "empty", "header-only", "no-test", "twice", "label"],
)
def test_a_bad_folder(refused, own_log, tmp_path, change, sentence):
    change(own_log)
    assert sentence in refused(*own_run(own_log, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_row_of_a_table_that_is_not_there(refused, command, own_log, tmp_path, monkeypatch):
    """Prepared data, damaged, that name a row beyond a table."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("RECFAST_CACHE", str(cache))
    assert command(*own_run(own_log, tmp_path / "first"))[0] == 0
    path = next(cache.glob("shop-*")) / "train" / "ids.npy"
    ids = np.load(path)
    for wrong in (5000, -1):
        ids[7, 1] = wrong
        np.save(path, ids)
        sentence = refused(*own_run(own_log, tmp_path / "second"))
        assert f"the train split holds the id {wrong} in 'item', which is outside [0, 61); the prepared" in sentence
    assert not list((tmp_path / "second").rglob("*.partial"))
    assert not (tmp_path / "second" / "metrics.json").exists()


# -- processes ---------------------------------------------------------------------------------------------------


def test_a_process_ends_with_two_and_one_line(tiny_run):
    done = subprocess.run(
        [sys.executable, "-m", "recfast", "recommend", str(tiny_run), "--users", "nobody"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("recfast: recommend: user 'nobody' is not in the training data")


def test_what_fails_inside_ends_with_one(command, monkeypatch, tiny_run):
    def broken(*_arguments):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Pipeline, "load", broken)
    code, out, err = command("recommend", tiny_run, "--users", "1")
    assert (code, out) == (1, "")
    assert err == "recfast: failed: RuntimeError: a mistake of ours (set RECFAST_DEBUG=1 to see where)\n"
    monkeypatch.setenv("RECFAST_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["recfast", "recommend", str(tiny_run), "--users", "1"])
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main()
