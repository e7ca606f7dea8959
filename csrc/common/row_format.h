// How a row of an embedding table lies in memory, and the scalar conversions that define what its codes stand for.
//
// Plain formats     float32, float64, bfloat16, float16: D values, no header
// With a step       float8 (e4m3fn), int8, int4, int2: [step: float32 | codes], value(d) = step * code(d); the row is
//                   padded with zero bytes to a multiple of 4, so that steps are aligned. Codes are two's complement,
//                   packed from the low bits up: column 2j of int4 is the low half of byte j, columns 4j .. 4j + 3 of
//                   int2 are bits 0-1, 2-3, 4-5, 6-7 of byte j
// Affine            int8, int4, int2, for inference: [scale: float16 | bias: float16 | codes without sign],
//                   value(d) = scale * code(d) + bias; the row layout of FBGEMM's inference tables; any stride
// The header stands in the row because a row's header and codes are then fetched together: one miss instead of two.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace recfast {

enum class Format : int {
  kFloat32 = 0,
  kFloat64 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kFloat8 = 4,
  kInt8 = 5,
  kInt4 = 6,
  kInt2 = 7,
};

enum class Header : int { kNone = 0, kStep = 1, kAffine = 2 };

[[nodiscard]] constexpr int bits_of(Format format) noexcept {
  switch (format) {
    case Format::kFloat64: return 64;
    case Format::kFloat32: return 32;
    case Format::kBFloat16:
    case Format::kFloat16: return 16;
    case Format::kFloat8:
    case Format::kInt8: return 8;
    case Format::kInt4: return 4;
    case Format::kInt2: return 2;
  }
  return 0;
}

[[nodiscard]] constexpr bool has_step(Format format) noexcept { return format >= Format::kFloat8; }
[[nodiscard]] constexpr bool is_integer(Format format) noexcept { return format >= Format::kInt8; }

inline constexpr std::int64_t kHeaderBytes = 4;

// Bytes of the codes alone.
[[nodiscard]] constexpr std::int64_t code_bytes(Format format, std::int64_t width) noexcept {
  return (width * bits_of(format) + 7) / 8;
}

// Bytes from one row to the next as recfast lays tables out.
[[nodiscard]] constexpr std::int64_t row_bytes(Format format, std::int64_t width) noexcept {
  return has_step(format) ? (kHeaderBytes + code_bytes(format, width) + 3) / 4 * 4 : code_bytes(format, width);
}

// The range of an integer code.
[[nodiscard]] constexpr int lowest_code(Format format) noexcept { return -(1 << (bits_of(format) - 1)); }
[[nodiscard]] constexpr int highest_code(Format format) noexcept { return (1 << (bits_of(format) - 1)) - 1; }

inline constexpr float kFloat8Max = 448.0f;
inline constexpr float kFloat16Max = 65504.0f;

[[nodiscard]] inline float bfloat16_to_float(std::uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

[[nodiscard]] inline float float16_to_float(std::uint16_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = bits >> 10 & 0x1Fu;
  const std::uint32_t mantissa = bits & 0x3FFu;
  if (exponent == 0) {  // zero and subnormals: a multiple of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | mantissa << 13);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

[[nodiscard]] inline float float8_to_float(std::uint8_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80u) << 24;
  const std::uint32_t exponent = bits >> 3 & 0xFu;
  const std::uint32_t mantissa = bits & 0x7u;
  if ((bits & 0x7Fu) == 0x7Fu) return std::numeric_limits<float>::quiet_NaN();
  if (exponent == 0) {  // zero and subnormals: a multiple of 2^-9
    const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 120) << 23 | mantissa << 20);
}

// The three encoders are exact for values of the format; other values must have been rounded to it before.
[[nodiscard]] inline std::uint16_t encode_bfloat16(float value) noexcept {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}

[[nodiscard]] inline std::uint16_t encode_float16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = std::fabs(value);
  if (magnitude < 0x1p-14f) return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(magnitude * 0x1p24f));
  if (!(magnitude <= kFloat16Max)) {
    return static_cast<std::uint16_t>(sign | (std::isnan(value) ? 0x7E00u : 0x7C00u));
  }
  return static_cast<std::uint16_t>(sign | ((bits >> 23 & 0xFFu) - 112) << 10 | (bits >> 13 & 0x3FFu));
}

[[nodiscard]] inline std::uint8_t encode_float8(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint8_t>(bits >> 24 & 0x80u);
  const float magnitude = std::fabs(value);
  if (magnitude < 0x1p-6f) return static_cast<std::uint8_t>(sign | static_cast<std::uint8_t>(magnitude * 0x1p9f));
  if (!(magnitude <= kFloat8Max)) return static_cast<std::uint8_t>(sign | (std::isnan(value) ? 0x7Fu : 0x7Eu));
  return static_cast<std::uint8_t>(sign | ((bits >> 23 & 0xFFu) - 120) << 3 | (bits >> 20 & 0x7u));
}

// The code of column d as an integer, in the signed (step) or unsigned (affine) reading.
[[nodiscard]] inline int code_at(Format format, const std::uint8_t* codes, std::int64_t d, bool is_signed) noexcept {
  const int bits = bits_of(format);
  const int per_byte = 8 / bits;
  const int raw = codes[d / per_byte] >> (d % per_byte * bits) & ((1 << bits) - 1);
  return is_signed && raw > highest_code(format) ? raw - (1 << bits) : raw;
}

template <class T>
[[nodiscard]] T read_at(const std::uint8_t* address) noexcept {  // rows need not be aligned
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

}  // namespace recfast
