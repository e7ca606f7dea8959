// What attention kernels need on top of common/vectors.h: products of blocks that lie in larger matrices, blocks turned
// (transposed), rows read from and written to any storage type, and the exponential of what lies below a maximum.
// Include it inside the target region after common/vectors.h; the standard header utility must have been included
// outside it.
//
// The usual plan: the queries of a block are turned once, so that 16 of them are the lanes of a vector. Scores
// [keys, queries] = K Q^T then read the keys by broadcast, maxima and sums over the keys are vertical, causal masks
// cut whole tiles but on the diagonal, and out^T [width, queries] = V^T P reads the values by broadcast.
#pragma once

namespace recfast {

template <class E, std::int64_t Size>
struct VectorOf {
  typedef E Type __attribute__((vector_size(sizeof(E) * static_cast<std::size_t>(Size))));
};

template <class Simd>
struct Tiles : Vectors<Simd> {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Base = Vectors<Simd>;
  static constexpr std::int64_t kWidth = Base::kWidth;
  using Base::load;
  using Base::splat;
  using Base::store;

  // c[r, :] = (add ? c[r, :] : 0) + sum_k a[r, k] b[k, :], terms added in the order of k: calls that cut the depth and
  // add give the bits of one call. Columns come in whole vectors.
  struct Block {
    const T* a;
    std::int64_t a_row;
    std::int64_t a_step;
    std::int64_t rows;
    std::int64_t depth;
    const T* b;
    std::int64_t b_row;
    std::int64_t columns;
    T* c;
    std::int64_t c_row;
    bool add;
  };

  // Part of the loop over the rows: a call a tile would cost as much as a tile of small depth.
  template <int R, int J>
  [[gnu::always_inline]] static inline void block_tile(const Block& p, std::int64_t row, std::int64_t column) noexcept {
    V sum[R][J];
    T* c = p.c + row * p.c_row + column;
    if (p.add) {
      _Pragma("GCC unroll 16") for (int r = 0; r < R; ++r) {
        _Pragma("GCC unroll 16") for (int j = 0; j < J; ++j) sum[r][j] = load(c + r * p.c_row + j * kWidth);
      }
    } else {
      _Pragma("GCC unroll 16") for (int r = 0; r < R; ++r) {
        _Pragma("GCC unroll 16") for (int j = 0; j < J; ++j) sum[r][j] = V{};
      }
    }
    const T* a = p.a + row * p.a_row;
    const T* b = p.b + column;
    const std::int64_t a_row = p.a_row;
    const std::int64_t a_step = p.a_step;
    const std::int64_t b_row = p.b_row;
    for (std::int64_t k = p.depth; k > 0; --k) {
      V w[J];
      _Pragma("GCC unroll 16") for (int j = 0; j < J; ++j) w[j] = load(b + j * kWidth);
      _Pragma("GCC unroll 16") for (int r = 0; r < R; ++r) {
        const V x = splat(a[r * a_row]);
        _Pragma("GCC unroll 16") for (int j = 0; j < J; ++j) sum[r][j] = Simd::fma(x, w[j], sum[r][j]);
      }
      a += a_step;
      b += b_row;
    }
    _Pragma("GCC unroll 16") for (int r = 0; r < R; ++r) {
      _Pragma("GCC unroll 16") for (int j = 0; j < J; ++j) store(c + r * p.c_row + j * kWidth, sum[r][j]);
    }
  }

  template <int J>
  static void block_strip(const Block& p, std::int64_t column) noexcept {
    constexpr int kRows = Simd::rows(J);
    std::int64_t row = 0;
    for (; row + kRows <= p.rows; row += kRows) block_tile<kRows, J>(p, row, column);
    if constexpr (kRows > 4) {
      if (row + 4 <= p.rows) {
        block_tile<4, J>(p, row, column);
        row += 4;
      }
    }
    for (; row + 2 <= p.rows; row += 2) block_tile<2, J>(p, row, column);
    if (row < p.rows) block_tile<1, J>(p, row, column);
  }

