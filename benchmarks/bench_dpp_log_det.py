"""dpp_log_det against torch's own forms, forward alone and with the gradient.

A unit of work is one list. The limit is the float64 product F F^T of each list (and, with the gradient, one more of its
size): the algebra that no form can leave out, by the library.
"""

import pytest
import torch

from recfast import ops

GAMMA = 0.05
WIDTH = 64


def problem(lists, picks):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(lists, picks, WIDTH, generator=generator)
    return torch.nn.functional.normalize(rows, dim=-1)


def kernels(rows):
    unit = torch.eye(rows.shape[1], dtype=rows.dtype)
    return (1 - GAMMA) * (rows @ rows.mT) + GAMMA * unit


def by_slogdet(rows):
    return torch.linalg.slogdet(kernels(rows))[1]


def by_cholesky(rows):
    return 2 * torch.linalg.cholesky(kernels(rows)).diagonal(dim1=-2, dim2=-1).log().sum(-1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with gradient"])
@pytest.mark.parametrize(("lists", "picks"), [(1024, 10), (256, 50)], ids=str)
def test_dpp_log_det(race, lists, picks, backward):
    rows = problem(lists, picks).requires_grad_(backward)
    exact = rows.detach().double()

    def whole(form):
        def run():
            if not backward:
                return form(rows)
            return torch.autograd.grad(form(rows).sum(), rows)[0]

        return run

    def limit():
        product = exact @ exact.mT
        return product @ exact if backward else product

    ways = {
        "ours": whole(lambda x: ops.dpp_log_det(x, gamma=GAMMA)),
        "torch": whole(by_slogdet),
        "torch cholesky": whole(by_cholesky),
        "torch float64": whole(lambda x: by_slogdet(x.double())),
        "limit": limit,
    }
    wanted = whole(lambda x: by_slogdet(x.double()))().detach()

    def check(answer, column):
        torch.testing.assert_close(answer.detach().double(), wanted.double(), rtol=1e-3, atol=1e-3, msg=column)

    shape = f"B={lists} K={picks} D={WIDTH}{' gradient' if backward else ''}"
    race("dpp_log_det", shape, lists, ways, check=check)
