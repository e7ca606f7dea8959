"""Settings: typed, read from TOML, overridden by dotted keys, and strict."""

from __future__ import annotations

import pytest

from recfast.errors import InputError
from recfast.train.config import RunConfig, TrainConfig, override

FULL = """
seed = 3
out = "runs/x"

[data]
name = "ml-100k"
path = "somewhere"
options = { min_rating = 4 }

[retriever]
model = "TwoTower"
options = { dim = 32, towers = [64, 32] }
codes = { codebooks = 4, n_codes = 128 }
[retriever.train]
epochs = 7
monitor = "recall@20"

[ranker]
options = { bits = 8 }
train = { lr = 5e-4, seed = 11 }

[second_ranker]
model = "DeepFM"

[reranker]
kind = "MMR"
options = { window = 5 }
diversity = 0.5
personal = 0.0

[pipeline]
candidates = 50
k = 5
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(FULL)
    return file


def test_a_full_file_is_read_and_comes_back_the_same(path, tmp_path):
    config = RunConfig.load(path)
    assert config.data.options == {"min_rating": 4}
    assert config.retriever.options == {"dim": 32, "towers": [64, 32]}
    assert (config.retriever.codes.codebooks, config.retriever.train.epochs) == (4, 7)
    assert (config.ranker.model, config.ranker.train.lr, config.ranker.train.epochs) == ("DIN", 5e-4, 10)
    assert config.second_ranker.model == "DeepFM"
    assert (config.reranker.diversity, config.reranker.personal) == (0.5, 0.0)
    assert (config.reranker.kind, config.reranker.options) == ("MMR", {"window": 5})
    config.save(tmp_path / "again.toml")
    assert RunConfig.load(tmp_path / "again.toml") == config


def test_defaults_come_back_the_same_too(tmp_path):
    RunConfig().save(tmp_path / "x.toml")
    assert RunConfig.load(tmp_path / "x.toml") == RunConfig()
    assert RunConfig().second_ranker is None


def test_a_stage_without_a_seed_takes_the_runs(path):
    config = RunConfig.load(path)
    assert [config.training(s).seed for s in ("retriever", "ranker", "second_ranker")] == [3, 11, 3]
    assert config.retriever.train.seed is None


def test_overrides(path):
    config = RunConfig.load(
        path,
        [
            "ranker.train.lr=1e-2",
            "ranker.options.hidden = [80, 40]",
            "data.name=frappe",
            'data.path="a b"',
            "reranker.personal=1",
            "second_ranker.train.epochs=1",
            "retriever.train.monitor=recall@10",
        ],
    )
    assert config.ranker.train.lr == 1e-2
    assert config.ranker.options == {"bits": 8, "hidden": [80, 40]}
    assert (config.data.name, config.data.path) == ("frappe", "a b")
    assert config.reranker.personal == 1.0
    assert config.second_ranker.train.epochs == 1
    assert config.retriever.train.monitor == "recall@10"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1", 1),
        ("true", True),
        ("True", "True"),
        ("", ""),
        ("'x'", "x"),
        ("[1, [2]]", [1, [2]]),
        ("{a = 1}", {"a": 1}),
        ("1\nb = 2", "1\nb = 2"),
        ("a=b", "a=b"),
        ("2020-13-01", "2020-13-01"),
    ],
)
def test_a_value_is_a_literal_or_else_a_string(text, value):
    assert override({}, [f"key={text}"]) == {"key": value}


def test_override_leaves_its_argument_alone():
    values = {"a": {"b": 1}}
    assert override(values, ["a.b=2", "a.c.d=3"]) == {"a": {"b": 2, "c": {"d": 3}}}
    assert values == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ranker.train.lrr=1"], "the key ranker.train.lrr is unknown, did you mean ranker.train.lr?"),
        (
            ["second_ranker.train.epoch=1"],
            "the key second_ranker.train.epoch is unknown, did you mean second_r",
        ),
        (["rankr.model=DIN"], "the key rankr is unknown, did you mean ranker?"),
        (["pipeline.zzz=1"], "the key pipeline.zzz is unknown, expected one of blend, candidates, "),
        (["ranker.train.lr=fast"], "ranker.train.lr = 'fast': input should be a valid number"),
        (["ranker.train.lr=nan"], "ranker.train.lr = nan: input should be a finite number"),
        (["pipeline.k=0"], "pipeline.k = 0: input should be greater than or equal to 1"),
        (["pipeline.k=2.5"], "pipeline.k = 2.5"),
        (["reranker.kind=DDP"], "reranker.kind = 'DDP': input should be 'DPP', 'KDPP', 'MMR', 'MSD', 'SSD' or 'XQuAD'"),
        (["reranker.diversity=1.5"], "reranker.diversity = 1.5: input should be less than or equal to 1"),
        (["ranker=DIN"], "ranker = 'DIN'"),
        (["seed.x=1"], "-o seed.x=1: seed is a value, expected a table"),
        (["ranker.train.lr"], "-o ranker.train.lr: expected dotted.key=value"),
        (["ranker..lr=1"], "-o ranker..lr=1: expected dotted.key=value"),
        (["=1"], "-o =1: expected dotted.key=value"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(overrides, message, path):
    with pytest.raises(InputError) as caught:
        RunConfig.load(path, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stage_needs_a_model(tmp_path):
    (tmp_path / "x.toml").write_text("[second_ranker]\n")
    with pytest.raises(InputError, match=r"x\.toml: the key second_ranker\.model is missing"):
        RunConfig.load(tmp_path / "x.toml")


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml: no such file, expected settings in TOML"):
        RunConfig.load(tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match="cannot be read"):
        RunConfig.load(tmp_path)
    (tmp_path / "x.toml").write_text("seed = \n")
    with pytest.raises(InputError, match=r"x\.toml: is not TOML: .*line 1"):
        RunConfig.load(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not TOML"):
        RunConfig.load(tmp_path / "x.toml")


def test_train_config_is_checked_when_changed():
    config = TrainConfig()
    with pytest.raises(ValueError, match="greater than 0"):
        config.lr = 0
