// The register-blocked product, straight to signs, for a vector of floats: `Simd` gives what common/vectors.h asks for,
// and store_signs(V, uint8_t*), one bit a lane. A form includes this inside its target region; the standard headers and
// simhash.h must have been included before, outside it.
#pragma once

namespace recfast::simhash {

template <class Simd>
struct Kernel {
  using T = typename Simd::T;
  using V = typename Simd::V;
  static constexpr std::int64_t kWidth = static_cast<std::int64_t>(sizeof(V) / sizeof(T));

  static V load(const T* p) noexcept {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  template <int R, int J>
  static void tile(const Block<T>& block, std::int64_t row, std::int64_t column) noexcept {
    const T* x[R];
    for (int r = 0; r < R; ++r) x[r] = block.rows[row + r];
    V sum[R][J]{};
    const T* projection = block.projections + column;
    for (std::int64_t d = 0; d < block.dim; ++d) {
      V w[J];
      for (int j = 0; j < J; ++j) w[j] = load(projection + j * kWidth);
      for (int r = 0; r < R; ++r) {
        const V value = x[r][d] - V{};
        for (int j = 0; j < J; ++j) sum[r][j] = Simd::fma(value, w[j], sum[r][j]);
      }
      projection += block.columns;
    }
    // Unrolled before the compiler places `sum`, or it would go through memory.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      std::uint8_t* signs = block.signs + (row + r) * sign_bytes(block.columns) + column / 8;
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) Simd::store_signs(sum[r][j], signs + j * kWidth / 8);
    }
  }

  template <int J>
  static void strip(const Block<T>& block, std::int64_t column) noexcept {
    constexpr int kRows = Simd::rows(J);
    std::int64_t row = 0;
    for (; row + kRows <= block.count; row += kRows) tile<kRows, J>(block, row, column);
    for (; row + 2 <= block.count; row += 2) tile<2, J>(block, row, column);
    if (row < block.count) tile<1, J>(block, row, column);
  }

  template <int J>
  static void strip_of(const Block<T>& block, std::int64_t column, std::int64_t vectors) noexcept {
    if constexpr (J > 1) {
      if (vectors < J) return strip_of<J - 1>(block, column, vectors);
    }
    strip<J>(block, column);
  }

  static void signs(const Block<T>& block) noexcept {
    const std::int64_t vectors = block.columns / kWidth;
    const std::int64_t strips = (vectors + Simd::kMaxColumns - 1) / Simd::kMaxColumns;
    for (std::int64_t i = 0; i < strips; ++i) {
      const std::int64_t first = vectors * i / strips;
      strip_of<Simd::kMaxColumns>(block, first * kWidth, vectors * (i + 1) / strips - first);
    }
  }
};

}  // namespace recfast::simhash
