"""The study of what diversity costs, on a small generated world: its data, its curves, its comparisons, its report."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from recfast import metrics

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "frontier.py"


@pytest.fixture(scope="module")
def frontier():
    spec = importlib.util.spec_from_file_location("recfast_frontier_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        module.REPLICATES = 100
        yield module


@pytest.fixture(scope="module")
def problem(frontier):
    return frontier.generated(0, users=60)


@pytest.fixture(scope="module")
def outcome(frontier, problem):
    worlds = (problem, frontier.generated(1, users=60))
    return frontier.outcome(
        [frontier.every_method(world, seed, grid=(0.0, 0.3, 0.7)) for seed, world in enumerate(worlds)]
    )


def test_generated_candidates_are_near_duplicates(frontier, problem):
    again = frontier.generated(0, users=60)
    np.testing.assert_array_equal(problem.candidates, again.candidates)
    assert problem.candidates.shape == (60, frontier.CANDIDATES)
    assert problem.candidates.min() >= 1
    first = metrics.intra_list_diversity(problem.candidates[:, :10], problem.vectors).mean()
    any_ten = metrics.intra_list_diversity(frontier.at_random(problem, 10, 0), problem.vectors).mean()
    assert first < 0.8 * any_ten
    ordered = metrics.ndcg(problem.candidates, problem.relevant, 10).mean()
    assert ordered > 1.5 * metrics.ndcg(frontier.at_random(problem, 10, 0), problem.relevant, 10).mean()
    assert np.ptp(problem.propensity) > 0.3
    np.testing.assert_allclose(problem.preferences.sum(1), 1)


def test_every_curve_begins_with_the_rankers_order(frontier, problem, outcome):
    assert len(outcome.curves) == len(frontier.METHODS)
    assert len({(c.method.title, c.method.features) for c in outcome.curves}) == len(outcome.curves)
    plain = metrics.ndcg(problem.candidates, problem.relevant, 20)
    for c in outcome.curves:
        np.testing.assert_array_equal(c.by_user[20, "ndcg"][0, :60], plain)
        assert c.by_user[10, "ndcg"].shape == (3, 120)
        own = f"ild_{c.method.features}"
        spread = c.by_user[10, own].mean(1)
        assert spread[0] < spread[1] < spread[2]
    assert outcome.users == 120


def test_a_user_of_two_trainings_counts_once(frontier, problem):
    method = [m for m in frontier.METHODS if m.name == "MMR"][:1]
    both = [frontier.every_method(problem, seed, method, (0.0, 0.5)) for seed in range(2)]
    joined = frontier.outcome(both)
    assert joined.users == 60
    np.testing.assert_allclose(joined.curves[0].by_user[10, "recall"], both[0].curves[0].by_user[10, "recall"])


def test_at_loss_interpolates(frontier):
    ndcg = np.array([[1.0, 1.0, 0.5], [0.98, 0.9, 0.49], [0.9, 0.85, 0.48]])
    value = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    found, passed = frontier.at_loss(ndcg, value, 0.05)
    # Halfway and 3/8 of the way; the third never loses 5 %.
    np.testing.assert_allclose(found, [1 + 3 / 8, 0.5, 2.0])
    assert passed.tolist() == [True, True, False]


def test_the_bootstrap_keeps_users_together(frontier):
    weights = frontier.resampled(50, replicates=2000)
    np.testing.assert_allclose(weights.sum(0), 1)
    np.testing.assert_allclose(weights[:, 0], 1 / 50)
    values = np.random.default_rng(0).normal(size=50)
    means = values @ weights[:, 1:]
    assert means.std() == pytest.approx(values.std() / 50**0.5, rel=0.1)
    assert frontier.half_width(means) == pytest.approx(1.96 * means.std(), rel=0.1)


def test_the_best_and_its_equals(frontier):
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=0.01, size=200)

    def row(name, figure, own):
        method = frontier.Method(name, "MMR", "genres")
        replicates = figure + noise + rng.normal(scale=own, size=200)
        return frontier.Reached(method, {"s_recall": figure}, {"s_recall": replicates}, True)

    rows = [row("a", 0.5, 0.001), row("b", 0.499, 0.001), row("c", 0.49, 0.001), row("d", 0.49, 0.02)]
    # Noise that all users share is no reason to call c equal; noise of its own is.
    assert frontier.not_worse(rows, "s_recall") == {"a", "b", "d"}


def test_the_report_says_what_was_measured(frontier, outcome, tmp_path):
    frontier.report([outcome], tmp_path)
    result = json.loads((tmp_path / frontier.RESULTS).read_text(encoding="utf-8"))["data"]["generated"]
    curve = outcome.curves[0]
    about = {"method": curve.method.name, "saw": "genres", "personal": False, "diversity": 0.3, "k": 10}
    points = [dict(zip(result["columns"], point, strict=True)) for point in result["points"]]
    (point,) = [p for p in points if all(p[key] == value for key, value in about.items())]
    assert point["ndcg"] == round(float(curve.by_user[10, "ndcg"][1].mean()), 5)
    text = (tmp_path / frontier.TABLE).read_text(encoding="utf-8")
    for method in frontier.METHODS:
        assert f"| {method.name} |" in text
    assert f"{outcome.by_seed[0]['ndcg']:.4f}" in text
    assert "any order of the 100" in text
    assert (tmp_path / frontier.PLOT).read_bytes().startswith(b"\x89PNG")
