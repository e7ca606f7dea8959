"""Adam over the rows of a batch against torch's two, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recfast import train

OPTIONS = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6}


class Model(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer, self.sparse = nn.Parameter(torch.randn(50, 7)), nn.Linear(7, 3), sparse

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(F.embedding(ids, self.table, sparse=self.sparse)).square().sum()


def steps(model, optimizers, batches):
    for ids in batches:
        model(ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def batches(count: int, rows: int = 50) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, rows, (9,), generator=generator) for _ in range(count)]


def close(one, two):
    # A step of a few sums and one root: some eps of the learning rate, times the number of steps.
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_is_sparse_adam_for_tables_and_adam_for_the_rest():
    ours, theirs = Model(sparse=True), Model(sparse=True)
    have = steps(ours, [train.LazyAdam(ours.parameters(), **OPTIONS)], batches(20))
    rest = [torch.optim.SparseAdam([theirs.table], **OPTIONS), torch.optim.Adam(theirs.layer.parameters(), **OPTIONS)]
    close(have, steps(theirs, rest, batches(20)))


def test_is_adam_where_gradients_are_dense():
    ours, theirs = Model(sparse=False), Model(sparse=False)
    have = steps(ours, [train.LazyAdam(ours.parameters(), weight_decay=0.1, **OPTIONS)], batches(20))
    close(have, steps(theirs, [torch.optim.Adam(theirs.parameters(), weight_decay=0.1, **OPTIONS)], batches(20)))


def test_other_tables_take_the_same_step():
    """A table that the kernel does not take (here: columns first) and one that it does; with weight decay."""
    ours, other = Model(sparse=True), Model(sparse=True)
    other.table.data = other.table.data.T.contiguous().T
    have = steps(ours, [train.LazyAdam(ours.parameters(), weight_decay=0.1, **OPTIONS)], batches(20))
    close(have, steps(other, [train.LazyAdam(other.parameters(), weight_decay=0.1, **OPTIONS)], batches(20)))


def test_rows_without_a_gradient_and_their_moments_stay():
    model = Model(sparse=True)
    optimizer = train.LazyAdam(model.parameters(), weight_decay=0.1, **OPTIONS)
    steps(model, [optimizer], batches(3))
    before, state = model.table.detach().clone(), copy.deepcopy(optimizer.state[model.table])
    ids = torch.tensor([4, 4, 9])
    steps(model, [optimizer], [ids])
    stays = torch.ones(50, dtype=torch.bool)
    stays[ids] = False
    after = optimizer.state[model.table]
    assert torch.equal(model.table[stays], before[stays])
    assert not torch.equal(model.table[~stays], before[~stays])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][stays], state[name][stays])
    assert after["step"] == state["step"] + 1


def test_state_goes_out_and_in():
    whole = Model(sparse=True)
    want = steps(whole, [train.LazyAdam(whole.parameters(), **OPTIONS)], batches(6))
    first = Model(sparse=True)
    optimizer = train.LazyAdam(first.parameters(), **OPTIONS)
    steps(first, [optimizer], batches(6)[:3])
    second = Model(sparse=True)
    second.load_state_dict(first.state_dict())
    resumed = train.LazyAdam(second.parameters(), **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    have = steps(second, [resumed], batches(6)[3:])
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_gradients_stay_and_a_closure_is_called():
    model = Model(sparse=True)
    optimizer = train.LazyAdam(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.tensor([1, 2]))
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert model.table.grad.is_sparse


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="learning rate"):
        train.LazyAdam([nn.Parameter(torch.zeros(2))], lr=-1.0)
