// The forms of dpp_greedy.h, included once per instruction set inside its target region. Before it stands a `Simd`:
//   kLanes, Floats, Ints (vectors of so many), floats<format>(address), spread, add_products, bits_at_least (see there).
// Items do not mix, sums have a fixed order, products and sums are rounded apart: all forms give the same bits.

namespace {

using Floats = Simd::Floats;
using Ints = Simd::Ints;
using item_panels::Rows;

constexpr std::int64_t kLanes = Simd::kLanes;
constexpr std::int64_t kSums = 16 / kLanes;
constexpr std::int64_t kParts = kPanel / kLanes;

inline Floats load(const float* p) noexcept {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) noexcept { std::memcpy(p, &v, sizeof v); }
inline Floats all(float x) noexcept { return x - Floats{}; }
inline Floats larger(Floats a, Floats b) noexcept { return a > b ? a : b; }

// Sixteen partial sums (or maxima), folded half onto half whatever the width of a register.
template <class F>
[[gnu::always_inline]] inline float folded(const Floats (&parts)[kSums], const F& f) noexcept {
  alignas(64) float lanes[16];
  for (std::int64_t s = 0; s < kSums; ++s) store(lanes + s * kLanes, parts[s]);
  _Pragma("GCC unroll 4") for (int half = 8; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = f(lanes[l], lanes[l + half]);
  }
  return lanes[0];
}

// Natural logarithm of normal positive numbers to 2 ulp: the polynomial of Cephes' logf on [sqrt(1/2), sqrt(2)).
inline Floats log_of(Floats x) noexcept {
  const Ints bits = (Ints)x;  // for vector types the cast keeps the bits
  const Ints exponent = (bits - 0x3F3504F3) >> 23;
  const Ints mantissa = bits - (exponent << 23);
  const Floats m = (Floats)mantissa - 1.0f;
  const Floats e = __builtin_convertvector(exponent, Floats);
  const Floats square = m * m;
  Floats p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * square - e * 2.12194440e-4f - square * 0.5f;
  return p + m + e * 0.693359375f;
}

// f(part, column, values) over the whole row in pieces of 16, zeros after the end.
template <Format format, class F>
[[gnu::always_inline]] inline void each(const std::byte* row, std::int64_t width, const F& f) noexcept {
  constexpr std::int64_t kBytes = bits_of(format) / 8;
  std::int64_t c = 0;
  for (; c + 16 <= width; c += 16) {
    _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kSums; ++s) {
      f(s, c + s * kLanes, Simd::template floats<format>(row + (c + s * kLanes) * kBytes));
    }
  }
  if (c == width) return;
  alignas(64) std::byte rest[16 * kBytes]{};
  std::memcpy(rest, row + c * kBytes, static_cast<std::size_t>((width - c) * kBytes));
  _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kSums; ++s) {
    f(s, c + s * kLanes, Simd::template floats<format>(rest + s * kLanes * kBytes));
  }
}

template <Format format>
inline void norms_as(const Rows& rows, std::int64_t first, std::int64_t count, const bool* wanted,
                     float* out) noexcept {
  constexpr std::int64_t kBytes = bits_of(format) / 8;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!wanted[i]) {
      out[i] = 1.0f;
      continue;
    }
    if (rows.ids != nullptr && i + 8 < count && wanted[i + 8]) {
      const std::byte* ahead = rows.at(first + i + 8);
      for (std::int64_t at = 0; at < rows.width * kBytes; at += 64) __builtin_prefetch(ahead + at);
    }
    Floats sums[kSums]{};
    each<format>(rows.at(first + i), rows.width, [&](std::int64_t s, std::int64_t, Floats x) { sums[s] += x * x; });
    out[i] = folded(sums, [](float a, float b) { return a + b; });
  }
}

