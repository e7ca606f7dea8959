// Views of memory that a kernel may touch. Kernels own nothing and allocate nothing.
#pragma once

#include <cstdint>
#include <span>

namespace recfast {

// A dense vector of known length.
template <class T>
using Span = std::span<T>;

// `rows` rows of `width` values; row i starts `stride` values after row i - 1.
template <class T>
struct Rows {
  T* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t width = 0;
  std::int64_t stride = 0;

  [[nodiscard]] T* operator[](std::int64_t row) const noexcept { return data + row * stride; }
};

}  // namespace recfast
