// What a new row of a dynamic table starts with: a function of (seed, id) alone, so that neither the order in which ids
// arrive nor the process that meets them first matters.
//
//   normal   out[i][d] = (h0 + h1 + h2 + h3 - 131070) * (std / sqrt((2^32 - 1) / 3))
//   uniform  out[i][d] = (2 (w >> 8) + 1 - 2^24) * (std / (2^24 / sqrt(3)))
//
// with h0..h3 the 16-bit halves of two words of Philox-4x32-7 (seed; id low, id high, d / 2, kind): words 0 and 1 for
// an even column, 2 and 3 for an odd one; w the first of the two. The sum of four uniform draws has the mean and the
// variance of the normal distribution it stands for, ends at 3.46 standard deviations, and, unlike a logarithm or a
// cosine, is exact: what stands in brackets is an integer of at most 24 bits and the product is rounded once, so that
// the bits are the same on every machine. Uniform draws lie inside +-sqrt(3) std; they serve to round rows of few bits.
#pragma once

#include <cstdint>

#include "common/span.h"

namespace recfast::initial_rows {

// The fourth word of the counter, which no other draw has.
enum class Kind : std::uint32_t { kNormal = 0x494E4954u, kUniform = 0x494E4955u };

inline constexpr double kNormalDeviation = 37837.22723720648;    // sqrt((2^32 - 1) / 3)
inline constexpr double kUniformDeviation = 9686330.173852498;   // 2^24 / sqrt(3)

struct Args {
  Span<const std::int64_t> ids;  // n
  std::int64_t width = 0;        // D
  Kind kind = Kind::kNormal;
  float scale = 0.0f;            // std over the deviation of the kind
  std::uint64_t seed = 0;
  float* out = nullptr;          // [n, D]
};

void run(const Args& args) noexcept;

}  // namespace recfast::initial_rows
