"""Sessions, lists and clicks, block by block."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from recfast.data.synthetic import config as c
from recfast.data.synthetic import titles
from recfast.data.synthetic import world as w
from recfast.errors import InputError
from recfast.files import atomic_path, write_json

CAUSES = "bias", "context", "taste", "quality", "price", "freshness", "season", "diversity"
"""The additive terms of the logit of P(R = 1)."""

_ONE = 1 << 24
"""Probabilities are multiples of 2^-24, and are compared with whole random numbers below 2^24."""

_SCORE_FLOOR = 0.002
NOISE_FIELDS = {"noise_a": 4, "noise_b": 10, "noise_c": 50, "noise_d": 10_000, "noise_e": 100_000}
"""Columns without any cause, and how many values each has."""


class _Sessions(NamedTuple):
    """Arrays over the S sessions of a block."""

    time: np.ndarray  # float64, seconds after START, ascending
    hour: np.ndarray  # int64
    user: np.ndarray  # int64, position
    scenario: np.ndarray  # int8
    device: np.ndarray  # int8
    random: np.ndarray  # bool
    born: np.ndarray  # int64, items that exist


class _Block(NamedTuple):
    """A block: per session, and per shown item [S, K], of which `shown` are there."""

    sessions: _Sessions
    items: np.ndarray
    shown: np.ndarray
    propensity: np.ndarray
    causes: dict[str, np.ndarray]
    relevance: np.ndarray
    examination: np.ndarray
    conversion: np.ndarray
    relevant: np.ndarray
    examined: np.ndarray
    converting: np.ndarray


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def _positions(what: str, raw: np.ndarray, ids: tuple[int, int], count: int) -> np.ndarray:
    """Positions of raw ids, int64."""
    position, odd = np.divmod(raw.astype(np.int64) - ids[0], ids[1])
    wrong = (odd != 0) | (position < 0) | (position >= count)
    if wrong.any():
        raise InputError(
            f"synthetic: there is no {what} {raw[wrong].flat[0]} among the {count} of these options"
        )
    return position


def _grid(probability: np.ndarray) -> np.ndarray:
    return np.rint(probability * _ONE) / _ONE


class Generator:
    """A log of impressions with known causes.

    A session at time t shows user u an ordered list of items. Item i at position k (from 1) is examined (E)
    with probability k^-eta, is relevant (R) with probability

        P(R = 1) = sigmoid(bias + context + 1.3 <th_u(t), q_i> + 0.6 quality_i - price_u z_i
                           + 0.4 exp(-age / 14 d) + season + d_u (1 - max similarity to the items above)),

    and is clicked when both hold, C = E R. Every impression has a drawn conversion potential V, which shows
    only if the item was clicked.

    Random numbers are counter-based (Philox), keyed by seed, purpose and block of 1 024 sessions; the
    candidates of a user on a day are a hash of seed, user and day. So any part of the log can be generated
    alone, on any worker, with equal bytes, and nothing but the users, the items and one part is ever in
    memory.

    Parameters
    ----------
    config : Config, optional
    **options
        The fields of `Config`, in place of `config`.

    Raises
    ------
    InputError
        An unknown option, or a value outside its range.
    """

    def __init__(self, config: c.Config | None = None, **options: Any) -> None:
        if config is not None and options:
            raise TypeError("Generator: give a config or options, not both")
        self.config = config if config is not None else c.Config.from_options(**options)
        self._items = w.Items(self.config)
        self._users = w.Users(self.config, self._items)
        self._last: tuple[int, _Block] | None = None

    # ---- frames and files

    @cached_property
    def items(self) -> pl.DataFrame:
        """item, title, genres, genre, brand, price, price_bucket, born (seconds since 1970): N rows."""
        return self._items.frame(self.config)

    @cached_property
    def users(self) -> pl.DataFrame:
        """user, age_band, city, arrived (seconds since 1970): U rows."""
        return self._users.frame()

    def part(self, index: int) -> pl.DataFrame:
        """Part `index` of the log, about half a million impressions in order of time.

        Columns: user, item, time (seconds since 1970), session (int64), position (from 1), hour (int16);
        scenario, device, age_band, city, genre, price_bucket (strings); click, conversion, random (int8); and
        propensity (float32): under "list" the probability of this pick given the items above it, under
        "poisson" of the item being in the list, both given the candidates of the session.
        """
        if not 0 <= index < self.config.n_parts:
            raise IndexError(f"synthetic: part {index} is outside [0, {self.config.n_parts})")
        first = index * c.BLOCKS_PER_PART
        last = min(first + c.BLOCKS_PER_PART, self.config.n_blocks)
        return pl.concat([self._frame(block) for block in range(first, last)], rechunk=True)

    def parts(self) -> Iterator[pl.DataFrame]:
        """All parts in order of time."""
        return (self.part(index) for index in range(self.config.n_parts))

    def frame(self) -> pl.DataFrame:
        """The whole log at once, for sizes that fit in memory."""
        return pl.concat(list(self.parts()))

    def write(self, path: str | Path, *, parts: range | None = None) -> list[Path]:
        """Write `items.parquet`, `users.parquet`, `part-00000.parquet`, ... and, last, `truth.json`.

        Each file appears whole or not at all, in place of one that was there. With `parts` given only those are
        written, without `truth.json`: several workers may share a folder.

        Returns
        -------
        list of Path
            The part files.
        """
        path = Path(path)
        check_folder(path, self.config)
        path.mkdir(parents=True, exist_ok=True)
        if parts is None or 0 in parts:
            write_parquet(self.items, path / "items.parquet")
            write_parquet(self.users, path / "users.parquet")
        written = []
        for index in range(self.config.n_parts) if parts is None else parts:
            target = path / f"part-{index:05d}.parquet"
            write_parquet(self.part(index), target)
            written.append(target)
        if parts is None:
            write_json(path / "truth.json", self.parameters())
        return written

    def parameters(self) -> dict[str, Any]:
        """What `truth.json` says: the configuration and the numbers of the graph that it does not name."""
        count = self.config.scenarios
        return {
            "config": self.config.to_dict(),
            "start": c.START,
            "width": c.WIDTH,
            "sessions": self.config.n_sessions,
            "parts": self.config.n_parts,
            "genres": list(titles.GENRES),
            "scenarios": {
                name: {"bias": float(bias), "examination_exponent": float(eta), "price_factor": float(price)}
                for name, bias, eta, price in zip(
                    titles.SCENARIOS[:count],
                    w.SCENARIO_BIAS,
                    self.config.examination * w.SCENARIO_EXAMINATION,
                    w.SCENARIO_PRICE,
                    strict=False,
                )
            },
            "propensity": "conditional pick probability"
            if self.config.policy == "list"
            else "inclusion probability",
            "causes": list(CAUSES),
        }

    # ---- the truth

    def truth_of(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The causes of given rows of the log, recomputed from their keys and the seed.

        Parameters
        ----------
        frame : polars.DataFrame
            Rows of this log with the columns session, position, user and item, in any order and number.

        Returns
        -------
        polars.DataFrame
            One row for each given row, in the same order, all float64: `p_click`, `p_relevance`, `p_examine`,
            `p_conversion` (given a click) exactly as they were used in drawing; `propensity`; the logit terms
            of `p_relevance`, named as `CAUSES`; and the drawn potential outcomes `relevant`, `examined`,
            `converting`.

        Raises
        ------
        InputError
            A row that is not of this log.
        """
        for name in ("session", "position", "user", "item"):
            if name not in frame.columns:
                raise InputError(
                    f"synthetic: truth_of needs the column {name!r}; the frame has {frame.columns}"
                )
        session, odd = np.divmod(frame["session"].to_numpy() - w.SESSION_ID[0], w.SESSION_ID[1])
        position = frame["position"].to_numpy().astype(np.int64) - 1
        block, row = np.divmod(session, c.SESSIONS_PER_BLOCK)
        wrong = (odd != 0) | (session < 0) | (session >= self.config.n_sessions) | (position < 0)
        users, items = frame["user"].to_numpy(), frame["item"].to_numpy()
        names = ("p_click", "p_relevance", "p_examine", "p_conversion", "propensity", *CAUSES)
        names = (*names, "relevant", "examined", "converting")
        out = {name: np.full(frame.height, np.nan) for name in names}
        order = np.argsort(block, kind="stable")
        order = order[~wrong[order]]
        starts = np.flatnonzero(np.diff(block[order], prepend=-1))
        for mine in np.split(order, starts[1:]) if len(order) else []:
            made = self._block(int(block[mine[0]]))
            inside = position[mine] < made.items.shape[1]
            wrong[mine[~inside]] = True
            mine = mine[inside]
            at = row[mine], position[mine]
            wrong[mine] |= ~made.shown[at]
            wrong[mine] |= self._users.raw_id[made.sessions.user[at[0]]] != users[mine]
            wrong[mine] |= self._items.raw_id[made.items[at]] != items[mine]
            out["p_click"][mine] = made.relevance[at] * made.examination[at]
            out["p_relevance"][mine] = made.relevance[at]
            out["p_examine"][mine] = made.examination[at]
            out["p_conversion"][mine] = made.conversion[at]
            out["propensity"][mine] = made.propensity[at]
            for name in CAUSES:
                out[name][mine] = np.broadcast_to(made.causes[name], made.items.shape)[at]
            for name in ("relevant", "examined", "converting"):
                out[name][mine] = getattr(made, name)[at]
        if wrong.any():
            bad = int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"synthetic: row {bad} (session {frame['session'][bad]}, position {frame['position'][bad]}) "
                "is not a row of the log of these options"
            )
        return pl.DataFrame(out)

    def outcomes_of(
        self,
        users: np.ndarray,
        times: np.ndarray,
        lists: np.ndarray,
        *,
        scenario: str = titles.SCENARIOS[0],
        device: str = titles.DEVICES[0],
    ) -> dict[str, np.ndarray]:
        """Probabilities under any lists, shown or not: the value of another policy, a ranking by the truth.

        Parameters
        ----------
        users : int64 [S]
            Raw ids.
        times : int64 or float64 [S]
            Seconds since 1970.
        lists : int64 [S, K]
            Raw ids of the items shown, from the top. Lists of one item give P(R) without an effect of the
            list.
        scenario, device : str
            The context of all S lists.

        Returns
        -------
        dict
            float64 [S, K]: `p_click`, `p_relevance`, `p_examine`, `p_conversion` (given a click), and the
            logit terms named as `CAUSES`.

        Raises
        ------
        InputError
            An id, scenario or device that is not of this world.
        """
        user = _positions("user", np.asarray(users), w.USER_ID, self._users.n)
        items = _positions("item", np.asarray(lists), w.ITEM_ID, self._items.n)
        if user.ndim != 1 or items.ndim != 2 or len(user) != len(items) or np.shape(times) != user.shape:
            raise InputError(
                f"synthetic: outcomes_of needs users [S], times [S], lists [S, K]; got {user.shape}, "
                f"{np.shape(times)}, {items.shape}"
            )
        context = []
        known_scenarios = titles.SCENARIOS[: self.config.scenarios]
        for what, name, known in (
            ("scenario", scenario, known_scenarios),
            ("device", device, titles.DEVICES),
        ):
            if name not in known:
                raise InputError(f"synthetic: {what} {name!r} is not one of {', '.join(known)}")
            context.append(np.full(len(user), known.index(name), dtype=np.int8))
        time = np.asarray(times, dtype=np.float64) - c.START
        hour = (time // 3600).astype(np.int64) % 24
        nobody = np.zeros(len(user), dtype=bool)
        sessions = _Sessions(time, hour, user, *context, nobody, np.full(len(user), self._items.n))
        causes = self._causes(sessions, items)
        relevance, examination, conversion = self._probabilities(sessions, items, causes)
        out = {
            "p_click": relevance * examination,
            "p_relevance": relevance,
            "p_examine": examination,
            "p_conversion": conversion,
        }
        return {**out, **{name: np.broadcast_to(causes[name], items.shape) for name in CAUSES}}

    # ---- one block

    def _block(self, block: int) -> _Block:
        if self._last is not None and self._last[0] == block:
            return self._last[1]
        sessions = self._sessions(block)
        items, shown, propensity = self._lists(block, sessions)
        causes = self._causes(sessions, items)
        relevance, examination, conversion = self._probabilities(sessions, items, causes)
        draw = c.random(self.config.seed, c.OUTCOMES, block)
        fate = draw.integers(0, _ONE, (3, *items.shape), dtype=np.uint32)
        made = _Block(
            sessions,
            items,
            shown,
            propensity,
            causes,
            relevance,
            examination,
            conversion,
            relevant=fate[0] < relevance * _ONE,
            examined=fate[1] < examination * _ONE,
            converting=fate[2] < conversion * _ONE,
        )
        self._last = block, made
        return made

    def _probabilities(
        self, sessions: _Sessions, items: np.ndarray, causes: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """P(R), P(E) and P(V) [S, K], multiples of 2^-24."""
        config = self.config
        relevance = _sigmoid(sum(causes[name] for name in CAUSES))
        exponent = config.examination * w.SCENARIO_EXAMINATION[sessions.scenario]
        rank = np.arange(1, items.shape[1] + 1, dtype=np.float64)
        examination = rank ** -exponent[:, None]
        conversion = _sigmoid(
            config.conversion_bias
            + config.conversion_taste * causes["taste"]
            + config.conversion_price * causes["price"]
        )
        return _grid(relevance), _grid(examination), _grid(conversion)

    def _sessions(self, block: int) -> _Sessions:
        config, users, items = self.config, self._users, self._items
        size = c.SESSIONS_PER_BLOCK
        draw = c.random(config.seed, c.SESSIONS, block)
        # Session s of n has the time of quantile (s + U) / n of the traffic: sorted over the whole log at no
        # cost.
        index = block * size + np.arange(size)
        quantile = np.minimum((index + draw.random(size)) / config.n_sessions, np.nextafter(1.0, 0.0))
        time = np.interp(quantile, users.traffic_sum, np.arange(len(users.traffic_sum)) * 3600.0)
        hour = (time // 3600).astype(np.int64) % 24

        present = np.stack(
            [np.searchsorted(users.arrival[group], time, side="right") for group in users.group]
        )
        mass = np.stack([total[here] for total, here in zip(users.group_sum, present, strict=True)])
        share = np.cumsum(mass * users.hour_profile[:, hour], axis=0)
        pick = (share[:-1] <= draw.random(size) * share[-1]).sum(0)
        level = draw.random(size)
        user = np.zeros(size, dtype=np.int64)
        for group, (members, total) in enumerate(zip(users.group, users.group_sum, strict=True)):
            mine = np.flatnonzero(pick == group)
            if len(mine):
                here = present[group, mine]
                at = np.searchsorted(total, level[mine] * total[here], side="right") - 1
                user[mine] = members[np.minimum(at, here - 1)]
        device = (
            (users.device_edges[user] <= draw.random(size, dtype=np.float32)[:, None]).sum(1).astype(np.int8)
        )
        is_random = draw.random(size) < config.random_share
        u = draw.random(size, dtype=np.float32)
        scenario = np.zeros(size, dtype=np.int8)
        if users.scenario_edges is not None:
            scenario = (users.scenario_edges[user] <= u[:, None]).sum(1).astype(np.int8)
        born = np.searchsorted(items.born, time, side="right")
        return _Sessions(time, hour, user, scenario, device, is_random, born)

    def _taste(self, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        """th_u(t) [S, D]."""
        users = self._users
        angle = (users.turn[user] * time).astype(np.float32)[:, None]
        return users.taste[user] * np.cos(angle) + users.later_taste[user] * np.sin(angle)

    def _candidates(self, sessions: _Sessions) -> tuple[np.ndarray, np.ndarray]:
        """Positions of items int32 [S, C], ascending in each row, and which of them count [S, C].

        A function of seed, user and day alone (and of which items exist), so that the recall adds no
        randomness of its own to the propensities.
        """
        config, items, users = self.config, self._items, self._users
        day = (sessions.time // w.DAY).astype(np.uint64)
        with np.errstate(over="ignore"):
            key = c.mix(np.uint64(config.seed) + c.GOLDEN * np.uint64(1))
            key = c.mix(key ^ c.mix(sessions.user.astype(np.uint64) * c.GOLDEN + day))
            slot = np.arange(1, config.popular_candidates + config.genre_candidates + 2, dtype=np.uint64)
            bits = c.mix(key[:, None] + slot * c.GOLDEN)
        out = np.empty((len(key), config.candidates), dtype=np.int32)
        few, many = config.popular_candidates, config.popular_candidates + config.genre_candidates
        popular, by_genre = bits[:, :few], bits[:, few:many]
        out[:, :few] = items.popular_table[popular >> np.uint64(64 - items.popular_bits)]
        genre = np.take_along_axis(
            users.genre_slot[sessions.user],
            (by_genre & np.uint64(w.GENRE_SLOTS - 1)).astype(np.int64),
            axis=1,
        )
        at = (by_genre >> np.uint64(64 - items.genre_bits)).astype(np.int64)
        out[:, few:many] = items.genre_table[(genre.astype(np.int64) << items.genre_bits) + at]
        # The rest is spread evenly over the items that exist: different ones always, so that no list is
        # short.
        spread = config.explore_candidates
        start = (bits[:, many] >> np.uint64(33)).astype(np.int64) % sessions.born
        stride = sessions.born // spread
        out[:, many:] = (start[:, None] + stride[:, None] * np.arange(spread)) % sessions.born[:, None]
        out.sort(axis=1)
        counts = out < sessions.born[:, None]
        counts[:, 1:] &= out[:, 1:] != out[:, :-1]
        return out, counts

    def _log_weights(self, sessions: _Sessions, candidates: np.ndarray) -> np.ndarray:
        """The policy's score S of each candidate: log of its weight, float32 [S, C]."""
        config, items = self.config, self._items
        guess = self._taste(sessions.user, sessions.time) + self._users.policy_error[sessions.user]
        guess *= np.float32(config.policy_taste)
        score = np.matmul(items.vector[candidates], guess[:, :, None])[:, :, 0]
        score += items.policy_base[candidates]
        angle = items.wave[candidates] * sessions.time.astype(np.float32)[:, None] + items.phase[candidates]
        score += np.float32(config.popularity_drift) * np.sin(angle)
        if config.scenarios > 1:
            score += items.scenario_tilt[sessions.scenario[:, None], items.genre[candidates]]
        return score

    def _lists(self, block: int, sessions: _Sessions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items [S, K], which are there [S, K], and the propensity of each."""
        config = self.config
        candidates, counts = self._candidates(sessions)
        score = self._log_weights(sessions, candidates)
        score[~counts] = -np.inf
        draw = c.random(config.seed, c.LISTS, block)
        noise = draw.standard_exponential(score.shape, dtype=np.float32)
        if config.policy == "list":
            items, propensity = self._plackett_luce(candidates, score, noise)
            shown = np.ones(items.shape, dtype=bool)
        else:
            items, shown, propensity = self._poisson(candidates, score, noise)
        uniform = np.flatnonzero(sessions.random)
        picks = self._uniform(draw, sessions.born[uniform])
        length = config.list_length
        items[uniform, :length] = picks
        shown[uniform] = np.arange(items.shape[1]) < length
        born = sessions.born[uniform, None].astype(np.float64)
        if config.policy == "list":
            propensity[uniform] = 1.0 / (born - np.arange(length))
        else:
            propensity[uniform] = length / born
        # The log ends at exactly `rows`: the last list may be cut, and the sessions after it are none.
        index = block * c.SESSIONS_PER_BLOCK + np.arange(c.SESSIONS_PER_BLOCK)
        shown[index >= config.n_sessions] = False
        if config.policy == "list" and block == config.n_blocks - 1:
            row = index[:, None] * config.list_length + np.arange(config.list_length)
            shown &= row < config.rows
        return items, shown, propensity

    def _plackett_luce(
        self, candidates: np.ndarray, score: np.ndarray, noise: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The K largest of score + Gumbel noise: an ordered draw without replacement, by weights exp(score)."""
        length = self.config.list_length
        # log E of an exponential E is a Gumbel variable with the sign turned.
        key = np.log(np.maximum(noise, np.float32(1e-30))) - score
        top = np.argpartition(key, length - 1, axis=1)[:, :length]
        order = np.argsort(np.take_along_axis(key, top, axis=1), axis=1, kind="stable")
        top = np.take_along_axis(top, order, axis=1)
        weight = np.exp((score - score.max(axis=1, keepdims=True)).astype(np.float64))
        picked = np.take_along_axis(weight, top, axis=1)
        # What is left before pick k is added up from below: subtracting from the total would cancel.
        np.put_along_axis(weight, top, 0.0, axis=1)
        left = weight.sum(axis=1, keepdims=True) + np.cumsum(picked[:, ::-1], axis=1)[:, ::-1]
        return np.take_along_axis(candidates, top, axis=1), picked / left

    def _poisson(
        self, candidates: np.ndarray, score: np.ndarray, noise: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each candidate independently, by probabilities 1 - exp(-tau w) that add up to K; ordered by score."""
        weight = np.exp((score - score.max(axis=1, keepdims=True)).astype(np.float64))
        length = self.config.list_length
        tau = length / weight.sum(axis=1, keepdims=True)
        # The sum is concave in tau and starts below K, so that Newton's method climbs to the root from the
        # left.
        for _ in range(60):
            rest = np.exp(-tau * weight)
            step = (length - (1 - rest).sum(1, keepdims=True)) / (weight * rest).sum(1, keepdims=True)
            tau += np.maximum(step, 0)
            if step.max() <= 1e-12 * tau.max():
                break
        probability = -np.expm1(-tau * weight)
        if self.config.overlap:
            probability = np.where(weight > 0, np.maximum(probability, _SCORE_FLOOR), 0)
        # exp(-noise) is uniform.
        chosen = -np.expm1(-noise.astype(np.float64)) < probability
        width = max(int(chosen.sum(1).max()), length)
        key = np.where(chosen, -score, np.inf)
        top = np.argsort(key, axis=1, kind="stable")[:, :width]
        shown = np.take_along_axis(chosen, top, axis=1)
        return (
            np.take_along_axis(candidates, top, axis=1),
            shown,
            np.take_along_axis(probability, top, axis=1),
        )

    def _uniform(self, draw: np.random.Generator, born: np.ndarray) -> np.ndarray:
        """K different ones of `born` items, uniform over ordered lists: int64 [R, K]."""
        length = self.config.list_length
        level = draw.random((len(born), length))
        picks = np.empty((len(born), length), dtype=np.int64)
        for k in range(length):
            # The x-th of the items not yet taken: step over each taken one at or below it, in ascending
            # order.
            x = (level[:, k] * (born - k)).astype(np.int64)
            taken = np.sort(picks[:, :k], axis=1)
            for j in range(k):
                x += x >= taken[:, j]
            picks[:, k] = x
        return picks

    def _causes(self, sessions: _Sessions, items: np.ndarray) -> dict[str, np.ndarray]:
        """The logit terms of P(R = 1), float64 [S, K] or [S, 1]."""
        config, world, users = self.config, self._items, self._users
        user, scenario = sessions.user, sessions.scenario
        taste = np.matmul(world.vector[items], self._taste(user, sessions.time)[:, :, None])[:, :, 0]
        direction = world.direction[items]
        similarity = np.matmul(direction, direction.transpose(0, 2, 1))
        rank = np.arange(items.shape[1])
        above = np.where(rank[:, None] > rank, similarity, 0).max(axis=2).clip(0, 1)
        age = np.maximum(sessions.time[:, None] - world.born[items], 0) / w.DAY
        swing = (sessions.hour[:, None] - world.genre_peak_hour[world.genre[items]]) * (2 * np.pi / 24)
        price_factor = -users.price[user] * w.SCENARIO_PRICE[scenario]
        return {
            "bias": config.bias + w.SCENARIO_BIAS[scenario][:, None],
            "context": w.DEVICE_BIAS[sessions.device][:, None],
            "taste": config.taste * taste.astype(np.float64),
            "quality": config.quality * world.quality[items].astype(np.float64),
            "price": price_factor[:, None] * world.price_term[items].astype(np.float64),
            "freshness": config.freshness * np.exp(-age / config.freshness_days),
            "season": config.season * np.cos(swing),
            "diversity": users.diversity[user][:, None] * (1.0 - above.astype(np.float64)),
        }

    def _frame(self, block: int) -> pl.DataFrame:
        made, users, items = self._block(block), self._users, self._items
        shown, sessions = made.shown, made.sessions
        count = shown.sum(1)
        session = np.repeat(np.arange(len(count)), count)
        item = made.items[shown]
        user = sessions.user[session]
        position = np.broadcast_to(np.arange(1, shown.shape[1] + 1, dtype=np.int16), shown.shape)[shown]
        click = (made.relevant & made.examined)[shown]
        number = block * c.SESSIONS_PER_BLOCK + session
        columns: dict[str, Any] = {
            "user": users.raw_id[user],
            "item": items.raw_id[item],
            "time": c.START + np.floor(sessions.time).astype(np.int64)[session],
            "session": w.SESSION_ID[0] + w.SESSION_ID[1] * number,
            "position": position,
            "hour": sessions.hour.astype(np.int16)[session],
            "scenario": w.labels(titles.SCENARIOS, sessions.scenario[session]),
            "device": w.labels(titles.DEVICES, sessions.device[session]),
            "age_band": w.labels(titles.AGE_BANDS, users.age_band[user]),
            "city": w.labels(titles.CITIES, users.city[user]),
            "genre": w.labels(titles.GENRES, items.genre[item]),
            "price_bucket": w.labels(titles.PRICE_BUCKETS, items.price_bucket[item]),
            "click": click.astype(np.int8),
            "conversion": (click & made.converting[shown]).astype(np.int8),
            "random": sessions.random.astype(np.int8)[session],
            "propensity": made.propensity[shown].astype(np.float32),
        }
        if self.config.extra_fields:
            draw = c.random(self.config.seed, c.EXTRAS, block)
            for name, size in NOISE_FIELDS.items():
                columns[name] = draw.integers(0, size, shown.shape, dtype=np.int32)[shown]
            columns["genre_copy"] = columns["genre"]
        return pl.DataFrame(columns)


def check_folder(path: Path, config: c.Config) -> bool:
    """Whether the folder holds the whole log of these options; raise if it holds that of others."""
    truth = path / "truth.json"
    if not truth.is_file():
        return False
    try:
        found = json.loads(truth.read_text(encoding="utf-8"))["config"]
        names = sorted(found.keys() | config.to_dict().keys())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"synthetic: {truth} is not the truth.json of a generated log") from None
    for name in names:
        want = config.to_dict().get(name)
        if found.get(name) != want:
            raise InputError(
                f"synthetic: {path} holds a log with {name} = {found.get(name)!r}, and {want!r} is asked for: "
                "give another folder"
            )
    return True


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        frame.write_parquet(temporary, compression="zstd", compression_level=1, statistics=True)


def bayes(probability: np.ndarray) -> dict[str, float]:
    """What the best possible model reaches on rows whose true probabilities of a click are given.

    Parameters
    ----------
    probability : float [R]
        `p_click` of `Generator.truth_of`.

    Returns
    -------
    dict
        `logloss`, the mean entropy in nats, and `auc`, the expected area under the curve of ranking by the
        probability itself (equal ones count half); nan where all probabilities are 0 or all are 1.
    """
    p = np.sort(np.asarray(probability, dtype=np.float64))
    inside = p[(p > 0) & (p < 1)]
    loss = -(inside * np.log(inside) + (1 - inside) * np.log1p(-inside)).sum() / max(len(p), 1)
    value, first = np.unique(p, return_index=True)
    total = np.concatenate([[0.0], np.cumsum(1 - p)])
    last = np.append(first[1:], len(p))
    same = total[last] - total[first]
    positive = np.add.reduceat(p, first) if len(p) else p
    won = (positive * (total[first] + 0.5 * same)).sum() if len(value) else 0.0
    pairs = positive.sum() * total[-1]
    # A row does not compete with itself.
    own = (p * (1 - p)).sum()
    return {
        "logloss": float(loss),
        "auc": float((won - 0.5 * own) / (pairs - own)) if pairs > own else math.nan,
    }
