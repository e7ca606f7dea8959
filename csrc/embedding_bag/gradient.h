// The gradients of embedding_bag: of the table (dense) and of the weights.
//
// Formula      dL/dtable[r] = sum over positions i that stand for row r, ascending, of c_i * grad[bag(i)]
//              dL/dweights[i] = <row(i), grad[bag(i)]>, over the bag's number of rows in mode mean
//              max: dL/dtable[row(argmax[b, d]), d] += grad[b, d], bags ascending
// where c_i = weights[i] (or 1), over the bag's number of rows in mode mean. Missing ids take no part.
// Dtypes       of T = float (double for float64 tables); gradients of 16-bit tables are summed in float
// Rounding     one order of summation: no dependence on threads or on the instruction set. <row, grad> is summed in 16
//              lanes, column d in lane d % 16, which are then added in pairs
// Limits       n <= 2^31 - 1 and T < 2^32, since (row, position) is sorted as one 64-bit word
#pragma once

#include "common/group_ids.h"
#include "embedding_bag/embedding_bag.h"

namespace recfast::embedding_bag {

// The gradient as positions see it.
template <class T>
struct PositionGradient {
  const T* grad;  // [B, D]
  std::int64_t width;
  const std::int32_t* bag_of;  // [n]; null: position i is bag i
  const T* coefficient;        // [n]; null: all 1

  [[nodiscard]] const T* at(std::int64_t position) const noexcept {
    return grad + (bag_of == nullptr ? position : bag_of[position]) * width;
  }
};

// Writes the row of each position to `rows` [n], `lookups.rows` for a missing id. An id outside is reported.
void resolve_rows(const Lookups& lookups, std::int64_t* rows, FirstError& error) noexcept;

// Writes bag_of [n] and, unless null, coefficient [n]. The offsets must have been checked. With `rows` (as resolve_rows
// writes them, `missing` for a missing id) a mean does not count the missing ones.
template <class T>
void spread_bags(const std::int64_t* offsets, std::int64_t bags, const T* weights, bool mean, std::int32_t* bag_of,
                 T* coefficient, const std::int64_t* rows = nullptr, std::int64_t missing = 0) noexcept;

// out[d] = sum of the run's gradients, in order.
template <class T>
inline void sum_run(const PositionGradient<T>& gradient, const std::uint64_t* first, const std::uint64_t* last,
                    T* out) noexcept {
  const std::int64_t width = gradient.width;
  for (std::int64_t d = 0; d < width; ++d) out[d] = T{0};
  for (const std::uint64_t* key = first; key < last; ++key) {
    const std::int64_t position = group_position(*key);
    const T* grad = gradient.at(position);
    if (gradient.coefficient == nullptr) {
      for (std::int64_t d = 0; d < width; ++d) out[d] += grad[d];
    } else {
      const T factor = gradient.coefficient[position];
      for (std::int64_t d = 0; d < width; ++d) out[d] += factor * grad[d];
    }
  }
}

// Writes the rows of `out` [T, D] that occur; the others must hold zeros already.
template <class T>
void table_gradient(const PositionGradient<T>& gradient, const std::uint64_t* sorted, const std::int64_t* starts,
                    std::int64_t runs, T* out) noexcept;

// Mode max: adds grad [B, D] to the rows of `out` [T, D], which must hold zeros, that argmax [B, D] points at.
template <class T>
void max_gradient(const T* grad, const std::int32_t* argmax, const std::int64_t* rows, std::int64_t bags,
                  std::int64_t width, T* out) noexcept;

// Writes out [n], of the type of grad [B, D]: double for a float64 table, else float. Ids without a row give zero.
void weight_gradient(const Args& args, const void* grad, void* out) noexcept;

// The forms behind it, one thread each.
using WeightForm = void(const Args& args, const void* grad, void* out, std::int64_t first, std::int64_t last) noexcept;
WeightForm weights_scalar, weights_avx2, weights_avx512;

}  // namespace recfast::embedding_bag
