"""Known data sets by name, from the files of their publishers, which are never shipped with recfast."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recfast.data.dataset import Dataset
from recfast.data.folder import load_folder
from recfast.data.prepare import prepare, prepare_libfm
from recfast.data.schema import Categorical, Schema, Sequence, nearest
from recfast.data.sources import byte_chunks, first_line
from recfast.errors import InputError

ML_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_AGE_FROM = (18, 25, 35, 45, 50, 56)
_AGES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "over 55")
FRAPPE_FIELDS = (
    "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city",
)  # fmt: skip
_FRAPPE_ABOUT = {
    True: "Frappe: which apps people use in which context.",
    False: "Frappe: which apps people use in which context; train negatives re-drawn.",
}


def load(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Dataset:
    """Load a data set by name.

    Parameters
    ----------
    name
        "ml-100k" (`load_ml_100k`), "frappe" (`load_frappe`), "gowalla" (`load_gowalla`), "synthetic"
        (`recfast.data.synthetic.load`), or "folder" for a log of one's own (`load_folder`).
    path
        The folder of its files; only "synthetic" needs none.
    cache
        Where prepared data are kept; see `recfast.data.prepare`.
    **options
        Options of that data set.

    Raises
    ------
    InputError
        An unknown name or option, or a folder without the files, which the sentence names.
    """
    if name == "synthetic":
        # Imported here: the generator builds on this package.
        from recfast.data import synthetic

        if cache is not None:
            options["cache"] = cache
        return synthetic.load(path, rows=options.pop("rows", 60_000), seed=options.pop("seed", 0), **options)
    loaders: dict[str, tuple[Callable[..., Dataset], tuple[str, ...]]] = {
        "ml-100k": (load_ml_100k, ("negatives", "popular_negatives", "seed", "max_length")),
        "frappe": (load_frappe, ()),
        "gowalla": (load_gowalla, ("valid_share", "select_on_test", "seed")),
        "folder": (load_folder, ("name", "sampled")),
    }
    if name not in loaders:
        raise InputError(f"data.load: there is no data set {name!r}; " + nearest(name, [*loaders, "synthetic"]))
    loader, known = loaders[name]
    for option in options:
        if option not in known:
            raise InputError(f"data.load: {name} has no option {option!r}; " + nearest(option, known))
    return loader(path, cache=cache, **options)


def _find(name: str, path: str | os.PathLike[str] | None, files: tuple[str, ...]) -> list[Path]:
    """Return the files of a data set, plain or .zst."""
    expected = f"expected a folder with {', '.join(files)} (plain or .zst)"
    if path is None:
        raise InputError(f"data.load: {name} needs path=; {expected}")
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"data.load: {folder} is not a folder; {expected}")
    found = []
    for file in files:
        here = next((p for p in (folder / file, folder / f"{file}.zst") if p.is_file()), None)
        if here is None:
            raise InputError(f"data.load: {folder} has no {file} or {file}.zst; {expected}")
        found.append(here)
    return found


def _read_table(path: Path, separator: str, schema: dict[str, Any], encoding: str = "utf-8") -> pl.DataFrame:
    try:
        text = b"".join(byte_chunks(path)).decode(encoding)
        return pl.read_csv(
            io.BytesIO(text.encode()),
            separator=separator,
            has_header=False,
            schema=schema,
            quote_char=None,
            truncate_ragged_lines=False,
        )
    except (pl.exceptions.PolarsError, OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"data.load: {path} is not what it should be ({first_line(error)})") from None


def load_ml_100k(
    path: str | os.PathLike[str] | None,
    *,
    negatives: int = 4,
    popular_negatives: float = 0.0,
    seed: int = 0,
    max_length: int = 50,
    cache: str | os.PathLike[str] | None = None,
) -> Dataset:
    """MovieLens 100K as a click log (Harper and Konstan, ACM TiiS 5(4), 2015).

    943 users, 1,682 films, 100,000 ratings. A rating of 4 or 5 is a positive, a lower one a negative. To each
    positive row `negatives` films are added that the user never rated in any split, drawn uniformly, with the
    positive's timestamp; they are marked, so `Dataset.seen` leaves them out. Each user's ratings, in time
    order (ties by the order of the file), are split 80 % train, 10 % valid, 10 % test.

    Columns: user, age (bucket), gender, occupation; item, genre (the first of the film's genres in the order
    of u.genre), year (of release: the decade before 1990, then the year); history. The genre list and the
    title are in `Dataset.items`.

    Its licence forbids redistribution: nothing of it may be copied into a project or a wheel.

    Parameters
    ----------
    path
        The folder with u.data, u.item, u.user (plain or .zst).
    negatives
        Drawn per positive row; 0 for none.
    popular_negatives
        Share of them, in [0, 1], drawn in proportion to the likes in the train split (plus one) instead of uniformly.
        A model that only ever met uniform negatives knows popular films from others, and little of order among
        the popular ones that a retriever hands it.
    seed
        Of the drawing (Philox).
    max_length
        Of the history.
    cache
        As in `prepare`.
    """
    if isinstance(negatives, bool) or not isinstance(negatives, int) or negatives < 0:
        raise InputError(f"data.load: ml-100k: negatives = {negatives!r} is not a whole number from 0 on")
    if not 0 <= popular_negatives <= 1:
        raise InputError(f"data.load: ml-100k: popular_negatives = {popular_negatives!r} is not a share in [0, 1]")
    data_path, item_path, user_path = _find("ml-100k", path, ("u.data", "u.item", "u.user"))
    ratings = _read_table(data_path, "\t", {"user": pl.Int64, "item": pl.Int64, "rating": pl.Int64, "time": pl.Int64})
    flags = {f"genre{i}": pl.Int8 for i in range(len(ML_GENRES))}
    item_schema = {
        "item": pl.Int64,
        "title": pl.String,
        "date": pl.String,
        "video": pl.String,
        "url": pl.String,
        **flags,
    }
    films = _read_table(item_path, "|", item_schema, "latin-1")
    people = _read_table(
        user_path,
        "|",
        {"user": pl.Int64, "age": pl.Int64, "gender": pl.String, "occupation": pl.String, "zip": pl.String},
    )

    for column, frame, path in (("item", films, item_path), ("user", people, user_path)):
        missing = ratings[column].filter(~ratings[column].is_in(frame[column].implode()))
        if missing.len():
            raise InputError(
                f"data.load: {data_path} names {column} {missing[0]}, which {path} does not hold; expected all of them"
            )

    genres = pl.concat_list(
        [pl.when(pl.col(f"genre{i}") == 1).then(pl.lit(genre)) for i, genre in enumerate(ML_GENRES)]
    ).list.drop_nulls()
    year = pl.col("date").str.tail(4).cast(pl.Int64, strict=False)
    items = films.select(
        "item",
        "title",
        genres=genres,
        genre=genres.list.first().fill_null("unknown"),
        year=pl.when(year.is_null())
        .then(pl.lit("unknown"))
        .when(year < 1990)
        .then((year // 10 * 10).cast(pl.String) + "s")
        .otherwise(year.cast(pl.String)),
    )
    users = people.select(
        "user",
        pl.Series("age", _AGES)[np.searchsorted(_AGE_FROM, people["age"].to_numpy(), side="right")],
        "gender",
        "occupation",
    )

    log = ratings.with_row_index("row").with_columns(label=(pl.col("rating") >= 4).cast(pl.Int8), sampled=pl.lit(False))
    # The position of a rating in its user's time order decides its split.
    by_time = log.sort(["user", "time", "row"]).with_columns(
        share=pl.int_range(pl.len()).over("user") / pl.len().over("user")
    )
    log = by_time.sort("row").with_columns(
        split=pl.when(pl.col("share") < 0.8).then(0).when(pl.col("share") < 0.9).then(1).otherwise(2)
    )
    if negatives:
        log = _with_negatives(log, films["item"].to_numpy(), negatives, popular_negatives, seed)
    parts = [
        log.filter(pl.col("split") == code).select("user", "item", "label", "time", "sampled") for code in range(3)
    ]
    schema = Schema(
        [
            Categorical("user", role="user"),
            Categorical("age", side="user"),
            Categorical("gender", side="user"),
            Categorical("occupation", side="user"),
            Categorical("item", role="item"),
            Categorical("genre", side="item"),
            Categorical("year", side="item"),
            Sequence("history", of="item", max_length=max_length),
        ],
        label="label",
        time="time",
        group="user",
    )
    drawn = f", {negatives} unseen films drawn as negatives for each" if negatives else ""
    return prepare(
        schema,
        *parts,
        items=items,
        users=users,
        sampled="sampled",
        cache=cache,
        name="ml-100k",
        about=f"MovieLens 100K: 100,000 ratings of films; 4 or 5 counts as liked{drawn}. Split by time "
        "within each user.",
    )


def _with_negatives(log: pl.DataFrame, catalogue: np.ndarray, count: int, popular: float, seed: int) -> pl.DataFrame:
    """Add `count` items that its user never rated after each positive row."""
    # Position of the item in the catalogue; user and position make one key.
    order = np.argsort(catalogue)
    position = order[np.searchsorted(catalogue, log["item"].to_numpy(), sorter=order)]
    user = log["user"].to_numpy()
    rated = np.unique(user * len(catalogue) + position)
    full = np.flatnonzero(np.bincount(rated // len(catalogue)) >= len(catalogue))
    if full.size:
        raise InputError(f"data.load: user {full[0]} rated every item, so that no negative can be drawn")
    positives = log.filter(pl.col("label") == 1)
    drawn = positives.select(pl.exclude("item", "label", "sampled")).with_columns(
        pl.lit(0, dtype=pl.Int8).alias("label"), pl.lit(True).alias("sampled")
    )
    drawn = pl.concat([drawn] * count).with_columns(
        pl.int_range(1, count + 1).repeat_by(positives.height).explode().alias("draw")
    )
    random = np.random.Generator(np.random.Philox(seed))
    who = drawn["user"].to_numpy()
    likes = ((log["label"] == 1) & (log["split"] == 0)).to_numpy()
    reach = np.cumsum(np.bincount(position[likes], minlength=len(catalogue)) + 1)
    by_likes = random.random(drawn.height) < popular

    def draw(rows: np.ndarray) -> np.ndarray:
        uniform = random.integers(len(catalogue), size=rows.size)
        liked = np.searchsorted(reach, random.integers(reach[-1], size=rows.size), side="right")
        return np.where(by_likes[rows], liked, uniform)

    item = draw(np.arange(drawn.height))
    again = np.arange(drawn.height)
    while again.size:
        key = who[again] * len(catalogue) + item[again]
        place = np.minimum(np.searchsorted(rated, key), len(rated) - 1)
        again = again[rated[place] == key]
        item[again] = draw(again)
    drawn = drawn.with_columns(pl.Series("item", catalogue[item]))
    columns = [*log.columns, "draw"]
    log = log.with_columns(pl.lit(0, dtype=pl.Int64).alias("draw"))
    return pl.concat([log.select(columns), drawn.select(columns)]).sort(["row", "draw"]).drop("draw")


def load_frappe(path: str | os.PathLike[str] | None, *, cache: str | os.PathLike[str] | None = None) -> Dataset:
    """Frappe, app usage in context (Baltrunas et al., arXiv:1505.03014), in the split of BARS `frappe_x1`.

    Ten categorical fields: user, item, daytime, weekday, isweekend, homework, cost, weather, country, city;
    label -1 becomes 0. 202,027 train, 57,722 validation and 28,860 test rows. There is no time, hence no
    history.

    Train negatives re-drawn: validation and test are the published files, but in the train file here the item
    of each negative was drawn again by the published rule, because the original file is not at hand. Say so
    beside every number.

    For research only; its terms forbid redistribution.

    Parameters
    ----------
    path
        The folder with frappe.train.rebuilt.libfm (or the original frappe.train.libfm),
        frappe.validation.libfm and frappe.test.libfm (plain or .zst).
    cache
        As in `prepare`.
    """
    rebuilt = "frappe.train.rebuilt.libfm"
    original = "frappe.train.libfm"
    has_original = path is not None and any((Path(path) / f"{original}{end}").is_file() for end in ("", ".zst"))
    files = _find(
        "frappe",
        path,
        (original if has_original else rebuilt, "frappe.validation.libfm", "frappe.test.libfm"),
    )
    return prepare_libfm(*files, FRAPPE_FIELDS, cache=cache, name="frappe", about=_FRAPPE_ABOUT[has_original])


def load_gowalla(
    path: str | os.PathLike[str] | None,
    *,
    valid_share: float = 0.0,
    select_on_test: bool = False,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Gowalla, places that people checked in at, in the split of LightGCN (He et al., SIGIR 2020), BARS `gowalla_m1`.

    29,858 users, 40,981 items, 810,128 train and 217,242 test pairs. Every row is a positive; there is no time, hence
    no order and no sequence: a model is given a user's other items (`history="others"`).

    Of the pairs of a user, some are drawn for the valid split with `valid_share`. The published results have none:
    their epoch was chosen on the test pairs. `select_on_test` does the same, for comparison with them only.

    Parameters
    ----------
    path
        The folder with train.txt (or train.recovered.txt) and test.txt (plain or .zst). A line is a user and the items
        of this user; one without items is passed over, an item that comes twice counts once.
    valid_share
        Share of each user's train pairs that become the valid split, in [0, 1), rounded; a user keeps one pair in
        train at least, and so does an item.
    select_on_test
        The test pairs are the valid split too, and there is no test split.
    seed
        Of the drawing (Philox).
    cache
        As in `prepare`.
    """
    if isinstance(valid_share, bool) or not isinstance(valid_share, int | float) or not 0 <= valid_share < 1:
        raise InputError(f"data.load: gowalla: valid_share = {valid_share!r} is not a share in [0, 1)")
    if valid_share and select_on_test:
        raise InputError("data.load: gowalla: valid_share and select_on_test both say what the valid split is")
    recovered = "train.recovered.txt"
    has_recovered = path is not None and any((Path(path) / f"{recovered}{end}").is_file() for end in ("", ".zst"))
    files = _find("gowalla", path, (recovered if has_recovered else "train.txt", "test.txt"))
    train, test = (_read_user_lines(file) for file in files)
    valid = None
    if select_on_test:
        valid, test = test, None
    elif valid_share:
        held = _drawn_pairs(train, valid_share, seed)
        train, valid = train.filter(~held), train.filter(held)
    about = "Gowalla: places that people checked in at, each pair of user and place once, without time."
    schema = Schema([Categorical("user", role="user"), Categorical("item", role="item")], label=None)
    return prepare(schema, train, valid, test, cache=cache, name="gowalla", about=about)


