"""A training step of a table (forward, backward, update) on 4096 bags of 20 ids.

Ours in 8 bits and in float32, torch's sparse gradients with Adagrad, and FBGEMM's fused float32 row-wise Adagrad where
it is installed (its wheel is serial).
"""

import numpy as np
import pytest
import torch

from recfast.nn import EmbeddingTables

BAGS, LENGTH = 4096, 20
SETS = 4


def make_ids(kind, rows, seed):
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        return torch.from_numpy(generator.integers(0, rows, BAGS * LENGTH))
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -1.05
    ranks = np.searchsorted(np.cumsum(weights / weights.sum()), generator.random(BAGS * LENGTH)).clip(max=rows - 1)
    return torch.from_numpy(np.random.default_rng(0).permutation(rows)[ranks])


def fbgemm(rows, width, offsets, grad):
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError):
        return None
    bags = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
    )
    return lambda which: bags(which, offsets).backward(grad)


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize(("rows", "width"), [(1_000_000, 64), (1_000_000, 16)])
def test_embedding_training_step(race, rows, width, kind):
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(0, BAGS * LENGTH + 1, LENGTH)
    ids = [make_ids(kind, rows, seed) for seed in range(SETS)]
    grad = torch.randn(BAGS, width, generator=generator) / BAGS
    tables = {name: EmbeddingTables([("t", rows)], width, name, lr=0.05) for name in ("int8", "float32")}
    first = {name: table.dequantize("t") for name, table in tables.items()}
    sparse = torch.nn.EmbeddingBag.from_pretrained(
        first["float32"].clone(), freeze=False, mode="sum", sparse=True, include_last_offset=True
    )
    adagrad = torch.optim.Adagrad(sparse.parameters(), lr=0.05)

    def ours(name):
        return lambda which: tables[name]({"t": (which, offsets)})["t"].backward(grad)

    def torch_form(which):
        sparse.zero_grad()
        sparse(which, offsets).backward(grad)
        adagrad.step()

    columns = {"ours": ours("int8"), "ours float32": ours("float32"), "torch sparse Adagrad": torch_form}
    rival = fbgemm(rows, width, offsets, grad)
    if rival is not None:
        columns["rival: FBGEMM float32 (serial)"] = rival

    def check(_, column):
        """The rows of the first batch moved against their gradient, by about the learning rate."""
        if not column.startswith("ours"):
            return
        name = "int8" if column == "ours" else "float32"
        moved = tables[name].dequantize("t") - first[name]
        bag_of = torch.arange(BAGS).repeat_interleave(LENGTH)
        total = torch.zeros(rows, width).index_add(0, ids[0], grad[bag_of])
        touched = ids[0].unique()
        rate = 0.05 / total[touched].square().mean(1, keepdim=True).sqrt()
        off = (moved[touched] + rate * total[touched]).abs().amax(1)
        step = float(tables["int8"].step_size("t").max()) if column == "ours" else 1e-4
        assert float(off.max()) <= 2 * step, column

    def rotate(function):
        calls = iter(range(10**9))
        return lambda: function(ids[next(calls) % SETS])

    race(
        "embedding training step",
        f"{rows}x{width} {kind}",
        BAGS * LENGTH,
        {name: rotate(function) for name, function in columns.items()},
        check=check,
        seconds=0.7,
    )