void norms(const Rows& rows, std::int64_t first, std::int64_t count, const bool* wanted, float* out) noexcept {
  switch (rows.format) {
    case Format::kFloat64: return norms_as<Format::kFloat64>(rows, first, count, wanted, out);
    case Format::kBFloat16: return norms_as<Format::kBFloat16>(rows, first, count, wanted, out);
    case Format::kFloat16: return norms_as<Format::kFloat16>(rows, first, count, wanted, out);
    default: return norms_as<Format::kFloat32>(rows, first, count, wanted, out);
  }
}

void offsets(const float* part, const float* diagonal, std::int64_t count, float* offset) noexcept {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    alignas(64) float p[kLanes]{};
    alignas(64) float d[kLanes];
    const std::int64_t n = std::min(kLanes, count - i);
    if (n == kLanes) {
      store(offset + i, load(part + i) + log_of(load(diagonal + i)));
      continue;
    }
    std::fill_n(d, kLanes, 1.0f);
    std::copy_n(part + i, n, p);
    std::copy_n(diagonal + i, n, d);
    store(p, load(p) + log_of(load(d)));
    std::copy_n(p, n, offset + i);
  }
}

// Codes of one row of floats given by `values(f)`, into `to` [whole columns] for the columns of a piece; see pack.
constexpr std::int64_t kColumns = 64;

