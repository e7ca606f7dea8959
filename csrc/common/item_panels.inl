// The vector forms of common/item_panels.h. Include it inside a target region, after common/vectors.h and tiles.h, with a
// `Simd` of them that also has W (a vector of double, half as many as V has floats), fma(W, W, W), float_of(W, W) and
//   doubles(format, address): the W of the values at an address.

namespace {

using V = Simd::V;
using W = Simd::W;
using Turner = Tiles<Simd>;

constexpr std::int64_t kFloats = sizeof(V) / sizeof(float);
constexpr std::int64_t kDoubles = kFloats / 2;
constexpr std::int64_t kSums = kPad / kDoubles;

inline W load(const double* p) noexcept {
  W w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
inline void store(double* p, W w) noexcept { std::memcpy(p, &w, sizeof w); }
inline W all(double x) noexcept { return x - W{}; }

inline double folded(W (&sums)[kSums]) noexcept {
  for (std::int64_t half = kSums / 2; half > 0; half /= 2) {
    for (std::int64_t s = 0; s < half; ++s) sums[s] += sums[s + half];
  }
  return Simd::folded(sums[0]);
}

// The whole vectors of a row, each with the column where it starts; then the rest, filled up with zeros.
template <Format format, class F>
[[gnu::always_inline]] inline void each(const std::byte* row, std::int64_t width, const F& f) noexcept {
  constexpr std::int64_t kBytes = bits_of(format) / 8;
  std::int64_t c = 0;
  for (; c + kPad <= width; c += kPad) {
    _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kSums; ++s) {
      f(s, c + s * kDoubles, Simd::template doubles<format>(row + (c + s * kDoubles) * kBytes));
    }
  }
  if (c == width) return;
  alignas(64) std::byte rest[kPad * kBytes]{};
  std::memcpy(rest, row + c * kBytes, static_cast<std::size_t>((width - c) * kBytes));
  _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kSums; ++s) {
    f(s, c + s * kDoubles, Simd::template doubles<format>(rest + s * kDoubles * kBytes));
  }
}

template <Format format>
inline void read_as(const std::byte* row, std::int64_t width, double scale, double* to) noexcept {
  const W factor = all(scale);
  each<format>(row, width, [&](std::int64_t, std::int64_t c, W x) { store(to + c, x * factor); });
}

void read(const Rows& rows, std::int64_t item, double scale, double* to) noexcept {
  const std::byte* row = rows.at(item);
  switch (rows.format) {
    case Format::kFloat64: return read_as<Format::kFloat64>(row, rows.width, scale, to);
    case Format::kBFloat16: return read_as<Format::kBFloat16>(row, rows.width, scale, to);
    case Format::kFloat16: return read_as<Format::kFloat16>(row, rows.width, scale, to);
    default: return read_as<Format::kFloat32>(row, rows.width, scale, to);
  }
}

template <Format format>
inline double squared_norm_as(const std::byte* row, std::int64_t width) noexcept {
  W sums[kSums]{};
  each<format>(row, width, [&](std::int64_t s, std::int64_t, W x) { sums[s] = Simd::fma(x, x, sums[s]); });
  return folded(sums);
}

double squared_norm(const Rows& rows, std::int64_t item) noexcept {
  const std::byte* row = rows.at(item);
  switch (rows.format) {
    case Format::kFloat64: return squared_norm_as<Format::kFloat64>(row, rows.width);
    case Format::kBFloat16: return squared_norm_as<Format::kBFloat16>(row, rows.width);
    case Format::kFloat16: return squared_norm_as<Format::kFloat16>(row, rows.width);
    default: return squared_norm_as<Format::kFloat32>(row, rows.width);
  }
}

void dots(const double* x, const double* vectors, std::int64_t stride, std::int64_t count, std::int64_t width,
          double* out) noexcept {
  for (std::int64_t v = 0; v < count; ++v) {
    const double* q = vectors + v * stride;
    W sums[kSums]{};
    for (std::int64_t c = 0; c < width; c += kPad) {
      _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kSums; ++s) {
        sums[s] = Simd::fma(load(x + c + s * kDoubles), load(q + c + s * kDoubles), sums[s]);
      }
    }
    out[v] = folded(sums);
  }
}