def _read_user_lines(path: Path) -> pl.DataFrame:
    """Read lines ``user item item ...`` as distinct pairs, in the order of the file."""
    try:
        text = b"".join(byte_chunks(path))
    except (OSError, EOFError) as error:
        raise InputError(f"data.load: {path} is not what it should be ({first_line(error)})") from None
    users, items = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            ids = np.array(line.split(), dtype=np.int64)
        except (ValueError, OverflowError):
            ids = np.array([-1])
        if ids.size and ids.min() < 0:
            raise InputError(f"data.load: {path}, line {number} is not a user and items, each a whole number from 0 on")
        if ids.size > 1:
            users.append(np.full(ids.size - 1, ids[0]))
            items.append(ids[1:])
    if not users:
        raise InputError(f"data.load: {path} has no line with a user and items")
    pairs = pl.DataFrame({"user": np.concatenate(users), "item": np.concatenate(items)})
    return pairs.unique(maintain_order=True)


def _drawn_pairs(pairs: pl.DataFrame, share: float, seed: int) -> np.ndarray:
    """Draw so many pairs of each user, bool [n], but never the only one of a user, nor all of an item."""
    user, item = (np.unique(pairs[name].to_numpy(), return_inverse=True)[1] for name in ("user", "item"))
    count = np.bincount(user)
    order = np.lexsort((np.random.Generator(np.random.Philox(seed)).random(len(user)), user))
    place = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    held = np.zeros(len(user), dtype=bool)
    held[order] = place < np.minimum(np.rint(share * count), count - 1)[user[order]]
    lost = np.bincount(item[~held], minlength=item.max() + 1) == 0
    return held & ~lost[item]
