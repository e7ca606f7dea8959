"""SparCode served: the scores of composite codes and items as sparse rows, of which a query adds a few."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from recfast.data import Jagged
from recfast.errors import InputError
from recfast.files import atomic_path, disk_errors, verify_checksums, write_checksums, write_json
from recfast.index import CodeRows

if TYPE_CHECKING:
    from recfast.models.retrieval.sparcode import SparCode

FORMAT = 1
# Scores worked out at once, 64 MiB, and cells of the mask of a search.
_SCORES = 1 << 24
# Beyond so many composite codes the codes in use must be named: the table of which row is whose would be too large.
_MOST_CODES = 1 << 27


def allowed(excluded: Jagged, n_items: int) -> Tensor:
    """Return which items are not in each of B lists, bool [B, n_items]."""
    rows = len(excluded.offsets) - 1
    mask = torch.ones(rows, n_items, dtype=torch.bool)
    cells = excluded.values
    if rows != 1:
        cells = cells + (torch.arange(rows) * n_items).repeat_interleave(excluded.lengths())
    mask.view(-1).index_fill_(0, cells, False)
    return mask


class SparCodeIndex:
    """A SparCode model and the index of its codes; made by `SparCode.build_index`.

    Attributes
    ----------
    model
        In evaluation mode. Weights that change after the build make the index wrong.
    rows
        `index.CodeRows`; its columns are item ids.
    row_of
        int64 [n_composite], the row of each composite code, -1 for one that was left out.
    """

    def __init__(self, model: SparCode, rows: CodeRows, row_of: Tensor) -> None:
        self.model, self.rows, self.row_of = model.eval(), rows, row_of
        self._is_whole = torch.equal(row_of, torch.arange(len(row_of)))

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        model: SparCode,
        *,
        top: int = 1000,
        bias: float | Literal["floor"] | None = None,
        codes: Tensor | None = None,
        say: Callable[[str], object] | None = None,
    ) -> SparCodeIndex:
        r"""Score composite codes with all items, and keep the positive scores of the best.

        Parameters
        ----------
        model
            Trained.
        top
            At most so many items a row.
        bias
            Added to each score before what is not positive is dropped: :math:`\max(0, s(q, i) + b)`. "floor": of each
            row its own, minus the best score that is cut, so that a missing item counts as if it had just missed the
            row; nothing is dropped beside the cut, and where `top` cuts nothing, scores stay as they are. The default
            is "floor" for a model with sparsity "index", and 0 for "train", whose ReLU is in the score already.
        codes
            int64, composite codes (`model.encode`) that get a row, such as those of all known users; all if None. A
            code without a row adds nothing to a query.
        say
            Told, after the first rows, how much is to come: rows, scores, bytes and seconds.

        Raises
        ------
        InputError
            An option out of range, more than 2^27 composite codes, or a model that is not trained.
        """
        if top < 1:
            raise InputError(f"SparCode.build_index: top = {top}, expected at least 1")
        if isinstance(bias, str) and bias != "floor":
            raise InputError(f"SparCode.build_index: bias = {bias!r} is not a number or 'floor'")
        if model.tokens.n_composite > _MOST_CODES:
            raise InputError(
                f"SparCode.build_index: {model.tokens.n_composite} composite codes, expected at most {_MOST_CODES}; "
                "take fewer codebooks or codes"
            )
        if not bool(model.tokens.quantizer.begun):
            raise InputError("SparCode.build_index: the model's codebooks have not begun; train it first")
        device = model.items.device
        chosen = torch.arange(model.tokens.n_composite) if codes is None else codes.flatten().cpu().unique()
        if len(chosen) and (chosen[0] < 0 or chosen[-1] >= model.tokens.n_composite):
            wrong = int(chosen[0] if chosen[0] < 0 else chosen[-1])
            raise InputError(
                f"SparCode.build_index: codes holds {wrong}, which is outside [0, {model.tokens.n_composite})"
            )
        row_of = torch.full((model.tokens.n_composite,), -1)
        row_of[chosen] = torch.arange(len(chosen))
        model.eval()
        floor = bias == "floor" or (bias is None and model.threshold is None)
        whole = floor and top >= model.rows - 1

        def blocks() -> Iterator[Tensor]:
            started, size = time.perf_counter(), max(1, _SCORES // model.rows)
            for begin in range(0, len(chosen), size):
                scores = model.code_scores(chosen[begin : begin + size].to(device))
                scores[:, 0] = -torch.inf
                if floor and not whole:
                    scores -= scores.topk(top + 1, dim=1).values[:, -1:]
                elif not floor and bias:
                    scores += bias
                yield scores
                if say is not None and begin == 0:
                    seconds = (time.perf_counter() - started) * len(chosen) / len(scores)
                    size_mb = CodeRows.expected_bytes(len(chosen), model.rows, top) / 1e6
                    say(
                        f"SparCode.build_index: {len(chosen):,} codes x {model.rows - 1:,} items = "
                        f"{len(chosen) * (model.rows - 1):,} scores; at most {size_mb:,.0f} MB; about {seconds:.0f} s"
                    )

        threshold = -torch.inf if whole else 0.0
        rows = CodeRows.build(len(chosen), model.rows, blocks(), top=top, threshold=threshold)
        return cls(model, rows, row_of)

    @torch.no_grad()
    def retrieve(
        self, histories: Jagged, users: Tensor | None, k: int, *, exclude: Jagged | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the k best items of each user: encode, then add the rows of the K_u codes, exactly.

        Parameters
        ----------
        histories, users
            As `SparCode.scores` takes them; B of them.
        k
            Length of the list.
        exclude
            B lists of item ids that are not to be found.

        Returns
        -------
        (scores float32 [B, k], item ids int64 [B, k]), ties by lowest id, padded with (-inf, -1) where the rows hold
        fewer items.
        """
        n, width = len(histories.offsets) - 1, self.rows.n_items
        if exclude is not None and len(exclude.offsets) - 1 != n:
            raise InputError(f"SparCodeIndex.retrieve: exclude has {len(exclude.offsets) - 1} lists, expected {n}")
        # Encoded together: a matrix product of another shape may round otherwise, and a code may hang on a rounding.
        named = self.model.encode(histories, users).cpu()
        if not self._is_whole:
            named = self.row_of[named]
        size = max(1, _SCORES // max(1, width))
        if exclude is None or n <= size:
            return self.rows.search(named, k, mask=None if exclude is None else allowed(exclude, width))
        blocks = torch.arange(n).split(size)
        found = [self.rows.search(named[part], k, mask=allowed(exclude.take(part), width)) for part in blocks]
        return torch.cat([scores for scores, _ in found]), torch.cat([ids for _, ids in found])

    def nbytes(self) -> int:
        """Return the bytes of the index: rows and the table of which row is whose, without the model."""
        parts = (self.rows.indptr, self.rows.item_ids, self.rows.scores, self.row_of)
        return sum(part.numel() * part.element_size() for part in parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model and index to a folder with checksums, whole or not at all."""
        from recfast.models import storage

        with disk_errors("SparCodeIndex.save", path), atomic_path(path, directory=True) as folder:
            storage.save_model(self.model, self.model.schema, folder / "model")
            self.rows.save(folder / "rows.safetensors")
            storage.write_tensors(folder / "codes.safetensors", {"row_of": self.row_of}, {})
            write_json(folder / "index.json", {"format": FORMAT, "kind": "SparCodeIndex"})
            write_checksums(folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> SparCodeIndex:
        """Read what `save` wrote; with `mmap` the rows are mapped, so that processes share their memory.

        Raises
        ------
        InputError
            Something is missing, truncated, damaged, or of another version.
        """
        from recfast.models import storage

        folder = Path(path)
        if not folder.is_dir():
            raise InputError(
                f"SparCodeIndex.load: {folder} is not a folder, expected one that SparCodeIndex.save wrote"
            )
        verify_checksums(folder, "SparCodeIndex.load")
        settings = storage.read_json(folder / "index.json")
        if (settings.get("kind"), settings.get("format")) != ("SparCodeIndex", FORMAT):
            raise InputError(
                f"SparCodeIndex.load: {folder / 'index.json'} is of the kind {settings.get('kind')!r} and the format "
                f"{settings.get('format')!r}, expected 'SparCodeIndex' and {FORMAT}"
            )
        tensors, _ = storage.read_tensors(folder / "codes.safetensors")
        rows = CodeRows.load(folder / "rows.safetensors", mmap=mmap)
        return cls(storage.load_model(folder / "model"), rows, tensors["row_of"])
