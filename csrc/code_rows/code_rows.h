// code_rows: the k best items under a weighted sum of a few sparse rows. Exact; SparCode's serving op.
//
//   y(q, i) = ((0 + t(q, 0, i)) + t(q, 1, i)) + ...,   t(q, j, i) = w(q, j) S[r(q, j), i] + c[r(q, j)]
//                                                      over the rows that hold item i
//
// Shapes       S in compressed rows: indptr [R + 1], item_ids [T], scores [T], ids strictly rising within a row;
//              rows [Q, Ku] with -1 for an absent one, weights [Q, Ku], c [R], masks (item_mask.h); out [Q, k];
//              contiguous
// Dtypes       indptr, rows int64; item_ids int32 or int64; scores, weights, c float32
// Rounding     product, bias and sum are rounded apart, in the order of the rows: those of a plain loop, bit for bit
// Candidates   items that at least one row holds, whatever their sum; a row named twice counts twice
// Order        score descending, ties by lowest id; never depends on k, Q or the number of threads
// Left out     items that the mask does not allow; items whose sum overflows to -inf or NaN
// Padding      (-inf, -1)
// Work         proportional to the length of the named rows. Item ids are visited in tiles of kTile, and only those
//              that a row reaches, so scratch is a fixed size and nothing is proportional to N
// Limits       k >= 0, ids in [0, N), scores, weights and c finite, rows in [-1, R): `check` says whether that holds,
//              but for c
// Source       Su et al., "Beyond Two-Tower Matching: Learning Sparse Retrievable Cross-Interactions for
//              Recommendation", SIGIR 2023
#pragma once

#include "code_rows/item_mask.h"
#include "common/span.h"
#include "common/top_k.h"

namespace recfast::code_rows {

// Items a tile: 128 KiB of sums stay in the second-level cache.
inline constexpr std::int64_t kTile = 32768;

template <class Id>
struct Args {
  const std::int64_t* indptr = nullptr;
  const Id* item_ids = nullptr;
  const float* scores = nullptr;
  const std::int64_t* rows = nullptr;
  const float* weights = nullptr;       // or null: all 1
  const float* row_bias = nullptr;      // or null: all 0
  Masks masks;
  Span<float> sums;                     // threads * kTile, all zero; zero again afterwards
  Span<std::uint64_t> touched;          // threads * kTile / 64, likewise
  Span<std::int64_t> cursors;           // threads * Ku
  Span<Scored> heaps;                   // threads * min(k, N)
  float* out_scores = nullptr;
  std::int64_t* out_ids = nullptr;
  std::int64_t queries = 0;
  std::int64_t width = 0;               // Ku
  std::int64_t n_rows = 0;
  std::int64_t n_items = 0;
  std::int64_t k = 0;
};

// Flat positions of the first value that breaks a limit, or -1.
struct Faults {
  std::int64_t rows;
  std::int64_t weights;
  std::int64_t outside;   // item_ids: not in [0, N)
  std::int64_t unsorted;  // item_ids: not above the one before it in its row
  std::int64_t scores;
};

// Reads rows and weights always, the matrix where `all`; indptr must have been checked.
template <class Id>
[[nodiscard]] Faults check(const Args<Id>& args, bool all) noexcept;

// Threaded over queries. `check` must have passed.
template <class Id>
void run(const Args<Id>& args) noexcept;

}  // namespace recfast::code_rows
