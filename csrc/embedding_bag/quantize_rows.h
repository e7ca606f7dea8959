// The loops behind quantize.h, written for the compiler to turn into vectors; included inside an instruction set's
// region, in an unnamed namespace. No loop's answer depends on how many columns are done at once.

constexpr std::int64_t kPiece = 128;  // columns at a time; a multiple of 8 and of 16

// The bits of |w| compare like |w|, and infinity and NaN are above all numbers.
constexpr std::uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr std::uint32_t kInfinity = 0x7F800000u;

// Columns [column, column + count) of a row as floats: in place, or converted to `buffer`.
template <Format F>
inline const float* load_piece(const QuantizeArgs& args, std::int64_t at, std::int64_t count, float* buffer) noexcept {
  if constexpr (F == Format::kFloat32) {
    return static_cast<const float*>(args.source) + at;
  } else if constexpr (F == Format::kFloat64) {
    const auto* source = static_cast<const double*>(args.source) + at;
    for (std::int64_t d = 0; d < count; ++d) buffer[d] = static_cast<float>(source[d]);
  } else {
    const auto* source = static_cast<const std::uint16_t*>(args.source) + at;
    for (std::int64_t d = 0; d < count; ++d) {
      buffer[d] = F == Format::kBFloat16 ? bfloat16_to_float(source[d]) : float16_to_float(source[d]);
    }
  }
  return buffer;
}

// The draws of columns [column, column + kPiece).
inline void draw_piece(const Philox& philox, std::int64_t row, std::int64_t column, std::uint32_t* draws) noexcept {
  constexpr int kBlocks = kPiece / 8;
  std::uint32_t c0[kBlocks];
  std::uint32_t c1[kBlocks];
  std::uint32_t c2[kBlocks];
  std::uint32_t c3[kBlocks];
  for (int k = 0; k < kBlocks; ++k) {
    c0[k] = 0xFFFFFFFFu;
    c1[k] = 0;
    c2[k] = static_cast<std::uint32_t>(row);
    c3[k] = static_cast<std::uint32_t>(column / 8) + static_cast<std::uint32_t>(k);
  }
  std::uint32_t k0 = philox.key0;
  std::uint32_t k1 = philox.key1;
  for (int round = 0; round < Philox::kRounds; ++round) {
    for (int k = 0; k < kBlocks; ++k) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0[k];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2[k];
      c0[k] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[k] ^ k0;
      c1[k] = static_cast<std::uint32_t>(p1);
      c2[k] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[k] ^ k1;
      c3[k] = static_cast<std::uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int k = 0; k < kBlocks; ++k) {
    draws[8 * k] = c0[k];
    draws[8 * k + 1] = exchange_halves(c0[k]);
    draws[8 * k + 2] = c1[k];
    draws[8 * k + 3] = exchange_halves(c1[k]);
    draws[8 * k + 4] = c2[k];
    draws[8 * k + 5] = exchange_halves(c2[k]);
    draws[8 * k + 6] = c3[k];
    draws[8 * k + 7] = exchange_halves(c3[k]);
  }
}

// x, of magnitude below 2^22, to an integer.
template <bool kStochastic>
inline float round_to_integer(float x, std::uint32_t draw) noexcept {
  constexpr float kShift = 0x1.8p23f;  // sums of this size have no fraction left
  const float nearest = (x + kShift) - kShift;
  if constexpr (!kStochastic) return nearest;
  const float floor = nearest > x ? nearest - 1.0f : nearest;
  return floor + (uniform01(draw) < x - floor ? 1.0f : 0.0f);
}

// x to a float with kMantissa bits and least exponent kLeast; still to be clamped.
template <bool kStochastic, int kLeast, int kMantissa>
inline float round_to_grid(float x, std::uint32_t draw) noexcept {
  const auto exponent = static_cast<int>(std::bit_cast<std::uint32_t>(x) >> 23 & 0xFFu);
  const int grid = (exponent < kLeast + 127 ? kLeast + 127 : exponent) - kMantissa;
  const float spacing = std::bit_cast<float>(static_cast<std::uint32_t>(grid) << 23);
  const float inverse = std::bit_cast<float>(static_cast<std::uint32_t>(254 - grid) << 23);
  return round_to_integer<kStochastic>(x * inverse, draw) * spacing;
}

