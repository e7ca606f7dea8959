// Small matrix products over any vector type, with memory asked for ahead, and the power of two: what the kernel of
// target_attention is made of. Included by target_attention_kernel.h, see there.
#pragma once

namespace recfast::target_attention {

// Without a name for its namespace, so that no other file's instructions can stand in for these at the link.
namespace {

// Asks for the rows that come after a tile, a few lines at a time: memory is busy all the while, and never with more
// than it can have under way. Its functions are inline by force: GCC takes one that only prefetches for one without
// effect, and drops the call.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* first, std::int64_t rows, std::int64_t stride_bytes, std::int64_t row_bytes) noexcept
      : row_(static_cast<const char*>(first)), stride_(stride_bytes), bytes_(row_bytes), left_(rows) {}

  [[nodiscard]] std::int64_t lines() const noexcept { return left_ * ((bytes_ + kLine - 1) / kLine); }

  [[gnu::always_inline]] inline void ask(std::int64_t lines) noexcept {
    for (; lines > 0 && left_ > 0; --lines) {
      __builtin_prefetch(row_ + at_, 0, 3);
      at_ += kLine;
      if (at_ >= bytes_) {
        at_ = 0;
        row_ += stride_;
        --left_;
      }
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;
  const char* row_ = nullptr;
  std::int64_t stride_ = 0;
  std::int64_t bytes_ = 0;
  std::int64_t left_ = 0;
  std::int64_t at_ = 0;
};

// The rows of keys, then those of values, at a pace.
struct Pace {
  Ahead keys;
  Ahead values;
  std::int64_t share = 0;  // lines for each step

  // A third of a head's lines in `steps` steps; the products of keys, the weights and the products of values take
  // about as long as each other.
  void over(std::int64_t lines, std::int64_t steps) noexcept {
    share = (lines + steps - 1) / std::max<std::int64_t>(steps, 1);
  }
  [[gnu::always_inline]] inline void step() noexcept {
    keys.ask(share);
    values.ask(share);
  }
};

}  // namespace

template <class Simd>
struct Dense : Vectors<Simd> {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Base = Vectors<Simd>;
  static constexpr std::int64_t kWidth = Base::kWidth;
  using Base::load;
  using Base::splat;
  using Base::store;

  // c[r, :] = start[r, :] + sum_k a[r, k] b[k, :], terms added in the order of k. Columns come in whole vectors.
  // a[r, k] lies at a[r * ARow + k * AStep]: known to the compiler, so that a row costs no register for its address.
  // start: zeros; c itself (add); c times factor[r] (factor).
  struct Multiply {
    const T* a;
    std::int64_t rows;
    std::int64_t depth;
    const T* b;
    std::int64_t b_row;
    std::int64_t columns;
    T* c;
    std::int64_t c_row;
    bool add;
    const T* factor;
    Pace* pace = nullptr;
    std::int64_t lines = 0;
  };

