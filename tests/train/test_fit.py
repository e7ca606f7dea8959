"""The loop: what it trains, when it stops, and that stopping changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recfast_tiny
import torch

from recfast import models, train
from recfast.errors import InputError
from recfast.models import storage

SETTINGS = {"epochs": 3, "batch_size": 32, "lr": 1e-2, "patience": 0}
STEPS_PER_EPOCH = 14


def make(data, **options):
    torch.manual_seed(7)
    return recfast_tiny.TinyRanker(data.schema, **options)


def timeless(history):
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in history]


def same_run(one: Path, two: Path) -> bool:
    """Whether two runs end in the same bits: weights, optimiser, random states, running loss."""
    for name in ("optimizer.safetensors", "model.safetensors"):
        first, second = storage.read_tensors(one / name)[0], storage.read_tensors(two / name)[0]
        if first.keys() != second.keys() or not all(torch.equal(first[k], second[k]) for k in first):
            return False
    return True


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A training that nothing stopped."""
    from recfast import data

    opened = data.open(tiny_folder)
    out = tmp_path_factory.mktemp("whole") / "run"
    return train.fit(make(opened), opened, out=out, progress=False, **SETTINGS)


def test_learns_and_leaves_the_best_weights(tiny_data, tmp_path, tiny_models):
    run = train.fit(make(tiny_data, dropout=0.0), tiny_data, out=tmp_path / "run", epochs=12, batch_size=32, lr=3e-2)
    values = [entry["valid"]["auc"] for entry in run.history]
    assert values.index(max(values)) < len(values) - 1, "the last evaluation is the best: this test would test nothing"
    assert max(values) > 0.6
    assert run.metrics["auc"] == max(values)
    assert not run.model.training
    assert train.evaluate(run.model, tiny_data.valid) == run.metrics
    assert train.evaluate(models.load(tmp_path / "run"), tiny_data.valid) == run.metrics


def test_without_a_folder_the_best_weights_are_kept_too(tiny_data):
    run = train.fit(make(tiny_data, dropout=0.0), tiny_data, epochs=12, batch_size=32, lr=3e-2)
    assert run.best["step"] < run.steps
    assert train.evaluate(run.model, tiny_data.valid) == run.metrics


def test_same_seed_same_weights_other_seed_others(whole, tiny_data, tmp_path):
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "a", **SETTINGS)
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "b", **SETTINGS, seed=1)
    assert same_run(tmp_path / "a", whole.out)
    assert not same_run(tmp_path / "b", whole.out)


@pytest.mark.parametrize("step", [1, 2, 13, 14, 15, 27, 28, 29, 41, 42])
def test_interrupted_after_any_step_and_resumed_is_bit_equal(step, whole, tiny_data, tmp_path):
    out = tmp_path / "run"
    model = make(tiny_data)
    loss = model.loss

    def interrupted(output, batch):
        if model.losses + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(output, batch)

    model.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        train.fit(model, tiny_data, out=out, **SETTINGS)
    assert storage.read_json(out / "state.json")["step"] == step
    torch.manual_seed(99)
    run = train.fit(recfast_tiny.TinyRanker(tiny_data.schema), tiny_data, out=out, **SETTINGS)
    assert same_run(out, whole.out)
    assert timeless(run.history) == timeless(whole.history)
    assert len((out / "log.jsonl").read_text().splitlines()) == len(whole.history)


@pytest.mark.parametrize("fail_at", [1, 4, 11, 16, 20, 41])
def test_crash_between_checkpoints_and_resumed_is_bit_equal(fail_at, whole, tiny_data, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train.fit(make(tiny_data, fail_at=fail_at), tiny_data, out=out, checkpoint_every_steps=5, **SETTINGS)
    train.fit(make(tiny_data), tiny_data, out=out, checkpoint_every_steps=5, **SETTINGS)
    assert same_run(out, whole.out)


def test_a_crash_between_the_two_renames_of_a_checkpoint_is_harmless(tiny_data, tmp_path):
    options = {**SETTINGS, "monitor": "loss"}
    whole = train.fit(make(tiny_data), tiny_data, out=tmp_path / "whole", **options)
    assert whole.best["epoch"] > 0
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "run", **{**options, "epochs": 1})
    shutil.copyfile(whole.out / "model.safetensors", tmp_path / "run" / "model.safetensors")
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "run", **options)
    assert same_run(tmp_path / "run", whole.out)


