"""Embedding tables for serving: rows and step sizes, nothing to train."""

from __future__ import annotations

import os

from recfast.errors import InputError
from recfast.nn import _table_files
from recfast.nn._table_group import Names
from recfast.nn._table_lookups import TableLookups


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
        facts = {
            "dim": self.dim,
            "skip_missing": self.skip_missing,
            "tables": [[name, rows, self.precisions[name]] for name, rows in self.specs],
            "aliases": self.aliases,
        }
        # One tensor a precision: its tables lie in it in order, and a reader can map it as it is.
        _table_files.write(self.place, path, {group.precision: group.rows for group in self.groups}, facts)

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
        tensors, facts = _table_files.read(cls.place, path, mmap=mmap)
        try:
            tables = cls(
                Names([(name, rows) for name, rows, _ in facts["tables"]], facts["aliases"]),
                facts["dim"],
                {name: kind for name, _, kind in facts["tables"]},
                skip_missing=facts["skip_missing"],
                storage=tensors,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{cls.place}: {path} is damaged, its header does not fit its tensors ({error})") from None
        return tables.eval()
