// Rows of floats rounded to a format with a step, or to 16-bit floats.
//
// Formula      step = given, or max |w| / highest code of the row (127, 7, 1, or 448 for float8), rounded to float32
//              x = w / step, rounded to float32 (0 where step is 0); code = x rounded and clamped to the range of the
//              codes. Of int2 the code -2 only comes with given steps
//              bfloat16, float16: x = w
// Rounding     nearest: ties to even. Stochastic: up with the probability of the fraction, on the grid of the format:
//              integers, or the multiples of 2^(max(e, e_min) - m) of a value with exponent e (float8: e_min = -6,
//              m = 3; float16: -14, 10); bfloat16 adds 16 random bits below its own and cuts. Floats keep the sign
//              of a value that becomes zero
// Draws        Philox (common/random.h) at counter (0xFFFFFFFF, 0, row, block): a function of seed and place alone
// Saturated    values that rounding puts outside the range: they become the nearest code or the largest finite float
//              (float8: 448). Counted
// Dtypes       float32, float64, bfloat16, float16; float64 is rounded to float32 first
// Not finite   values (after rounding to float32) are reported, the first of them; the rows written are then worthless
// Threads      equal bits for any number and on every instruction set
#pragma once

#include <cstdint>

#include "common/row_format.h"

namespace recfast::embedding_bag {

struct QuantizeArgs {
  const void* source;  // [T, D]
  Format source_format;
  std::int64_t rows;
  std::int64_t width;
  std::uint8_t* target;  // rows of `stride` bytes
  std::int64_t stride;
  Format format;
  const float* step;  // [T], or null
  bool stochastic;
  std::uint64_t seed;
};

struct QuantizeOutcome {
  std::int64_t not_finite;  // flat position, or -1
  std::int64_t saturated;
};

[[nodiscard]] QuantizeOutcome quantize(const QuantizeArgs& args) noexcept;

// Rows [first, last) by one thread. Returns the number saturated; `not_finite` gets the first wrong flat position.
using QuantizeForm = std::int64_t(const QuantizeArgs& args, std::int64_t first, std::int64_t last,
                                  std::int64_t& not_finite) noexcept;
QuantizeForm quantize_scalar, quantize_avx2, quantize_avx512;

}  // namespace recfast::embedding_bag
