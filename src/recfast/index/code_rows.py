"""Sparse rows over items, a few of which are added for each query: SparCode's index."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from recfast import ops
from recfast.errors import InputError
from recfast.index import _file, _row_streams
from recfast.index._arrays import as_tensor
from recfast.ops import code_rows as rows_op
from recfast.ops import packed_rows


class CodeRows:
    """A sparse matrix of scores [R, N] (composite codes x items), searched exactly for the sum of a few of its rows.

    .. math:: y_{q,i} = \\sum_{j=0}^{K_u-1} w_{q,j} S_{r_{q,j},i}

    Parameters
    ----------
    indptr : array or Tensor [R + 1], int64
        Row r is `item_ids[indptr[r]:indptr[r + 1]]`.
    item_ids : array or Tensor [T], int32 or int64, in [0, N)
        Strictly rising within a row.
    scores : array or Tensor [T], float32, finite
    n_items : int
        N.

    Raises
    ------
    TypeError, ValueError, IndexError
        A wrong dtype or shape; ids that do not rise within a row, a score that is not finite; an id out of range.

    Attributes
    ----------
    packed : PackedRows
        What is searched, see `ops.pack_rows`; it shares `indptr` and `scores` with what was given, where contiguous;
        they must not be written to afterwards.

    Notes
    -----
    Searches may run at the same time in many threads.

    References
    ----------
    Su et al., "Beyond Two-Tower Matching: Learning Sparse Retrievable Cross-Interactions for Recommendation", SIGIR
    2023.
    """

    def __init__(self, indptr: Any, item_ids: Any, scores: Any, n_items: int):
        matrix = ops.RowsIndex(
            as_tensor("CodeRows", "indptr", indptr),
            as_tensor("CodeRows", "item_ids", item_ids),
            as_tensor("CodeRows", "scores", scores),
            int(n_items),
        )
        self._hold(ops.pack_rows(matrix))

    def _hold(self, packed: ops.PackedRows) -> None:
        self.packed = packed
        self._fields = packed_rows.fields_of(packed)

    # A copy has its arrays elsewhere.
    def __getstate__(self) -> ops.PackedRows:
        return self.packed

    def __setstate__(self, state: ops.PackedRows) -> None:
        self._hold(state)

    @property
    def n_items(self) -> int:
        """N."""
        return self.packed.n_items

    @property
    def indptr(self) -> torch.Tensor:
        """Where each row begins among all postings, int64 [R + 1]."""
        return self.packed.indptr

    @property
    def scores(self) -> torch.Tensor:
        """The scores of all postings, float32 [T]."""
        return self.packed.scores

    @property
    def item_ids(self) -> torch.Tensor:
        """The items of all postings, int32 [T]; made anew at each call."""
        return self.packed.item_ids()

    @property
    def nbytes(self) -> int:
        """Bytes of the index, in memory and (but for the header) in a file."""
        return self.packed.nbytes

    @classmethod
    def from_csr(cls, indptr: Any, item_ids: Any, scores: Any, n_items: int) -> CodeRows:
        """The same as the constructor, by the name of the format."""
        return cls(indptr, item_ids, scores, n_items)

    @classmethod
    def build(
        cls, n_rows: int, n_items: int, blocks: Iterable[Any], top: int | None = None, *, threshold: float = 0.0
    ) -> CodeRows:
        """Make the rows from dense blocks of scores, one block in memory at a time.

        Parameters
        ----------
        n_rows, n_items : int
            R and N.
        blocks : iterable of arrays or Tensors [rows, N], floating point
            The scores of all pairs, block after block in the order of the rows, R rows together. -inf is never kept.
        top : int, optional
            At most so many items a row: the best, ties by lowest id.
        threshold : float
            Only scores above it are kept.

        Raises
        ------
        TypeError, ValueError
            A block of another shape or dtype; a score that is NaN or +inf; fewer or more rows than R.

        Notes
        -----
        Scores are rounded to float32 first. Beyond one block, memory is what the finished rows take
        (see `expected_bytes`); without `top` twice that, for a moment.
        """
        _check_sizes("CodeRows.build", n_rows, n_items, top)
        return cls(*_row_streams.rows_of_blocks("CodeRows.build", n_rows, n_items, blocks, top, threshold), n_items)

    @classmethod
    def from_rows(
        cls,
        n_rows: int,
        n_items: int,
        rows: Iterable[tuple[int, Any, Any]],
        top: int | None = None,
        *,
        threshold: float = 0.0,
    ) -> CodeRows:
        """Make the rows from a stream of (row, ids, scores); as `build`, for scores that are sparse already.

        Parameters
        ----------
        n_rows, n_items : int
            R and N.
        rows : iterable of (int, ids [L] integer, scores [L] floating point)
            Row numbers must rise; those left out are empty. Ids may come in any order, each once a row.
        top, threshold
            As in `build`; `threshold=-math.inf` keeps all.

        Raises
        ------
        TypeError, ValueError, IndexError
            Rows that do not rise, an id named twice, a score that is not finite; an id out of range.
        """
        _check_sizes("CodeRows.from_rows", n_rows, n_items, top)
        return cls(*_row_streams.rows_of_postings("CodeRows.from_rows", n_rows, n_items, rows, top, threshold), n_items)

    @staticmethod
    def expected_bytes(n_rows: int, n_items: int, per_row: float) -> int:
        """How many bytes an index of rows with `per_row` items on average takes at most, but for some hundred."""
        per_row = min(per_row, n_items)
        shift = packed_rows.shift_for(n_items, per_row)
        return packed_rows.bytes_for(n_rows, n_items, per_row, shift)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.packed.lowest)

    def __repr__(self) -> str:
        return f"CodeRows({len(self)} rows over {self.n_items} items, {len(self.scores)} scores)"

    def search(
        self, rows: Any, k: int, weights: Any = None, mask: Any = None, row_bias: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the rows named for each query and find the k best items, exactly.

        Parameters
        ----------
        rows : array or Tensor [Q, Ku], int64
            Row numbers, or -1 for an absent one. A row named twice counts twice.
        k : int
            May exceed N, may be 0.
        weights : array or Tensor [Q, Ku], float32, optional
        mask : array or Tensor or Bitmap, optional
            The items allowed, for all queries or for each: bool [N] or [Q, N], bits as uint8 [ceil(N / 8)] or
            [Q, ceil(N / 8)], lowest first, or a Bitmap.
        row_bias : array or Tensor [R], float32, optional
            Added once for each naming of a row to each of its items, not multiplied by the weight.

        Returns
        -------
        scores : Tensor [Q, k], float32
        ids : Tensor [Q, k], int64
            Sorted by score descending, ties by lowest id, padded with (-inf, -1). Only items that a named row holds are
            candidates.

        Raises
        ------
        TypeError, ValueError, IndexError
            A wrong dtype or shape, a weight or a bias that is not finite, a row out of range.
        """
        place = "CodeRows.search"
        rows = as_tensor(place, "rows", rows)
        weights = None if weights is None else as_tensor(place, "weights", weights)
        row_bias = None if row_bias is None else as_tensor(place, "row_bias", row_bias)
        if mask is not None and not hasattr(mask, "words"):
            mask = as_tensor(place, "mask", mask)
        query = rows_op.check_query(len(self), self.n_items, rows.device, rows, k, weights, row_bias, mask)
        # Not through torch's dispatcher, which costs as much as a short search.
        return packed_rows.search_packed(self._fields, rows, k, *query)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file (safetensors), whole or not at all, with checksums over every byte."""
        arrays = {name: part.numpy() for name, part in self.packed._asdict().items() if isinstance(part, torch.Tensor)}
        _file.save(path, "CodeRows", {"n_items": self.n_items, "shift": self.packed.shift}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False) -> CodeRows:
        """Read what `save` wrote; with `mmap` the file is mapped, so that processes share its memory.

        Raises
        ------
        InputError
            No such file; truncated, corrupt, or not such a file.
        """
        config, arrays = _file.load(path, "CodeRows", mmap=mmap)
        try:
            if "item_ids" in arrays:  # as written before rows were packed
                return cls(arrays["indptr"], arrays["item_ids"], arrays["scores"], config["n_items"])
            parts = {name: as_tensor("CodeRows.load", name, array) for name, array in arrays.items()}
            packed = ops.PackedRows(**{"locals": None, **parts}, n_items=config["n_items"], shift=config["shift"])
            packed_rows.check_packed("CodeRows", packed)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"CodeRows.load: {path} is corrupt: {error}") from error
        index = cls.__new__(cls)
        index._hold(packed)
        return index


def _check_sizes(place: str, n_rows: int, n_items: int, top: int | None) -> None:
    for name, value in (("n_rows", n_rows), ("n_items", n_items), ("top", 0 if top is None else top)):
        if value < 0:
            raise ValueError(f"{place}: {name} must be at least 0, got {value}")
    if n_items >= 2**31:
        raise ValueError(f"{place}: n_items must be below 2**31, got {n_items}")
