"""negatives_loss against torch with all scores (and private lists' rows) side by side, eager and compiled.

A unit of work is one pair of a row and a negative. `torch` is what one writes without this op: the rows of the lists
looked up once, scores by a matrix product, the loss over them. `compiled` is the same through `torch.compile`, on one
thread, as long as compiling has taken less than a minute in all. `limit` is, where columns are shared, as many
multiplications as the products take (one forward; two of the scores, one for each gradient in both) through oneDNN's
1x1 convolution, which is faster than torch's own matrix product on some processors; for private lists a gather of the
rows that adds them up, `F.embedding_bag`, once forward and, in both, once more for writing their gradients. Tables get
sparse gradients from lists, dense ones from the whole catalogue; what is shared with torch, the dense gradient of its
index, is part of its time.
"""

import functools
import time

import pytest
import torch
from torch.nn import functional as F

from recfast import ops
from recfast.nn.losses import collisions, cosine_contrastive, sampled_softmax

# Name: rows, negatives, table rows, width, form, options.
CASES = {
    "SimpleX Gowalla, shared": (256, 2000, 40_982, 64, "shared", "contrastive"),
    "SimpleX Gowalla, private": (256, 2000, 40_982, 64, "private", "contrastive"),
    "YoutubeDNN Gowalla, private": (512, 801, 40_982, 64, "private", "softmax"),
    "sampled softmax, shared": (512, 2048, 40_982, 64, "shared", "softmax"),
    "SASRec-CE Beauty, all": (730, 12_101, 12_101, 64, "all", "softmax"),
    "100 k items, all": (4096, 100_000, 100_000, 64, "all", "softmax"),
}
OPTIONS = {
    "contrastive": {"loss": "contrastive", "normalize": "table", "margin": 0.9, "weight": 250.0},
    "softmax": {"loss": "softmax", "scale": 0.2},
}
_compiling = [60.0]  # seconds left


def plain(queries, table, positives, negatives, kind):
    """The same in torch, one look-up for each list."""
    if negatives is None:
        return F.cross_entropy(queries @ table.T * 0.2, positives)
    own, others = table[positives], table[negatives]
    if kind == "contrastive":
        own, others = F.normalize(own, dim=-1), F.normalize(others, dim=-1)
    own = (queries * own).sum(1)
    scores = queries @ others.T if negatives.dim() == 1 else (others @ queries[..., None])[..., 0]
    collision = collisions(positives, negatives)
    if kind == "contrastive":
        return cosine_contrastive(own, scores, margin=0.9, weight=250.0, collision=collision)
    return sampled_softmax(0.2 * own, 0.2 * scores, collision=collision)


@functools.cache
def compiled():
    return torch.compile(plain, dynamic=False)


def runs(way):
    """Whether `torch.compile` can do it here, in the time that is left."""
    if _compiling[0] <= 0:
        return False
    started = time.perf_counter()
    try:
        way()
    except Exception:
        return False
    finally:
        _compiling[0] -= time.perf_counter() - started
    return True


def products(flops):
    """So many multiplications and additions at the rate that the machine has for products of matrices."""
    width, pixels = 256, 1024
    times = max(round(flops / (2 * width * width * pixels)), 1)
    weight, image = torch.randn(width, width, 1, 1), torch.randn(1, width, pixels // 32, 32)
    if torch.backends.mkldnn.is_available():
        image = image.to_mkldnn()

    def run():
        for _ in range(times):
            torch.conv2d(image, weight)

    return torch.no_grad()(run)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", CASES)
def test_negatives_loss(race, threads, name, backward):
    rows, count, items, dim, form, kind = CASES[name]
    large = rows * count > 10**8
    if large and (threads > 1 or not backward):
        pytest.skip("measured once")
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(rows, dim, generator=generator), dim=1) * (1 if kind == "contrastive" else 8)
    queries.requires_grad_(backward)
    table = torch.randn(items, dim, generator=generator).requires_grad_(backward)
    positives = torch.randint(0, items, (rows,), generator=generator)
    shape = {"all": None, "shared": (count,), "private": (rows, count)}[form]
    negatives = None if shape is None else torch.randint(0, items, shape, generator=generator)

    def work(loss):
        answer = loss()
        return [answer, *torch.autograd.grad(answer, [queries, table])] if backward else [answer]

    def ours():
        sparse = form != "all"
        return ops.negatives_loss(queries, table, positives, negatives, sparse=sparse, **OPTIONS[kind]).mean()

    ways = {
        "ours": lambda: work(ours),
        "torch": lambda: work(lambda: plain(queries, table, positives, negatives, kind)),
    }
    if form == "private":
        values = table.detach()

        def gather():
            for _ in range(1 + backward):
                F.embedding_bag(negatives, values, mode="sum")

        ways["limit"] = gather
    else:
        ways["limit"] = products(2 * rows * count * dim * (4 if backward else 1))
    if threads == 1 and not large:
        ways["compiled"] = lambda: work(lambda: compiled()(queries, table, positives, negatives, kind))
        if not runs(ways["compiled"]):
            del ways["compiled"]
    wanted = [x.detach() for x in ways["torch"]()]

    def check(answer, _column):
        for have, want in zip(answer, wanted, strict=True):
            have = have.detach()
            have = have.to_dense() if have.is_sparse else have
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))

    title = f"{'both   ' if backward else 'forward'} {name} {rows} x {count}"
    race("negatives_loss", title, rows * count, ways, check=check, seconds=0.5)
