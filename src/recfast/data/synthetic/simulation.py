"""Sessions, lists and outcomes of the generated world, block by block."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recfast.data.synthetic import config as c
from recfast.data.synthetic import world as w

CAUSES = "bias", "context", "taste", "quality", "price", "freshness", "season", "diversity", "history"
"""The additive terms of the logit of P(R = 1)."""

_ONE = 1 << 24
"""Probabilities are multiples of 2^-24, and are compared with whole random numbers below 2^24."""

_PROBABILITY_FLOOR = 0.002


class Sessions(NamedTuple):
    """Arrays over the S sessions of a block."""

    time: np.ndarray  # float64, whole seconds after START, ascending
    hour: np.ndarray  # int64
    user: np.ndarray  # int64, position
    scenario: np.ndarray  # int8
    device: np.ndarray  # int8
    random: np.ndarray  # bool
    born: np.ndarray  # int64, items that exist


class Block(NamedTuple):
    """A block: per session, and per shown item [S, K], of which `shown` are there."""

    sessions: Sessions
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


def _grid(probability: np.ndarray) -> np.ndarray:
    return np.rint(probability * _ONE) / _ONE


class Simulation:
    """The causal graph as arrays: a block of sessions is a function of configuration and number alone."""

    def __init__(self, config: c.Config) -> None:
        self.config = config
        self.items = w.Items(config)
        self.users = w.Users(config, self.items)
        self.pasts = w.Pasts(config, self.items)
        self._last: tuple[int, Block] | None = None

    def block(self, block: int) -> Block:
        """Block `block` of 1 024 sessions; the last one asked for is remembered."""
        if self._last is not None and self._last[0] == block:
            return self._last[1]
        sessions = self._sessions(block)
        items, shown, propensity = self._lists(block, sessions)
        causes = self.causes(sessions, items)
        relevance, examination, conversion = self.probabilities(sessions, items, causes)
        draw = c.random(self.config.seed, c.OUTCOMES, block)
        fate = draw.integers(0, _ONE, (3, *items.shape), dtype=np.uint32)
        made = Block(
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

    def probabilities(
        self, sessions: Sessions, items: np.ndarray, causes: dict[str, np.ndarray]
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

    def _sessions(self, block: int) -> Sessions:
        config, users, items = self.config, self.users, self.items
        size = c.SESSIONS_PER_BLOCK
        draw = c.random(config.seed, c.SESSIONS, block)
        # Session s of n comes at quantile (s + U) / n of the traffic: the log is in order without sorting.
        index = block * size + np.arange(size)
        quantile = np.minimum((index + draw.random(size)) / config.n_sessions, np.nextafter(1.0, 0.0))
        time = np.floor(np.interp(quantile, users.traffic_sum, np.arange(len(users.traffic_sum)) * 3600.0))
        hour = (time // 3600).astype(np.int64) % 24

        present = np.stack([np.searchsorted(users.arrival[group], time, side="right") for group in users.group])
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
        device = (users.device_edges[user] <= draw.random(size, dtype=np.float32)[:, None]).sum(1).astype(np.int8)
        is_random = draw.random(size) < config.random_share
        u = draw.random(size, dtype=np.float32)
        scenario = np.zeros(size, dtype=np.int8)
        if users.scenario_edges is not None:
            scenario = (users.scenario_edges[user] <= u[:, None]).sum(1).astype(np.int8)
        born = np.searchsorted(items.born, time, side="right")
        return Sessions(time, hour, user, scenario, device, is_random, born)

    def _taste(self, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        """th_u(t) [S, D]."""
        users = self.users
        angle = (users.turn[user] * time).astype(np.float32)[:, None]
        return users.taste[user] * np.cos(angle) + users.later_taste[user] * np.sin(angle)

    def _candidates(self, sessions: Sessions) -> tuple[np.ndarray, np.ndarray]:
        """Positions of items int32 [S, C], ascending in each row, and which of them count [S, C].

        A function of seed, user and day alone (and of which items exist), so that the recall adds no
        randomness of its own to the propensities.
        """
        config, items, users = self.config, self.items, self.users
        day = (sessions.time // w.DAY).astype(np.uint64)
        with np.errstate(over="ignore"):
            key = c.mix(np.uint64(config.seed) + c.GOLDEN)
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
        # The rest is spread evenly over the items that exist, all different, so that no list is short.
        spread = config.explore_candidates
        start = (bits[:, many] >> np.uint64(33)).astype(np.int64) % sessions.born
        stride = sessions.born // spread
        out[:, many:] = (start[:, None] + stride[:, None] * np.arange(spread)) % sessions.born[:, None]
        out.sort(axis=1)
        counts = out < sessions.born[:, None]
        counts[:, 1:] &= out[:, 1:] != out[:, :-1]
        return out, counts

    def _log_weights(self, sessions: Sessions, candidates: np.ndarray) -> np.ndarray:
        """The policy's score S of each candidate: log of its weight, float32 [S, C]."""
        config, items = self.config, self.items
        guess = self._taste(sessions.user, sessions.time) + self.users.policy_error[sessions.user]
        guess *= np.float32(config.policy_taste)
        score = np.matmul(items.vector[candidates], guess[:, :, None])[:, :, 0]
        score += items.policy_base[candidates]
        angle = items.wave[candidates] * sessions.time.astype(np.float32)[:, None] + items.phase[candidates]
        score += np.float32(config.popularity_drift) * np.sin(angle)
        if config.scenarios > 1:
            score += items.scenario_tilt[sessions.scenario[:, None], items.genre[candidates]]
        return score

    def _lists(self, block: int, sessions: Sessions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        """The K largest of score + Gumbel noise: an ordered draw without replacement, by exp(score)."""
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
        """Each candidate independently, by 1 - exp(-tau w), which add up to K; ordered by score."""
        weight = np.exp((score - score.max(axis=1, keepdims=True)).astype(np.float64))
        length = self.config.list_length
        tau = length / weight.sum(axis=1, keepdims=True)
        # The sum is concave in tau and starts below K: Newton's method climbs to the root from the left.
        for _ in range(60):
            rest = np.exp(-tau * weight)
            step = (length - (1 - rest).sum(1, keepdims=True)) / (weight * rest).sum(1, keepdims=True)
            tau += np.maximum(step, 0)
            if step.max() <= 1e-12 * tau.max():
                break
        probability = -np.expm1(-tau * weight)
        if self.config.overlap:
            probability = np.where(weight > 0, np.maximum(probability, _PROBABILITY_FLOOR), 0)
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
            # The x-th of the items not yet taken: step over the taken ones at or below it, lowest first.
            x = (level[:, k] * (born - k)).astype(np.int64)
            taken = np.sort(picks[:, :k], axis=1)
            for j in range(k):
                x += x >= taken[:, j]
            picks[:, k] = x
        return picks

    def causes(self, sessions: Sessions, items: np.ndarray) -> dict[str, np.ndarray]:
        """The logit terms of P(R = 1), float64 [S, K] or [S, 1]."""
        config, world, users = self.config, self.items, self.users
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
            "history": self._past(user, items),
        }

    def _past(self, user: np.ndarray, items: np.ndarray) -> np.ndarray:
        """What the user's events before the log say of the items' topics, [S, K]; 0 where there are none."""
        if not self.config.history_length:
            return np.zeros((1, 1))
        pasts = self.pasts
        return self.config.history * pasts.interest[user[:, None], pasts.topic[items]].astype(np.float64)
