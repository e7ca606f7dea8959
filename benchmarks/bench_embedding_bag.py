"""embedding_bag in every format against torch's bags, FBGEMM, and gathering rows without arithmetic.

4096 bags of 20 ids. `limit` is the best of a gather probe over both prefetch hints and several distances, on rows of
as many bytes in memory of the same kind; it takes each id once, in order, and computes nothing. Every column has a
table of its own: the last cache would otherwise hold the rows that the column before has just read. All columns of a
format hold the same numbers, and every answer is checked before it is timed. FBGEMM is shown as it comes (it checks ids
in a pass of its own) and without its check; its wheel has no OpenMP, so it is serial whatever is set, as are torch's 4-
and 2-bit bags.
"""

import functools
import time

import numpy as np
import pytest
import torch

from recfast import _C, ops
from recfast.ops.formats import empty_table

BAGS, LENGTH = 4096, 20
SETS = 4  # index sets in rotation, so that one call does not find the rows of the call before in the cache
OFFSETS = torch.arange(0, BAGS * LENGTH + 1, LENGTH)
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"int8": 8, "int4": 4, "int2": 2, "float8": "fp8"}
TORCH_QUANTIZED = {
    8: ("torch 8-bit", torch.ops.quantized.embedding_bag_byte_rowwise_offsets),
    4: ("torch 4-bit (serial)", torch.ops.quantized.embedding_bag_4bit_rowwise_offsets),
    2: ("torch 2-bit (serial)", torch.ops.quantized.embedding_bag_2bit_rowwise_offsets),
}


@functools.cache
def make_ids(kind, rows, seed):
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        ids = generator.integers(0, rows, BAGS * LENGTH)
    else:
        # Zipf 1.05 over the table's rows by inversion, popular ids scattered over the table.
        weights = np.arange(1, rows + 1, dtype=np.float64) ** -1.05
        ranks = np.searchsorted(np.cumsum(weights / weights.sum()), generator.random(BAGS * LENGTH)).clip(max=rows - 1)
        ids = np.random.default_rng(0).permutation(rows)[ranks]
    return torch.from_numpy(ids.astype(np.int64))


def probe(stored, ids):
    """The best way to touch the rows, found once; gives the function to time."""
    rows, width = stored.shape[0], stored.shape[1] * stored.element_size()
    table = empty_table(rows, width)
    table.copy_(stored.view(torch.uint8))
    ways = [(ahead, near) for ahead in (8, 16, 32, 64) for near in (False, True)]

    def touch(which, ahead, near):
        return _C.gather_probe(table.data_ptr(), width, which.data_ptr(), which.numel(), ahead, near)

    def seconds(way):
        times = []
        for _ in range(2):
            for which in ids:
                start = time.perf_counter()
                touch(which, *way)
                times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    best = min(ways, key=seconds)
    return lambda which: touch(which, *best)


def fbgemm(name, table, checked):
    """FBGEMM's inference bags over the same numbers, or None without it."""
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen as Bags,
        )
    except (ImportError, OSError):
        return None
    kinds = {"float32": "FP32", "float16": "FP16", "int8": "INT8", "int4": "INT4", "int2": "INT2"}
    if name not in kinds:
        return None
    kind = getattr(SparseType, kinds[name])
    rows = table.to_fbgemm() if isinstance(table, ops.QuantizedTable) else table.view(torch.uint8)
    width = table.dim if isinstance(table, ops.QuantizedTable) else table.shape[1]
    options = {} if checked else {"bounds_check_mode": BoundsCheckMode.NONE}
    spec = ("t", len(rows), width, kind, EmbeddingLocation.HOST)
    bags = Bags([spec], device="cpu", output_dtype=SparseType.FP32, **options)
    bags.fill_random_weights()
    stored = bags.split_embedding_weights(split_scale_shifts=False)[0][0]
    stored[:, : rows.shape[1]].copy_(rows)
    narrow = OFFSETS.int()
    ids32 = {}
    return lambda which: bags(ids32.setdefault(which.data_ptr(), which.int()), narrow)


def torch_bags(name, table):
    """(column, function) of torch's own bags over the same numbers."""
    if name in FLOATS:
        other = table.clone()
        return f"torch {name}", lambda which: torch.nn.functional.embedding_bag(
            which, other, OFFSETS, mode="sum", include_last_offset=True
        )
    if table.bits == "fp8":
        return None
    column, function = TORCH_QUANTIZED[table.bits]
    packed = table.to_fbgemm(layout="fused")
    return column, lambda which: function(packed, which, OFFSETS, False, 0, False, None, None, True)


def make_table(name, rows, width):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    if name in FLOATS:
        table = empty_table(rows, width * FLOATS[name].itemsize, FLOATS[name])
        table.copy_(weight)
        return table
    highest = {8: 127, 4: 7, 2: 1, "fp8": 448}[BITS[name]]
    step = (weight.abs().amax(1) / highest).half().float()  # so that FBGEMM's float16 scale is the same number
    return ops.quantize(weight, bits=BITS[name], step=step)


def reference(table, ids):
    seen, short = torch.unique(ids, return_inverse=True)
    values = table.reference_values(seen) if isinstance(table, ops.QuantizedTable) else table[seen].float()
    return ops.embedding_bag.reference(values, short, OFFSETS)


@pytest.mark.parametrize("name", [*BITS, *FLOATS])
@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize(("rows", "width"), [(1_000_000, 64), (4_000_000, 32), (16_000, 64)])
def test_embedding_bag(race, rows, width, kind, name):
    table = make_table(name, rows, width)
    ids = [make_ids(kind, rows, seed) for seed in range(SETS)]
    wanted = reference(table, ids[0])

    def rotate(function):
        calls = iter(range(10**9))
        return lambda: function(ids[next(calls) % SETS])

    columns = {"ours": lambda which: ops.embedding_bag(table, which, OFFSETS)}
    rival = torch_bags(name, table)
    if rival is not None:
        columns[rival[0]] = rival[1]
    for column, checked in (("rival: FBGEMM (serial)", True), ("rival: FBGEMM unchecked (serial)", False)):
        bags = fbgemm(name, table, checked)
        if bags is not None:
            columns[column] = bags
    columns["limit"] = probe(table if name in FLOATS else table.rows, ids)

    def check(answer, column):
        # The same numbers, summed in other orders; torch rounds sums of 16-bit floats back to 16 bits.
        rounded = {"bfloat16": 2**-8, "float16": 2**-10}.get(name, 0) if column.startswith("torch") else 0
        torch.testing.assert_close(answer.float(), wanted, rtol=rounded, atol=2e-4 + 20 * rounded, msg=column)

    race(
        f"embedding_bag {name}",
        f"{rows}x{width} {kind}",
        BAGS * LENGTH,
        {column: rotate(function) for column, function in columns.items()},
        check=check,
        seconds=0.6,
    )
