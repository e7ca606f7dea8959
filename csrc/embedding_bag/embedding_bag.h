// embedding_bag: out[b] = sum of c_i * row(indices[i]) over i in offsets[b] .. offsets[b + 1], and its gradients.
//
// Formula      row(r) = table[r] (float), or step[r] * table[r] (int8 codes, symmetric: no zero point)
//              c_i = weights[i], or 1; mode mean divides by offsets[b + 1] - offsets[b]; an empty bag gives zeros
// Shapes       table [T, D], step [T], indices [n], offsets [B + 1] or none (then B = n, one id a bag),
//              weights [n] or none, out [B, D]; all contiguous
// Dtypes       table float32, float64 or int8 (+ float32 step); indices int32 or int64; offsets int64;
//              weights and out in the table's float type (float32 for int8)
// Accumulator  the type of out, from zero, in the order of the positions; for int8 the factor step[r] * weights[i] is
//              rounded first. Products and sums are rounded apart (no FMA): equal bits on every instruction set and for
//              any number of threads
// Error bound  |out - exact| <= (k + 3) * eps * sum |terms| for a bag of k rows
// Limits       gradients: n <= 2^31 - 1 and T <= 2^32, since (row, position) is sorted as one 64-bit word
// Bad ids      are found in the kernel's own pass; such a row counts as zeros and the lowest position is returned
// Source       EmbeddingBag: Naumov et al., "Deep Learning Recommendation Model", arXiv:1906.00091
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/span.h"
#include "common/status.h"

namespace recfast::embedding_bag {

// The type of outputs, weights and gradients of a table of Value.
template <class Value>
using Real = std::conditional_t<std::is_same_v<Value, double>, double, float>;

template <class Value, class Index>
struct Args {
  Rows<const Value> table;
  const float* step;  // only with int8
  Span<const Index> indices;
  const std::int64_t* offsets;  // null: one id a bag
  std::int64_t bags;
  const Real<Value>* weights;  // may be null
  bool mean;
  Real<Value>* out;

  [[nodiscard]] std::int64_t begin(std::int64_t bag) const noexcept { return offsets == nullptr ? bag : offsets[bag]; }
};

// What a call may find wrong. Indices: the lowest position with an id outside [0, T). Offsets: the first wrong entry.
struct Status {
  std::int64_t bad_index = -1;
  std::int64_t bad_offset = -1;
};

// The first entry that is not 0 (at 0), falls, or (at the end) is not `total`; -1 where all is well.
[[nodiscard]] std::int64_t first_bad_offset(const std::int64_t* offsets, std::int64_t bags,
                                            std::int64_t total) noexcept;

// Threaded over bags, dispatched by instruction set. With a bad offset nothing is computed.
template <class Value, class Index>
[[nodiscard]] Status run(const Args<Value, Index>& args) noexcept;

// The forms behind it, one thread each, for bags [first, last).
template <class Value, class Index>
void bags_scalar(const Args<Value, Index>& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept;
template <class Value, class Index>
void bags_avx2(const Args<Value, Index>& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept;
template <class Value, class Index>
void bags_avx512(const Args<Value, Index>& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept;

// How far ahead of the row in use rows are asked for, in lookups, across the borders of bags. The hint is "into L2" for
// tables in memory, where into L1 the few outstanding misses of one core are the limit; "into L1" for tables that the
// last cache holds.
inline constexpr std::int64_t kAhead = 24;
inline constexpr std::uint64_t kNearBytes = std::uint64_t{8} << 20;

}  // namespace recfast::embedding_bag
