"""The latest events of a history that share the candidate's category: the hard search of SIM."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recfast.ops import _check
from recfast.ops._hashed import check_shared, check_users, cut_candidates, flat_rows, lists, users_of
from recfast.ops._library import define, kernel

_KERNELS = {torch.int32: kernel("category_top_k_int32"), torch.int64: kernel("category_top_k_int64")}


def _cpu(query_categories, key_categories, offsets, candidate_offsets, k):
    op = "category_top_k"
    candidate_offsets = cut_candidates(op, candidate_offsets, query_categories.shape[0])
    keys = lists(op, key_categories.unsqueeze(-1), offsets)
    begin, end = keys.begin, keys.begin + keys.prefix.diff()
    out = query_categories.new_empty((query_categories.shape[0], k), dtype=torch.int64)
    _KERNELS[query_categories.dtype](
        query=query_categories.data_ptr(),
        query_stride=query_categories.stride(0),
        keys=keys.rows.data_ptr(),
        keys_stride=keys.rows.stride(-2),
        begin=begin.data_ptr(),
        end=end.data_ptr(),
        candidates=0 if candidate_offsets is None else candidate_offsets.data_ptr(),
        out=out.data_ptr(),
        users=begin.numel(),
        rows=query_categories.shape[0],
        k=k,
    )
    return out


def _fake(query_categories, key_categories, offsets, candidate_offsets, k):
    return query_categories.new_empty((query_categories.shape[0], k), dtype=torch.int64)


def _expected(query_categories, key_categories, offsets, candidate_offsets, k):
    return reference(query_categories, key_categories, offsets, k, candidate_offsets=candidate_offsets)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    offsets, lengths = torch.tensor([0, 4, 4, 80]), torch.tensor([4, 0, 3])
    for dtype in _check.INDEX_DTYPES:

        def categories(*shape, dtype=dtype):
            return torch.randint(5, shape, generator=generator, dtype=dtype)

        yield categories(3), categories(80), offsets, None, 7
        yield categories(6), categories(3, 4), lengths, torch.tensor([0, 2, 2, 6]), 2
        yield categories(6), categories(3, 4), lengths, torch.tensor([0, 2, 2, 6]), 0


def reference(
    query_categories: torch.Tensor,
    key_categories: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
    *,
    candidate_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, candidate by candidate."""
    keys, offsets = flat_rows(key_categories.unsqueeze(-1), offsets)
    out = torch.full((query_categories.shape[0], k), -1)
    for c, user in enumerate(users_of(candidate_offsets, query_categories.shape[0]).tolist()):
        same = (keys[offsets[user] : offsets[user + 1], 0] == query_categories[c]).nonzero().flatten()
        latest = same.flip(0)[:k]
        out[c, : len(latest)] = latest
    return out


_op = define(
    "category_top_k(Tensor query_categories, Tensor key_categories, Tensor offsets, Tensor? candidate_offsets, "
    "SymInt k) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
)


def category_top_k(
    query_categories: torch.Tensor,
    key_categories: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
    *,
    candidate_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Find the latest `k` events of a history whose category is the candidate's.

    Parameters
    ----------
    query_categories : Tensor [Nc], int32 or int64
    key_categories : Tensor [T] or padded [B, L], dtype of `query_categories`
        In time order, latest last; may be strided.
    offsets : Tensor [B + 1], int32 or int64; or the lengths [B] of padded rows
        User b's events are rows `offsets[b]:offsets[b + 1]`. Padding is never read.
    k : int
        How many to find, at least 0.
    candidate_offsets : Tensor [B + 1], int32 or int64, optional
        User b's candidates are rows `candidate_offsets[b]:candidate_offsets[b + 1]`; left out, each user has one.

    Returns
    -------
    positions : Tensor [Nc, k], int64
        Counted from the start of the user's history, latest first; -1 where there are fewer than `k`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes, shapes or offsets.

    Notes
    -----
    No category is special: an "unknown" one, if there is such, matches itself. Exact: equal on every instruction set
    and thread count. Not differentiable. Backends: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Pi et al., "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
    Prediction", CIKM 2020, arXiv 2006.05639.
    """
    op = "category_top_k"
    query = _check.tensor(op, "query_categories", query_categories, dtypes=_check.INDEX_DTYPES, shape=["Nc"])
    padded = isinstance(key_categories, torch.Tensor) and key_categories.dim() == 2
    shape = ["B", "L"] if padded else ["T"]
    _check.tensor(op, "key_categories", key_categories, dtypes=[query.dtype], shape=shape, device=query.device)
    users = check_users(op, offsets, key_categories.shape[0] if padded else None, query.device)
    _check.at_least(op, "k", k, 0)
    candidate_offsets = check_shared(op, "query_categories", query.shape[0], candidate_offsets, users, query.device)
    return _op(query, key_categories, offsets.to(torch.int64), candidate_offsets, k)


category_top_k.reference = reference
