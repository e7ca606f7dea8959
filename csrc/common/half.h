// bfloat16 and IEEE half precision as stored bits, converted without any processor extension.
#pragma once

#include <bit>
#include <cstdint>

namespace recfast {

struct BFloat16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

[[nodiscard]] constexpr float to_float(BFloat16 x) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

[[nodiscard]] constexpr float to_float(float x) noexcept { return x; }

// Round to nearest, ties to even; NaN stays NaN.
[[nodiscard]] constexpr BFloat16 to_bfloat16(float x) noexcept {
  const std::uint32_t word = std::bit_cast<std::uint32_t>(x);
  if ((word & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<std::uint16_t>((word >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((word + 0x7FFFu + ((word >> 16) & 1u)) >> 16)};
}

[[nodiscard]] constexpr float to_float(Half x) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1Fu;
  const std::uint32_t fraction = x.bits & 0x3FFu;
  if (exponent == 0x1Fu) return std::bit_cast<float>(sign | 0x7F800000u | (fraction << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float subnormal = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
}

}  // namespace recfast
