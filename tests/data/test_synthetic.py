"""The generated log against its own truth, with tolerances from the binomial and chi-squared laws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from recfast import data
from recfast.data import synthetic
from recfast.data.synthetic import CAUSES, Config, Generator, bayes, describe, titles
from recfast.data.synthetic import config as config_module
from recfast.errors import InputError

SOURCE = Path(__file__).resolve().parents[2] / "src"
SIGMAS = 4.5
"""Two-sided probability of a false alarm: 7 in a million for each comparison."""


@pytest.fixture(scope="module")
def default():
    generator = Generator(rows=200_000, n_users=2000, n_items=1500, scenarios=4, seed=3)
    frame = generator.frame()
    return generator, frame, generator.truth_of(frame)


@pytest.fixture(scope="module")
def poisson():
    generator = Generator(rows=60_000, policy="poisson", seed=5)
    frame = generator.frame()
    return generator, frame, generator.truth_of(frame)


def z_score(hits: np.ndarray, probability: np.ndarray) -> float:
    """Standard errors between the number of hits and its expectation."""
    variance = (probability * (1 - probability)).sum()
    return abs(hits.sum() - probability.sum()) / np.sqrt(variance)


def logloss(label: np.ndarray, probability: np.ndarray) -> np.ndarray:
    return -np.where(label > 0, np.log(probability), np.log1p(-probability))


# ---- determinism


def test_same_seed_same_bytes(tmp_path):
    for name in ("a", "b"):
        Generator(rows=3_000, seed=11).write(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["items.parquet", "part-00000.parquet", "truth.json", "users.parquet"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = Generator(rows=3_000, seed=12)
    assert other.items["title"].to_list() != Generator(rows=3_000, seed=11).items["title"].to_list()
    assert not other.frame().equals(Generator(rows=3_000, seed=11).frame())


@pytest.mark.parametrize("policy", ["list", "poisson"])
def test_part_alone_equals_part_in_sequence(tmp_path, monkeypatch, policy):
    monkeypatch.setattr(config_module, "BLOCKS_PER_PART", 2)
    options = {"rows": 65_000, "seed": 4, "policy": policy, "extra_fields": True, "scenarios": 4}
    whole = Generator(**options)
    assert whole.config.n_parts == 4
    whole.write(tmp_path / "whole")
    for index in (3, 1):
        Generator(**options).write(tmp_path / "alone", parts=range(index, index + 1))
        name = f"part-{index:05d}.parquet"
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "alone" / "truth.json").exists()
    read = pl.read_parquet(tmp_path / "whole" / "part-*.parquet")
    assert read.equals(whole.frame())


def test_does_not_depend_on_threads(tmp_path):
    script = (
        "import hashlib, sys; from recfast.data.synthetic import Generator; "
        "frame = Generator(rows=20_480, seed=2).frame(); "
        "print(hashlib.sha256(b''.join(frame[c].to_numpy().tobytes() "
        "for c in ('user', 'item', 'time', 'click', 'conversion', 'propensity'))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": str(n), "OMP_NUM_THREADS": str(n)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in (1, 2)
    }
    assert len(digests) == 1


# ---- shape


@pytest.mark.parametrize("rows", [1, 7, 1_000, 10_240, 10_241])
def test_any_number_of_rows(rows):
    generator = Generator(rows=rows, seed=1)
    frame = generator.frame()
    assert frame.height == rows
    assert frame["time"].is_sorted()
    assert frame.null_count().sum_horizontal().item() == 0
    sessions = frame.group_by("session", maintain_order=True).agg(
        pl.len(),
        pl.col("item").n_unique().alias("items"),
        pl.col("position").max(),
        pl.col("user").n_unique(),
    )
    assert (sessions["len"] == sessions["items"]).all()
    assert (sessions["len"] == sessions["position"]).all()
    assert (sessions["user"] == 1).all()
    assert (sessions["len"][:-1] == 10).all()
    assert frame["item"].is_in(generator.items["item"].implode()).all()
    assert frame["user"].is_in(generator.users["user"].implode()).all()


def test_columns_agree_with_side_tables(default):
    generator, frame, _ = default
    items = frame.select("item", "genre", "price_bucket").unique()
    assert items.height == frame["item"].n_unique()
    assert items.join(generator.items, on=["item", "genre", "price_bucket"]).height == items.height
    users = frame.select("user", "age_band", "city").unique()
    assert users.join(generator.users, on=["user", "age_band", "city"]).height == users.height
    first = frame.group_by("item").agg(pl.col("time").min()).join(generator.items, on="item")
    assert (first["time"] >= first["born"]).all()
    first = frame.group_by("user").agg(pl.col("time").min()).join(generator.users, on="user")
    assert (first["time"] >= first["arrived"]).all()
    hour = pl.from_epoch(frame["time"], time_unit="s").dt.hour()
    assert (hour == frame["hour"]).all()


def test_titles_are_readable_and_carry_the_genre():
    items = Generator(rows=1_000, n_items=4_000, seed=2).items
    words = items["title"].str.split(" ").list.len()
    assert words.min() >= 3
    assert words.max() <= 7
    assert items["title"].n_unique() == items.height
    assert set(items["genre"]) == set(titles.GENRES)
    assert (items["genres"].list.first() == items["genre"]).all()
    # Guess the genre of each second title from the words of the others: naive Bayes by counts.
    counts: dict[str, dict[str, int]] = {}
    rows = list(items.select("title", "genre").iter_rows())
    for title, genre in rows[::2]:
        for word in title.replace(",", "").split():
            counts.setdefault(word, {}).setdefault(genre, 0)
            counts[word][genre] += 1
    right = 0
    for title, genre in rows[1::2]:
        score = dict.fromkeys(titles.GENRES, 0.0)
        for word in title.replace(",", "").split():
            seen = counts.get(word, {})
            for name in titles.GENRES:
                score[name] += np.log((seen.get(name, 0) + 0.1) / (sum(seen.values()) + 1.2))
        right += max(score, key=score.get) == genre
    assert right / len(rows[1::2]) > 0.9


def test_extra_fields_change_nothing_else():
    plain, more = Generator(rows=5_000), Generator(rows=5_000, extra_fields=True)
    frame = more.frame()
    assert frame.select(plain.frame().columns).equals(plain.frame())
    assert (frame["genre_copy"] == frame["genre"]).all()
    click = frame["click"].to_numpy()
    for name in ("noise_a", "noise_b", "noise_c"):
        table = np.stack([np.bincount(frame[name].to_numpy()[click == label]) for label in (0, 1)])
        assert stats.chi2_contingency(table).pvalue > 1e-5


def test_believable_figures():
    generator = Generator()
    figures = describe(generator.frame(), n_items=generator.config.n_items)
    assert figures["rows"] == 60_000
    assert 0.05 < figures["ctr"] < 0.12
    assert 0.01 < figures["cvr"] < 0.12
    assert figures["clicks_per_user"] >= 10
    assert -1.3 < figures["zipf_clicks"] < -0.6
    assert -1.3 < figures["zipf_impressions"] < -0.6
    sessions = figures["sessions_per_user"]
    assert sessions["p99"] > 4 * sessions["mean"] > 4 * sessions["median"]


# ---- the truth


def test_click_rate_by_position_follows_examination(default):
    _, frame, truth = default
    p_relevance = truth["p_relevance"].to_numpy()
    click, position = frame["click"].to_numpy(), frame["position"].to_numpy()
    scenario = frame["scenario"].to_numpy()
    for name, eta in (("home", 0.6), ("search", 1.0), ("category", 0.6), ("push", 0.0)):
        for k in range(1, 11):
            mine = (scenario == name) & (position == k)
            assert z_score(click[mine], p_relevance[mine] * float(k) ** -eta) < SIGMAS
    # The decay is examination only: relevance itself falls far less.
    home = scenario == "home"
    top, bottom = (p_relevance[home & (position == k)].mean() for k in (1, 10))
    assert bottom / top > 2 * 10**-0.6


def test_probabilities_are_calibrated(default):
    _, frame, truth = default
    click = frame["click"].to_numpy()
    p = truth["p_click"].to_numpy()
    np.testing.assert_allclose(p, truth["p_relevance"].to_numpy() * truth["p_examine"].to_numpy(), rtol=1e-15)
    assert z_score(click, p) < SIGMAS
    for group in np.array_split(np.argsort(p, kind="stable"), 20):
        assert z_score(click[group], p[group]) < SIGMAS
    for column in ("genre", "age_band", "device", "price_bucket", "scenario", "hour"):
        for value in frame[column].unique():
            mine = (frame[column] == value).to_numpy()
            if p[mine].sum() > 30:
                assert z_score(click[mine], p[mine]) < SIGMAS, (column, value)
    for outcome, name in (
        ("relevant", "p_relevance"),
        ("examined", "p_examine"),
        ("converting", "p_conversion"),
    ):
        assert z_score(truth[outcome].to_numpy(), truth[name].to_numpy()) < SIGMAS
    assert (truth["relevant"].to_numpy() * truth["examined"].to_numpy() == click).all()
    assert (truth["converting"].to_numpy() * click == frame["conversion"].to_numpy()).all()


def test_causes_add_up(default):
    _, _, truth = default
    logit = sum(truth[name].to_numpy() for name in CAUSES)
    # Probabilities are rounded to 2^-24.
    np.testing.assert_allclose(truth["p_relevance"].to_numpy(), 1 / (1 + np.exp(-logit)), atol=2.0**-25 * 1.001)
    for name in ("taste", "quality", "price", "freshness", "season", "diversity", "context"):
        assert truth[name].std() > 0.02, name


def test_nothing_beats_the_truth(default):
    _, frame, truth = default
    click, p = frame["click"].to_numpy(), truth["p_click"].to_numpy()
    best = logloss(click, p)
    ideal = bayes(p)
    assert abs(best.mean() - ideal["logloss"]) < SIGMAS * best.std() / np.sqrt(len(p))
    order = stats.rankdata(p)
    positive = click.sum()
    auc = (order[click == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(p) - positive))
    # Hanley's bound of the standard error of an AUC.
    assert abs(auc - ideal["auc"]) < SIGMAS * np.sqrt(auc * (1 - auc) / positive)
    assert ideal["auc"] > 0.75
    odds = np.log(p / (1 - p))
    rivals = {
        "higher": odds + 0.1,
        "lower": odds - 0.1,
        "sharper": 1.1 * odds - 0.1 * odds.mean(),
        "flatter": 0.9 * odds,
        "without the diversity": odds - truth["diversity"].to_numpy() * (1 - truth["p_relevance"].to_numpy()),
        "rate": np.full_like(odds, np.log(click.mean() / (1 - click.mean()))),
    }
    for name, rival in rivals.items():
        gap = logloss(click, 1 / (1 + np.exp(-rival))) - best
        assert gap.mean() > 3 * gap.std() / np.sqrt(len(p)), name


def test_bayes_known_values():
    assert bayes(np.array([0.5, 0.5]))["logloss"] == pytest.approx(np.log(2))
    assert bayes(np.array([0.5, 0.5, 0.5]))["auc"] == pytest.approx(0.5)
    assert bayes(np.array([1.0, 0.0, 1.0, 0.0])) == {"logloss": 0.0, "auc": 1.0}
    # Ordered pairs (clicked, not clicked) of different rows: .8 * .7 won and .3 * .2 lost.
    assert bayes(np.array([0.3, 0.8]))["auc"] == pytest.approx(0.56 / 0.62)
    assert np.isnan(bayes(np.array([1.0, 1.0]))["auc"])
    assert np.isnan(bayes(np.array([]))["auc"])


def test_truth_of_any_rows(default):
    generator, frame, truth = default
    some = frame.with_row_index().sample(500, seed=1, shuffle=True)
    again = Generator(generator.config).truth_of(some)
    assert again.equals(truth[some["index"].to_numpy()])
    assert generator.truth_of(frame[:0]).height == 0
    for change, row in (
        (pl.col("item") + 17, 0),
        (pl.col("user") + 13, 3),
        (pl.col("session") + 1, 2),
        (pl.col("position") + 100, 1),
        (-pl.col("position"), 1),
        (pl.col("session") * 1000, 4),
    ):
        bad = some.head(5).with_columns(
            pl.when(pl.int_range(5) == row).then(change).otherwise(pl.col(change.meta.root_names()[0]))
        )
        with pytest.raises(InputError, match=f"row {row} "):
            generator.truth_of(bad)
    with pytest.raises(InputError, match="'session'"):
        generator.truth_of(some.drop("session"))


def test_outcomes_of_logged_lists_equal_the_truth(default):
    generator, frame, truth = default
    both = pl.concat([frame, truth.select("p_click", "p_conversion", "diversity")], how="horizontal")
    lists = both.group_by("session", maintain_order=True).agg(pl.all())[500:900]
    first = lists.select(pl.col("user", "time", "scenario", "device").list.first())
    out = generator.outcomes_of(
        first["user"].to_numpy(),
        first["time"].to_numpy(),
        np.array(lists["item"].to_list()),
        scenario=first["scenario"].to_list(),
        device=first["device"].to_list(),
    )
    for name in ("p_click", "p_conversion", "diversity"):
        np.testing.assert_allclose(out[name], np.array(lists[name].to_list()), atol=1e-6)
    with pytest.raises(InputError, match="no item 5"):
        generator.outcomes_of([1_000_003], [1_704_067_200], [[5]])
    with pytest.raises(InputError, match="'cinema'"):
        generator.outcomes_of([1_000_003], [1_704_067_200], [[5_000_011]], scenario="cinema")


def test_diversity_term_known_values():
    generator = Generator(rows=2_000, seed=9)
    user, item, other = generator.users["user"][0], generator.items["item"][0], generator.items["item"][1]
    out = generator.outcomes_of([user, user], [1_704_067_200] * 2, [[item, item, other], [item, other, item]])
    appetite = generator._world.users.diversity[0]
    direction = generator._world.items.direction
    novelty = 1 - max(0.0, float(direction[0] @ direction[1]))
    expected = appetite * np.array([[1, 0, novelty], [1, novelty, 0]])
    np.testing.assert_allclose(out["diversity"], expected, atol=1e-6)


# ---- exposure


def logged_sessions(generator):
    """Block by block: its number, its sessions, and what the policy had before it."""
    world = generator._world
    for block in range(generator.config.n_blocks):
        sessions = world._sessions(block)
        candidates, counts = world._candidates(sessions)
        yield block, sessions, candidates, counts, world._log_weights(sessions, candidates)


def test_list_propensities_are_exact(default):
    """Against the definition, in float64: weight of the pick over the weights not yet picked."""
    generator, frame, _ = default
    block, sessions, candidates, counts, score = next(logged_sessions(generator))
    items = (frame["item"].to_numpy()[:10_240].reshape(-1, 10) - 5_000_011) // 17
    logged = frame["propensity"].to_numpy()[:10_240].reshape(-1, 10)
    assert block == 0
    for s in range(0, 1024, 7):
        if sessions.random[s]:
            expected = 1 / (sessions.born[s] - np.arange(10))
        else:
            inside = candidates[s][counts[s]]
            assert len(np.unique(inside)) == len(inside)
            weight = dict(zip(inside.tolist(), np.exp(score[s][counts[s]].astype(np.float64)), strict=True))
            expected = []
            for item in items[s].tolist():
                expected.append(weight[item] / sum(weight.values()))
                del weight[item]
        # The log holds float32.
        np.testing.assert_allclose(logged[s], expected, rtol=1e-6)


def test_first_pick_follows_its_probabilities():
    """The same user on the same day has the same candidates: the first pick is a draw from known weights."""
    generator = Generator(rows=60_000, n_users=1, days=1, n_items=100, seed=6, random_share=0.0, policy_taste=1.0)
    frame = generator.frame()
    first = frame.filter(pl.col("position") == 1)
    picked = (first["item"].to_numpy() - 5_000_011) // 17
    expected = np.zeros(100)
    deviation = variance = 0.0
    for block, sessions, candidates, counts, score in logged_sessions(generator):
        weight = np.where(counts, np.exp(score.astype(np.float64)), 0)
        weight /= weight.sum(1, keepdims=True)
        real = min(len(sessions.time), generator.config.n_sessions - block * 1024)
        np.add.at(expected, candidates[:real].ravel(), weight[:real].ravel())
        # The score of the pick against its mean: a wrong temperature shows here before anywhere else.
        score = np.where(counts, score, 0)
        mean = (weight * score).sum(1)
        variance += (weight * (score - mean[:, None]) ** 2)[:real].sum()
        mine = picked[block * 1024 : block * 1024 + real, None] == candidates[:real]
        deviation += score[np.arange(real), np.argmax(mine, axis=1)].sum() - mean[:real].sum()
    assert abs(deviation) < SIGMAS * np.sqrt(variance)
    seen = np.bincount(picked, minlength=100)
    assert expected.sum() == pytest.approx(seen.sum())
    assert (seen[expected == 0] == 0).all()
    rare = expected < 5
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    statistic = ((seen[used] - expected[used]) ** 2 / expected[used]).sum()
    assert stats.chi2.sf(statistic, used.sum() - 1) > 1e-5


def test_candidates_are_a_function_of_user_and_day():
    generator = Generator(rows=60_000, seed=8, cold_items=0.0)
    sets: dict[tuple[int, int], np.ndarray] = {}
    repeats = 0
    for _, sessions, candidates, counts, _ in logged_sessions(generator):
        assert (counts.sum(1) > generator.config.list_length).all()
        for s, (user, time) in enumerate(zip(sessions.user.tolist(), sessions.time.tolist(), strict=True)):
            key = user, int(time // 86_400)
            repeats += key in sets
            np.testing.assert_array_equal(sets.setdefault(key, candidates[s]), candidates[s])
    assert repeats > 100


def test_poisson_propensities(poisson):
    """Inclusion probabilities add up to K, and inverse weighting by them is unbiased."""
    generator, frame, truth = poisson
    np.testing.assert_allclose(frame["propensity"].to_numpy(), truth["propensity"].to_numpy(), rtol=1e-6)
    logged = frame.with_columns(exact=truth["propensity"]).filter(pl.col("random") == 0)
    expected, variance, reach, reach_variance = 0.0, 0.0, 0, 0.0
    for block, sessions, candidates, counts, score in logged_sessions(generator):
        weight = np.where(counts, np.exp(score.astype(np.float64)), 0)
        low, high = np.zeros(len(weight)), np.full(len(weight), 1e9)
        for _ in range(200):
            tau = np.sqrt(np.maximum(low, 1e-12) * high)
            over = (1 - np.exp(-tau[:, None] * weight)).sum(1) > 10
            high, low = np.where(over, tau, high), np.where(over, low, tau)
        pi = np.where(counts, np.maximum(1 - np.exp(-tau[:, None] * weight), 0.002), 0)
        real = ~sessions.random & (np.arange(len(weight)) + block * 1024 < generator.config.n_sessions)
        expected += pi[real].sum()
        variance += (pi * (1 - pi))[real].sum()
        reach += counts[real].sum()
        reach_variance += ((1 - pi[real]) / np.where(counts[real], pi[real], 1))[counts[real]].sum()
        # Each logged row has the probability that bisection finds.
        here = block * 1024 + np.array([0, 1023])
        rows = logged.filter(pl.col("session").is_between(*(700_000_001 + 3 * here)))
        s = (rows["session"].to_numpy() - 700_000_001) // 3 - here[0]
        at = np.argmax(candidates[s] == ((rows["item"].to_numpy() - 5_000_011) // 17)[:, None], axis=1)
        np.testing.assert_allclose(rows["exact"].to_numpy(), pi[s, at], rtol=1e-9)
    assert abs(logged.height - expected) < SIGMAS * np.sqrt(variance)
    weighted = (1 / logged["exact"].to_numpy()).sum()
    assert abs(weighted - reach) < SIGMAS * np.sqrt(reach_variance)
    assert frame.group_by("session").len()["len"].n_unique() > 5


@pytest.mark.parametrize("policy", ["list", "poisson"])
def test_random_sessions_are_uniform(policy):
    generator = Generator(rows=60_000, n_items=300, seed=7, policy=policy, cold_items=0.0, random_share=0.3)
    frame = generator.frame().filter(pl.col("random") == 1)
    position = frame["position"].to_numpy()
    item = (frame["item"].to_numpy() - 5_000_011) // 17
    for k in (1, 2, 10):
        seen = np.bincount(item[position == k], minlength=300)
        assert stats.chisquare(seen).pvalue > 1e-5
    assert stats.chisquare(np.bincount(item, minlength=300)).pvalue > 1e-5
    if policy == "poisson":
        np.testing.assert_allclose(frame["propensity"].to_numpy(), 10 / 300, rtol=1e-6)


def test_random_share(default):
    generator, frame, truth = default
    sessions = frame.group_by("session").agg(pl.col("random").first())
    share = generator.config.random_share
    assert z_score(sessions["random"].to_numpy(), np.full(sessions.height, share)) < SIGMAS
    # The bias of selection that these sessions are there to uncover.
    random = (frame["random"] == 1).to_numpy()
    relevance = truth["p_relevance"].to_numpy()
    assert relevance[~random].mean() > 1.3 * relevance[random].mean()


def test_taste_is_in_the_clicks():
    """Neighbours by co-occurrence find what is clicked later, better than popularity does."""
    generator = Generator()
    frame = generator.frame()
    user = (frame["user"].to_numpy() - 1_000_003) // 13
    item = (frame["item"].to_numpy() - 5_000_011) // 17
    click = frame["click"].to_numpy() == 1
    early = np.arange(len(click)) < 0.8 * len(click)
    seen = np.zeros((generator.config.n_users, generator.config.n_items))
    later = seen.astype(bool)
    seen[user[click & early], item[click & early]] = 1
    later[user[click & ~early], item[click & ~early]] = True
    later &= seen == 0
    popularity = seen.sum(0)
    together = seen.T @ seen
    np.fill_diagonal(together, 0)
    similar = together / (np.sqrt(np.outer(popularity, popularity)) + 3)
    tested = later.any(1) & (seen.sum(1) > 0)

    def recall(score: np.ndarray) -> float:
        score = np.where(seen > 0, -np.inf, score)
        top = np.argpartition(-score, 50, axis=1)[:, :50]
        found = np.take_along_axis(later, top, axis=1).sum(1)
        return (found[tested] / later[tested].sum(1)).mean()

    assert recall(seen @ similar) > 1.3 * recall(np.tile(popularity, (len(seen), 1)))


# ---- files, memory, bad input


def peak_memory(script: str) -> int:
    """Peak resident memory of a fresh process that runs the script, in MB."""
    # Not ru_maxrss, which a child inherits from the process that forked it.
    script += "\nprint(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_memory_of_a_million_rows(tmp_path):
    script = f"from recfast.data.synthetic import Generator; Generator(rows=1_000_000).write({str(tmp_path)!r})"
    assert peak_memory(script) < 600
    assert pl.scan_parquet(tmp_path / "part-*.parquet").select(pl.len()).collect().item() == 1_000_000


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    script = "from recfast.data.synthetic import Generator; Generator(rows={}).write({!r}, parts=range({}))"
    # The users and items of a hundred million rows, and some of their parts.
    assert peak_memory(script.format(100_000_000, str(tmp_path / "a"), 8)) < 600
    few = peak_memory(script.format(10_000_000, str(tmp_path / "b"), 3))
    many = peak_memory(script.format(10_000_000, str(tmp_path / "c"), 12))
    assert many < 1.15 * few


def test_truth_json(tmp_path):
    generator = Generator(rows=1_000, scenarios=3)
    generator.write(tmp_path)
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert truth["config"] == generator.config.to_dict()
    assert list(truth["scenarios"]) == ["home", "search", "category"]
    assert truth["scenarios"]["search"]["price_factor"] < 0 < truth["scenarios"]["home"]["price_factor"]
    with pytest.raises(InputError, match="rows = 1000, and 2000 is asked for"):
        Generator(rows=2_000, scenarios=3).write(tmp_path)


def test_write_splits(tmp_path):
    generator = Generator(rows=30_000, seed=2)
    folder = synthetic.write_splits(generator, tmp_path / "log")
    parts = [pl.read_parquet(folder / name / "*.parquet") for name in ("train", "valid", "test")]
    assert [part.height for part in parts] == [24_000, 3_000, 3_000]
    assert pl.concat(parts).equals(generator.frame())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    synthetic.write_splits(generator, folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(InputError, match="seed = 2, and 3 is asked for"):
        synthetic.write_splits(Generator(rows=30_000, seed=3), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="neither a generated log nor an empty folder"):
        synthetic.write_splits(generator, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"
    with pytest.raises(InputError, match="too few"):
        synthetic.write_splits(Generator(rows=190), tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_load(tmp_path):
    options = {"rows": 20_000, "seed": 2, "scenarios": 4, "extra_fields": True}
    dataset = data.load("synthetic", tmp_path / "log", cache=tmp_path / "cache", **options)
    frame = Generator(**options).frame()
    schema = synthetic.schema(Config(**options))
    assert dataset.schema.names == schema.names
    assert {"scenario", "noise_e", "genre_copy"} < set(schema.names)
    assert {"scenario", "noise_e", "position", "conversion", "propensity"}.isdisjoint(synthetic.schema().names)
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [16_000, 2_000, 2_000]
    # Raw ids come back, and the history of a row is what its user clicked strictly before.
    raw = dataset.vocabulary["item"].decode(dataset.train.ids[:, dataset.schema.position("item")])
    assert raw == frame["item"][:16_000].to_list()
    batch = next(iter(data.Loader(dataset.valid, 64)))
    history = batch.sequences["history"]
    for row in range(0, 64, 9):
        now = frame[16_000 + row]
        before = frame.filter(
            (pl.col("user") == now["user"][0]) & (pl.col("time") < now["time"][0]) & (pl.col("click") == 1)
        )
        ids = history.values[history.offsets[row] : history.offsets[row + 1]]
        known = set(dataset.vocabulary["item"].decode(list(range(1, dataset.schema.rows("item")))))
        expected = [item if item in known else None for item in before["item"].to_list()[-50:]]
        assert dataset.vocabulary["item"].decode(ids) == expected
    titles_of = dict(Generator(**options).items.select("item", "title").iter_rows())
    assert dataset.title(3) == titles_of[dataset.vocabulary["item"].decode([3])[0]]
    again = data.load("synthetic", cache=tmp_path / "other", **options)
    assert (again.test.ids == dataset.test.ids).all()
    with pytest.raises(InputError, match="did you mean 'scenarios'"):
        data.load("synthetic", scenario=2)


def test_nothing_half_written(tmp_path, monkeypatch):
    def full_disk(self, *args, **kwargs):
        Path(args[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    generator = Generator(rows=1_000)
    monkeypatch.setattr(pl.DataFrame, "write_parquet", full_disk)
    with pytest.raises(OSError, match="No space"):
        generator.write(tmp_path / "flat")
    with pytest.raises(OSError, match="No space"):
        synthetic.write_splits(generator, tmp_path / "log")
    assert [path for path in tmp_path.rglob("*") if path.name != "flat"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows = 0 is not at least 1"),
        ({"rows": 1.5}, "rows = 1.5 is not a whole number"),
        ({"rows": True}, "rows = True is not a whole number"),
        ({"seed": -1}, "seed = -1 is not in"),
        ({"policy": "greedy"}, "policy = 'greedy' is not"),
        ({"scenarios": 5}, "scenarios = 5 is not in"),
        ({"n_items": 10}, "n_items = 10 is not in"),
        ({"bias": float("nan")}, "bias = nan is not a finite number"),
        ({"n_user": 10}, "did you mean 'n_users'?"),
        ({"list_length": 0}, "list_length = 0 is not in"),
        ({"extra_fields": 1}, "extra_fields = 1 is not true or false"),
    ],
)
def test_rejects_bad_input(options, message):
    with pytest.raises(InputError) as caught:
        Generator(**options)
    assert message in str(caught.value)


def test_part_out_of_range():
    with pytest.raises(IndexError, match=r"part 1 is outside \[0, 1\)"):
        Generator(Config(rows=1_000)).part(1)


# ---- pasts


PAST = {"rows": 4000, "n_users": 20, "n_items": 200, "seed": 6, "history_length": 400, "list_length": 20}


def test_pasts_have_eras_of_their_own_topics():
    generator = Generator(**PAST)
    past = pl.concat(list(generator.past()))
    again = pl.concat(list(Generator(**PAST).past()))
    assert past.equals(again)
    assert not past.equals(pl.concat(list(Generator(**{**PAST, "seed": 7}).past())))
    assert past.group_by("user").len()["len"].to_list() == [400] * 20
    assert past["time"].max() < generator.frame()["time"].min()
    topic = past.join(generator.items, on="item")
    assert topic.height == past.height, "only items that are there"
    assert (topic["born"] <= topic["time"].max()).all()
    # The second half of the eras by age: events 201 to 400 before the log, of three topics but for the noise.
    early = topic.filter(pl.col("time") < topic["time"].min() + 200 * 3600)
    late = topic.filter(pl.col("time") >= topic["time"].min() + 360 * 3600)
    for user in past["user"].unique().to_list():
        top = early.filter(pl.col("user") == user)["topic"].value_counts(sort=True)
        share = top["count"][:3].sum() / 200
        assert share > 0.9 - SIGMAS * np.sqrt(0.9 * 0.1 / 200)
        other = late.filter((pl.col("user") == user) & pl.col("topic").is_in(top["topic"][:3].implode()))
        assert other.height < 20, "the interests of the early era are over"


def test_clicks_depend_on_the_whole_past():
    generator = Generator(**PAST)
    frame = generator.frame()
    truth = generator.truth_of(frame)
    past = pl.concat(list(generator.past())).join(generator.items.select("item", "topic"), on="item")
    counts = past.group_by("user", "topic").len()
    n = frame.select("user", "topic").join(counts, on=["user", "topic"], how="left")["len"].fill_null(0).to_numpy()
    total = counts.with_columns(h=(pl.col("len") + 1).log()).group_by("user").agg(pl.col("h").sum() / 48)
    mean = frame.select("user").join(total, on="user", how="left")["h"].to_numpy()
    np.testing.assert_allclose(truth["history"].to_numpy(), 0.8 * (np.log1p(n) - mean), rtol=1e-5, atol=1e-5)
    click, p = frame["click"].to_numpy(), truth["p_click"].to_numpy()
    assert z_score(click, p) < SIGMAS
    assert truth["history"].std() > 0.5


def test_without_a_past_nothing_changes(tmp_path):
    plain = Generator(rows=2000)
    assert list(plain.past()) == []
    assert not {"history_length", "history", "history_noise"} & plain.config.to_dict().keys()
    assert "topic" not in plain.items.columns
    assert (plain.truth_of(plain.frame())["history"] == 0).all()
    with pytest.raises(InputError, match="history_length = -1 is not in"):
        Config(history_length=-1)


def test_load_with_pasts(tmp_path):
    ds = data.load("synthetic", cache=tmp_path, max_length=300, **PAST)
    assert ds.schema.sequences[0].max_length == 300
    assert ds.schema.rows("topic") <= 49
    batch = next(iter(data.Loader(ds.train, 8, shared=True)))
    assert batch.sequences["history"].lengths().tolist() == [300] * (len(batch.candidate_offsets) - 1)
    assert len(batch) > 100
    assert len(ds.train) == 3200
    assert int(ds.history("train").lengths()[1:].min()) >= 400
