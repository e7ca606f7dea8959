// What a new row of a dynamic table starts with: a function of (seed, id) alone, so that neither the order in which ids
// arrive nor the process that meets them first matters.
//
//   out[i][d] = (h0 + h1 + h2 + h3 - 131070) * (std / sqrt((2^32 - 1) / 3))
//
// with h0..h3 the 16-bit halves of two words of Philox-4x32-7 (seed; id low, id high, d / 2, kInitialRows): words 0 and 1
// for an even column, 2 and 3 for an odd one. The sum of four uniform draws has the mean and the variance of the normal
// distribution it stands for, ends at 3.46 standard deviations, and, unlike a logarithm or a cosine, is exact: the sum
// is an integer below 2^24 and the product is rounded once, so that the bits are the same on every machine.
#pragma once

#include <cstdint>

#include "common/span.h"

namespace recfast::initial_rows {

inline constexpr std::uint32_t kInitialRows = 0x494E4954u;  // the fourth counter word, which no other draw has
inline constexpr double kDeviation = 37837.22723720648;      // sqrt((2^32 - 1) / 3)

struct Args {
  Span<const std::int64_t> ids;  // n
  std::int64_t width = 0;        // D
  float scale = 0.0f;            // std / kDeviation
  std::uint64_t seed = 0;
  float* out = nullptr;          // [n, D]
};

void run(const Args& args) noexcept;

}  // namespace recfast::initial_rows
