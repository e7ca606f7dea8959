// AVX-512 for common/vectors.h. Include <immintrin.h> before, and this inside a target region that has it.
// Without a name for its namespace, so that no other file's instructions can stand in for these at the link.
#pragma once

namespace recfast {
namespace {

struct Avx512 {
  using T = float;
  using V = __m512;
  static constexpr int kMaxColumns = 6;
  // Tiles that fill the 32 registers, less one row of weights and one broadcast.
  static constexpr int rows(int columns) { return columns <= 3 ? 8 : columns == 4 ? 6 : columns == 5 ? 5 : 4; }
  static V fma(V a, V b, V c) noexcept { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace recfast
