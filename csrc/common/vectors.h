// Small dense algebra and elementwise functions over any vector type, for kernels that are whole within one file.
// A kernel includes this inside its target region and gives a `Simd`:
//   T, V (a GCC vector of T), kMaxColumns (vectors side by side in a tile), rows(J) (rows of a tile J vectors wide),
//   fma(a, b, c).
// Forms whose fma rounds once give the same bits; the portable one rounds product and sum apart.
// The standard headers (algorithm, cmath, cstdint, cstring, type_traits, utility) and common/arena.h must have been included
// before, outside that region.
#pragma once

#define RECFAST_INLINED __attribute__((always_inline))

namespace recfast {

// f<0>(), f<1>(), ..., f<N - 1>()
template <int N, class F>
RECFAST_INLINED inline void unrolled(const F& f) noexcept {
  [&]<int... i>(std::integer_sequence<int, i...>) RECFAST_INLINED {
    (f.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, N>{});
}

template <class Simd>
struct Vectors {
  using T = typename Simd::T;
  using V = typename Simd::V;
  static constexpr std::int64_t kWidth = static_cast<std::int64_t>(sizeof(V) / sizeof(T));

  static V load(const T* p) noexcept {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, V v) noexcept { std::memcpy(p, &v, sizeof v); }
  static V splat(T x) noexcept { return x - V{}; }

  // c[r, :] = start[r, :] + sum_k a[r, k] b[k, :], terms added in the order of k. Columns come in whole vectors.
  static constexpr T kZeros[Simd::kMaxColumns * kWidth]{};  // what a row of a tile starts from

  struct Product {
    const T* a;
    std::int64_t a_row;
    std::int64_t a_step;
    std::int64_t rows;
    std::int64_t depth;
    const T* b;
    std::int64_t columns;   // also the row stride of b
    const T* start;         // null: zeros
    std::int64_t start_row; // 0: one row for all
    T* c;                   // row stride `columns`
  };

  // What puts a tile into a matrix.
  struct Store {
    T* to;
    std::int64_t width;

    template <int R, int J>
    RECFAST_INLINED void operator()(const V (&sum)[R][J], std::int64_t row, std::int64_t column) const noexcept {
      T* at = to + row * width + column;
      unrolled<R>([&]<int r>() RECFAST_INLINED {
        unrolled<J>([&]<int j>() RECFAST_INLINED { store(at + j * kWidth, sum[r][j]); });
        at += width;
      });
    }
  };

  // A tile of c, R rows of J vectors from (row, column) on, in registers; `finish(sum, row, column)` puts it away.
  // Every index into `sum` is a constant from the start, also in `finish` (see unrolled): or the compiler leaves the
  // tile in memory between the steps.
  template <int R, int J, class Finish>
  static void tile(const Product& p, std::int64_t row, std::int64_t column, const Finish& finish) noexcept {
    V sum[R][J];
    const bool from_zero = p.start == nullptr;
    const T* start = from_zero ? kZeros : p.start + row * p.start_row + column;
    const std::int64_t start_row = from_zero ? 0 : p.start_row;
    unrolled<R>([&]<int r>() RECFAST_INLINED {
      unrolled<J>([&]<int j>() RECFAST_INLINED { sum[r][j] = load(start + j * kWidth); });
      start += start_row;
    });
    const T* a = p.a + row * p.a_row;
    const T* b = p.b + column;
    for (std::int64_t k = 0; k < p.depth; ++k) {
      V w[J];
      unrolled<J>([&]<int j>() RECFAST_INLINED { w[j] = load(b + j * kWidth); });
      unrolled<R>([&]<int r>() RECFAST_INLINED {
        const V x = splat(a[r * p.a_row]);
        unrolled<J>([&]<int j>() RECFAST_INLINED { sum[r][j] = Simd::fma(x, w[j], sum[r][j]); });
      });
      a += p.a_step;
      b += p.columns;
    }
    finish(sum, row, column);
  }

  template <int J, class Finish>
  static void strip(const Product& p, std::int64_t column, const Finish& finish) noexcept {
    constexpr int kRows = Simd::rows(J);
    std::int64_t row = 0;
    for (; row + kRows <= p.rows; row += kRows) tile<kRows, J>(p, row, column, finish);
    if constexpr (kRows > 4) {
      if (row + 4 <= p.rows) {
        tile<4, J>(p, row, column, finish);
        row += 4;
      }
    }
    for (; row + 2 <= p.rows; row += 2) tile<2, J>(p, row, column, finish);
    if (row < p.rows) tile<1, J>(p, row, column, finish);
  }

  template <int J, class Finish>
  static void strip_of(const Product& p, std::int64_t column, std::int64_t vectors, const Finish& finish) noexcept {
    if constexpr (J > 1) {
      if (vectors < J) return strip_of<J - 1>(p, column, vectors, finish);
    }
    strip<J>(p, column, finish);
  }

  static void multiply(const Product& p) noexcept { multiply(p, Store{p.c, p.columns}); }

  // With `finish` in the place of the store to c: what comes next is done while the sums are in registers. Strips of
  // columns come from left to right.
  template <class Finish>
  static void multiply(const Product& p, const Finish& finish) noexcept {
    const std::int64_t vectors = p.columns / kWidth;
    const std::int64_t strips = (vectors + Simd::kMaxColumns - 1) / Simd::kMaxColumns;
    for (std::int64_t i = 0; i < strips; ++i) {
      const std::int64_t first = vectors * i / strips;
      const std::int64_t last = vectors * (i + 1) / strips;
      strip_of<Simd::kMaxColumns>(p, first * kWidth, last - first, finish);
    }
  }

  static T sum_lanes(const T (&lanes)[kLanes]) noexcept {
    T part[kLanes];
    std::copy_n(lanes, kLanes, part);
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (std::int64_t i = 0; i < half; ++i) part[i] += part[i + half];
    }
    return part[0];
  }

  // The same partial sums for every vector width.
  static T dot(const T* a, const T* b, std::int64_t size) noexcept {
    constexpr std::int64_t kParts = kLanes / kWidth;
    V sum[kParts]{};
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      for (std::int64_t part = 0; part < kParts; ++part) {
        const std::int64_t at = i + part * kWidth;
        sum[part] = Simd::fma(load(a + at), load(b + at), sum[part]);
      }
    }
    T lanes[kLanes];
    for (std::int64_t part = 0; part < kParts; ++part) store(lanes + part * kWidth, sum[part]);
    for (std::int64_t lane = 0; i < size; ++i, ++lane) lanes[lane] += a[i] * b[i];
    return sum_lanes(lanes);
  }

