// code_postings: code_search for tables of few entries, through one list of items for each code. Exact.
//
//   y(q, i) = ((t(q, 0, c(i, 0)) + t(q, 1, c(i, 1))) + ... + t(q, M - 1, c(i, M - 1))) + bias[i]
//
//   where t(q, m, c) is the value of the entry m K + c of query q, or 0 where it has none
//
// Shapes       codes in planes [P, M, 64]: plane m of block p holds codebook m of the positions 64 p .. 64 p + 63;
//              lists: indptr [M K + 1], positions [M N]; order [N]; slots [N] (position -> slot), bias [N] by position,
//              ids [N] by slot, live [P] words of bits by position; mask [W] or [Q, W] words of bits by slot; entries of
//              query q: codes, values[offsets[q] : offsets[q + 1]]; out [Q, k]; all contiguous
// Dtypes       codes uint8 or uint16; lists int64 and int32; order, slots int32; values, bias float32; the rest int64
// Rounding     float32 sums in the order written above, no FMA: an item's additions of 0 change no bit, so that the
//              scores are those of code_search over the same table, bit for bit. Only a sum of nothing but entries
//              -0.0 is 0.0 here and -0.0 there; no comparison tells these apart
// Order        score descending, ties by lowest id (the slot where there are no ids); never depends on k, Q or the number
//              of threads
// Left out     items not live or not allowed, and items whose sum is -inf (or -inf met +inf from overflow)
// Work         the length of the lists of the query's entries. Items that no list holds score 0 + bias: they are taken
//              from `order` (bias descending, then id) until the next one cannot enter the answer. Positions are visited
//              in tiles of kTile, and only those that a list reaches
// Limits       0 <= k, N < 2^31, entries in [0, M K) and strictly rising within a query, values finite or -inf, all codes
//              below K: `check` says whether that holds of the entries
// Source       Moffat, Zobel, "Self-indexing inverted files for fast text retrieval", TOIS 14 (1996), term at a time;
//              here with the sums of a tile kept in the cache
#pragma once

#include "common/span.h"
#include "common/top_k.h"

namespace recfast::code_postings {

// Positions a tile: 128 KiB of sums stay in the second-level cache.
inline constexpr std::int64_t kTile = 32768;

template <class Code>
struct Args {
  const Code* planes = nullptr;
  const std::int64_t* indptr = nullptr;
  const std::int32_t* positions = nullptr;  // strictly rising within a list
  const std::int32_t* order = nullptr;      // or null: positions rise with (bias descending, id) as they are
  const std::int32_t* slots = nullptr;      // or null: the position
  const float* bias = nullptr;              // or null: none
  const std::int64_t* ids = nullptr;        // or null: the slot
  const std::uint64_t* live = nullptr;      // or null: all
  const std::uint64_t* mask = nullptr;      // or null: all
  std::int64_t mask_stride = 0;             // words from one query's mask to the next; 0 where all share one
  const std::int64_t* codes = nullptr;      // the entries: m K + c
  const float* values = nullptr;
  const std::int64_t* offsets = nullptr;
  Span<float> sums;                         // threads * min(kTile, 64 P), all zero; zero again afterwards
  Span<std::uint64_t> touched;              // threads * min(kTile, 64 P) / 64, likewise
  Span<std::uint64_t> named;                // threads * (M K / 64, rounded up), likewise
  Span<std::int64_t> cursors;               // threads * the most entries of a query
  Span<Scored> heaps;                       // threads * min(k, N)
  float* scores = nullptr;
  std::int64_t* found = nullptr;
  std::int64_t queries = 0;
  std::int64_t items = 0;                   // N
  std::int64_t books = 0;
  std::int64_t entries = 0;                 // K
  std::int64_t longest = 0;                 // the most entries of a query
  std::int64_t k = 0;
};

// Fills the lists from the planes: indptr, then the positions of each code in rising order. Threaded over codebooks.
// `starts` is scratch of M K.
template <class Code>
void build(const Code* planes, std::int64_t items, std::int64_t books, std::int64_t entries, std::int64_t* indptr,
           std::int32_t* positions, std::int64_t* starts) noexcept;

// How many items have each code: counts [M K], which need not be zero before.
template <class Code>
void count(const Code* planes, std::int64_t items, std::int64_t books, std::int64_t entries,
           std::int64_t* counts) noexcept;

// The first entry that breaks a limit, or -1. `offsets` must have been checked.
struct Faults {
  std::int64_t outside;   // codes: not in [0, M K)
  std::int64_t unsorted;  // codes: not above the one before it in its query
  std::int64_t values;    // NaN or +inf
};
[[nodiscard]] Faults check(Span<const std::int64_t> codes, Span<const float> values, Span<const std::int64_t> offsets,
                           std::int64_t limit) noexcept;

// Threaded over queries. `check` must have passed.
template <class Code>
void run(const Args<Code>& args) noexcept;

}  // namespace recfast::code_postings
