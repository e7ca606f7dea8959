// The gradients of embedding_bag: of the table (dense, float tables) and of the weights.
//
// Formula      dL/dtable[r] = sum over positions i with indices[i] = r, ascending, of c_i * grad[bag(i)]
//              dL/dweights[i] = <row(indices[i]), grad[bag(i)]>, over the bag's length in mode mean
// where c_i = weights[i] (or 1), over the bag's length in mode mean.
// Rounding     one order of summation: no dependence on threads or on the instruction set
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

// Writes bag_of [n] and, unless null, coefficient [n]. The offsets must have been checked.
template <class T>
void spread_bags(const std::int64_t* offsets, std::int64_t bags, const T* weights, bool mean, std::int32_t* bag_of,
                 T* coefficient) noexcept;

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

// Writes out [n]. Ids outside the table give zero.
template <class Value, class Index>
void weight_gradient(const Args<Value, Index>& args, const Real<Value>* grad, Real<Value>* out) noexcept;

}  // namespace recfast::embedding_bag