inline float clamp(float x, float low, float high) noexcept {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <Format F>
constexpr float highest_value() noexcept {
  if constexpr (F == Format::kFloat8) return kFloat8Max;
  if constexpr (F == Format::kFloat16) return kFloat16Max;
  if constexpr (is_integer(F)) return static_cast<float>(highest_code(F));
  return 0;
}

template <Format F>
constexpr float lowest_value() noexcept {
  return is_integer(F) ? static_cast<float>(lowest_code(F)) : -highest_value<F>();
}

// Codes of `count` columns; returns how many were saturated.
template <Format F, bool kStochastic>
inline std::int64_t encode_piece(const float* w, float step, std::int64_t count, const std::uint32_t* draws,
                                 std::uint8_t* target) noexcept {
  std::int32_t saturated = 0;
  if constexpr (F == Format::kBFloat16) {
    auto* out = reinterpret_cast<std::uint16_t*>(target);
    for (std::int64_t d = 0; d < count; ++d) {
      const auto bits = std::bit_cast<std::uint32_t>(w[d]);
      const std::uint32_t magnitude = bits & kMagnitude;
      const std::uint32_t more = kStochastic ? draws[d] >> 16 : 0x7FFFu + (magnitude >> 16 & 1u);
      std::uint32_t rounded = (magnitude + more) >> 16;
      saturated += rounded > 0x7F7Fu ? 1 : 0;
      rounded = rounded > 0x7F7Fu ? 0x7F7Fu : rounded;
      out[d] = static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | rounded);
    }
  } else if constexpr (F == Format::kFloat16) {
    auto* out = reinterpret_cast<std::uint16_t*>(target);
    for (std::int64_t d = 0; d < count; ++d) {
      const float rounded = round_to_grid<kStochastic, -14, 10>(w[d], kStochastic ? draws[d] : 0);
      saturated += rounded > kFloat16Max || rounded < -kFloat16Max ? 1 : 0;
      const std::uint32_t magnitude =
          std::bit_cast<std::uint32_t>(clamp(rounded, -kFloat16Max, kFloat16Max)) & kMagnitude;
      const auto small = static_cast<std::uint32_t>(
          static_cast<std::int32_t>(std::bit_cast<float>(magnitude < 0x38800000u ? magnitude : 0u) * 0x1p24f));
      const std::uint32_t code = magnitude < 0x38800000u ? small : (magnitude >> 13) - (112u << 10);
      out[d] = static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(w[d]) >> 16 & 0x8000u) | code);
    }
  } else if constexpr (F == Format::kFloat8) {
    for (std::int64_t d = 0; d < count; ++d) {
      const float x = step == 0.0f ? 0.0f : clamp(w[d] / step, -1024.0f, 1024.0f);
      const float rounded = round_to_grid<kStochastic, -6, 3>(x, kStochastic ? draws[d] : 0);
      saturated += rounded > kFloat8Max || rounded < -kFloat8Max ? 1 : 0;
      const std::uint32_t magnitude =
          std::bit_cast<std::uint32_t>(clamp(rounded, -kFloat8Max, kFloat8Max)) & kMagnitude;
      const auto small = static_cast<std::uint32_t>(
          static_cast<std::int32_t>(std::bit_cast<float>(magnitude < 0x3C800000u ? magnitude : 0u) * 0x1p9f));
      const std::uint32_t code = magnitude < 0x3C800000u ? small : (magnitude >> 20) - (120u << 3);
      target[d] = static_cast<std::uint8_t>((std::bit_cast<std::uint32_t>(x) >> 24 & 0x80u) | code);
    }
  } else {
    constexpr float kLow = lowest_value<F>();
    constexpr float kHigh = highest_value<F>();
    alignas(64) std::int8_t codes[kPiece];
    for (std::int64_t d = 0; d < count; ++d) {
      const float x = step == 0.0f ? 0.0f : clamp(w[d] / step, kLow - 1.0f, kHigh + 1.0f);
      const float rounded = round_to_integer<kStochastic>(x, kStochastic ? draws[d] : 0);
      saturated += rounded > kHigh || rounded < kLow ? 1 : 0;
      codes[d] = static_cast<std::int8_t>(static_cast<std::int32_t>(clamp(rounded, kLow, kHigh)));
    }
    if constexpr (F == Format::kInt8) {
      std::memcpy(target, codes, static_cast<std::size_t>(count));
    } else {
      constexpr std::int64_t kPer = 8 / bits_of(F);
      for (std::int64_t d = count; d % kPer != 0; ++d) codes[d] = 0;
      const std::int64_t bytes = (count + kPer - 1) / kPer;
      for (std::int64_t j = 0; j < bytes; ++j) {
        if constexpr (F == Format::kInt4) {
          std::uint16_t pair;
          std::memcpy(&pair, codes + 2 * j, sizeof pair);
          target[j] = static_cast<std::uint8_t>((pair & 0xFu) | (pair >> 4 & 0xF0u));
        } else {
          std::uint32_t four;
          std::memcpy(&four, codes + 4 * j, sizeof four);
          target[j] = static_cast<std::uint8_t>((four & 0x3u) | (four >> 6 & 0xCu) | (four >> 12 & 0x30u) |
                                                (four >> 18 & 0xC0u));
        }
      }
    }
  }
  return saturated;
}

