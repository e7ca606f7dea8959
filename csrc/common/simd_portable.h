// The vector that every 64-bit processor has: 16 bytes. Elsewhere the compiler takes it apart. See common/vectors.h.
#pragma once

namespace recfast {
namespace {

template <class Value>
struct Portable {
  using T = Value;
  typedef Value V __attribute__((vector_size(16)));
  static constexpr int kMaxColumns = 3;
  static constexpr int rows(int columns) { return columns == 3 ? 3 : 4; }
  static V fma(V a, V b, V c) noexcept { return a * b + c; }
};

}  // namespace
}  // namespace recfast