inline void encode_values(Floats x, Floats inverse, std::uint8_t* to, Floats* error) noexcept {
  using Bytes = unsigned char __attribute__((vector_size(kLanes)));
  const Floats scaled = x * inverse;
  const Floats shifted = scaled + 12582912.0f;  // 1.5 * 2^23: the sum is an integer, in the low bits
  const Floats left = scaled - (shifted - 12582912.0f);
  *error += left * left;
  const Bytes bytes = __builtin_convertvector((Ints)shifted - 0x4B400000 + 128, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
}

template <Format format>
inline void pack_as(const Rows& rows, std::int64_t first, const double* scale, const Panel& panel) noexcept {
  constexpr std::int64_t kBytes = bits_of(format) / 8;
  constexpr Floats kZero{};
  const std::int64_t width = rows.width;
  const std::int64_t groups = (width + 3) / 4;
  const float root = std::sqrt(static_cast<float>(width));
  alignas(64) std::uint8_t piece[kPanel * kColumns];
  alignas(64) float inverses[kPanel];
  alignas(64) float factors[kPanel];
  alignas(64) Floats errors[kPanel][kSums];
  alignas(64) float plain[kColumns];
  // Whether the values of the row itself are in float32's range; otherwise they are scaled first.
  const auto direct = [&](std::int64_t l) { return factors[l] != 0.0f; };
  // A piece of a scaled row, in float32.
  const auto scaled = [&](std::int64_t l, std::int64_t from, std::int64_t columns) {
    for (std::int64_t c = 0; c < columns; ++c) plain[c] = static_cast<float>(rows.value(first + l, from + c) * scale[l]);
    return reinterpret_cast<const std::byte*>(plain);
  };

  for (std::int64_t l = 0; l < kPanel; ++l) {
    panel.step[l] = panel.delta[l] = panel.sum[l] = inverses[l] = factors[l] = 0.0f;
    for (std::int64_t s = 0; s < kSums; ++s) errors[l][s] = kZero;
    if (scale[l] == 0.0) continue;
    Floats most[kSums]{};
    const auto measure = [&](std::int64_t s, std::int64_t, Floats x) { most[s] = larger(most[s], x < 0.0f ? -x : x); };
    const auto greater = [](float a, float b) { return a > b ? a : b; };
    float greatest = 0.0f;
    if constexpr (format != Format::kFloat64) {
      each<format>(rows.at(first + l), width, measure);
      greatest = folded(most, greater);
      if (greatest > 1e-30f) factors[l] = static_cast<float>(scale[l]);
    }
    if (factors[l] == 0.0f) {
      for (std::int64_t from = 0; from < width; from += kColumns) {
        const std::int64_t columns = std::min(kColumns, width - from);
        each<Format::kFloat32>(scaled(l, from, columns), columns, measure);
      }
      greatest = folded(most, greater);
    }
    if (greatest == 0.0f) continue;
    if (greatest <= 1e-30f) {
      panel.delta[l] = 1.0f;  // nothing is known of it
      continue;
    }
    inverses[l] = 127.0f / greatest;
    panel.step[l] = (direct(l) ? factors[l] * greatest : greatest) / 127.0f;
  }

  using Turner = Tiles<typename Simd::Moves>;
  for (std::int64_t from = 0; from < width; from += kColumns) {
    const std::int64_t columns = std::min(kColumns, width - from);
    for (std::int64_t l = 0; l < kPanel; ++l) {
      std::uint8_t* to = piece + l * kColumns;
      if (columns < kColumns) std::memset(to, 128, kColumns);
      const Floats inverse = all(inverses[l]);
      const auto encode_piece = [&](std::int64_t s, std::int64_t c, Floats x) {
        encode_values(x, inverse, to + c, &errors[l][s]);
      };
      if (inverses[l] == 0.0f) {
        std::memset(to, 128, kColumns);
      } else if (direct(l)) {
        each<format>(rows.at(first + l) + from * kBytes, columns, encode_piece);
      } else {
        each<Format::kFloat32>(scaled(l, from, columns), columns, encode_piece);
      }
    }
    // Four bytes of a row move as one float; nothing is computed with them.
    const auto* values = reinterpret_cast<const float*>(piece);
    auto* codes = reinterpret_cast<float*>(panel.codes + from * kPanel);
    if (columns == kColumns) {
      Turner::turn(values, kColumns / 4, kPanel, kColumns / 4, codes, kPanel);
    } else {
      alignas(64) float turned[kColumns / 4 * kPanel];
      Turner::turn(values, kColumns / 4, kPanel, kColumns / 4, turned, kPanel);
      std::memcpy(codes, turned, static_cast<std::size_t>((groups - from / 4) * kPanel * 4));
    }
  }

  for (std::int64_t l = 0; l < kPanel; ++l) {
    if (inverses[l] == 0.0f) continue;
    const float error = folded(errors[l], [](float a, float b) { return a + b; });
    // Beside the codes' own error: the rounding of scaled values (127 u each), of the step and of the norm.
    panel.delta[l] = panel.step[l] * (std::sqrt(error) * 1.0001f + root * 1e-5f) + 5e-7f +
                     static_cast<float>(width) * 1.2e-7f;
  }
}

void pack(const Rows& rows, std::int64_t first, const double* scale, const Panel& panel) noexcept {
  switch (rows.format) {
    case Format::kFloat64: return pack_as<Format::kFloat64>(rows, first, scale, panel);
    case Format::kBFloat16: return pack_as<Format::kBFloat16>(rows, first, scale, panel);
    case Format::kFloat16: return pack_as<Format::kFloat16>(rows, first, scale, panel);
    default: return pack_as<Format::kFloat32>(rows, first, scale, panel);
  }
}

float encode(const double* q, std::int64_t width, std::int64_t groups, std::int8_t* high, std::int8_t* low,
             Direction* direction) noexcept {
  constexpr float kMost = 127.0f * 256.0f;
  float greatest = 0.0f;
  for (std::int64_t c = 0; c < width; ++c) {
    const float size = std::fabs(static_cast<float>(q[c]));
    greatest = size > greatest ? size : greatest;
  }
  direction->high = high;
  direction->low = low;
  direction->sign = 1.0f;
  direction->step = greatest / kMost;
  std::memset(high + width, 0, static_cast<std::size_t>(groups * 4 - width));
  std::memset(low + width, 0, static_cast<std::size_t>(groups * 4 - width));
  const float inverse = greatest > 1e-30f ? kMost / greatest : 0.0f;
  std::int32_t highs = 0;
  std::int32_t lows = 0;
  for (std::int64_t c = 0; c < width; ++c) {
    const float scaled = static_cast<float>(q[c]) * inverse;
    const std::int32_t code = std::bit_cast<std::int32_t>(scaled + 12582912.0f) - 0x4B400000;
    const std::int32_t upper = (code + 128) >> 8;
    const std::int32_t lower = code - upper * 256;
    highs += upper;
    lows += lower;
    high[c] = static_cast<std::int8_t>(upper);
    low[c] = static_cast<std::int8_t>(lower);
  }
  direction->high_start = -128 * highs;
  direction->low_start = -128 * lows;
  // Each code is off by half a step at most, and a little for the rounding of the scaled value.
  return greatest > 1e-30f ? direction->step * 0.51f * std::sqrt(static_cast<float>(width)) : 1e-30f;
}

float refresh(const Panel& panel, const Direction* directions, std::int64_t count, std::int64_t groups, float error,
              float slack) noexcept {
  constexpr std::int64_t kStrip = kParts < 4 ? kParts : 4;  // registers of items worked on together
  // Above the sum of what rounding the offset, the logarithm and the sums can take away.
  constexpr float kRounding = 1.5e-6f;
  constexpr float kSmallest = 1.17549435e-38f;
  Floats best = all(-std::numeric_limits<float>::infinity());
  for (std::int64_t at = 0; at < kPanel; at += kStrip * kLanes) {
    Floats sums[kStrip];
    _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kStrip; ++s) sums[s] = load(panel.sum + at + s * kLanes);
    for (std::int64_t v = 0; v < count; ++v) {
      const Direction& q = directions[v];
      Ints high[kStrip];
      Ints low[kStrip];
      _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kStrip; ++s) {
        high[s] = q.high_start - Ints{};
        low[s] = q.low_start - Ints{};
      }
      const std::uint8_t* codes = panel.codes + at * 4;
      for (std::int64_t g = 0; g < groups; ++g, codes += kPanel * 4) {
        const auto h = Simd::spread(q.high + g * 4);
        const auto l = Simd::spread(q.low + g * 4);
        _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kStrip; ++s) {
          Ints bytes;
          std::memcpy(&bytes, codes + s * kLanes * 4, sizeof bytes);
          Simd::add_products(bytes, h, l, &high[s], &low[s]);
        }
      }
      _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kStrip; ++s) {
        const Floats whole = __builtin_convertvector(high[s], Floats) * 256.0f + __builtin_convertvector(low[s], Floats);
        const Floats part = whole * (load(panel.step + at + s * kLanes) * q.step);
        sums[s] += part * part * q.sign;
      }
    }
    _Pragma("GCC unroll 4") for (std::int64_t s = 0; s < kStrip; ++s) {
      const std::int64_t i = at + s * kLanes;
      store(panel.sum + i, sums[s]);
      const Floats sum = larger(sums[s], Floats{});
      const Floats off = load(panel.delta + i) + error;
      Floats share = 1.0f - sum + (off * (sum * 1.4143f + 0.7072f) + slack);
      share = larger(share, all(kSmallest));
      share = share < 1.000001f ? share : all(1.000001f);
      const Floats logarithm = log_of(share);
      const Floats offset = load(panel.offset + i);
      const Floats size = (logarithm < 0.0f ? -logarithm : logarithm) + (offset < 0.0f ? -offset : offset) + 1.0f;
      // An item that may not be picked has the offset -inf, and -inf + inf would be NaN.
      const Floats upper = offset < -3.0e38f ? offset : offset + logarithm + size * kRounding;
      store(panel.upper + i, upper);
      best = larger(upper, best);
    }
  }
  float greatest = best[0];
  for (std::int64_t lane = 1; lane < kLanes; ++lane) greatest = best[lane] > greatest ? best[lane] : greatest;
  return greatest;
}

std::uint64_t at_least(const float* upper, float least) noexcept {
  std::uint64_t bits = 0;
  _Pragma("GCC unroll 16") for (std::int64_t s = 0; s < kParts; ++s) {
    bits |= Simd::bits_at_least(load(upper + s * kLanes), all(least)) << (s * kLanes);
  }
  return bits;
}

}  // namespace