@pytest.mark.parametrize("optimizer", ["adamw", "adagrad", "sgd"])
def test_every_optimizer_resumes(optimizer, tiny_data, tmp_path):
    options = {**SETTINGS, "optimizer": optimizer, "weight_decay": 1e-3, "clip_norm": 0.5}
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "a", **options)
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "b", **{**options, "epochs": 1})
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "b", **options)
    assert same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("lr_patience", [0, 1])
def test_lr_falls_on_a_plateau_and_resumes(tiny_data, tmp_path, lr_patience):
    options = {**SETTINGS, "epochs": 8, "lr": 0.2, "lr_plateau": 0.5, "lr_patience": lr_patience, "patience": 0}
    run = train.fit(make(tiny_data), tiny_data, out=tmp_path / "a", **options)
    best, in_a_row, falls = -1.0, 0, 0
    for entry in run.history:
        in_a_row = in_a_row + 1 if entry["valid"]["auc"] <= best else 0
        falls += in_a_row > 0 and in_a_row % (lr_patience + 1) == 0
        best = max(best, entry["valid"]["auc"])
    assert 0 < falls < 8
    header = storage.read_tensors(tmp_path / "a" / "optimizer.safetensors")[1]
    assert header["optimizer"]["groups"][0]["lr"] == pytest.approx(0.2 * 0.5**falls)
    for epochs in (3, 6, 8):
        train.fit(make(tiny_data), tiny_data, out=tmp_path / "b", **{**options, "epochs": epochs})
    assert same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match=r"trained with lr_plateau = 0\.5"):
        train.fit(make(tiny_data), tiny_data, out=tmp_path / "b", **{**options, "lr_plateau": 0.1})


def test_a_run_may_go_on_in_another_folder(whole, tiny_data, tmp_path):
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "a", **{**SETTINGS, "epochs": 2})
    before = (tmp_path / "a" / "optimizer.safetensors").read_bytes()
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "b", resume=tmp_path / "a", **SETTINGS)
    assert same_run(tmp_path / "b", whole.out)
    assert (tmp_path / "a" / "optimizer.safetensors").read_bytes() == before


def test_resume_none_begins_anew(whole, tiny_data, tmp_path):
    train.fit(make(tiny_data), tiny_data, out=tmp_path / "a", **{**SETTINGS, "batch_size": 16})
    run = train.fit(make(tiny_data), tiny_data, out=tmp_path / "a", resume=None, **SETTINGS)
    assert len(run.history) == 3
    assert same_run(tmp_path / "a", whole.out)


