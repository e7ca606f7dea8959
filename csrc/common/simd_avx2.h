// AVX2 and FMA for common/vectors.h. Include <immintrin.h> before, and this inside a target region that has both.
// Without a name for its namespace, so that no other file's instructions can stand in for these at the link.
#pragma once

namespace recfast {
namespace {

struct Avx2 {
  using T = float;
  using V = __m256;
  static constexpr int kMaxColumns = 3;
  // Tiles that fill the 16 registers, less one row of weights and one broadcast.
  static constexpr int rows(int columns) { return columns == 1 ? 6 : columns == 2 ? 5 : 4; }
  static V fma(V a, V b, V c) noexcept { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace recfast
