"""The generated log as a prepared data set."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from recfast.data.synthetic import world as w
from recfast.data.synthetic.config import Config
from recfast.data.synthetic.generator import NOISE_FIELDS, Generator, check_folder, write_parquet
from recfast.errors import InputError
from recfast.files import atomic_path, write_json

if TYPE_CHECKING:
    from recfast.data import Dataset, Schema

SPLITS = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}
"""Shares of the sessions, in order of time: the future is never seen in training."""


def schema(config: Config | None = None, *, max_length: int = 50) -> Schema:
    """What the columns of the log are to a model.

    `position` is no feature: it is not known when candidates are ranked. Left out too are the label's
    relatives (`conversion`), the keys, and what only the truth needs (`random`, `propensity`).

    Parameters
    ----------
    config : Config, optional
        Adds `scenario` where there are several, `topic` where users have a past, and the extra fields where they are
        generated.
    max_length : int
        Of the history.
    """
    from recfast.data import Categorical, Schema, Sequence

    config = config or Config()
    columns = [
        Categorical("user", role="user"),
        Categorical("item", role="item"),
        Categorical("genre", side="item"),
        Categorical("price_bucket", side="item"),
        Categorical("age_band", side="user"),
        Categorical("city", side="user"),
        Categorical("device", side="context"),
        Categorical("hour", side="context"),
    ]
    if config.scenarios > 1:
        columns.append(Categorical("scenario", side="context"))
    if config.extra_fields:
        columns += [Categorical(name, side="context") for name in (*NOISE_FIELDS, "genre_copy")]
    if config.history_length:
        columns.append(Categorical("topic", side="item"))
    columns.append(Sequence("history", of="item", max_length=max_length))
    return Schema(columns, label="click", time="time", group="user")


def write_splits(generator: Generator, path: str | os.PathLike[str]) -> Path:
    """Write the log to a folder in three subfolders, `train`, `valid` and `test`, and the users' pasts, if they have
    any, in a fourth, `before`; whole or not at all.

    Nothing is done where it is already there.

    Raises
    ------
    InputError
        The folder holds something else, or the log is too short to be split.
    """
    path, config = Path(path), generator.config
    if check_folder(path, config):
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"synthetic: {path} is neither a generated log nor an empty folder")
    if config.n_sessions < 20:
        raise InputError(
            f"synthetic: rows = {config.rows} is too few to be split in three: "
            f"at least {20 * config.list_length} are needed"
        )
    with atomic_path(path, directory=True) as folder:
        for name in SPLITS:
            (folder / name).mkdir()
        generator.write_sides(folder)
        first, step = w.SESSION_ID
        for index, part in enumerate(generator.parts()):
            for name, (start, stop) in SPLITS.items():
                low, high = (first + step * round(share * config.n_sessions) for share in (start, stop))
                rows = part.filter((pl.col("session") >= low) & (pl.col("session") < high))
                if rows.height:
                    write_parquet(rows, folder / name / f"part-{index:05d}.parquet")
        for index, part in enumerate(generator.past()):
            (folder / "before").mkdir(exist_ok=True)
            write_parquet(part, folder / "before" / f"part-{index:05d}.parquet")
        write_json(folder / "truth.json", generator.parameters())
    return path


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    rows: int = 60_000,
    seed: int = 0,
    max_length: int = 50,
    cache: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Dataset:
    """The generated log, split by time into 80, 10 and 10 in a hundred sessions, and prepared.

    Parameters
    ----------
    path : path, optional
        An empty or missing folder for the log, or one that holds the log of the same options, which is then
        read. Left out: a folder beside the prepared data whose name is a digest of the options.
    rows : int
        Impressions, 200 at least; see `Config` for the growth of users and items with it.
    seed : int
    max_length : int
        Of the history that a row is given.
    cache : path, optional
        The folder that holds prepared data; see `recfast.data.cache_folder`.
    **options
        The other fields of `Config`. `history_length=10_000` gives every user a past of so many events, on which the
        clicks depend.

    Raises
    ------
    InputError
        An unknown option, a value outside its range, a folder that holds something else.
    """
    from recfast.data import cache_folder, prepare

    config = Config.from_options(rows=rows, seed=seed, **options)
    if path is None:
        key = json.dumps(config.to_dict(), sort_keys=True).encode()
        path = cache_folder(cache) / f"synthetic-{hashlib.blake2b(key, digest_size=6).hexdigest()}"
    folder = Path(path)
    if not check_folder(folder, config):
        write_splits(Generator(config), folder)
    return prepare(
        schema(config, max_length=max_length),
        **{name: folder / name for name in SPLITS},
        before=folder / "before" if config.history_length else None,
        items=folder / "items.parquet",
        users=folder / "users.parquet",
        cache=cache,
        name="synthetic",
        about="An invented bookshop, made by the built-in generator: what was shown to whom, and what was clicked. The "
        "causes of every click are known. Split by time.",
    )