void subtract(double* x, const double* vectors, std::int64_t stride, const double* parts, std::int64_t count,
              std::int64_t width) noexcept {
  constexpr std::int64_t kStrip = 2 * kSums;  // vectors of x that stay in registers: twice kPad columns
  std::int64_t c = 0;
  const auto strip = [&]<std::int64_t Size>(std::integral_constant<std::int64_t, Size>) {
    W left[Size];
    for (std::int64_t s = 0; s < Size; ++s) left[s] = load(x + c + s * kDoubles);
    for (std::int64_t v = 0; v < count; ++v) {
      const W part = all(-parts[v]);
      const double* q = vectors + v * stride + c;
      _Pragma("GCC unroll 8") for (std::int64_t s = 0; s < Size; ++s) {
        left[s] = Simd::fma(part, load(q + s * kDoubles), left[s]);
      }
    }
    for (std::int64_t s = 0; s < Size; ++s) store(x + c + s * kDoubles, left[s]);
    c += Size * kDoubles;
  };
  while (c + 2 * kPad <= width) strip(std::integral_constant<std::int64_t, kStrip>{});
  if (c < width) strip(std::integral_constant<std::int64_t, kSums>{});
}

template <Format format>
inline void pack_as(const Rows& rows, std::int64_t first, const double* scale, float* panel) noexcept {
  constexpr std::int64_t kBytes = bits_of(format) / 8;
  constexpr std::int64_t kColumns = 64;  // columns at a time, so that a row is read in long pieces
  alignas(64) float piece[kPanel * kColumns];
  alignas(64) float turned[kColumns * kPanel];
  alignas(64) double wide[kColumns];
  for (std::int64_t from = 0; from < rows.width; from += kColumns) {
    const std::int64_t columns = std::min(kColumns, rows.width - from);
    const std::int64_t whole = padded_width(columns);
    for (std::int64_t l = 0; l < kPanel; ++l) {
      float* to = piece + l * kColumns;
      if (scale[l] == 0.0) {
        std::fill_n(to, whole, 0.0f);
        continue;
      }
      read_as<format>(rows.at(first + l) + from * kBytes, columns, scale[l], wide);
      for (std::int64_t c = 0; c < whole; c += kFloats) {
        Turner::store(to + c, Simd::float_of(load(wide + c), load(wide + c + kDoubles)));
      }
    }
    if (columns == whole) {
      Turner::turn(piece, kColumns, kPanel, whole, panel + from * kPanel, kPanel);
    } else {
      Turner::turn(piece, kColumns, kPanel, whole, turned, kPanel);
      std::copy_n(turned, columns * kPanel, panel + from * kPanel);
    }
  }
}

void pack(const Rows& rows, std::int64_t first, const double* scale, float* panel) noexcept {
  switch (rows.format) {
    case Format::kFloat64: return pack_as<Format::kFloat64>(rows, first, scale, panel);
    case Format::kBFloat16: return pack_as<Format::kBFloat16>(rows, first, scale, panel);
    case Format::kFloat16: return pack_as<Format::kFloat16>(rows, first, scale, panel);
    default: return pack_as<Format::kFloat32>(rows, first, scale, panel);
  }
}

// `Strip` vectors of items with `Count` directions at once: their sums hide the adder's latency.
template <int Count>
inline void products_of(const float* panel, const float* directions, std::int64_t stride, std::int64_t width,
                        float* out) noexcept {
  constexpr int kStrip = 4;
  for (std::int64_t l = 0; l < kPanel; l += kStrip * kFloats) {
    V sums[Count][kStrip]{};
    for (std::int64_t c = 0; c < width; ++c) {
      const float* column = panel + c * kPanel + l;
      _Pragma("GCC unroll 2") for (int v = 0; v < Count; ++v) {
        const V q = Turner::splat(directions[v * stride + c]);
        _Pragma("GCC unroll 4") for (int s = 0; s < kStrip; ++s) {
          sums[v][s] = Simd::fma(Turner::load(column + s * kFloats), q, sums[v][s]);
        }
      }
    }
    for (int v = 0; v < Count; ++v) {
      for (int s = 0; s < kStrip; ++s) Turner::store(out + v * kPanel + l + s * kFloats, sums[v][s]);
    }
  }
}

void products(const float* panel, const float* directions, std::int64_t stride, std::int64_t count, std::int64_t width,
              float* out) noexcept {
  std::int64_t v = 0;
  for (; v + 2 <= count; v += 2) products_of<2>(panel, directions + v * stride, stride, width, out + v * kPanel);
  if (v < count) products_of<1>(panel, directions + v * stride, stride, width, out + v * kPanel);
}

}  // namespace
