"""Embedding tables for serving: rows and step sizes, nothing to train."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recfast.errors import InputError
from recfast.files import atomic_path, disk_errors
from recfast.nn._table_group import Names
from recfast.nn._table_lookups import TableLookups

_FORMAT = 1


class FrozenTables(TableLookups):
    """Tables that only answer, as `EmbeddingTables.freeze` makes them; lookups are those of `EmbeddingTables`.

    Parameters
    ----------
    schema_or_specs, dim, precision, skip_missing
        As in `EmbeddingTables`. The rows are zeros until they are filled.
    """

    place = "FrozenTables"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tables to one safetensors file, whole or not at all.

        Raises
        ------
        InputError
            The disk is full or the folder may not be written.
        """
        layout = {
            "format": _FORMAT,
            "dim": self.dim,
            "skip_missing": self.skip_missing,
            "tables": [[name, rows, self.precisions[name]] for name, rows in self.specs],
            "aliases": self.aliases,
        }
        # One tensor a precision: its tables lie in it in order, and a reader can map it as it is.
        tensors = {group.precision: group.rows for group in self.groups}
        with disk_errors("FrozenTables", Path(path)), atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"recfast.tables": json.dumps(layout)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> FrozenTables:
        """Read what `save` wrote.

        Parameters
        ----------
        path
        mmap : bool
            Leave the rows in the file and let the system fetch the pages that are asked for. False: read all now.

        Raises
        ------
        InputError
            The file is missing, truncated, damaged or of another kind.
        """
        place = Path(path)
        if not place.is_file():
            raise InputError(f"FrozenTables: {place} is missing")
        try:
            with safe_open(place, framework="pt") as handle:
                text = (handle.metadata() or {}).get("recfast.tables")
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"FrozenTables: {place} is truncated or damaged, expected a whole safetensors file ({error})"
            ) from None
        try:
            layout = json.loads(text or "{}")
            if layout.get("format") != _FORMAT:
                raise InputError(f"FrozenTables: {place} has the format {layout.get('format')}, expected {_FORMAT}")
            specs = [(str(name), int(rows)) for name, rows, _ in layout["tables"]]
            tables = cls(
                Names(specs, layout["aliases"]),
                layout["dim"],
                {name: kind for name, _, kind in layout["tables"]},
                skip_missing=layout["skip_missing"],
                storage=tensors if mmap else {name: tensor.clone() for name, tensor in tensors.items()},
            )
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"FrozenTables: {place} is damaged, its header does not fit its tensors ({error})"
            ) from None
        return tables.eval()