template <Format Source, Format F, bool kStochastic>
std::int64_t quantize_rows(const QuantizeArgs& args, std::int64_t first, std::int64_t last,
                           std::int64_t& not_finite) noexcept {
  constexpr std::int64_t kHead = has_step(F) ? kHeaderBytes : 0;
  const std::int64_t width = args.width;
  const Philox philox(args.seed);
  alignas(64) float buffer[kPiece];
  alignas(64) std::uint32_t draws[kPiece];
  std::int64_t saturated = 0;
  for (std::int64_t row = first; row < last; ++row) {
    std::uint32_t largest = 0;
    for (std::int64_t column = 0; column < width; column += kPiece) {
      const std::int64_t count = width - column < kPiece ? width - column : kPiece;
      const float* w = load_piece<Source>(args, row * width + column, count, buffer);
      for (std::int64_t d = 0; d < count; ++d) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(w[d]) & kMagnitude;
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    if (largest >= kInfinity) {
      if (not_finite >= 0) continue;
      for (std::int64_t column = 0; column < width && not_finite < 0; ++column) {
        const float* w = load_piece<Source>(args, row * width + column, 1, buffer);
        if ((std::bit_cast<std::uint32_t>(*w) & kMagnitude) >= kInfinity) not_finite = row * width + column;
      }
      continue;
    }
    std::uint8_t* target = args.target + row * args.stride;
    float step = 1.0f;
    if constexpr (has_step(F)) {
      step = args.step != nullptr ? args.step[row] : std::bit_cast<float>(largest) / highest_value<F>();
      std::memcpy(target, &step, sizeof step);
    }
    for (std::int64_t column = 0; column < width; column += kPiece) {
      const std::int64_t count = width - column < kPiece ? width - column : kPiece;
      const float* w = load_piece<Source>(args, row * width + column, count, buffer);
      if constexpr (kStochastic) draw_piece(philox, row, column, draws);
      saturated += encode_piece<F, kStochastic>(w, step, count, draws, target + kHead + column * bits_of(F) / 8);
    }
    const std::int64_t used = kHead + code_bytes(F, width);
    if (used < args.stride) std::memset(target + used, 0, static_cast<std::size_t>(args.stride - used));
  }
  return saturated;
}

template <Format Source, Format F>
QuantizeForm* pick_rounding(bool stochastic) noexcept {
  return stochastic ? &quantize_rows<Source, F, true> : &quantize_rows<Source, F, false>;
}

template <Format Source>
QuantizeForm* pick_target(const QuantizeArgs& args) noexcept {
  switch (args.format) {
    case Format::kBFloat16: return pick_rounding<Source, Format::kBFloat16>(args.stochastic);
    case Format::kFloat16: return pick_rounding<Source, Format::kFloat16>(args.stochastic);
    case Format::kFloat8: return pick_rounding<Source, Format::kFloat8>(args.stochastic);
    case Format::kInt4: return pick_rounding<Source, Format::kInt4>(args.stochastic);
    case Format::kInt2: return pick_rounding<Source, Format::kInt2>(args.stochastic);
    default: return pick_rounding<Source, Format::kInt8>(args.stochastic);
  }
}

inline QuantizeForm* pick_form(const QuantizeArgs& args) noexcept {
  switch (args.source_format) {
    case Format::kFloat64: return pick_target<Format::kFloat64>(args);
    case Format::kBFloat16: return pick_target<Format::kBFloat16>(args);
    case Format::kFloat16: return pick_target<Format::kFloat16>(args);
    default: return pick_target<Format::kFloat32>(args);
  }
}
