// code_search: the k best of N items, each coded by M codebooks, under a table of scores per query. Exact.
//
//   y(q, i) = ((table[q, 0, c(i, 0)] + table[q, 1, c(i, 1)]) + ... + table[q, M - 1, c(i, M - 1)]) + bias[i]
//
// Shapes       table [Q, M, K], codes [N, M], bias [N], ids [N], live [N], mask [N] or [Q, N]; out [Q, k]; contiguous
// Dtypes       table, bias float32; codes uint8 or uint16; ids int64; live, mask one byte an item, 0 or 1
// Rounding     float32 sums in the order written above, no FMA: the scores are those of a plain loop, bit for bit
// Order        score descending, ties by lowest id (the item's position where there are no ids); never depends on k, Q,
//              the number of threads or the instruction set
// Left out     items with live[i] = 0 or mask[i] = 0, and items whose sum is -inf (or -inf met +inf from overflow)
// Padding      (-inf, -1)
// Limits       M >= 1, k >= 0, c(i, m) < K, no NaN and no +inf in table and bias: `check` says whether that holds
// Forms        Rows of codes as below, one by one; packed.h has the fast ones, from blocks of items
// Source       Jegou, Douze, Schmid, "Product quantization for nearest neighbor search", PAMI 33 (2011)
#pragma once

#include "common/span.h"
#include "common/top_k.h"

namespace recfast::code_search {

template <class Code>
struct Args {
  const float* table = nullptr;
  const Code* codes = nullptr;
  const float* bias = nullptr;          // or null: none
  const std::int64_t* ids = nullptr;    // or null: the position
  const std::uint8_t* live = nullptr;   // or null: all
  const std::uint8_t* mask = nullptr;   // or null: all
  std::int64_t mask_stride = 0;         // from one query's mask to the next; 0 where all share one
  Span<Scored> heaps;                   // cut_for(Q, N).heaps * min(k, N) entries of scratch
  float* scores = nullptr;
  std::int64_t* found = nullptr;
  std::int64_t queries = 0;
  std::int64_t items = 0;
  std::int64_t books = 0;
  std::int64_t entries = 0;
  std::int64_t k = 0;
};

// How the work is cut for the present number of threads: with fewer queries than threads, items are cut in pieces.
struct Cut {
  std::int64_t pieces;
  std::int64_t heaps;
};
[[nodiscard]] Cut cut_for(std::int64_t queries, std::int64_t items) noexcept;

// Flat positions of the first value that breaks a limit, or -1.
struct Faults {
  std::int64_t table;
  std::int64_t codes;
  std::int64_t bias;
};

// Reads the table always, codes and bias where `all`.
template <class Code>
[[nodiscard]] Faults check(const Args<Code>& args, bool all) noexcept;

// Threaded. `check` must have passed.
template <class Code>
void run(const Args<Code>& args) noexcept;

}  // namespace recfast::code_search