  // y += x * a, product and sum rounded apart.
  static void add_scaled(T* __restrict y, const T* __restrict a, T x, std::int64_t size) noexcept {
    for (std::int64_t i = 0; i < size; ++i) y[i] += x * a[i];
  }

  // Relative error below 2 ulp on the floats whose exponential is normal; beyond, the nearest such value.
  static V exponential(V x) noexcept {
    if constexpr (std::is_same_v<T, float>) {
      typedef std::int32_t Integers __attribute__((vector_size(sizeof(V))));
      const V high = splat(88.3762626647949f);
      const V low = splat(-87.3365478515625f);
      x = x > high ? high : x;
      x = x < low ? low : x;
      const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
      const V n = Simd::fma(x, splat(1.44269504088896341f), magic) - magic;
      V r = Simd::fma(n, splat(-0.693359375f), x);
      r = Simd::fma(n, splat(2.12194440e-4f), r);
      V y = splat(1.9875691500e-4f);
      y = Simd::fma(y, r, splat(1.3981999507e-3f));
      y = Simd::fma(y, r, splat(8.3334519073e-3f));
      y = Simd::fma(y, r, splat(4.1665795894e-2f));
      y = Simd::fma(y, r, splat(1.6666665459e-1f));
      y = Simd::fma(y, r, splat(5.0000001201e-1f));
      y = Simd::fma(y, r * r, r) + splat(1.0f);
      Integers bits;
      std::memcpy(&bits, &y, sizeof bits);
      bits += __builtin_convertvector(n, Integers) << 23;
      std::memcpy(&y, &bits, sizeof y);
      return y;
    } else {
      for (std::int64_t i = 0; i < kWidth; ++i) x[i] = std::exp(x[i]);
      return x;
    }
  }

  static V logistic(V x) noexcept { return splat(T{1}) / (splat(T{1}) + exponential(-x)); }

  // y += x; whole vectors.
  static void add(T* y, const T* x, std::int64_t size) noexcept {
    for (std::int64_t i = 0; i < size; i += kWidth) store(y + i, load(y + i) + load(x + i));
  }
};

}  // namespace recfast
