"""What every search over codes must give, to the bit: sums in a plain loop and a full sort."""

import numpy as np


def oracle(codes, table, k, bias=None, ids=None, allowed=None):
    """float32 sums in the order of the codebooks, then a full sort by (score descending, id ascending)."""
    items, books = codes.shape
    ids = np.arange(items) if ids is None else ids
    scores = np.full((len(table), k), -np.inf, dtype=np.float32)
    found = np.full((len(table), k), -1, dtype=np.int64)
    for query, entry in enumerate(table):
        with np.errstate(over="ignore", invalid="ignore"):
            total = entry[0, codes[:, 0]].astype(np.float32)
            for book in range(1, books):
                total = total + entry[book, codes[:, book]]
            if bias is not None:
                total = total + bias
            keep = total > -np.inf
        if allowed is not None:
            keep &= np.broadcast_to(allowed, (len(table), items))[query]
        kept = keep.nonzero()[0]
        order = kept[np.lexsort((ids[kept], -total[kept]))][:k]
        scores[query, : len(order)], found[query, : len(order)] = total[order], ids[order]
    return scores, found


def equal_bits(answer, wanted):
    scores, found = (part.numpy() for part in answer)
    np.testing.assert_array_equal(found, wanted[1])
    np.testing.assert_array_equal(scores.view(np.int32), wanted[0].view(np.int32))
