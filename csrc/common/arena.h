// Scratch memory cut into padded pieces. Kernels allocate nothing: Python gives them one block.
#pragma once

#include <cstdint>

namespace recfast {

// Widths are padded to this many values, with zeros in the weights; dot products run in this many partial sums on
// every instruction set.
inline constexpr std::int64_t kLanes = 16;

[[nodiscard]] constexpr std::int64_t padded(std::int64_t width) noexcept {
  return (width + kLanes - 1) / kLanes * kLanes;
}

// Hands out pieces of scratch, or only counts them (base null).
template <class T>
class Arena {
 public:
  explicit Arena(T* base) noexcept : base_(base) {}
  [[nodiscard]] T* take(std::int64_t size) noexcept {
    T* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += padded(size);
    return piece;
  }
  [[nodiscard]] std::int64_t used() const noexcept { return used_; }

 private:
  T* base_;
  std::int64_t used_ = 0;
};

}  // namespace recfast