  template <int J>
  static void block_strip_of(const Block& p, std::int64_t column, std::int64_t vectors) noexcept {
    if constexpr (J > 1) {
      if (vectors < J) return block_strip_of<J - 1>(p, column, vectors);
    }
    block_strip<J>(p, column);
  }

  static void multiply_block(const Block& p) noexcept {
    if (p.rows <= 0) return;
    const std::int64_t vectors = p.columns / kWidth;
    const std::int64_t strips = (vectors + Simd::kMaxColumns - 1) / Simd::kMaxColumns;
    for (std::int64_t i = 0; i < strips; ++i) {
      const std::int64_t first = vectors * i / strips;
      const std::int64_t last = vectors * (i + 1) / strips;
      block_strip_of<Simd::kMaxColumns>(p, first * kWidth, last - first);
    }
  }

  template <std::int64_t First, std::int64_t... I>
  static V interleave(V a, V b, std::integer_sequence<std::int64_t, I...>) noexcept {
    return __builtin_shufflevector(a, b, (First + I / 2 + (I % 2) * kWidth)...);
  }

  // to[c, r] = from[r, c]; rows and columns are multiples of kWidth.
  static void turn(const T* from, std::int64_t from_row, std::int64_t rows, std::int64_t columns, T* to,
                   std::int64_t to_row) noexcept {
    using Lanes = std::make_integer_sequence<std::int64_t, kWidth>;
    for (std::int64_t r0 = 0; r0 < rows; r0 += kWidth) {
      for (std::int64_t c0 = 0; c0 < columns; c0 += kWidth) {
        V x[kWidth];
        for (std::int64_t i = 0; i < kWidth; ++i) x[i] = load(from + (r0 + i) * from_row + c0);
        // Each pass is a perfect shuffle of the rows' values; log2 of the width of them turn the square.
        for (std::int64_t pass = kWidth; pass > 1; pass /= 2) {
          V y[kWidth];
          for (std::int64_t i = 0; i < kWidth / 2; ++i) {
            y[2 * i] = interleave<0>(x[i], x[i + kWidth / 2], Lanes{});
            y[2 * i + 1] = interleave<kWidth / 2>(x[i], x[i + kWidth / 2], Lanes{});
          }
          for (std::int64_t i = 0; i < kWidth; ++i) x[i] = y[i];
        }
        for (std::int64_t i = 0; i < kWidth; ++i) store(to + (c0 + i) * to_row + r0, x[i]);
      }
    }
  }

  // One value from storage: T itself, or bfloat16 as std::uint16_t.
  template <class S>
  static T widened(S x) noexcept {
    if constexpr (std::is_same_v<S, T>) {
      return x;
    } else {
      const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
      T y;
      std::memcpy(&y, &bits, sizeof y);
      return y;
    }
  }

  // A vector of them.
  template <class S>
  static V widen(const S* p) noexcept {
    if constexpr (std::is_same_v<S, T>) {
      return load(p);
    } else {
      static_assert(std::is_same_v<S, std::uint16_t> && std::is_same_v<T, float>);
      using Halves = typename VectorOf<std::uint16_t, kWidth>::Type;
      using Words = typename VectorOf<std::uint32_t, kWidth>::Type;
      Halves halves;
      std::memcpy(&halves, p, sizeof halves);
      const Words words = __builtin_convertvector(halves, Words) << 16;
      V v;
      std::memcpy(&v, &words, sizeof v);
      return v;
    }
  }

  // The way back; bfloat16 rounds to nearest, ties to even.
  template <class S>
  static void narrow(S* p, V v) noexcept {
    if constexpr (std::is_same_v<S, T>) {
      store(p, v);
    } else {
      using Halves = typename VectorOf<std::uint16_t, kWidth>::Type;
      using Words = typename VectorOf<std::uint32_t, kWidth>::Type;
      using Flags = typename VectorOf<std::int32_t, kWidth>::Type;
      Words words;
      std::memcpy(&words, &v, sizeof words);
      const Words rounded = words + ((words >> 16) & 1u) + 0x7FFFu;
      const Flags is_number = v == v;
      const Words kept = is_number ? rounded : words | 0x400000u;
      const Halves halves = __builtin_convertvector(kept >> 16, Halves);
      std::memcpy(p, &halves, sizeof halves);
    }
  }

