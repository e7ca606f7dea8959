"""What serving must know of a data set: vocabularies, features by id, histories. No training row is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recfast.data.dataset import Batch, Dataset, Jagged, Vocabulary, file_name, load_array, read_frame
from recfast.data.schema import Schema
from recfast.errors import InputError, OutOfRange
from recfast.files import atomic_path, disk_errors, verify_checksums, write_checksums

_ROLES = ("user", "item")


@dataclass(frozen=True)
class Catalogue:
    """Users, items and what happened between them, as a `Pipeline` needs it.

    Attributes
    ----------
    schema
        Fitted, with the roles "user" and "item".
    vocabulary
        "user" and "item" -> `Vocabulary`: raw ids and back.
    features
        role -> "ids" int64 [rows, columns], "numeric" float32 [rows, n], "vectors" name -> float32 [rows, dim].
        The role "context" holds, by user, the values of the last training row.
    history, seen
        By user id: liked items in time order, and every item met. `Jagged` with rows(user) lists.
    sequences
        name -> `Jagged` by user: the last known list of a sequence that the raw data gave, or the history of another
        column than the item. A sequence that is not here is the item history.
    genres
        float32 [rows(item), G], 0 or 1; `genre_names` names the columns.
    items
        Frame in id order: raw id, and title and genres where known.
    """

    schema: Schema
    vocabulary: dict[str, Vocabulary]
    features: dict[str, dict[str, Any]]
    history: Jagged
    seen: Jagged
    sequences: dict[str, Jagged]
    genres: np.ndarray
    genre_names: list[str]
    items: pl.DataFrame

    @classmethod
    def from_dataset(cls, dataset: Dataset, upto: str = "all") -> Catalogue:
        """Gather it from a prepared data set, with histories up to and including the split `upto`."""
        schema = dataset.schema
        for role in _ROLES:
            if getattr(schema, role) is None:
                raise InputError(f"Catalogue: {dataset.name} has no column with the role {role!r}, which serving needs")
        features = {role: {key: dataset.side(role)[key] for key in ("ids", "numeric", "vectors")} for role in _ROLES}
        last = _last_rows(dataset)
        batch = dataset.train.gather(np.maximum(last, 0))
        known = torch.from_numpy(last >= 0)[:, None]
        side = [column.side == "context" for column in schema.categorical]
        numeric_side = [column.side == "context" for column in schema.numeric]
        features["context"] = {
            "ids": (batch.ids * known)[:, side].numpy(),
            "numeric": (batch.numeric * known)[:, numeric_side].numpy(),
            "vectors": {c.name: (batch.vectors[c.name] * known).numpy() for c in schema.vectors if c.side == "context"},
        }
        given = [c.name for c in schema.sequences if c.name not in dataset.meta["derived"]]
        return cls(
            schema=schema,
            vocabulary={role: dataset.vocabulary[getattr(schema, role)] for role in _ROLES},
            features=features,
            history=dataset.history(upto),
            seen=dataset.seen(upto),
            sequences={name: _emptied(batch.sequences[name], last < 0) for name in given} | _derived(dataset, upto),
            genres=dataset.item_features(),
            genre_names=dataset.genre_names,
            items=dataset.items,
        )

    def upto(self, dataset: Dataset, upto: str) -> Catalogue:
        """The same with the histories of `dataset` up to and including another split."""
        return replace(
            self,
            history=dataset.history(upto),
            seen=dataset.seen(upto),
            sequences=self.sequences | _derived(dataset, upto),
        )

    def title(self, item: int) -> str:
        """The title of an item id, or its raw id where there is none."""
        row = self.items.row(item - 1, named=True)
        return str(row.get("title") or row[self.schema.item])

    def genres_of(self, item: int) -> list[str]:
        """The names of an item's genres."""
        return [self.genre_names[g] for g in np.flatnonzero(self.genres[item])]

    def candidates(self, users: Tensor, items: Tensor) -> tuple[Batch, Tensor]:
        """Rows for a ranker: each user with that user's candidates, which share the user's history.

        Parameters
        ----------
        users
            int64 [B], user ids.
        items
            int64 [B, C], item ids; -1 where a user has fewer.

        Returns
        -------
        batch
            `Batch` of R rows, one a candidate, with `candidate_offsets`.
        valid
            bool [B, C]: row r of the batch is the r-th true entry.

        Raises
        ------
        OutOfRange
            A user or an item that the tables have no row for.
        """
        schema = self.schema
        self.check("candidates", "users", users, schema.user)
        self.check("candidates", "items", items, schema.item, padded=True)
        valid = items >= 0
        counts = valid.sum(dim=1)
        user = users.repeat_interleave(counts)
        item = items[valid]
        index = {"user": user, "item": item, "context": user}

        def assemble(columns: list, key: str, dtype: torch.dtype) -> Tensor:
            out = torch.zeros(len(item), len(columns), dtype=dtype)
            for side, rows in index.items():
                places = [j for j, column in enumerate(columns) if column.side == side]
                if places:
                    out[:, places] = torch.from_numpy(self.features[side][key][rows.numpy()]).to(dtype)
            return out

        ids = assemble(schema.categorical, "ids", torch.int64)
        # The ids themselves are exact even for users and items that the side tables do not know.
        ids[:, schema.position(schema.user)] = user
        ids[:, schema.position(schema.item)] = item
        sequences = {}
        for column in schema.sequences:
            lists = self.sequences.get(column.name, self.history)
            sequences[column.name] = lists.take(users, last=column.max_length)
        offsets = torch.zeros(len(users) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=offsets[1:])
        batch = Batch(
            ids=ids,
            numeric=assemble(schema.numeric, "numeric", torch.float32),
            sequences=sequences,
            vectors={
                column.name: torch.from_numpy(
                    self.features[column.side]["vectors"][column.name][index[column.side].numpy()]
                )
                for column in schema.vectors
            },
            candidate_offsets=offsets,
            columns=tuple(column.name for column in schema.categorical),
        )
        return batch, valid

    def check(self, place: str, name: str, ids: Tensor, column: str, *, padded: bool = False) -> None:
        """Refuse ids that the tables of `column` have no row for; -1 is allowed where `padded`."""
        rows = self.schema.rows(column)
        wrong = (ids < (-1 if padded else 0)) | (ids >= rows)
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise OutOfRange(
                f"{place}: {name}[{', '.join(map(str, at))}] = {int(ids[tuple(at)])} is outside [0, {rows}), "
                f"the rows of {column!r}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder of JSON, Parquet and .npy files with their checksums, whole or not at all.

        Raises
        ------
        InputError
            The disk is full, or the place may not be written.
        """
        with disk_errors("Catalogue.save", path), atomic_path(path, directory=True) as folder:
            self.schema.save(folder / "schema.json")
            for role in _ROLES:
                self.vocabulary[role].save(folder / f"{role}.vocabulary.parquet")
            self.items.write_parquet(folder / "items.parquet")
            pl.DataFrame({"genre": pl.Series(self.genre_names, dtype=pl.String)}).write_parquet(
                folder / "genres.parquet"
            )
            for name, array in self._arrays().items():
                np.save(folder / f"{name}.npy", array, allow_pickle=False)
            write_checksums(folder)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {"genres": self.genres}
        lists = {"history": self.history, "seen": self.seen}
        lists |= {f"sequence.{name}": jagged for name, jagged in self.sequences.items()}
        for name, jagged in lists.items():
            stem = file_name(name)
            arrays[f"{stem}.values"], arrays[f"{stem}.offsets"] = jagged.values.numpy(), jagged.offsets.numpy()
        for side, values in self.features.items():
            arrays[f"{side}.ids"], arrays[f"{side}.numeric"] = np.asarray(values["ids"]), np.asarray(values["numeric"])
            for name, vectors in values["vectors"].items():
                arrays[f"{side}.vector.{file_name(name)}"] = np.asarray(vectors)
        return arrays

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Catalogue:
        """Read what `save` wrote. A missing, truncated or damaged file is an `InputError`."""
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(f"Catalogue.load: {folder} is not a folder, expected one that Catalogue.save wrote")
        verify_checksums(folder, "Catalogue.load")
        schema = Schema.load(folder / "schema.json")

        def array(name: str) -> np.ndarray:
            return load_array(folder / f"{name}.npy")

        def jagged(name: str) -> Jagged:
            stem = file_name(name)
            return Jagged(
                torch.from_numpy(np.array(array(f"{stem}.values"))),
                torch.from_numpy(np.array(array(f"{stem}.offsets"))),
            )

        features = {
            side: {
                "ids": np.array(array(f"{side}.ids")),
                "numeric": np.array(array(f"{side}.numeric")),
                "vectors": {
                    c.name: np.array(array(f"{side}.vector.{file_name(c.name)}"))
                    for c in schema.vectors
                    if c.side == side
                },
            }
            for side in ("user", "item", "context")
        }
        return cls(
            schema=schema,
            vocabulary={
                role: Vocabulary.load(folder / f"{role}.vocabulary.parquet", getattr(schema, role)) for role in _ROLES
            },
            features=features,
            history=jagged("history"),
            seen=jagged("seen"),
            sequences={
                c.name: jagged(f"sequence.{c.name}")
                for c in schema.sequences
                if (folder / f"{file_name('sequence.' + c.name)}.values.npy").exists()
            },
            genres=np.array(array("genres")),
            genre_names=read_frame(folder / "genres.parquet")["genre"].to_list(),
            items=read_frame(folder / "items.parquet"),
        )


def _derived(dataset: Dataset, upto: str) -> dict[str, Jagged]:
    """By user, the histories of the derived sequences that list another column than the item."""
    columns = [c for c in dataset.schema.sequences if c.name in dataset.meta["derived"]]
    return {c.name: dataset.history(upto, of=c.of) for c in columns if c.of != dataset.schema.item}


def _last_rows(dataset: Dataset) -> np.ndarray:
    """The position of each user's last training row, int64 [rows(user)]; -1 where there is none."""
    split = dataset.train
    users = split.column(dataset.schema.user)
    order = np.arange(len(split)) if split.time is None else np.argsort(split.time, kind="stable")
    last = np.full(dataset.schema.rows(dataset.schema.user), -1, dtype=np.int64)
    last[users[order]] = order  # the last of several writes to one place stays
    return last


def _emptied(lists: Jagged, where: np.ndarray) -> Jagged:
    """The lists, those at the true positions of `where` made empty."""
    lengths = lists.lengths()
    keep = torch.from_numpy(~where)
    offsets = torch.zeros_like(lists.offsets)
    torch.cumsum(lengths * keep, 0, out=offsets[1:])
    return Jagged(lists.values[keep.repeat_interleave(lengths)], offsets)
