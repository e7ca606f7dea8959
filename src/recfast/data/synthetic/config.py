"""What the generator can be told, and the random numbers everything is drawn from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

import numpy as np

from recfast.errors import InputError

VERSION = 1
"""Goes up whenever the same options would give other rows."""

WIDTH = 16
"""Width D of the latent taste vectors."""

SESSIONS_PER_BLOCK = 1024
"""Sessions drawn from one counter of the random generator: the smallest unit that can be made alone."""

BLOCKS_PER_PART = 32
"""Blocks in a part file: a third of a million rows at ten a list."""

START = 1_704_067_200
"""The log begins here, in seconds since 1970: Monday 2024-01-01, midnight UTC."""


@dataclass(frozen=True)
class Config:
    """Options of the generator.

    Below the options of size and kind come those of the exposure (what the policy weighs, candidates of each
    kind) and of the clicks (the factors of the logit's terms, see `Generator`). All are written to
    `truth.json`.

    Parameters
    ----------
    rows : int
        Impressions. Exact under `policy="list"`; the expected number under `policy="poisson"`.
    seed : int
        In [0, 2**63).
    n_users, n_items : int, optional
        Left out they grow with `rows`, but slower than it: 500 (rows / 60 000)^.85 and
        900 (rows / 60 000)^.6.
    list_length : int
        Items K in a list; in "poisson" mode the expected number.
    policy : {"list", "poisson"}
        "list": an ordered draw without replacement (Plackett-Luce) of exactly K items. "poisson": each
        candidate is shown independently of the others, and the list is ordered by the policy's score.
    scenarios : int
        1 to 4 of home, search, category, push. In "search" the effect of the price has the opposite sign.
    days : int
        Time span of the log.
    extra_fields : bool
        Add five fields of pure noise and one duplicate of `genre`, for the tests of feature selection.
    overlap : bool
        "poisson" only: no candidate is shown with a probability below .002.
    history_length : int
        Events of each user before the log begins, see `Pasts`; they decide clicks too (the cause "history"), and the
        items get the column `topic`.
    """

    rows: int = 60_000
    seed: int = 0
    n_users: int | None = None
    n_items: int | None = None
    list_length: int = 10
    policy: str = "list"
    scenarios: int = 1
    days: int = 28
    extra_fields: bool = False
    overlap: bool = True
    history_length: int = 0

    # exposure
    random_share: float = 0.02
    popular_candidates: int = 40
    genre_candidates: int = 72
    policy_taste: float = 0.4
    policy_quality: float = 0.5
    policy_popularity: float = 0.15
    policy_noise: float = 0.5
    popularity_exponent: float = 0.9
    popularity_drift: float = 0.3
    activity_tail: float = 1.6
    cold_users: float = 0.1
    cold_items: float = 0.1

    # clicks
    bias: float = -4.4
    taste: float = 1.3
    quality: float = 0.6
    freshness: float = 0.4
    freshness_days: float = 14.0
    season: float = 0.25
    price: float = 0.25
    diversity: float = 1.0
    drift: float = 0.35
    examination: float = 0.6
    history: float = 0.8
    history_noise: float = 0.1
    conversion_bias: float = -4.8
    conversion_taste: float = 0.5
    conversion_price: float = 2.0

    def __post_init__(self) -> None:
        def need(name: str, good: bool, rule: str) -> None:
            if not good:
                raise InputError(f"synthetic: {name} = {getattr(self, name)!r} is not {rule}")

        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float":
                ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                need(field.name, ok, "a finite number")
            elif field.type == "int" or (field.type == "int | None" and value is not None):
                need(field.name, isinstance(value, int) and not isinstance(value, bool), "a whole number")
            elif field.type == "bool":
                need(field.name, isinstance(value, bool), "true or false")
        need("rows", self.rows >= 1, "at least 1")
        need("seed", 0 <= self.seed < 2**63, "in [0, 2**63)")
        need("list_length", 1 <= self.list_length <= 100, "in [1, 100]")
        need("policy", self.policy in ("list", "poisson"), '"list" or "poisson"')
        need("scenarios", 1 <= self.scenarios <= 4, "in [1, 4]")
        need("days", 1 <= self.days <= 3650, "in [1, 3650]")
        for name, most in (("random_share", 1), ("cold_users", 0.5), ("cold_items", 0.5), ("history_noise", 1)):
            need(name, 0 <= getattr(self, name) <= most, f"in [0, {most}]")
        for name in ("popular_candidates", "genre_candidates"):
            need(name, 0 <= getattr(self, name) <= 10_000, "in [0, 10000]")
        for name in ("activity_tail", "freshness_days"):
            need(name, getattr(self, name) > 0, "above 0")
        need("history_length", 0 <= self.history_length <= 1_000_000, "in [0, 1000000]")
        need("examination", self.examination >= 0, "at least 0")
        size = self.rows / 60_000
        if self.n_users is None:
            object.__setattr__(self, "n_users", max(20, round(500 * size**0.85)))
        if self.n_items is None:
            object.__setattr__(self, "n_items", max(4 * self.explore_candidates, round(900 * size**0.6)))
        need("n_users", 1 <= self.n_users < 2**31, "in [1, 2**31)")
        least = 2 * self.explore_candidates
        need(
            "n_items",
            least <= self.n_items < 2**31,
            f"in [{least}, 2**31), which lists of {self.list_length} need",
        )

    @property
    def explore_candidates(self) -> int:
        """Candidates spread evenly over the catalogue; enough of them that no list is ever short."""
        return max(16, self.list_length + 6)

    @property
    def candidates(self) -> int:
        """Candidates C of one session, repeated ones counted."""
        return self.popular_candidates + self.genre_candidates + self.explore_candidates

    @property
    def n_sessions(self) -> int:
        return -(-self.rows // self.list_length)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_sessions // SESSIONS_PER_BLOCK)

    @property
    def n_parts(self) -> int:
        return -(-self.n_blocks // BLOCKS_PER_PART)

    def to_dict(self) -> dict[str, Any]:
        """All options, with the version of the generator: equal dictionaries mean equal rows."""
        options = {"version": VERSION, **asdict(self)}
        if not self.history_length:
            # Without a past its options mean nothing; logs written before there were any stay what they are.
            for name in ("history_length", "history", "history_noise"):
                del options[name]
        return options

    @classmethod
    def from_options(cls, **options: Any) -> Config:
        """Build from keywords; an unknown one is an error that names the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f", did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
                raise InputError(f"synthetic: there is no option {name!r}{hint}")
        return cls(**options)


# Streams: what a random number is for. A new purpose takes a new number, so that old draws stay as they are.
USERS, ITEMS, TITLES, GENRES, SESSIONS, LISTS, OUTCOMES, EXTRAS, PASTS = range(9)


def random(seed: int, stream: int, block: int = 0) -> np.random.Generator:
    """The random numbers of one (seed, stream, block): Philox, the block in the counter's third word."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, block, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a uint64 hash of each uint64, for draws keyed by several ids at once."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
