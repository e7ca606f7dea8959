"""A log of one's own: a folder that says what its columns are."""

from __future__ import annotations

import os
from pathlib import Path

from recfast.data.dataset import SPLITS, Dataset
from recfast.data.prepare import prepare
from recfast.data.schema import Schema
from recfast.data.sources import table_files
from recfast.errors import InputError


def load_folder(
    path: str | os.PathLike[str] | None,
    *,
    name: str | None = None,
    sampled: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Prepare the log in a folder.

    The folder holds `schema.json` (see `Schema.to_dict`) and, each as a CSV, TSV or Parquet file (also .gz and .zst) or
    as a folder of such files, `train`, and where there are any `valid`, `test`, `items` and `users`.

    Parameters
    ----------
    path
        The folder.
    name
        What reports call the data; the folder's own name if left out.
    sampled, cache
        See `prepare`.

    Raises
    ------
    InputError
        No such folder, a file that is missing or there twice, or anything that `prepare` refuses.

    Examples
    --------
    A `schema.json` for the columns user, item, click and time::

        {"columns": [{"kind": "categorical", "name": "user", "role": "user"},
                     {"kind": "categorical", "name": "item", "role": "item"},
                     {"kind": "sequence", "name": "history", "of": "item"}],
         "label": "click", "time": "time"}
    """
    if path is None:
        raise InputError("data.load: folder needs path=, a folder with schema.json and train.csv or train.parquet")
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"data.load: {folder} is not a folder, expected one with schema.json and train.csv")
    schema = Schema.load(folder / "schema.json")
    tables = {}
    for stem in (*SPLITS, "items", "users"):
        found = [folder / stem] if (folder / stem).is_dir() else []
        found += [file for file in table_files(folder) if file.name.split(".")[0] == stem]
        if len(found) > 1:
            raise InputError(
                f"data.load: {folder} holds both {found[0].name} and {found[1].name}, expected one of them"
            )
        tables[stem] = found[0] if found else None
    if tables["train"] is None:
        raise InputError(
            f"data.load: {folder} holds no train table, expected train.csv, train.parquet or such a folder"
        )
    return prepare(schema, **tables, sampled=sampled, cache=cache, name=name or folder.resolve().name)
