"""AUC against every pair, GAUC against a loop, logloss and calibration against their sums."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from recfast import InputError, metrics

# Few distinct scores, so that ties are common.
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1e-30, 7.0]), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


def pairs_auc(labels, scores):
    above = [(a > b) + 0.5 * (a == b) for a, x in zip(scores, labels, strict=True) if x
             for b, y in zip(scores, labels, strict=True) if not y]  # fmt: skip
    return sum(above) / len(above)


@given(ROWS)
def test_auc_counts_pairs(rows):
    labels, scores, _ = zip(*rows, strict=True)
    assume(0 < sum(labels) < len(labels))
    assert metrics.auc(labels, scores) == pytest.approx(pairs_auc(labels, scores), abs=1e-12)


@given(ROWS, st.sampled_from(["rows", "equal"]))
def test_gauc_is_a_mean_over_groups(rows, weight):
    labels, scores, groups = map(np.array, zip(*rows, strict=True))
    total = over = skipped = kept = 0
    for group in set(groups.tolist()):
        part = groups == group
        if 0 < labels[part].sum() < part.sum():
            w = part.sum() if weight == "rows" else 1
            total, over, kept = total + w * pairs_auc(labels[part], scores[part]), over + w, kept + 1
        else:
            skipped += 1
    assume(kept)
    answer = metrics.gauc(labels, scores, groups, weight=weight)
    assert answer.value == pytest.approx(total / over, abs=1e-12)
    assert (answer.groups, answer.skipped) == (kept, skipped)


def test_known_values():
    labels, chances = [1, 0, 1, 0], torch.tensor([0.8, 0.4, 0.5, 0.5])
    assert metrics.auc(labels, chances) == 0.875
    assert metrics.logloss([1, 0], [0.8, 0.4]) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    assert metrics.logloss([1, 0], [0.0, 1.0], clip=1e-3) == pytest.approx(-math.log(1e-3))
    assert metrics.pcoc(labels, chances) == pytest.approx(2.2 / 2)
    # Bins {0.1, 0.2} with no click and {0.6, 0.9} with one: |0.15 - 0| / 2 + |0.75 - 0.5| / 2.
    assert metrics.ece([0, 0, 1, 0], [0.1, 0.2, 0.6, 0.9], bins=2) == pytest.approx(0.2)
    assert metrics.ece([0, 1], [0.5, 0.5], bins=2) == 0.0


@given(ROWS, st.integers(1, 12), st.randoms(use_true_random=False))
def test_ece_bins_have_equal_mass_and_know_no_order(rows, bins, random):
    labels, scores, _ = zip(*rows, strict=True)
    chances = [min(max(score, 0.0), 1.0) for score in scores]
    bounds = metrics.reliability(labels, chances, bins=bins)
    assert len(bounds.rows) == min(bins, len(rows))
    assert bounds.rows.max() - bounds.rows.min() <= 1
    # Nothing is lost on the way into the bins.
    assert bounds.predicted @ bounds.rows == pytest.approx(sum(chances), abs=1e-9)
    assert bounds.observed @ bounds.rows == pytest.approx(sum(labels), abs=1e-9)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = metrics.ece([labels[i] for i in order], [chances[i] for i in order], bins=bins)
    assert metrics.ece(labels, chances, bins=bins) == pytest.approx(shuffled, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: metrics.auc([1] + [0] * 17, [0.0] * 17 + [math.nan]), r"auc: scores\[17\] is NaN"),
        (lambda: metrics.auc([1, 0], [1.0]), "auc: scores must have 2 entries like labels, got 1"),
        (lambda: metrics.auc([1, 2], [0.0, 1.0]), r"auc: labels\[1\] must be 0 or 1, got 2"),
        (lambda: metrics.auc([1, 1], [0.0, 1.0]), "auc: labels are all 1, both classes are needed"),
        (lambda: metrics.auc([], []), "auc: labels must not be empty"),
        (lambda: metrics.gauc([1, 0], [0.0, 1.0], [0, 1]), "gauc: none of the 2 groups has both classes"),
        (lambda: metrics.gauc([1, 0], [0.0, 1.0], [0]), r"gauc: groups must have shape \[2\], got \[1\]"),
        (lambda: metrics.logloss([1], [1.5]), r"logloss: probabilities\[0\] must be in \[0, 1\], got 1.5"),
        (lambda: metrics.logloss([1], [0.5], clip=0), r"logloss: clip must be in \(0, 0.5\), got 0"),
        (lambda: metrics.ece([1], [math.nan]), r"ece: probabilities\[0\] is NaN"),
        (lambda: metrics.ece([1], [0.5], bins=0), "ece: bins must be at least 1, got 0"),
        (lambda: metrics.pcoc([0], [0.5]), "pcoc: labels are all 0, a positive one is needed"),
    ],
)
def test_rejects_bad_input(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