  // to[r, :] = scale * from[r, :] for `rows` rows, widened with zeros to `to_row` values; zeros in the rows up to
  // `all_rows`. to_row is a multiple of kWidth, or equal to the width.
  template <class S>
  static void read_rows(const S* from, std::int64_t from_row, std::int64_t rows, std::int64_t width, T scale, T* to,
                        std::int64_t to_row, std::int64_t all_rows) noexcept {
    const V factor = splat(scale);
    const std::int64_t whole = width / kWidth * kWidth;
    const std::int64_t rest = width - whole;
    for (std::int64_t r = 0; r < rows; ++r) {
      const S* x = from + r * from_row;
      T* y = to + r * to_row;
      for (std::int64_t d = 0; d < whole; d += kWidth) store(y + d, factor * widen(x + d));
      if (rest > 0) {
        S tail[kWidth]{};
        std::copy_n(x + whole, rest, tail);
        T wide[kWidth];
        store(wide, factor * widen(tail));
        std::copy_n(wide, std::min(kWidth, to_row - whole), y + whole);
      }
      for (std::int64_t d = whole + (rest > 0 ? kWidth : 0); d < to_row; ++d) y[d] = T{0};
    }
    std::fill_n(to + rows * to_row, (all_rows - rows) * to_row, T{0});
  }

  // to[r, :] = scale * from[r, :]; `from` may be read up to a multiple of kWidth.
  template <class S>
  static void write_rows(const T* from, std::int64_t from_row, std::int64_t rows, std::int64_t width, T scale, S* to,
                         std::int64_t to_row) noexcept {
    const V factor = splat(scale);
    const std::int64_t whole = width / kWidth * kWidth;
    const std::int64_t rest = width - whole;
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* x = from + r * from_row;
      S* y = to + r * to_row;
      for (std::int64_t d = 0; d < whole; d += kWidth) narrow(y + d, factor * load(x + d));
      if (rest > 0) {
        S tail[kWidth];
        narrow(tail, factor * load(x + whole));
        std::copy_n(tail, rest, y + whole);
      }
    }
  }

  // The larger; b where one is NaN.
  static V larger(V a, V b) noexcept { return a > b ? a : b; }

  // exp(x) for x <= 0: exactly 1 at 0, relative error below (2 + |x| / 8) eps down to x = -87, and below that
  // exp(-87) = 1.6e-38, never 0. A NaN stays one. Half the work of `exponential`.
  static V decay(V x) noexcept {
    if constexpr (std::is_same_v<T, float>) {
      using Integers = typename VectorOf<std::int32_t, kWidth>::Type;
      const V log2e = splat(1.44269504088896341f);
      const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
      x = larger(splat(-87.0f), x);
      const V shifted = Simd::fma(x, log2e, magic);
      const V r = Simd::fma(x, log2e, magic - shifted);
      V y = splat(1.3264727065279147e-3f);  // 2^r on [-1/2, 1/2], 1 at 0; relative error 9.2e-8
      y = Simd::fma(y, r, splat(9.671512648910169e-3f));
      y = Simd::fma(y, r, splat(5.550733743691147e-2f));
      y = Simd::fma(y, r, splat(2.402224208517323e-1f));
      y = Simd::fma(y, r, splat(6.93146977598857e-1f));
      y = Simd::fma(y, r, splat(1.0f));
      Integers power;
      Integers bits;
      std::memcpy(&power, &shifted, sizeof power);
      std::memcpy(&bits, &y, sizeof bits);
      bits += power << 23;
      std::memcpy(&y, &bits, sizeof y);
      return y;
    } else {
      for (std::int64_t i = 0; i < kWidth; ++i) x[i] = std::exp(x[i]);
      return x;
    }
  }
};

}  // namespace recfast
