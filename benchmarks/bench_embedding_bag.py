"""embedding_bag on 8-bit rows against torch's float and 8-bit bags, FBGEMM, and gathering rows without arithmetic.

4096 bags of 20 ids. `limit` is the best of a gather probe over both prefetch hints and several distances, on rows of
as many bytes; it takes each id once, in order, and computes nothing. Every column has a table of its own: the last
cache would otherwise hold the rows that the column before has just read.
"""

import time

import numpy as np
import pytest
import torch

from recfast import _C, ops

BAGS, LENGTH = 4096, 20
SETS = 4  # index sets in rotation, so that one call does not find the rows of the call before in the cache


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


def probe(codes, ids):
    """The best way to touch the rows, found once; gives the function to time."""
    width = codes.shape[1] * codes.element_size()
    ways = [(ahead, near) for ahead in (8, 16, 32, 64) for near in (False, True)]

    def touch(which, ahead, near):
        return _C.gather_probe(codes.data_ptr(), width, which.data_ptr(), which.numel(), ahead, near)

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


def fbgemm(table, offsets):
    """FBGEMM's 8-bit inference bags (its wheel has no OpenMP: one thread whatever is set), or None without it."""
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen as Bags,
        )
    except (ImportError, OSError):
        return None
    rows, width = table.codes.shape
    bags = Bags(
        [("t", rows, width, SparseType.INT8, EmbeddingLocation.HOST)], device="cpu", output_dtype=SparseType.FP32
    )
    bags.fill_random_weights()
    packed = bags.split_embedding_weights()[0]
    weights, scale_shift = packed if isinstance(packed, tuple) else (packed, None)
    shift = torch.stack([table.step, -128 * table.step], 1).half()
    if scale_shift is not None:
        scale_shift.copy_(shift.view(torch.uint8).reshape(rows, 4))
    weights[:, -width:].copy_((table.codes.int() + 128).to(torch.uint8))
    narrow = offsets.int()
    return lambda which: bags(which.int(), narrow)


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize(("rows", "width"), [(1_000_000, 64), (4_000_000, 32), (16_000, 64)])
def test_embedding_bag(race, rows, width, kind):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    table = ops.quantize(weight)
    offsets = torch.arange(0, BAGS * LENGTH + 1, LENGTH)
    ids = [make_ids(kind, rows, seed) for seed in range(SETS)]
    packed = torch.ops.quantized.embedding_bag_byte_prepack(weight)
    wanted = ops.embedding_bag.reference(weight, ids[0], offsets)

    def rotate(function):
        calls = iter(range(10**9))
        return lambda: function(ids[next(calls) % SETS])

    own, other = weight.clone(), weight.clone()
    columns = {
        "ours": lambda which: ops.embedding_bag(table, which, offsets),
        "ours float32": lambda which: ops.embedding_bag(own, which, offsets),
        "torch float32": lambda which: torch.nn.functional.embedding_bag(
            which, other, offsets, mode="sum", include_last_offset=True
        ),
        "torch 8-bit": lambda which: torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            packed, which, offsets, False, 0, False, None, None, True
        ),
        "limit": probe(table.codes.clone(), ids),
    }
    rival = fbgemm(table, offsets)
    if rival is not None:
        columns["rival: FBGEMM 8-bit (serial)"] = rival

    def check(answer, column):
        # 20 rows, each off by at most half a step of max |w| / 127 (half a step of the whole range for torch).
        torch.testing.assert_close(answer.float(), wanted, rtol=0, atol=20 * 0.05, msg=column)

    race(
        "embedding_bag int8",
        f"{rows}x{width} {kind}",
        BAGS * LENGTH,
        {name: rotate(function) for name, function in columns.items()},
        check=check,
        seconds=0.7,
    )
