"""The log as frames, as files, and its truth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recfast.data.synthetic import config as c
from recfast.data.synthetic import titles
from recfast.data.synthetic import world as w
from recfast.data.synthetic.simulation import CAUSES, Sessions, Simulation
from recfast.errors import InputError
from recfast.files import atomic_path, write_json

NOISE_FIELDS = {"noise_a": 4, "noise_b": 10, "noise_c": 50, "noise_d": 10_000, "noise_e": 100_000}
"""Columns without any cause, and how many values each has."""


class Generator:
    """A log of impressions with known causes.

    A session at time t shows user u an ordered list of items. Item i at position k (from 1) is examined (E)
    with probability k^-eta, is relevant (R) with probability

        P(R = 1) = sigmoid(bias + context + 1.3 <th_u(t), q_i> + 0.6 quality_i - price_u z_i
                           + 0.4 exp(-age / 14 d) + season + d_u (1 - max similarity to the items above)
                           + 0.8 h_ui if users have a past of `history_length` events, see `past`),

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
        self._world = Simulation(self.config)

    # ---- frames and files

    @cached_property
    def items(self) -> pl.DataFrame:
        """item, title, genres, genre, brand, price, price_bucket, born (seconds since 1970): N rows."""
        return self._world.items.frame(self.config)

    @cached_property
    def users(self) -> pl.DataFrame:
        """user, age_band, city, arrived (seconds since 1970): U rows."""
        return self._world.users.frame()

    def part(self, index: int) -> pl.DataFrame:
        """Part `index` of the log, about a third of a million impressions in order of time.

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

        Each file appears whole or not at all, in place of one that was there. With `parts` given only those
        are written, without `truth.json`: several workers may share a folder.

        Returns
        -------
        list of Path
            The part files.
        """
        path = Path(path)
        check_folder(path, self.config)
        path.mkdir(parents=True, exist_ok=True)
        if parts is None or 0 in parts:
            self.write_sides(path)
        written = []
        for index in range(self.config.n_parts) if parts is None else parts:
            target = path / f"part-{index:05d}.parquet"
            write_parquet(self.part(index), target)
            written.append(target)
        if parts is None:
            write_json(path / "truth.json", self.parameters())
        return written

    def write_sides(self, path: Path) -> None:
        """Write `items.parquet` and `users.parquet`, without keeping the frames in memory."""
        write_parquet(self._world.items.frame(self.config), path / "items.parquet")
        write_parquet(self._world.users.frame(), path / "users.parquet")

    def past(self) -> Iterator[pl.DataFrame]:
        """What the users liked before the log begins, users in order and the oldest event first, in frames of about two
        million rows: user, item, time (seconds since 1970).

        `history_length` events a user, one every hour until the log begins. There are five eras, of which the latest
        has 1/200 of the events and the earliest a half; in each the user follows three topics that belong to no other
        era, and one event in ten (`history_noise`) strays to any item that is there when the log begins. A click
        depends on the count n of the item's topic over the whole past: h = log(1 + n), less its mean over the topics.
        So each part of the past tells of interests that no other part does.
        """
        world = self._world
        if not self.config.history_length:
            return iter(())
        return world.pasts.frames(world.users.raw_id, world.items.raw_id)

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
            "propensity": "conditional pick probability" if self.config.policy == "list" else "inclusion probability",
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
                raise InputError(f"synthetic: truth_of needs the column {name!r}; the frame has {frame.columns}")
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
            made = self._world.block(int(block[mine[0]]))
            inside = position[mine] < made.items.shape[1]
            wrong[mine[~inside]] = True
            mine = mine[inside]
            at = row[mine], position[mine]
            wrong[mine] |= ~made.shown[at]
            wrong[mine] |= self._world.users.raw_id[made.sessions.user[at[0]]] != users[mine]
            wrong[mine] |= self._world.items.raw_id[made.items[at]] != items[mine]
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
        scenario: str | Sequence[str] = titles.SCENARIOS[0],
        device: str | Sequence[str] = titles.DEVICES[0],
    ) -> dict[str, np.ndarray]:
        """Probabilities under any lists, shown or not: the value of another policy, a ranking by the truth.

        Parameters
        ----------
        users : int64 [S]
            Raw ids.
        times : int64 or float64 [S]
            Seconds since 1970.
        lists : int64 [S, K]
            Raw ids of the items shown, from the top. Lists of one item give P(R) without an effect of others.
        scenario, device : str or S of them
            The context.

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
        user = _positions("user", np.asarray(users), w.USER_ID, self._world.users.n)
        items = _positions("item", np.asarray(lists), w.ITEM_ID, self._world.items.n)
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
            names = [name] * len(user) if isinstance(name, str) else list(name)
            for one in dict.fromkeys(names):
                if one not in known:
                    raise InputError(f"synthetic: {what} {one!r} is not one of {', '.join(known)}")
            context.append(np.array([known.index(one) for one in names], dtype=np.int8))
        time = np.asarray(times, dtype=np.float64) - c.START
        hour = (time // 3600).astype(np.int64) % 24
        nobody = np.zeros(len(user), dtype=bool)
        sessions = Sessions(time, hour, user, *context, nobody, np.full(len(user), self._world.items.n))
        causes = self._world.causes(sessions, items)
        relevance, examination, conversion = self._world.probabilities(sessions, items, causes)
        out = {
            "p_click": relevance * examination,
            "p_relevance": relevance,
            "p_examine": examination,
            "p_conversion": conversion,
        }
        return {**out, **{name: np.broadcast_to(causes[name], items.shape) for name in CAUSES}}

    def _frame(self, block: int) -> pl.DataFrame:
        made, users, items = self._world.block(block), self._world.users, self._world.items
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
        if self.config.history_length:
            columns["topic"] = items.topic_names(item)
        return pl.DataFrame(columns)


def _positions(what: str, raw: np.ndarray, ids: tuple[int, int], count: int) -> np.ndarray:
    """Positions of raw ids, int64."""
    position, odd = np.divmod(raw.astype(np.int64) - ids[0], ids[1])
    wrong = (odd != 0) | (position < 0) | (position >= count)
    if wrong.any():
        raise InputError(f"synthetic: there is no {what} {raw[wrong].flat[0]} among the {count} of these options")
    return position


def check_folder(path: Path, config: c.Config) -> bool:
    """Whether the folder holds the whole log of these options; raise if it holds that of others."""
    truth = path / "truth.json"
    if not truth.is_file():
        return False
    try:
        found = json.loads(truth.read_text(encoding="utf-8"))["config"]
        names = list(dict.fromkeys([*config.to_dict(), *found]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"synthetic: {truth} is not the truth.json of a generated log") from None
    for name in names:
        want = config.to_dict().get(name)
        if found.get(name) != want:
            raise InputError(
                f"synthetic: {path} holds a log with {name} = {found.get(name)!r}, and {want!r} "
                "is asked for: give another folder"
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
