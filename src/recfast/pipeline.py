"""The cascade: retrieve candidates, rank them, re-rank the best for diversity. Raw ids in, raw ids out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from recfast import rerank
from recfast.data import Catalogue, Dataset, Jagged
from recfast.errors import InputError
from recfast.files import atomic_path, disk_errors, verify_checksums, write_checksums, write_json
from recfast.index import Bitmap, CodeIndex
from recfast.models.storage import load_model, read_json, read_tensors, save_model, write_tensors
from recfast.nn import ProductQuantizer, ResidualKMeans, ResidualQuantizer, Tokenizer

FORMAT = 1
# A mask of this many cells, and a batch of this many candidate rows, are held at once; users are cut to fit.
_MASK_CELLS = 1 << 24
_CANDIDATE_ROWS = 1 << 15
# Of the similarity of two items, what their genres have to say where the vectors speak too.
_GENRE_SHARE = 0.8

_RERANKERS = rerank.KINDS
_TOKENIZERS = {kind.__name__: kind for kind in (ProductQuantizer, ResidualKMeans, ResidualQuantizer)}

Cold = Literal["error", "popular"]
Exclude = Literal["seen", "liked", "nothing"]


class Pipeline:
    """Recommendations for users, from three trained stages.

    Parameters
    ----------
    retriever
        A model with `user_vectors` and `item_vectors`, scored by dot product. Its item vectors are turned into codes.
    ranker
        A model whose `forward(batch)` gives logits; None keeps the retriever's order.
    reranker
        A `rerank.DPP` or another of `rerank`, or what has the same `rank` and `personal`; None keeps the ranker's
        order.
    data
        A `Dataset`, or the `Catalogue` of one.
    candidates
        How many items are retrieved for a user.
    pool
        How many of the best ranked are re-ranked; all candidates if None.
    features
        What makes two items alike: "genres", "vectors" (of the retriever), or "both": the cosine of the genres, which a
        person sees, with four times the weight of the cosine of the vectors, which tells items of equal genres apart.
        "auto" is both where genres are known.
    recent
        So many of the items that a user liked last count as shown: the list is to differ from them too. 0 for none.
        `KDPP` takes no heed of it.
    codebooks, n_codes
        Bytes of an item's code, and values of each. Ignored where `quantizer` is given.
    quantizer
        A fitted tokeniser of `nn`, as wide as the item vectors or wider (zeros fill the rest), whose scores are sums
        over codes: `nn.ProductQuantizer`, which is what is made where none is given, `nn.ResidualKMeans` (with
        `normalize=False` for near scores), or `nn.ResidualQuantizer` with `decoder_hidden=()`.
    exclude
        What is not recommended again: what the user has "seen" (any row of the log), has "liked", or "nothing".
    blend
        How much the retriever's score counts beside the ranker's, both standardised over a user's candidates. A ranker
        that was trained on a log of its own knows features and context; the retriever has met every item as a
        negative. 0 is the ranker alone.
    seed
        Of the quantiser's k-means.
    index
        The index of the items' codes, in order of id, where it exists already. Needs `quantizer`.
    """

    def __init__(
        self,
        retriever: nn.Module,
        ranker: nn.Module | None,
        reranker: Any | None,
        data: Dataset | Catalogue,
        *,
        candidates: int = 100,
        pool: int | None = None,
        features: Literal["auto", "genres", "vectors", "both"] = "auto",
        codebooks: int = 8,
        n_codes: int = 256,
        quantizer: Tokenizer | None = None,
        exclude: Exclude = "seen",
        blend: float = 0.0,
        seed: int = 0,
        index: CodeIndex | None = None,
        recent: int = 0,
    ) -> None:
        if exclude not in ("seen", "liked", "nothing"):
            raise InputError(f"Pipeline: exclude must be seen, liked or nothing, got {exclude!r}")
        if candidates < 1 or (pool is not None and pool < 1):
            raise InputError(f"Pipeline: candidates and pool must be at least 1, got {candidates} and {pool}")
        self.catalogue = data if isinstance(data, Catalogue) else Catalogue.from_dataset(data)
        self.retriever = retriever.eval()
        self.ranker = None if ranker is None else ranker.eval()
        self.reranker = reranker
        if not 0 <= blend < float("inf"):
            raise InputError(f"Pipeline: blend must be a number from 0 on, got {blend}")
        if recent < 0:
            raise InputError(f"Pipeline: recent must be at least 0, got {recent}")
        self.candidates, self.pool, self.exclude, self.blend = candidates, pool, exclude, blend
        self.recent = recent
        if features == "auto":
            features = "both" if len(self.catalogue.genre_names) > 1 else "vectors"
        self.features = features
        with torch.inference_mode():
            # Asked for before anything is coded: not every retriever has vectors whose dot product is its score.
            unknown = torch.zeros(1, dtype=torch.int64)
            width = retriever.user_vectors(self.catalogue.history.take(unknown), unknown).shape[1]
            # Row 0 stands for unknown items and is never recommended.
            vectors = _finite("item_vectors of the retriever", retriever.item_vectors().float().cpu())[1:]
        if vectors.shape[1] != width:
            raise InputError(f"Pipeline: the retriever's items have {vectors.shape[1]} coordinates, its users {width}")
        if quantizer is None:
            quantizer = ProductQuantizer(-(-vectors.shape[1] // codebooks) * codebooks, codebooks, n_codes)
            quantizer.fit(_widened(vectors, quantizer.dim), seed=seed)
        if quantizer.dim < vectors.shape[1]:
            raise InputError(
                f"Pipeline: quantizer codes vectors of {quantizer.dim} coordinates, and the items have "
                f"{vectors.shape[1]}"
            )
        try:
            # Not every tokeniser has scores that are sums over codes, and not every one is fitted.
            quantizer.eval().score_table(torch.zeros(1, quantizer.dim))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"Pipeline: quantizer cannot score: {error}") from None
        self.quantizer = quantizer
        self.item_vectors = vectors
        ids = torch.arange(1, len(vectors) + 1)
        if index is None:
            codes = quantizer.encode(_widened(vectors, quantizer.dim))
            index = CodeIndex(codes, n_codes=quantizer.n_codes, ids=ids)
        elif not torch.equal(index.ids, ids):
            raise InputError(f"Pipeline: index must hold the items 1 to {len(vectors)} in this order")
        self.index = index
        self._similarity = self._item_similarity_features()

    # -- stages, on internal ids ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def user_vectors(self, users: Tensor) -> Tensor:
        """The retriever's vectors of user ids, from their whole known history; [B, D]."""
        self.catalogue.check("Pipeline", "users", users, self.catalogue.schema.user)
        vectors = self.retriever.user_vectors(self.catalogue.history.take(users), users)
        return _finite("user_vectors of the retriever", vectors.float().cpu())

    def score_table(self, users: Tensor) -> Tensor:
        """What each code of each codebook adds to each user's scores, float32 [B, M, K]."""
        return self.quantizer.score_table(_widened(self.user_vectors(users), self.quantizer.dim))

    def excluded(self, exclude: Exclude | None = None) -> Jagged | None:
        """The items that each user is not to get, by user id; None for none."""
        which = exclude or self.exclude
        return {"seen": self.catalogue.seen, "liked": self.catalogue.history, "nothing": None}[which]

    def allowed(self, users: Tensor, exclude: Exclude | None = None) -> Tensor | None:
        """The items that each user may get, bool [B, N] in the order of the index; None for all."""
        lists = self.excluded(exclude)
        if lists is None:
            return None
        lists = lists.take(users)
        mask = torch.ones(len(users), len(self.item_vectors) + 1, dtype=torch.bool)
        mask[torch.arange(len(users)).repeat_interleave(lists.lengths()), lists.values] = False
        return mask[:, 1:].contiguous()

    def _allowed_bits(self, users: Tensor, exclude: Exclude | None) -> Bitmap | None:
        """The same as bits, an eighth of the memory and no row of N bytes a user."""
        lists = self.excluded(exclude)
        if lists is None:
            return None
        lists = lists.take(users)
        # Slot i holds item i + 1; the unknown item 0 is in no list of items to recommend.
        kept = lists.values > 0
        ends = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        return Bitmap.deny(self.index.n_slots, lists.values[kept] - 1, ends[lists.offsets])

    def retrieve(self, users: Tensor, k: int | None = None, *, exclude: Exclude | None = None) -> tuple[Tensor, Tensor]:
        """The k best items of each user by the coded vectors: exact top-k over the codes.

        Returns
        -------
        (scores float32 [B, k], item ids int64 [B, k]), padded with (-inf, -1).
        """
        k = self.candidates if k is None else k
        scores, items = [], []
        for _, block in _blocks(users, max(1, _MASK_CELLS // max(len(self.index), 1))):
            found = self.index.search(self.score_table(block), k, mask=self._allowed_bits(block, exclude))
            scores.append(found[0])
            items.append(found[1])
        return torch.cat(scores), torch.cat(items)

    @torch.inference_mode()
    def rank(self, users: Tensor, items: Tensor) -> Tensor:
        """The ranker's logits of candidates; -inf at padding.

        Parameters
        ----------
        users
            int64 [B].
        items
            int64 [B, C], -1 padded.
        """
        if self.ranker is None:
            raise InputError("Pipeline.rank: this pipeline has no ranker")
        logits = torch.full(items.shape, -torch.inf)
        step = max(1, _CANDIDATE_ROWS // max(items.shape[1], 1))
        for first in range(0, len(users), step):
            part = slice(first, first + step)
            batch, valid = self.catalogue.candidates(users[part], items[part])
            if len(batch):
                logits[part][valid] = self.ranker(batch).float()
        wrong = ((items >= 0) & ~torch.isfinite(logits)).nonzero()
        if len(wrong):
            row, place = wrong[0].tolist()
            user = self.catalogue.vocabulary["user"].decode([int(users[row])])[0]
            raise InputError(
                f"Pipeline.rank: the ranker's score of item {self._raw_items([int(items[row, place])])[0]!r} for user "
                f"{user!r} is {float(logits[row, place])}, expected a number; train it again, or load another "
                "checkpoint"
            )
        return logits

    def relevance(self, retrieved: Tensor, logits: Tensor) -> Tensor:
        """What candidates are ordered by: the ranker's logits, with the retriever's scores blended in.

        Both arguments and the result are float32 [B, C], -inf at padding.
        """
        if self.blend == 0:
            return logits
        return _standardised(logits) + self.blend * _standardised(retrieved)

    def appetite(self, users: Tensor) -> np.ndarray:
        """Each user's appetite for diversity, [B] in [0, 1]: how widely the history spreads over genres.

        `rerank.entropy_propensity` of the genres in the history (where they are not known, of clusters of items).
        """
        history = self.catalogue.history.take(users)
        return rerank.entropy_propensity(self._genre_counts(history))

    def preferences(self, users: Tensor) -> np.ndarray:
        """How often each genre occurs in each user's history, as shares, [B, Z]; all alike where it is empty.

        Where genres are not known, of clusters of items.
        """
        counts = self._genre_counts(self.catalogue.history.take(users)).astype(np.float64)
        total = counts.sum(1, keepdims=True)
        return np.where(total > 0, counts / np.where(total > 0, total, 1.0), 1.0 / counts.shape[1])

    def rerank(
        self,
        users: Tensor,
        items: Tensor,
        relevance: Tensor,
        k: int,
        *,
        reranker: Any | None = None,
        appetite: np.ndarray | None = None,
    ) -> Tensor:
        """Positions [B, k] into the candidates, -1 padded, in the re-ranker's order.

        `reranker` stands in for the pipeline's own; `appetite` is `self.appetite(users)` where the caller has it.
        """
        chosen = self.reranker if reranker is None else reranker
        relevance = relevance.masked_fill(items < 0, -torch.inf)
        order = torch.argsort(relevance, dim=1, descending=True, stable=True)
        order = order.masked_fill(items.gather(1, order) < 0, -1)
        if chosen is None:
            return _padded(order, k)
        pool = order[:, : max(self.pool, k)] if self.pool else order
        valid = pool >= 0
        place = pool.clamp(min=0)
        # The place in the order says how much an item matters, by the discount of NDCG: the same for every model, where
        # the size of its scores is not.
        worth = (1.0 / np.log2(np.arange(pool.shape[1]) + 2.0)).astype(np.float32)
        scores = np.where(valid.numpy(), worth, np.float32(0.0))
        candidates = items.gather(1, place).masked_fill(~valid, -1)
        by_user: dict[str, Any] = {"candidates": candidates}
        if chosen.personal:
            by_user["propensity"] = self.appetite(users) if appetite is None else appetite
        on_topics = getattr(chosen, "reads", "features") == "topics"
        if on_topics:
            by_user["preferences"] = self.preferences(users)
        if getattr(chosen, "draws", False):
            # A user's draw is the same in any batch.
            by_user["users"] = users
        elif self.recent:
            by_user["shown"] = self._latest(users)
        size = min(k, pool.shape[1])
        step = max(1, _CANDIDATE_ROWS // max(pool.shape[1], 1))
        picks = [torch.zeros(0, size, dtype=torch.int64)]
        for first in range(0, len(users), step):
            part = slice(first, first + step)
            own = {name: value[part] for name, value in by_user.items()}
            table = self._topics(own) if on_topics else self._similarity
            picks.append(torch.as_tensor(chosen.rank(table, scores[part], size, **own)))
        picked = torch.cat(picks)
        return _padded(place.gather(1, picked.clamp(min=0)).masked_fill(picked < 0, -1), k)

    # -- raw ids -------------------------------------------------------------------------------------------------

    def recommend(
        self, users: Iterable[Any], k: int = 20, *, exclude: Exclude | None = None, cold: Cold = "error"
    ) -> pl.DataFrame:
        """Recommend items.

        Parameters
        ----------
        users
            Raw user ids.
        k
            Items a user.
        exclude
            "seen", "liked" or "nothing"; as the pipeline was made if left out.
        cold
            For a user who is unknown or has an empty history: "error", or "popular" for the most liked items.

        Returns
        -------
        polars.DataFrame
            Columns: the schema's user column, "rank" (from 1), its item column, "score" (what the candidates were
            ordered by before re-ranking, see `relevance`), and "title" where titles are known. Users in the order
            given; fewer than k rows where too few items are left.

        Raises
        ------
        InputError
            An unknown user or an empty history under `cold="error"`; k below 1; a score that is NaN.
        """
        if isinstance(users, str):
            raise InputError(f"recommend: users must be a list of user ids, got the text {users!r}")
        raw = list(users)
        if k < 1:
            raise InputError(f"recommend: k must be at least 1, got {k}")
        if cold not in ("error", "popular"):
            raise InputError(f"recommend: cold must be error or popular, got {cold!r}")
        ids = torch.tensor(self.catalogue.vocabulary["user"].encode(raw), dtype=torch.int64)
        lengths = self.catalogue.history.take(ids).lengths() if len(raw) else ids
        is_cold = (ids == 0) | (lengths == 0)
        if cold == "error" and bool(is_cold.any()):
            at = int(is_cold.nonzero()[0])
            what = "is not in the training data" if ids[at] == 0 else "has liked nothing yet, so there is no history"
            raise InputError(
                f"recommend: user {raw[at]!r} {what}, expected a user with at least one liked item; "
                "cold='popular' (--cold popular) gives such users the most popular items"
            )
        items = torch.full((len(raw), k), -1, dtype=torch.int64)
        scores = torch.full((len(raw), k), -torch.inf)
        warm = (~is_cold).nonzero()[:, 0]
        if len(warm):
            items[warm], scores[warm] = self._recommend_warm(ids[warm], k, exclude)
        if bool(is_cold.any()):
            popular = self._popular(ids[is_cold], k, exclude)
            items[is_cold], scores[is_cold] = popular, torch.zeros(popular.shape)
        return self._frame(raw, items, scores)

    def _recommend_warm(self, users: Tensor, k: int, exclude: Exclude | None) -> tuple[Tensor, Tensor]:
        scores, items = self.retrieve(users, max(k, self.candidates), exclude=exclude)
        if self.ranker is not None:
            scores = self.relevance(scores, self.rank(users, items))
        chosen = self.rerank(users, items, scores, k)
        place = chosen.clamp(min=0)
        missing = chosen < 0
        return items.gather(1, place).masked_fill(missing, -1), scores.gather(1, place)

    def _frame(self, raw: list[Any], items: Tensor, scores: Tensor) -> pl.DataFrame:
        schema, kept = self.catalogue.schema, items >= 0
        rows, places = kept.nonzero(as_tuple=True)
        ids = items[kept]
        frame = pl.DataFrame(
            {
                schema.user: _series(raw)[rows.numpy()],
                "rank": pl.Series(places.numpy() + 1),
                schema.item: self.catalogue.vocabulary["item"].decode_series(ids),
                "score": pl.Series(scores[kept].numpy()),
            }
        )
        if "title" in self.catalogue.items.columns:
            frame = frame.with_columns(self.catalogue.items["title"][ids.numpy() - 1].alias("title"))
        return frame

    # -- helpers -------------------------------------------------------------------------------------------------

    def _popular(self, users: Tensor, k: int, exclude: Exclude | None) -> Tensor:
        """The most liked items that each user may get, [B, k], -1 padded; ties by the lowest id."""
        counts = torch.bincount(self.catalogue.history.values, minlength=len(self.index) + 1)[1:]
        order = torch.argsort(counts, descending=True, stable=True)
        items = torch.full((len(users), k), -1, dtype=torch.int64)
        for first, block in _blocks(users, max(1, _MASK_CELLS // max(len(self.index), 1))):
            allowed = self.allowed(block, exclude)
            if allowed is None:
                allowed = torch.ones(len(block), len(order), dtype=torch.bool)
            allowed = allowed[:, order]
            place = allowed.cumsum(1)
            row, column = (allowed & (place <= k)).nonzero(as_tuple=True)
            items[first + row, place[row, column] - 1] = order[column] + 1
        return items

    def _raw_items(self, items: list[int]) -> list[Any]:
        return self.catalogue.vocabulary["item"].decode(items)

    def _genre_counts(self, history: Jagged) -> np.ndarray:
        """How often each genre occurs in each list, [B, G]."""
        lists = torch.arange(len(history.offsets) - 1).repeat_interleave(history.lengths())
        if len(self.catalogue.genre_names) > 1:
            counts = torch.zeros(len(history.offsets) - 1, len(self.catalogue.genre_names))
            return counts.index_add_(0, lists, torch.from_numpy(self.catalogue.genres)[history.values]).numpy()
        # Without genres the first codebook's clusters stand for them. Row 0, the unknown item, is cluster 0.
        cluster = torch.zeros(len(self.item_vectors) + 1, dtype=torch.int64)
        cluster[1:] = self.index.codes[:, 0].long()
        width = self.quantizer.n_codes
        cells = torch.bincount(lists * width + cluster[history.values], minlength=(len(history.offsets) - 1) * width)
        return cells.reshape(-1, width).numpy().astype(np.float32)

    def _latest(self, users: Tensor) -> Tensor:
        """The `recent` last liked items of each user, oldest first, int64 [B, recent], -1 before them."""
        lists = self.catalogue.history.take(users, last=self.recent)
        lengths = lists.lengths()
        out = torch.full((len(users), self.recent), -1, dtype=torch.int64)
        out[torch.arange(self.recent) >= self.recent - lengths[:, None]] = lists.values
        return out.masked_fill(out == 0, -1)  # the unknown item is like none

    def _topics(self, by_user: dict[str, Any]) -> np.ndarray:
        """The topics of items, [rows, Z]: their genres, or else the cluster that each is in.

        Of clusters the table has rows for the items that are asked for alone, and their ids become those of its rows.
        """
        if len(self.catalogue.genre_names) > 1:
            return self.catalogue.genres
        named = [name for name in ("candidates", "shown") if name in by_user]
        items = torch.cat([by_user[name].reshape(-1) for name in named]).unique()
        items = items[items >= 0]
        for name in named:
            ids = by_user[name]
            by_user[name] = torch.where(ids >= 0, torch.searchsorted(items, ids), -1)
        topics = np.eye(self.quantizer.n_codes, dtype=np.float32)[self.index.codes[items - 1, 0].long().numpy()]
        topics[items.numpy() == 0] = 0.0  # the unknown item has none
        return topics

    def _item_similarity_features(self) -> np.ndarray:
        """Unit vectors by item id, float32 [rows(item), D]; two items are as alike as their dot product says."""
        if self.features not in ("genres", "vectors", "both"):
            raise InputError(f"Pipeline: features must be one of auto, genres, vectors, both, got {self.features!r}")
        with torch.inference_mode():
            alike = getattr(self.retriever, "similarity_vectors", self.retriever.item_vectors)
            vectors = _unit(alike().float().cpu().numpy())
        vectors[0] = 0.0  # the unknown item is like none
        genres = _unit(self.catalogue.genres)
        parts = {
            "genres": [genres],
            "vectors": [vectors],
            "both": [np.sqrt(_GENRE_SHARE) * genres, np.sqrt(1 - _GENRE_SHARE) * vectors],
        }
        return np.ascontiguousarray(np.concatenate(parts[self.features], axis=1), dtype=np.float32)

    # -- disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that `recommend` needs to a folder with checksums, whole or not at all.

        Raises
        ------
        InputError
            The disk is full, or the place may not be written; what was there before is untouched.
        """
        tokenizer = type(self.quantizer).__name__
        if _TOKENIZERS.get(tokenizer) is not type(self.quantizer):
            raise InputError(
                f"Pipeline.save: a quantizer of the class {tokenizer} cannot be saved, expected one of "
                f"{', '.join(_TOKENIZERS)}"
            )
        reranker = None
        if self.reranker is not None:
            kind = type(self.reranker).__name__
            if _RERANKERS.get(kind) is not type(self.reranker):
                raise InputError(
                    f"Pipeline.save: a re-ranker of the class {kind} cannot be saved, expected one of "
                    f"{', '.join(_RERANKERS)}"
                )
            reranker = {"kind": kind, "options": self.reranker.config()}
        with disk_errors("Pipeline.save", path), atomic_path(path, directory=True) as folder:
            save_model(self.retriever, self.catalogue.schema, folder / "retriever")
            if self.ranker is not None:
                save_model(self.ranker, self.catalogue.schema, folder / "ranker")
            written = {"kind": tokenizer, "options": self.quantizer.config()}
            write_tensors(folder / "quantizer.safetensors", self.quantizer.state_dict(), written)
            self.index.save(folder / "index.safetensors")
            self.catalogue.save(folder / "catalogue")
            settings = {
                "format": FORMAT,
                "candidates": self.candidates,
                "pool": self.pool,
                "features": self.features,
                "exclude": self.exclude,
                "blend": self.blend,
                "recent": self.recent,
                "ranker": self.ranker is not None,
                "reranker": reranker,
            }
            write_json(folder / "pipeline.json", settings)
            write_checksums(folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Pipeline:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            Something is missing, truncated, damaged, or of another version.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(f"Pipeline.load: {folder} is not a folder, expected one that Pipeline.save wrote")
        verify_checksums(folder, "Pipeline.load")
        settings = read_json(folder / "pipeline.json")
        if settings.get("format") != FORMAT:
            raise InputError(
                f"Pipeline.load: {folder / 'pipeline.json'} has the format {settings.get('format')!r}, "
                f"expected {FORMAT}"
            )
        tensors, written = read_tensors(folder / "quantizer.safetensors")
        if "kind" not in written:
            # Of before there was a choice.
            shape = {name: written[name] for name in ("dim", "n_codebooks", "n_codes")}
            written = {"kind": "ProductQuantizer", "options": shape}
        if written["kind"] not in _TOKENIZERS:
            raise InputError(
                f"Pipeline.load: {folder / 'quantizer.safetensors'} holds a {written['kind']}, expected one of "
                f"{', '.join(_TOKENIZERS)}"
            )
        # Beginning weights are drawn at random, and are not needed.
        with torch.random.fork_rng(devices=[]):
            quantizer = _TOKENIZERS[written["kind"]](**written["options"])
        quantizer.load_state_dict(tensors)
        reranker = settings["reranker"]
        if reranker is not None:
            reranker = rerank.build(reranker["kind"], **reranker["options"])
        return cls(
            load_model(folder / "retriever"),
            load_model(folder / "ranker") if settings["ranker"] else None,
            reranker,
            Catalogue.load(folder / "catalogue"),
            candidates=settings["candidates"],
            pool=settings["pool"],
            features=settings["features"],
            exclude=settings["exclude"],
            blend=settings["blend"],
            recent=settings.get("recent", 0),
            quantizer=quantizer,
            index=CodeIndex.load(folder / "index.safetensors"),
        )


def _blocks(users: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    # One empty block for no users, so that results have their shape all the same.
    yield from ((first, users[first : first + size]) for first in range(0, max(len(users), 1), size))


def _series(raw: list[Any]) -> pl.Series:
    """Raw ids as they were given; as text where they are of several types."""
    try:
        return pl.Series(raw, dtype=None if raw else pl.String)
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        return pl.Series([str(value) for value in raw])


def _finite(what: str, vectors: Tensor) -> Tensor:
    wrong = (~torch.isfinite(vectors)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise InputError(
            f"Pipeline: {what}[{row}, {column}] is {float(vectors[row, column])}, expected a finite number; "
            "train the model again, or load another checkpoint"
        )
    return vectors


def _standardised(scores: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1 over its finite entries; -inf stays."""
    valid = torch.isfinite(scores)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    filled = scores.masked_fill(~valid, 0.0)
    centred = (filled - filled.sum(1, keepdim=True) / count).masked_fill(~valid, 0.0)
    spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return (centred / spread.clamp(min=1e-6)).masked_fill(~valid, -torch.inf)


def _widened(vectors: Tensor, width: int) -> Tensor:
    """The vectors with zeros behind them: a width that cannot be cut into equal parts is made one that can."""
    return torch.nn.functional.pad(vectors, (0, width - vectors.shape[1]))


def _padded(positions: Tensor, k: int) -> Tensor:
    out = torch.full((len(positions), k), -1, dtype=torch.int64)
    width = min(k, positions.shape[1])
    out[:, :width] = positions[:, :width]
    return out


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)