  // CRow 0: c_row. Fresh: never `add`.
  template <int ARow, int AStep, int CRow = 0, bool Fresh = false>
  struct Product {
    template <int R, int J>
    static void tile(const Multiply& p, std::int64_t row, std::int64_t column) noexcept {
      // All loops over the tile are unrolled, or its sums would live in memory between them.
      V sum[R][J];
      const std::int64_t c_row = CRow == 0 ? p.c_row : CRow;
      T* c = p.c + row * c_row + column;
      if (Fresh || !p.add) {
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
          for (int j = 0; j < J; ++j) sum[r][j] = V{};
        }
      } else if (p.factor == nullptr) {
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
          for (int j = 0; j < J; ++j) sum[r][j] = load(c + r * c_row + j * kWidth);
        }
      } else {
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
          const V factor = splat(p.factor[row + r]);
#pragma GCC unroll 16
          for (int j = 0; j < J; ++j) sum[r][j] = load(c + r * c_row + j * kWidth) * factor;
        }
      }
      const T* a = p.a + row * ARow;
      const T* b = p.b + column;
      const std::int64_t b_row = p.b_row;
      for (std::int64_t k = p.depth; k > 0; --k) {
        V w[J];
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) w[j] = load(b + j * kWidth);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
          const V x = splat(a[r * ARow]);
#pragma GCC unroll 16
          for (int j = 0; j < J; ++j) sum[r][j] = Simd::fma(x, w[j], sum[r][j]);
        }
        a += AStep;
        b += b_row;
      }
      // The addresses of the stores are computed here, not kept from the loads: there are too few registers.
      if constexpr (CRow == 0) asm("" : "+r"(c));
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) store(c + j * kWidth, sum[r][j]);
        c += c_row;
      }
    }

    template <int R, int J>
    static void rows_of(const Multiply& p, std::int64_t row, std::int64_t column, std::int64_t count) noexcept {
      if constexpr (R > 1) {
        if (count < R) return rows_of<R - 1, J>(p, row, column, count);
      }
      tile<R, J>(p, row, column);
    }

    template <int J>
    static void strip(const Multiply& p, std::int64_t column, std::int64_t vectors) noexcept {
      if constexpr (J > 1) {
        if (vectors < J) return strip<J - 1>(p, column, vectors);
      }
      // Tiles of about equal height: a low last one would wait for its own sums.
      constexpr int kRows = Simd::tile_rows(J);
      const std::int64_t tiles = (p.rows + kRows - 1) / kRows;
      std::int64_t row = 0;
      if (p.pace != nullptr) p.pace->over(p.lines, tiles);
      for (std::int64_t i = 1; i <= tiles; ++i) {
        const std::int64_t next = p.rows * i / tiles;
        rows_of<kRows, J>(p, row, column, next - row);
        row = next;
        if (p.pace != nullptr) p.pace->step();
      }
    }

    static void run(const Multiply& p) noexcept {
      const std::int64_t vectors = p.columns / kWidth;
      const std::int64_t strips = (vectors + Simd::kMaxColumns - 1) / Simd::kMaxColumns;
      std::int64_t first = 0;
      for (std::int64_t i = 1; i <= strips; ++i) {
        const std::int64_t next = vectors * i / strips;
        strip<Simd::kMaxColumns>(p, first * kWidth, next - first);
        first = next;
      }
    }
  };

  // a turned, with a row for each of its columns: queries and gradients [width, kBlock]. c: scores [kBlock, kTile].
  static void multiply_block(const Multiply& p) noexcept { Product<1, kBlock, kTile, true>::run(p); }
  // a as it is: scores [kBlock, kTile].
  static void multiply_scores(const Multiply& p) noexcept { Product<kTile, 1>::run(p); }
  // The rows of scores as columns of a.
  static void multiply_scores_turned(const Multiply& p) noexcept { Product<1, kTile>::run(p); }

  // 2^x for x <= 127, relative error below 2 ulp; for floats below the smallest normal one some value below it, and 0
  // from -127 on.
  static V power_of_two(V x) noexcept {
    if constexpr (std::is_same_v<T, float>) {
      typedef std::int32_t Integers __attribute__((vector_size(sizeof(V))));
      const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
      x = Simd::max(splat(-127.0f), x);    // NaN stays
      const V shifted = x + magic;
      const V r = x - (shifted - magic);
      V y = splat(1.535336188319500e-4f);
      y = Simd::fma(y, r, splat(1.339887440266574e-3f));
      y = Simd::fma(y, r, splat(9.618437357674640e-3f));
      y = Simd::fma(y, r, splat(5.550332471162809e-2f));
      y = Simd::fma(y, r, splat(2.402264791363012e-1f));
      y = Simd::fma(y, r, splat(6.931472028550421e-1f));
      y = Simd::fma(y, r, splat(1.0f));
      Integers bits;
      Integers power;
      std::memcpy(&bits, &y, sizeof bits);
      std::memcpy(&power, &shifted, sizeof power);
      bits += power << 23;  // the low bits of `shifted` are the integer
      std::memcpy(&y, &bits, sizeof y);
      return y;
    } else {
      for (std::int64_t i = 0; i < kWidth; ++i) x[i] = std::exp2(x[i]);
      return x;
    }
  }

  static T power_of_two_scalar(T x) noexcept { return power_of_two(splat(x))[0]; }
};

}  // namespace recfast::target_attention
