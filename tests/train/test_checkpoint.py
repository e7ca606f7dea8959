"""What is wrong with a checkpoint is said in one sentence, and a failed write leaves the one before."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import recfast_tiny
import torch
from safetensors.torch import save_file

from recfast import data, models, train
from recfast.errors import InputError
from recfast.models import storage
from recfast.train import checkpoint

SETTINGS = {"epochs": 2, "batch_size": 64, "lr": 1e-2, "patience": 0}


def make(opened, **options):
    torch.manual_seed(7)
    return recfast_tiny.TinyRanker(opened.schema, **options)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> Path:
    opened = data.open(tiny_folder)
    out = tmp_path_factory.mktemp("finished") / "run"
    train.fit(make(opened), opened, out=out, **SETTINGS)
    return out


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of a finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder, opened, model=None, **settings):
    return train.fit(model or make(opened), opened, out=folder, **{**SETTINGS, "epochs": 3, **settings})


def rewrite(path: Path, change) -> None:
    """Change the header of a file in place, and let its checksum stand."""
    tensors, header = storage.read_tensors(path)
    change(header)
    storage.write_tensors(path, tensors, {k: v for k, v in header.items() if k not in ("crc32",)})


def test_the_folder_is_as_documented(finished, tiny_data):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        "config.toml",
        "log.jsonl",
        "metrics.json",
        "model.safetensors",
        "optimizer.safetensors",
        "schema.json",
        "state.json",
        "vocabulary",
    }
    assert data.Schema.load(finished / "schema.json") == tiny_data.schema
    for name, vocabulary in tiny_data.vocabulary.items():
        stored = data.Vocabulary.load(finished / "vocabulary" / f"{name}.parquet", name)
        assert stored.values.to_list() == vocabulary.values.to_list()
    state = storage.read_json(finished / "state.json")
    assert (state["epoch"], state["step"], state["batch"]) == (2, 14, 0)
    assert state["model"] == {"name": "TinyRanker", "config": {"dim": 8, "dropout": 0.2}}
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert lines == state["history"]
    assert {"epoch", "step", "loss", "rows", "seconds", "rows_per_second", "valid"} <= lines[0].keys()
    assert storage.read_json(finished / "metrics.json")["best"] in lines
    settings = train.TrainConfig.parse(train.config.read_toml(finished / "config.toml")["train"])
    assert (settings.batch_size, settings.monitor) == (64, "auc")


def test_no_file_is_a_pickle_and_all_may_be_read_as_the_umask_says(finished):
    umask = os.umask(0)
    os.umask(umask)
    for path in finished.rglob("*"):
        if path.is_file():
            assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), path
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_metrics_can_be_added(folder):
    before = storage.read_json(folder / "metrics.json")
    train.add_metrics(folder, test={"auc": 0.75})
    assert storage.read_json(folder / "metrics.json") == {**before, "test": {"auc": 0.75}}


def test_a_model_is_loaded_with_its_options(folder, tiny_data, tiny_models):
    shutil.rmtree(folder / "vocabulary")
    model = models.load(folder)
    assert (type(model).__name__, model.config(), model.training) == ("TinyRanker", {"dim": 8, "dropout": 0.2}, False)
    best = storage.read_json(folder / "metrics.json")["best"]["valid"]
    assert train.evaluate(model, tiny_data.valid) == best


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 8, 100, 0.5, 0.999])
def test_truncated(name, keep, folder, tiny_data, tiny_models):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=rf"checkpoint: .*{name} is truncated or damaged, expected a whole safetens"):
        resume(folder, tiny_data)
    if name == "model.safetensors":
        with pytest.raises(InputError, match="truncated or damaged"):
            models.load(folder)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors"])
def test_one_flipped_bit_is_found(name, folder, tiny_data):
    path = folder / name
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"is damaged, expected the checksum \d+, found \d+"):
        resume(folder, tiny_data)


def test_missing(folder, tiny_data, tiny_models):
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match=r"checkpoint: .*optimizer.safetensors is missing"):
        resume(folder, tiny_data)
    (folder / "state.json").unlink()
    with pytest.raises(InputError, match=r"checkpoint: .*state.json is missing"):
        models.load(folder)
    with pytest.raises(InputError, match="is not a folder, expected a run that recfast wrote"):
        models.load(folder / "nowhere")
    with pytest.raises(InputError, match=r"optimizer.safetensors is missing"):
        train.fit(make(tiny_data), tiny_data, out=folder, resume=folder / "nowhere", **SETTINGS)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\x01", '{"format": 2}'])
def test_damaged_state_json(text, folder, tiny_models):
    (folder / "state.json").write_text(text)
    with pytest.raises(InputError, match=r"checkpoint: .*state.json is damaged, expected"):
        models.load(folder)


def test_foreign_and_other_versions(folder, tiny_data, tiny_models):
    save_file({"weight": torch.zeros(3)}, folder / "optimizer.safetensors")
    with pytest.raises(InputError, match="was not written by recfast, expected a format version, found none"):
        resume(folder, tiny_data)
    save_file({"weight": torch.zeros(3)}, folder / "optimizer.safetensors", metadata={"format": "99"})
    with pytest.raises(InputError, match="has the format version 99, expected 2"):
        resume(folder, tiny_data)
    shutil.copyfile(folder / "model.safetensors", folder / "optimizer.safetensors")
    with pytest.raises(InputError, match="holds no training state"):
        resume(folder, tiny_data)
    state = storage.read_json(folder / "state.json")
    (folder / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(InputError, match=r"state.json has the format version 99, expected 2"):
        models.load(folder)
    (folder / "state.json").write_text(json.dumps({**state, "model": {"name": "TinyRankr", "config": {}}}))
    with pytest.raises(InputError, match="model 'TinyRankr' is unknown, did you mean 'TinyRanker'"):
        models.load(folder)


def test_a_setting_younger_than_the_checkpoint_was_at_its_default(folder, tiny_data):
    rewrite(folder / "optimizer.safetensors", lambda header: header["state"]["train"].pop("shared_histories"))
    assert resume(folder, tiny_data).epochs == 3


def test_another_model_configuration_or_training(folder, tiny_data, tiny_models):
    class Other(recfast_tiny.TinyRanker):
        pass

    with pytest.raises(InputError, match="is of the model TinyRanker, expected Other"):
        resume(folder, tiny_data, Other(tiny_data.schema))
    with pytest.raises(InputError, match="is of a TinyRanker with dim = 8, expected 4"):
        resume(folder, tiny_data, make(tiny_data, dim=4))
    with pytest.raises(InputError, match="was trained with batch_size = 64, expected 32; choose another folder"):
        resume(folder, tiny_data, batch_size=32)
    with pytest.raises(InputError, match="was trained with seed = 0, expected 5"):
        resume(folder, tiny_data, seed=5)
    with pytest.raises(InputError, match="was trained with shared_histories = False, expected True"):
        resume(folder, tiny_data, shared_histories=True)
    tiny_data.train = tiny_data.train.take(range(300))
    with pytest.raises(InputError, match="was trained on 420 rows, expected 300"):
        resume(folder, tiny_data)


def test_another_vocabulary(folder, tmp_path, tiny_data, tiny_models):
    more = recfast_tiny.prepare(tmp_path / "more", users=33)
    with pytest.raises(InputError, match=r"has another vocabulary, expected 34 ids in 'user' .* found 31 ids"):
        resume(folder, more)
    others = recfast_tiny.prepare(tmp_path / "others", seed=1)
    assert others.schema.rows("user") == tiny_data.schema.rows("user")
    with pytest.raises(InputError, match="another vocabulary, expected the raw ids of 'item' in the data at hand"):
        resume(folder, others)
    more.schema.save(folder / "schema.json")
    with pytest.raises(InputError, match=r"'tables.0.weight' has the shape \[31, 8\], expected \[34, 8\]"):
        models.load(folder)


def test_weights_of_another_model(folder, tiny_data, tmp_path):
    model = make(tiny_data)
    before = [p.clone() for p in model.parameters()]
    tensors, extra = storage.split_state(model)
    path = tmp_path / "x"
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != "net.0.bias"}, "expected the tensor 'net.0.bias', found none"),
        ({**tensors, "more": torch.zeros(1)}, "found the tensor 'more', which this model does not have"),
        ({**tensors, "net.0.bias": torch.zeros(16).double()}, "is torch.float64, expected torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            storage.restore_state(model, {k: v + 1 for k, v in wrong.items()}, extra, path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_damaged_checkpoint_is_not_overwritten(folder, tiny_data):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(InputError):
        resume(folder, tiny_data)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("fail_at", ["first", "second", "json"])
def test_a_full_disk_leaves_the_previous_checkpoint(fail_at, folder, tiny_data, monkeypatch):
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    calls = []

    def full(tensors, path, metadata=None, real=storage.save_file):
        calls.append(path)
        if len(calls) == (1 if fail_at == "first" else 2):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(tensors, path, metadata=metadata)

    def full_text(self, text, encoding=None, real=Path.write_text):
        if ".log.jsonl" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, text, encoding=encoding)

    if fail_at == "json":
        monkeypatch.setattr(Path, "write_text", full_text)
    else:
        monkeypatch.setattr(storage, "save_file", full)
    # "second": the training state was written in full, and the best weights were not.
    monkeypatch.setattr(train.fit.__globals__["_Training"], "_is_best", lambda self, entry: True)
    with pytest.raises(InputError, match=r"run cannot be written, the disk is full; what was there before is untouch"):
        resume(folder, tiny_data)
    monkeypatch.undo()
    after = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    # The configuration says more epochs now; nothing else has changed, and no half file lies about.
    assert {k: v for k, v in after.items() if k.name != "config.toml"} == {
        k: v for k, v in before.items() if k.name != "config.toml"
    }
    assert resume(folder, tiny_data).epochs == 3


def test_a_real_writer_that_fails_is_a_sentence(tmp_path, tiny_data):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot be written, file exists"):
        train.fit(make(tiny_data), tiny_data, out=tmp_path / "run", **SETTINGS)


def test_tied_scalar_empty_and_odd_tensors_survive(tmp_path):
    shared = torch.arange(6.0)
    tensors = {
        "a": shared,
        "tied": shared,
        "view": shared[2:],
        "turned": torch.arange(6).view(2, 3).T,
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "bytes": torch.tensor([-128, 127], dtype=torch.int8),
        "flag": torch.tensor([True, False]),
    }
    storage.write_tensors(tmp_path / "x.safetensors", tensors, {"note": {"a": [1, None]}})
    read, header = storage.read_tensors(tmp_path / "x.safetensors")
    assert header["note"] == {"a": [1, None]}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_random_states_are_carried_over():
    import random

    import numpy as np

    def draw():
        legacy = np.random.normal(size=3)  # noqa: NPY002
        return torch.rand(3).tolist(), [random.gauss(0, 1) for _ in range(3)], legacy.tolist()

    draw()
    state = checkpoint._random_state()
    first = draw()
    assert draw() != first
    checkpoint._set_random_state(*state)
    assert draw() == first
