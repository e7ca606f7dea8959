"""The rows of a history whose hash codes are nearest to a candidate's: the search of ETA."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recfast.ops import _check
from recfast.ops._hashed import check_shared, check_users, cut_candidates, flat_rows, lists, users_of
from recfast.ops._histories import unit_rows
from recfast.ops._library import define, kernel

_DTYPES = (torch.uint8, torch.int64)
_KERNELS = {torch.uint8: kernel("hamming_top_k_uint8"), torch.int64: kernel("hamming_top_k_int64")}
_SCRATCH = kernel("hamming_top_k_scratch")
_MOST_BITS = 2**16 - 1


def _cpu(query_codes, key_codes, offsets, candidate_offsets, k):
    op = "hamming_top_k"
    query_codes = unit_rows(query_codes)
    candidate_offsets = cut_candidates(op, candidate_offsets, query_codes.shape[0])
    keys = lists(op, key_codes, offsets)
    begin, end = keys.begin, keys.begin + keys.prefix.diff()
    sizes = {"users": begin.numel(), "words": query_codes.shape[1], "k": k, "longest": keys.longest}
    out = query_codes.new_empty((query_codes.shape[0], k), dtype=torch.int64)
    scratch = torch.empty(_SCRATCH(query_codes.element_size(), **sizes), dtype=torch.int64)
    _KERNELS[query_codes.dtype](
        **sizes,
        rows=query_codes.shape[0],
        query=query_codes.data_ptr(),
        query_stride=query_codes.stride(0),
        keys=keys.rows.data_ptr(),
        keys_stride=keys.rows.stride(-2),
        begin=begin.data_ptr(),
        end=end.data_ptr(),
        candidates=0 if candidate_offsets is None else candidate_offsets.data_ptr(),
        out=out.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    return out


def _fake(query_codes, key_codes, offsets, candidate_offsets, k):
    return query_codes.new_empty((query_codes.shape[0], k), dtype=torch.int64)


def _expected(query_codes, key_codes, offsets, candidate_offsets, k):
    return reference(query_codes, key_codes, offsets, k, candidate_offsets=candidate_offsets)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    offsets, lengths = torch.tensor([0, 4, 4, 50]), torch.tensor([4, 0, 3])
    for words in (1, 3):
        for low, high, dtype in ((0, 256, torch.uint8), (-(2**63), 2**63 - 1, torch.int64)):

            def codes(*shape, low=low, high=high, dtype=dtype):
                return torch.randint(low, high, shape, generator=generator, dtype=dtype)

            yield codes(3, words), codes(50, words), offsets, None, 5
            yield codes(6, words), codes(3, 4, words), lengths, torch.tensor([0, 2, 2, 6]), 2
            yield codes(6, words), codes(3, 4, words), lengths, torch.tensor([0, 2, 2, 6]), 0


def reference(
    query_codes: torch.Tensor,
    key_codes: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
    *,
    candidate_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch: every distance, and a stable sort."""
    keys, offsets = flat_rows(key_codes, offsets)
    shifts = torch.arange(query_codes.element_size() * 8)
    out = torch.full((query_codes.shape[0], k), -1)
    for c, user in enumerate(users_of(candidate_offsets, query_codes.shape[0]).tolist()):
        differ = query_codes[c].long() ^ keys[offsets[user] : offsets[user + 1]].long()
        distance = ((differ.unsqueeze(-1) >> shifts) & 1).sum((1, 2))
        # Turned around, so that a stable sort puts the later of two equal ones first.
        order = len(distance) - 1 - distance.flip(0).sort(stable=True).indices
        found = min(k, len(distance))
        out[c, :found] = order[:found]
    return out


_op = define(
    "hamming_top_k(Tensor query_codes, Tensor key_codes, Tensor offsets, Tensor? candidate_offsets, SymInt k) "
    "-> Tensor",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
)


def hamming_top_k(
    query_codes: torch.Tensor,
    key_codes: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
    *,
    candidate_offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Find the `k` events of a history whose codes differ from the candidate's in the fewest bits.

    Parameters
    ----------
    query_codes : Tensor [Nc, W], int64 or uint8
        Codes of the candidates, as `simhash` gives them; all bits of all `W` words count.
    key_codes : Tensor [T, W] or padded [B, L, W], dtype of `query_codes`
        Codes of the events; rows may be strided.
    offsets : Tensor [B + 1], int32 or int64; or the lengths [B] of padded rows
        User b's events are rows `offsets[b]:offsets[b + 1]`. Padding is never read.
    k : int
        How many to find, at least 0.
    candidate_offsets : Tensor [B + 1], int32 or int64, optional
        User b's candidates are rows `candidate_offsets[b]:candidate_offsets[b + 1]`; left out, each user has one.

    Returns
    -------
    positions : Tensor [Nc, k], int64
        Counted from the start of the user's history; fewest differing bits first, of equal ones the later first; -1
        where the history is shorter than `k`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes, shapes or offsets; codes of 2**16 bits or more.

    Notes
    -----
    Exact: equal on every instruction set and thread count. Not differentiable. Backends: CPU (scalar, AVX2, AVX-512
    with VPOPCNTDQ).

    References
    ----------
    Chen et al., "Efficient Long Sequential User Data Modeling for Click-Through Rate Prediction", arXiv 2108.04468.
    """
    op = "hamming_top_k"
    query = _check.tensor(op, "query_codes", query_codes, dtypes=_DTYPES, shape=["Nc", "W"])
    words, device = query.shape[1], query.device
    if not words * query.element_size() * 8 <= _MOST_BITS:
        raise ValueError(f"{op}: query_codes must have fewer than 65536 bits a row, got {words} x {query.dtype}")
    padded = isinstance(key_codes, torch.Tensor) and key_codes.dim() == 3
    shape = ["B", "L", words] if padded else ["T", words]
    _check.tensor(op, "key_codes", key_codes, dtypes=[query.dtype], shape=shape, device=device)
    users = check_users(op, offsets, key_codes.shape[0] if padded else None, device)
    _check.at_least(op, "k", k, 0)
    candidate_offsets = check_shared(op, "query_codes", query.shape[0], candidate_offsets, users, device)
    return _op(query, key_codes, offsets.to(torch.int64), candidate_offsets, k)


hamming_top_k.reference = reference
