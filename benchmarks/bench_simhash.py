"""simhash against torch's product, comparison and packing, faiss's LSH encoder, and an sgemm of as many operations.

A unit of work is one row.
"""

import pytest
import torch

from recfast import ops

# Rows, width, hashes, bits: SDIM's keys, ETA's, and a wide hash.
SHAPES = [(64_000, 64, 16, 3), (64_000, 64, 1, 64), (64_000, 32, 16, 3), (16_000, 128, 4, 64)]


def in_torch(x, projections):
    dim, tables, bits = projections.shape
    positive = (x @ projections.view(dim, -1)) > 0
    weight = 1 << torch.arange(bits)  # 1 << 63 is the sign
    return (positive.view(-1, tables, bits) * weight).sum(-1).to(torch.uint8 if bits <= 8 else torch.int64)


def faiss_encoder(dim, threads):
    """An encoder to 64 bits, and its rotation as projections."""
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexLSH(dim, 64, True, False)
    rotation = torch.from_numpy(faiss.vector_to_array(index.rrot.A).reshape(64, dim))
    return index, rotation.T.reshape(dim, 1, 64).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "dim", "tables", "bits"), SHAPES)
def test_simhash(race, threads, rows, dim, tables, bits, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, dim).to(dtype)
    projections = torch.randn(dim, tables, bits)
    ways = {"ours": lambda: ops.simhash(x, projections)}
    if dim == tables * bits == 64 and dtype == torch.float32:
        encoder, projections = faiss_encoder(dim, threads)
        wide = x.numpy()
        ways["rival: faiss"] = lambda: torch.from_numpy(encoder.sa_encode(wide)).view(torch.int64)
    ways["torch"] = lambda: in_torch(x.float(), projections)
    flat, a, c = projections.view(dim, -1), x.float(), torch.empty(rows, tables * bits)
    ways["limit"] = lambda: torch.mm(a, flat, out=c)
    wanted = ops.simhash.reference(x, projections)

    def check(answer, column):
        # A sign within rounding of 0 may fall either way where sums run in another order.
        assert (answer != wanted).float().mean() < 1e-4, column

    name = "fp32" if dtype == torch.float32 else "bf16"
    race("simhash", f"{name} D={dim} M={tables} bits={bits}", rows, ways, check=check)