def test_a_finished_run_is_returned_untouched(whole, tiny_data):
    before = {p.name: p.read_bytes() for p in whole.out.glob("*.safetensors")}
    run = train.fit(make(tiny_data), tiny_data, out=whole.out, **SETTINGS)
    assert (run.stopped, run.steps, run.history) == ("epochs", 42, whole.history)
    assert train.evaluate(run.model, tiny_data.valid) == whole.metrics
    assert {p.name: p.read_bytes() for p in whole.out.glob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("SimpleX", {"dim": 8, "num_negatives": 8}),
        ("TwoTower", {"dim": 8, "num_negatives": 8}),
        ("SimpleX", {"dim": 8, "num_negatives": 8, "optimizer": "lazy_adam"}),
        ("TwoTower", {"dim": 8, "num_negatives": 8, "negatives": "mixed", "optimizer": "lazy_adam"}),
        ("DeepFM", {"dim": 4, "hidden": [8], "dropout": 0.1}),
        ("DeepFM", {"dim": 4, "hidden": [8], "precision": "int8", "tables": {"lr": 0.1}}),
        ("DIN", {"dim": 4, "precision": "int8"}),
        ("DIN", {"dim": 4, "precision": {"item": "int4", "user": "bfloat16"}, "tables": {"passes": 2}}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("precision", value.get("optimizer", ""))),
)
def test_our_models_resume_bit_equal_and_load(name, build, tiny_data, tmp_path):
    options = {"epochs": 2, "batch_size": 32, "lr": 1e-2, "weight_decay": 1e-3}
    build = dict(build)
    if "optimizer" in build:
        options["optimizer"] = build.pop("optimizer")

    def make():
        torch.manual_seed(5)
        return models.build(name, tiny_data.schema, build)

    train.fit(make(), tiny_data, out=tmp_path / "whole", **options)
    model = make()
    loss, calls = model.loss, []

    def interrupted(output, batch):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(output, batch)

    model.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        train.fit(model, tiny_data, out=tmp_path / "run", **options)
    passes = build.get("tables", {}).get("passes", 1)
    assert storage.read_json(tmp_path / "run" / "state.json")["step"] == -(-9 // passes)
    run = train.fit(models.build(name, tiny_data.schema, build), tiny_data, out=tmp_path / "run", **options)
    assert same_run(tmp_path / "run", tmp_path / "whole")
    loaded = models.load(tmp_path / "run")
    assert loaded.config() == run.model.config()
    assert train.evaluate(loaded, tiny_data.valid, dataset=tiny_data) == run.metrics


def test_tables_that_refuse_a_gradient_name_the_step(tiny_data):
    model = models.build("DeepFM", tiny_data.schema, {"dim": 4, "hidden": [8], "precision": "int8"})
    loss, calls = model.loss, []

    def damaged(output, batch):
        calls.append(1)
        return loss(output, batch) * (float("nan") if len(calls) == 6 else 1.0)

    model.loss = damaged
    with pytest.raises(InputError, match=r"fit: the loss is not finite at step 6 \(epoch 1\)"):
        train.fit(model, tiny_data, **SETTINGS)


def test_deepfm_learns_ml_100k(shared_data, tmp_path):
    from recfast import data

    opened = data.load("ml-100k", shared_data / "ml-100k", cache=tmp_path / "cache")
    opened.train = opened.train.take(range(0, len(opened.train), 3))
    torch.manual_seed(0)
    model = models.build("DeepFM", opened.schema, {"dim": 8, "hidden": [32], "precision": "int8"})
    run = train.fit(model, opened, epochs=2, batch_size=512, lr=2e-3, out=tmp_path / "run")
    assert run.metrics["auc"] > 0.80
    test = train.evaluate(models.load(tmp_path / "run"), opened.test)
    assert test["auc"] > 0.78
    assert test["logloss"] < 0.38


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["Popularity", "ItemKNN"])
def test_our_baselines_are_fitted_and_loaded(name, tiny_data, tmp_path):
    run = train.fit(models.build(name, tiny_data.schema), tiny_data, out=tmp_path / "run")
    assert (run.steps, len(run.history)) == (0, 1)
    assert 0 < run.metrics["recall@10"] <= 1
    loaded = models.load(tmp_path / "run")
    assert train.evaluate(loaded, tiny_data.valid, dataset=tiny_data) == run.metrics


