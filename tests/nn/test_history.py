"""Histories as weighted means, against a loop over them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast.nn.history import recent_events, segment_softmax, weighted_sum

lists = st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=6)


def jagged(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([0, *map(len, rows)])
    return torch.tensor([x for row in rows for x in row], dtype=torch.int64), lengths.cumsum(0)


@given(lists, st.one_of(st.none(), st.integers(1, 8)), st.booleans())
def test_pooling_matches_a_loop(rows, max_length, with_exclude):
    values, offsets = jagged(rows)
    exclude = torch.arange(len(rows)) % 4 if with_exclude else None
    events = recent_events(values, offsets, max_length, exclude=exclude)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    by_age = torch.randn(8, generator=generator, dtype=torch.float64)
    weight = segment_softmax(by_age[events.age], events.owner, len(rows))
    pooled = weighted_sum(table, events, weight)
    assert pooled.shape == (len(rows), 3)
    assert events.offsets.tolist()[-1] == len(events.ids)
    for b, row in enumerate(rows):
        counted = [
            (age, item)
            for age, item in enumerate(reversed(row))
            if item != 0 and (max_length is None or age < max_length) and (exclude is None or item != exclude[b])
        ]
        total = sum((by_age[age].exp() for age, _ in counted), torch.zeros((), dtype=torch.float64))
        wanted = torch.zeros(3, dtype=torch.float64)
        for age, item in counted:
            wanted += by_age[age].exp() / total * table[item]
        torch.testing.assert_close(pooled[b], wanted)


def test_dropout_leaves_out_about_its_share():
    values, offsets = torch.ones(20_000, dtype=torch.int64), torch.tensor([0, 20_000])
    torch.manual_seed(0)
    kept = len(recent_events(values, offsets, None, dropout=0.3).ids)
    # Four standard deviations of a binomial.
    assert abs(kept - 14_000) < 4 * (20_000 * 0.3 * 0.7) ** 0.5


def test_gradients():
    values, offsets = jagged([[1, 2, 3], [], [4, 4]])
    events = recent_events(values, offsets, None)
    table = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    by_age = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)

    def pool(table, by_age):
        return weighted_sum(table, events, segment_softmax(by_age[events.age], events.owner, 3))

    assert torch.autograd.gradcheck(pool, (table, by_age))


def test_extreme_logits_stay_finite():
    weight = segment_softmax(torch.tensor([1000.0, -1000.0, -1000.0]), torch.tensor([0, 0, 2]), 3)
    assert weight.tolist() == [1.0, 0.0, 1.0]


def test_segment_softmax_with_empty_places():
    logits, owner = torch.tensor([1.0, 2.0, 90.0, -300.0]), torch.tensor([0, 0, 1, 3])
    weight = segment_softmax(logits, owner, 4, empty=torch.tensor([3, 5, 7, 0]))
    e = torch.e
    torch.testing.assert_close(weight[:2], torch.tensor([e, e**2]) / (3 + e + e**2))
    torch.testing.assert_close(weight[2:], torch.ones(2))  # neither overflows nor vanishes
    # With the empty places written out as entries it is a softmax.
    full = segment_softmax(torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0]), torch.zeros(5, dtype=torch.int64), 1)
    torch.testing.assert_close(weight[:2], full[:2])
