"""A training step of a table (forward, backward, update) on 4096 bags of 20 ids, through `nn.EmbeddingTables`.

Ours in several formats; FBGEMM's fused row-wise Adagrad in float32 and float16, as it comes (it checks ids in a pass of
its own) and without its check, its wheel being serial whatever is set; torch's sparse gradients with Adagrad and
SparseAdam. `limit` gathers the rows of the lookups and then reads and writes the rows that occur with their state
(int8), doing nothing else. What an update does to the rows is checked before anything is timed.
"""

import functools
import time

import numpy as np
import pytest
import torch

from recfast import _C
from recfast.nn import EmbeddingTables
from recfast.ops.formats import row_bytes

BAGS, LENGTH = 4096, 20
SETS = 4  # index sets in rotation, so that one call does not find the rows of the call before in the cache
OFFSETS = torch.arange(0, BAGS * LENGTH + 1, LENGTH)
LR = 0.05
OURS = {
    "ours": {"precision": "int8"},
    "ours int4": {"precision": "int4"},
    "ours int2": {"precision": "int2"},
    "ours float32": {"precision": "float32"},
    "ours bfloat16": {"precision": "bfloat16"},
    "ours int8, 8-bit Adam": {"precision": "int8", "optimizer": "rowwise_adam", "moment_bits": 8},
}


@functools.cache
def make_ids(kind, rows, seed):
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        return torch.from_numpy(generator.integers(0, rows, BAGS * LENGTH))
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -1.05
    ranks = np.searchsorted(np.cumsum(weights / weights.sum()), generator.random(BAGS * LENGTH)).clip(max=rows - 1)
    return torch.from_numpy(np.random.default_rng(0).permutation(rows)[ranks])


def fbgemm(rows, width, grad, half, checked):
    """A step of FBGEMM's fused row-wise Adagrad, or None without it."""
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError):
        return None
    bags = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        weights_precision=SparseType.FP16 if half else SparseType.FP32,
        output_dtype=SparseType.FP32,
        bounds_check_mode=BoundsCheckMode.WARNING if checked else BoundsCheckMode.NONE,
    )
    return lambda which: bags(which, OFFSETS).backward(grad)


def torch_step(weight, grad, optimizer):
    sparse = torch.nn.EmbeddingBag.from_pretrained(
        weight, freeze=False, mode="sum", sparse=True, include_last_offset=True
    )
    own = optimizer(sparse.parameters(), lr=LR)

    def step(which):
        sparse.zero_grad()
        sparse(which, OFFSETS).backward(grad)
        own.step()

    return step


def limit(rows, width, ids):
    """The probes on rows and state of an int8 table, the best of several distances, found once."""
    size, state_size = row_bytes("int8", width), 8
    table, state = (torch.zeros(rows, bytes_, dtype=torch.uint8) for bytes_ in (size, state_size))
    touched = {id(which): which.unique() for which in ids}

    def touch(which, ahead):
        _C.gather_probe(table.data_ptr(), size, which.data_ptr(), which.numel(), ahead, False)
        unique = touched[id(which)]
        _C.update_probe(table.data_ptr(), size, state.data_ptr(), state_size, unique.data_ptr(), unique.numel(), ahead)

    def seconds(ahead):
        start = time.perf_counter()
        for which in ids:
            touch(which, ahead)
        return time.perf_counter() - start

    best = min((8, 16, 32, 64), key=lambda ahead: min(seconds(ahead) for _ in range(2)))
    return lambda which: touch(which, best)


def check_rows(tables, precision, before, ids, grad):
    """The rows of the first batch moved against their gradient by the learning rate, and no other row did."""
    rows, width = before.shape
    bag_of = torch.arange(BAGS).repeat_interleave(LENGTH)
    total = torch.zeros(rows, width).index_add(0, ids, grad[bag_of])
    touched = ids.unique()
    moved = tables.dequantize("t") - before
    assert int((moved != 0).any(1).sum()) <= len(touched)
    rate = LR / total[touched].square().mean(1, keepdim=True).sqrt()
    off = float((moved[touched] + rate * total[touched]).abs().mean())
    size = float((rate * total[touched]).abs().mean())
    # What the format cannot say is lost: half a step in the mean, and a step is the range over its codes.
    tolerance = {"int8": 0.05, "int4": 0.5, "int2": 2.0, "bfloat16": 0.01, "float32": 1e-4}[precision]
    assert off <= tolerance * size, (precision, off, size)


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize(("rows", "width"), [(1_000_000, 64), (4_000_000, 32)])
def test_embedding_training_step(race, rows, width, kind):
    generator = torch.Generator().manual_seed(0)
    ids = [make_ids(kind, rows, seed) for seed in range(SETS)]
    grad = torch.randn(BAGS, width, generator=generator) / BAGS
    columns = {}
    for column, options in OURS.items():
        tables = EmbeddingTables([("t", rows)], width, lr=LR, **options)
        step = lambda which, tables=tables: tables({"t": (which, OFFSETS)})["t"].backward(grad)  # noqa: E731
        if "optimizer" not in options:
            before = tables.dequantize("t")
            step(ids[0])
            check_rows(tables, options["precision"], before, ids[0], grad)
        columns[column] = step
    for half, checked in ((False, True), (False, False), (True, True)):
        rival = fbgemm(rows, width, grad, half, checked)
        if rival is not None:
            kind_of = f"float{16 if half else 32} (serial{'' if checked else ', unchecked'})"
            columns[f"rival: FBGEMM {kind_of}"] = rival
    weight = torch.randn(rows, width, generator=generator) * 0.01
    columns["torch sparse Adagrad"] = torch_step(weight, grad, torch.optim.Adagrad)
    columns["torch SparseAdam"] = torch_step(weight.clone(), grad, lambda p, lr: torch.optim.SparseAdam(list(p), lr=lr))
    columns["limit"] = limit(rows, width, ids)

    def rotate(function):
        calls = iter(range(10**9))
        return lambda: function(ids[next(calls) % SETS])

    race(
        "embedding training step",
        f"{rows}x{width} {kind}",
        BAGS * LENGTH,
        {name: rotate(function) for name, function in columns.items()},
        seconds=1.5,
        settle=True,
    )