_CHILD = """
import sys, time
import torch, recfast_tiny
from recfast import data, train
opened = data.open(sys.argv[1])
torch.manual_seed(7)
model = recfast_tiny.TinyRanker(opened.schema)
loss = model.loss
model.loss = lambda output, batch: (time.sleep(0.02), loss(output, batch))[1]
train.fit(model, opened, out=sys.argv[2], epochs=3, batch_size=32, lr=1e-2, patience=0, checkpoint_every_steps=4)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_killed_process_resumes_bit_equal(number, whole, tiny_folder, tiny_data, tmp_path):
    root = Path(train.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
    out = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(tiny_folder), str(out)], env=environment)
    deadline = time.monotonic() + 60
    # Past the second checkpoint, so that a state has been replaced too.
    while child.poll() is None and time.monotonic() < deadline:
        if (out / "state.json").exists() and storage.read_json(out / "state.json")["step"] >= 8:
            break
        time.sleep(0.01)
    child.send_signal(number)
    assert child.wait(30) == -number
    step = storage.read_json(out / "state.json")["step"]
    assert 8 <= step < 42
    train.fit(make(tiny_data), tiny_data, out=out, checkpoint_every_steps=4, **SETTINGS)
    assert same_run(out, whole.out)


def test_retrieval_is_prepared_trained_on_positives_and_stops_early(tiny_data, tmp_path):
    torch.manual_seed(0)
    model = recfast_tiny.TinyRetriever(tiny_data.schema)
    run = train.fit(model, tiny_data, epochs=30, batch_size=32, lr=3e-2, patience=3, monitor="recall@5")
    assert model.prepared == 420
    assert run.history[0]["rows"] == len(tiny_data.train.positives()) < 420
    assert run.stopped == "patience"
    values = [entry["valid"]["recall@5"] for entry in run.history]
    assert len(values) == values.index(max(values)) + 4
    assert run.best is run.history[values.index(max(values))]


def test_an_early_stop_is_remembered(tiny_data, tmp_path):
    options = {"epochs": 30, "batch_size": 32, "lr": 1e-30, "patience": 2, "out": tmp_path / "run"}
    first = train.fit(recfast_tiny.TinyRetriever(tiny_data.schema), tiny_data, **options)
    assert (first.stopped, first.epochs, first.best["epoch"]) == ("patience", 3, 0)
    again = train.fit(recfast_tiny.TinyRetriever(tiny_data.schema), tiny_data, **options)
    assert (again.stopped, again.epochs, again.steps) == ("patience", 3, first.steps)


def test_lower_is_better_for_a_loss(tiny_data):
    run = train.fit(make(tiny_data), tiny_data, **{**SETTINGS, "epochs": 6}, monitor="logloss")
    assert run.best["valid"]["logloss"] == min(entry["valid"]["logloss"] for entry in run.history)
    run = train.fit(make(tiny_data), tiny_data, **SETTINGS, monitor="loss")
    assert run.best["loss"] == min(entry["loss"] for entry in run.history)


def test_steps_and_callbacks_end_training(tiny_data, whole, tmp_path):
    run = train.fit(make(tiny_data), tiny_data, **SETTINGS, steps=20, out=tmp_path / "run")
    assert (run.stopped, run.steps, run.epochs) == ("steps", 20, 1)
    assert [entry["rows"] for entry in run.history] == [420, 192]
    entries = []
    run = train.fit(
        make(tiny_data), tiny_data, **SETTINGS, callbacks=[lambda e: entries.append(e) or len(entries) == 2]
    )
    assert (run.stopped, run.epochs) == ("callback", 2)
    # Going on from the twentieth step, in the middle of an epoch, ends where the whole training did.
    train.fit(make(tiny_data), tiny_data, **SETTINGS, out=tmp_path / "run")
    last = [storage.read_tensors(p / "optimizer.safetensors")[0] for p in (tmp_path / "run", whole.out)]
    assert all(torch.equal(last[0][k], last[1][k]) for k in last[1] if k.startswith(("model.", "optimizer.")))


@pytest.mark.parametrize("steps", [5, 14, 20, 28])
@pytest.mark.parametrize("monitor", ["auc", "loss"])
def test_a_stop_by_steps_changes_nothing_of_what_comes_after(tiny_data, tiny_models, tmp_path, steps, monitor):
    """At this lr most evaluations are no better: one too many would lower lr and count against the patience."""
    options = {**SETTINGS, "lr": 0.2, "lr_plateau": 0.5, "lr_patience": 0, "patience": 3, "epochs": 4}
    options["monitor"] = monitor
    whole = train.fit(make(tiny_data), tiny_data, **options, out=tmp_path / "whole")
    for stop in (1, steps, steps):
        torch.manual_seed(99)
        part = train.fit(make(tiny_data), tiny_data, **options, steps=stop, out=tmp_path / "run")
    assert (part.stopped, part.steps, part.epochs) == ("steps", steps, steps // 14)
    assert part.history[-1]["step"] == steps
    assert len(part.history) == -(-steps // 14)
    # What is in the folder is what the run says.
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == len(part.history)
    assert train.evaluate(part.model, tiny_data.valid) == part.metrics
    assert train.evaluate(models.load(tmp_path / "run"), tiny_data.valid) == part.metrics
    run = train.fit(make(tiny_data), tiny_data, **options, out=tmp_path / "run")
    assert same_run(tmp_path / "run", tmp_path / "whole")
    assert timeless(run.history) == timeless(whole.history)
    assert (run.stopped, run.metrics) == (whole.stopped, whole.metrics)


def test_a_model_with_nothing_to_train_is_prepared_and_measured(tiny_data, tmp_path):
    class Counter(recfast_tiny.TinyRetriever):
        def __init__(self, schema):
            super().__init__(schema)
            self.requires_grad_(False)

        def config(self):
            return {}

    run = train.fit(Counter(tiny_data.schema), tiny_data, epochs=5, out=tmp_path / "run")
    assert (len(run.history), run.steps, run.model.prepared) == (1, 0, 420)
    assert {"recall@50", "ndcg@10"} <= run.metrics.keys()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_without_a_validation_split_the_last_weights_stay(tiny_data):
    tiny_data.valid = None
    run = train.fit(make(tiny_data), tiny_data, **SETTINGS)
    assert (run.metrics, run.best["step"]) == ({}, 42)
    with pytest.raises(InputError, match="'auc' needs a validation split"):
        train.fit(make(tiny_data), tiny_data, **SETTINGS, monitor="auc")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_with_its_step(value, tiny_data, tmp_path):
    model = make(tiny_data)
    loss = model.loss
    model.loss = lambda output, batch: loss(output, batch) * (value if model.losses == 17 else 1.0)
    with pytest.raises(InputError, match=r"fit: the loss is not finite at step 17 \(epoch 2\)"):
        train.fit(model, tiny_data, out=tmp_path / "run", checkpoint_every_steps=5, **SETTINGS)
    # The damage is not saved: the checkpoint is from before.
    tensors = storage.read_tensors(tmp_path / "run" / "optimizer.safetensors")[0]
    assert storage.read_json(tmp_path / "run" / "state.json")["step"] == 15
    assert all(torch.isfinite(t.double()).all() for t in tensors.values())


def test_bf16_trains(tiny_data):
    run = train.fit(make(tiny_data), tiny_data, precision="bf16-mixed", **SETTINGS)
    assert next(run.model.parameters()).dtype == torch.float32
    full = train.fit(make(tiny_data), tiny_data, **SETTINGS)
    assert run.history[0]["loss"] != full.history[0]["loss"]
    assert run.history[0]["loss"] == pytest.approx(full.history[0]["loss"], abs=0.02)


def test_progress_goes_to_standard_error_and_only_when_asked(tiny_data, capfd):
    train.fit(make(tiny_data), tiny_data, **SETTINGS)
    assert capfd.readouterr() == ("", "")
    train.fit(make(tiny_data), tiny_data, **SETTINGS, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    # No terminal: a line for each evaluation, and no bar.
    lines = err.splitlines()
    assert [line[:16] for line in lines] == ["epoch 1/3  loss ", "epoch 2/3  loss ", "epoch 3/3  loss "]
    assert all("auc 0." in line and line.endswith("rows/s") for line in lines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "fit: the key epoch is unknown, did you mean epochs?"),
        ({"lr": -1.0}, r"fit: lr = -1.0: input should be greater than 0"),
        ({"monitor": "aux"}, "fit: monitor = 'aux', expected loss, auc, gauc, logloss"),
        ({"monitor": "recall@50"}, "expected loss, auc, gauc, logloss"),
        ({"resume": "nowhere"}, "resume = 'nowhere' needs out="),
        ({"optimizer": "lazy_adam", "clip_norm": 1.0}, "fit: clip_norm is not for optimizer = 'lazy_adam'"),
    ],
)
def test_rejects_bad_settings(settings, message, tiny_data):
    with pytest.raises(InputError) as caught:
        train.fit(make(tiny_data), tiny_data, **settings)
    assert message in str(caught.value)


def test_rejects_an_empty_split(tiny_data):
    tiny_data.train = tiny_data.train.take([])
    with pytest.raises(InputError, match="fit: the train split has no rows"):
        train.fit(make(tiny_data), tiny_data)
    with pytest.raises(InputError, match="the train split has no rows with label 1"):
        train.fit(recfast_tiny.TinyRetriever(tiny_data.schema), tiny_data)
