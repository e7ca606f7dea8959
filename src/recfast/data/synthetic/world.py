"""Who lives in the generated world: genres, items and users, with the latent causes of what they do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import polars as pl

from recfast.data.synthetic import config as c
from recfast.data.synthetic import titles

N_GENRES = len(titles.GENRES)
DAY = 86_400
HOURS = np.arange(24)
CHRONOTYPE_PEAKS = np.array([8, 13, 19, 23])
CHRONOTYPE_SHARES = np.array([0.2, 0.2, 0.4, 0.2])
WEEK = np.array([1.0, 0.95, 0.95, 1.0, 1.1, 1.3, 1.25])
"""Traffic by day of the week, Monday first."""

USER_ID = 1_000_003, 13
ITEM_ID = 5_000_011, 17
SESSION_ID = 700_000_001, 3
"""Raw id = first + step * position: recognisable as an id, never equal to a table row."""

GENRE_SLOTS = 8
POPULAR_TABLE = 16
"""Entries of the sampling table for each item, at the mean."""

SCENARIO_SHARES = np.array([0.70, 0.20, 0.08, 0.02])
SCENARIO_BIAS = np.array([0.0, 0.4, -0.2, -0.8])
SCENARIO_EXAMINATION = np.array([1.0, 1.0 / 0.6, 1.0, 0.0])
"""Factor on the exponent of the examination curve: feeds, search-like (1.0 at the default), flat."""
SCENARIO_PRICE = np.array([1.0, -2.0, 1.0, 1.0])
"""Factor on the effect of the price; the sign of "search" is the opposite one."""
DEVICE_BIAS = np.array([0.0, 0.15, 0.05, -0.3])


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sampling_table(weight: np.ndarray, size: int) -> np.ndarray:
    """Positions repeated in proportion to their weight (systematic resampling): int32 [size].

    A uniform draw from the table is a draw in proportion to the weights, for one memory access.
    """
    edges = np.cumsum(weight, dtype=np.float64)
    marks = (np.arange(size) + 0.5) * (edges[-1] / size)
    return np.searchsorted(edges, marks, side="right").clip(0, len(weight) - 1).astype(np.int32)


class Items:
    """N items in the order of their birth, and the genres they belong to.

    Attributes
    ----------
    vector : float32 [N, D]
        q: genre prototype, topic, publisher and the item's own part.
    direction : float32 [N, D]
        q / |q|, for similarities within a list.
    genre, second_genre : int8 [N]
        Positions in `GENRES`; -1 where there is no second one.
    price_term : float32 [N]
        Standardised logarithm of the price.
    """

    def __init__(self, config: c.Config) -> None:
        self.n = n = config.n_items
        span = config.days * DAY
        shape = c.random(config.seed, c.GENRES)
        # Orthogonal prototypes: a mixture of genres then is no other genre.
        basis = np.linalg.qr(shape.standard_normal((c.WIDTH, c.WIDTH)))[0]
        self.prototype = basis[:N_GENRES].astype(np.float32)
        self.topic_vector = _unit(shape.standard_normal((N_GENRES, titles.TOPICS, c.WIDTH))).astype(np.float32)
        publisher_vector = _unit(shape.standard_normal((len(titles.PUBLISHERS), c.WIDTH))).astype(np.float32)
        order = shape.permutation(N_GENRES)
        self.genre_share = (1.0 + order) ** -0.6
        self.genre_share /= self.genre_share.sum()
        self.genre_peak_hour = shape.uniform(0, 24, N_GENRES)
        self.genre_price = shape.normal(np.log(11.0), 0.25, N_GENRES)
        self.scenario_tilt = shape.normal(0, 0.4, (4, N_GENRES)).astype(np.float32)
        self.scenario_tilt[0] = 0
        self.age_tilt = shape.lognormal(0, 0.8, (len(titles.AGE_BANDS), N_GENRES))

        draw = c.random(config.seed, c.ITEMS)
        self.genre = sampling_draw(draw, self.genre_share, n).astype(np.int8)
        second = sampling_draw(draw, self.genre_share, n).astype(np.int8)
        second[(second == self.genre) | (draw.random(n) > 0.35)] = -1
        self.second_genre = second
        self.topic = draw.integers(0, titles.TOPICS, n, dtype=np.int8)
        # Each genre has its own publishers.
        per_genre = len(titles.PUBLISHERS) // N_GENRES
        self.publisher = (self.genre + N_GENRES * draw.integers(0, per_genre, n)).astype(np.int8)
        vector = 0.85 * self.prototype[self.genre]
        vector += np.where(second[:, None] >= 0, 0.4 * self.prototype[second], 0)
        vector += 0.6 * self.topic_vector[self.genre, self.topic]
        vector += 0.2 * publisher_vector[self.publisher]
        vector += (0.3 / np.sqrt(c.WIDTH)) * draw.standard_normal((n, c.WIDTH), dtype=np.float32)
        self.vector = vector.astype(np.float32)
        self.quality = (0.5 * draw.standard_normal(n)).astype(np.float32)

        cold = round(n * config.cold_items)
        born = np.concatenate([-draw.uniform(0, 730 * DAY, n - cold), draw.uniform(0, span, cold)])
        self.born = np.sort(born)
        log_price = self.genre_price[self.genre] + 0.45 * draw.standard_normal(n)
        self.price = np.round(np.exp(log_price), 2)
        self.price_bucket = np.searchsorted(titles.PRICE_EDGES, self.price, side="right").astype(np.int8)
        self.price_term = ((log_price - np.log(11.0)) / 0.5).astype(np.float32)

        rank = draw.permutation(n) + 1.0
        prior = rank**-config.popularity_exponent
        self.log_popularity = np.log(prior).astype(np.float32)
        # Popularity moves slowly and is known beforehand: no state is carried from row to row.
        self.wave = (2 * np.pi / (DAY * draw.uniform(20, 90, n))).astype(np.float32)
        self.phase = draw.uniform(0, 2 * np.pi, n).astype(np.float32)
        self.policy_base = (
            config.policy_quality * self.quality + config.policy_popularity * self.log_popularity
        ).astype(np.float32)

        self.popular_bits = max(12, int(POPULAR_TABLE * n - 1).bit_length())
        self.popular_table = sampling_table(prior, 1 << self.popular_bits)
        self.genre_bits = max(10, int(POPULAR_TABLE * n // N_GENRES).bit_length())
        self.genre_table = np.stack(
            [
                # A genre that no item has (tiny catalogues) falls back on all items.
                sampling_table(np.where(inside, prior, 0) if inside.any() else prior, 1 << self.genre_bits)
                for inside in (self.genre == g for g in range(N_GENRES))
            ]
        ).reshape(-1)

    @cached_property
    def direction(self) -> np.ndarray:
        return _unit(self.vector)

    @cached_property
    def raw_id(self) -> np.ndarray:
        return ITEM_ID[0] + ITEM_ID[1] * np.arange(self.n, dtype=np.int64)

    def frame(self, config: c.Config) -> pl.DataFrame:
        """What a shop would know of its items: the columns of `items.parquet`."""
        draws = c.random(config.seed, c.TITLES).integers(0, 2**32, (self.n, 6), dtype=np.uint32)
        genres = [
            [titles.GENRES[first]] + ([titles.GENRES[second]] if second >= 0 else [])
            for first, second in zip(self.genre.tolist(), self.second_genre.tolist(), strict=True)
        ]
        columns = {
            "item": self.raw_id,
            "title": titles.make_titles(self.genre, self.topic, self.publisher, draws),
            "genres": pl.Series(genres, dtype=pl.List(pl.String)),
            "genre": labels(titles.GENRES, self.genre),
            "brand": labels(titles.PUBLISHERS, self.publisher),
            "price": self.price,
            "price_bucket": labels(titles.PRICE_BUCKETS, self.price_bucket),
            "born": c.START + np.floor(self.born).astype(np.int64),
        }
        if config.history_length:
            columns["topic"] = self.topic_names(slice(None))
        return pl.DataFrame(columns)

    def topic_names(self, items: slice | np.ndarray) -> pl.Series:
        """Genre and number of the topic, such as "Mystery 2", of the items at these positions."""
        names = tuple(f"{genre} {topic + 1}" for genre in titles.GENRES for topic in range(titles.TOPICS))
        return labels(names, self.genre[items].astype(np.int64) * titles.TOPICS + self.topic[items])


class Users:
    """U users in the order of their arrival.

    Attributes
    ----------
    taste, later_taste : float32 [U, D]
        th and th'; the taste at time t is th cos(w t) + th' sin(w t).
    policy_error : float32 [U, D]
        What the policy gets wrong about the taste.
    diversity : float32 [U]
        Appetite d for what is unlike the items above it; can be negative.
    """

    def __init__(self, config: c.Config, items: Items) -> None:
        self.n = n = config.n_users
        span = config.days * DAY
        draw = c.random(config.seed, c.USERS)
        cold = round(n * config.cold_users)
        self.arrival = np.concatenate([np.zeros(n - cold), np.sort(draw.uniform(0.9 * span, span, cold))])
        self.age_band = sampling_draw(draw, np.array([0.06, 0.18, 0.28, 0.2, 0.18, 0.1]), n).astype(np.int8)
        self.city = sampling_draw(draw, (1.0 + np.arange(len(titles.CITIES))) ** -0.7, n).astype(np.int8)
        self.chronotype = sampling_draw(draw, CHRONOTYPE_SHARES, n).astype(np.int8)
        self.device_edges = np.cumsum(draw.dirichlet(np.array([1.2, 0.6, 0.35, 0.15]), n).astype(np.float32), axis=1)[
            :, :-1
        ].copy()
        self.scenario_edges = None
        if config.scenarios > 1:
            habit = draw.dirichlet(8 * SCENARIO_SHARES[: config.scenarios], n).astype(np.float32)
            self.scenario_edges = np.cumsum(habit, axis=1)[:, :-1].copy()
        # Capped, so that no single person is a visible part of the log.
        self.activity = np.minimum((1 - draw.random(n)) ** (-1 / config.activity_tail), 60.0)
        self.turn = (np.abs(draw.standard_normal(n)) * config.drift / span).astype(np.float32)

        self.taste, liked, weight = self._tastes(draw, items)
        self.later_taste = self._tastes(draw, items)[0]
        noise = config.policy_noise / np.sqrt(c.WIDTH)
        self.policy_error = noise * draw.standard_normal((n, c.WIDTH), dtype=np.float32)
        self.genre_slot = self._genre_slots(draw, liked, weight)
        # Breadth: entropy of the mixture, over that of three equal parts.
        part = np.maximum(weight, 1e-9)
        breadth = -(part * np.log(part)).sum(1) / np.log(3)
        self.diversity = (config.diversity * (0.5 * breadth + 0.3 * draw.standard_normal(n))).astype(np.float32)
        self.price = (config.price * (1 + 0.5 * draw.standard_normal(n))).astype(np.float32)

        # Users of one chronotype in order of arrival, with running sums of activity: who is here at time t is
        # a prefix, so that drawing one of them takes one search.
        self.group = [np.flatnonzero(self.chronotype == g) for g in range(len(CHRONOTYPE_PEAKS))]
        self.group_sum = [np.concatenate([[0.0], np.cumsum(self.activity[members])]) for members in self.group]
        self.hour_profile = np.exp(1.5 * (np.cos((HOURS - CHRONOTYPE_PEAKS[:, None]) * (2 * np.pi / 24)) - 1)) / (
            np.exp(1.5 * (np.cos(HOURS * (2 * np.pi / 24)) - 1)).sum()
        )
        hours = np.arange(config.days * 24)
        traffic = (CHRONOTYPE_SHARES @ self.hour_profile)[hours % 24] * WEEK[hours // 24 % 7]
        self.traffic_sum = np.concatenate([[0.0], np.cumsum(traffic) / traffic.sum()])

    def _tastes(self, draw: np.random.Generator, items: Items) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mixtures of 1 to 3 genres, one topic each: (taste [U, D], genres [U, 3], weights [U, 3])."""
        n = self.n
        share = items.age_tilt * items.genre_share**0.5
        edges = np.cumsum(share / share.sum(1, keepdims=True), axis=1)
        liked = np.empty((n, 3), dtype=np.int8)
        for part in range(3):
            u = draw.random(n, dtype=np.float32)
            for band in range(len(titles.AGE_BANDS)):
                mine = self.age_band == band
                liked[mine, part] = np.searchsorted(edges[band, :-1], u[mine], side="right")
        weight = draw.dirichlet(np.full(3, 2.0), n).astype(np.float32)
        count = sampling_draw(draw, np.array([0.3, 0.45, 0.25]), n) + 1
        weight *= np.arange(3) < count[:, None]
        weight /= weight.sum(1, keepdims=True)
        topic = draw.integers(0, titles.TOPICS, (n, 3), dtype=np.int8)
        taste = np.zeros((n, c.WIDTH), dtype=np.float32)
        for part in range(3):
            one = items.prototype[liked[:, part]] + 0.7 * items.topic_vector[liked[:, part], topic[:, part]]
            taste += weight[:, part, None] ** 0.5 * one
        taste += (0.3 / np.sqrt(c.WIDTH)) * draw.standard_normal((n, c.WIDTH), dtype=np.float32)
        return TASTE_NORM * _unit(taste).astype(np.float32), liked, weight

    def _genre_slots(self, draw: np.random.Generator, liked: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Genres the recall asks for, int8 [U, GENRE_SLOTS]: six by the mixture, two at random."""
        n = self.n
        known = GENRE_SLOTS - 2
        marks = (np.arange(known) + 0.5) / known
        part = (np.cumsum(weight, axis=1)[:, None, :2] < marks[:, None]).sum(2)
        slots = np.empty((n, GENRE_SLOTS), dtype=np.int8)
        slots[:, :known] = np.take_along_axis(liked, part, axis=1)
        slots[:, known:] = draw.integers(0, N_GENRES, (n, 2), dtype=np.int8)
        return slots

    @cached_property
    def raw_id(self) -> np.ndarray:
        return USER_ID[0] + USER_ID[1] * np.arange(self.n, dtype=np.int64)

    def frame(self) -> pl.DataFrame:
        """What a shop would know of its users: the columns of `users.parquet`."""
        return pl.DataFrame(
            {
                "user": self.raw_id,
                "age_band": labels(titles.AGE_BANDS, self.age_band),
                "city": labels(titles.CITIES, self.city),
                "arrived": c.START + np.floor(self.arrival).astype(np.int64),
            }
        )


PAST_STEP = 3_600
"""Seconds from one event of a past to the next; the last is as long before the log begins."""

ERAS = 0.005, 0.02, 0.1, 0.5, 1.0
"""Where the eras of a past end, as shares of it, counted backwards from the log: 50, 200, ... of 10 000 events."""

INTERESTS = 3
"""Topics that a user follows in an era; no topic has two eras."""


class Pasts:
    """What each user liked before the log begins, see `Generator.past`; a function of seed and user alone.

    Attributes
    ----------
    topic : int64 [N]
        The topic of each item among those of all genres.
    interest : float32 [U, topics]
        What the past says of a topic: log(1 + count), less its mean over the topics.
    """

    def __init__(self, config: c.Config, items: Items) -> None:
        self.config = config
        self.topic = items.genre.astype(np.int64) * titles.TOPICS + items.topic
        self.topics = N_GENRES * titles.TOPICS
        # Items are in the order of birth: those born before the log are the first ones.
        self._old = max(1, int(np.searchsorted(items.born, 0.0, side="right")))
        order = np.argsort(self.topic[: self._old], kind="stable")
        self._by_topic = order
        self._first = np.searchsorted(self.topic[order], np.arange(self.topics + 1))
        self._filled = np.flatnonzero(np.diff(self._first))

    def of(self, user: int) -> np.ndarray:
        """Positions of the items that a user liked, oldest first: int64 [history_length]."""
        length = self.config.history_length
        draw = c.random(self.config.seed, c.PASTS, user)
        # Where fewer topics have items, as in a tiny catalogue, some come again.
        followed = np.resize(draw.permutation(self._filled), (len(ERAS), INTERESTS))
        age = np.arange(length, 0, -1)
        era = np.searchsorted(np.ceil(np.array(ERAS) * length), age)
        topic = followed[era, draw.integers(0, INTERESTS, length)]
        count = self._first[topic + 1] - self._first[topic]
        place = self._first[topic] + (draw.random(length) * count).astype(np.int64)
        astray = draw.random(length) < self.config.history_noise
        place = np.where(astray, draw.integers(0, self._old, length), place)
        return self._by_topic[place]

    @cached_property
    def interest(self) -> np.ndarray:
        counts = np.stack(
            [np.bincount(self.topic[self.of(user)], minlength=self.topics) for user in range(self.config.n_users)]
        )
        interest = np.log1p(counts)
        return (interest - interest.mean(axis=1, keepdims=True)).astype(np.float32)

    def frames(self, raw_user: np.ndarray, raw_item: np.ndarray, rows: int = 1 << 21) -> Iterator[pl.DataFrame]:
        """The pasts as a log of about `rows` rows a frame: user, item, time (seconds since 1970)."""
        length = self.config.history_length
        time = c.START - PAST_STEP * np.arange(length, 0, -1, dtype=np.int64)
        step = max(1, rows // max(length, 1))
        for first in range(0, self.config.n_users, step):
            users = np.arange(first, min(first + step, self.config.n_users))
            yield pl.DataFrame(
                {
                    "user": raw_user[users].repeat(length),
                    "item": raw_item[np.concatenate([self.of(int(user)) for user in users])],
                    "time": np.tile(time, len(users)),
                }
            )


TASTE_NORM = 3.6
"""Length of a taste vector: the product with an item then has a standard deviation of about one."""


def sampling_draw(draw: np.random.Generator, share: np.ndarray, n: int) -> np.ndarray:
    """n draws of a position in proportion to `share`."""
    edges = np.cumsum(share) / np.sum(share)
    return np.searchsorted(edges[:-1], draw.random(n), side="right")


def labels(names: tuple[str, ...], codes: np.ndarray) -> pl.Series:
    """The names of the codes."""
    return pl.Series(names, dtype=pl.String).gather(codes.astype(np.uint32))
