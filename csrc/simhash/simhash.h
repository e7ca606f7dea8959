// simhash: the signs of random projections, packed into codes.
//
//   code[i, j] = sum_t 2^t [ x_i . R[:, j, t] > 0 ]      j < M, t < bits; strictly above, so 0 and NaN give 0
//
// Shapes       x: `outer` blocks of `inner` rows of D values, strides apart; R [D, M, bits] and codes [rows, M]
//              contiguous; with lengths [outer], rows lengths[o] <= i < inner of block o are not read and get code 0
// Dtypes       x float32, bfloat16 (widened, exact) or float64; R float32, or float64 with x; codes uint8 for
//              bits <= 8, int64 above (bit 63 is the sign)
// Accumulator  R's type. The sum starts at 0 and takes its terms in the order of D, each by one FMA (std::fma where the
//              processor has none), in every form: the bits are equal on every instruction set, whatever the batch,
//              the number of threads and the strides
// Rounding     a bit can differ from the exact sign only where |x . R| <= D eps sum_d |x_d R_d|
// Limits       1 <= bits <= 64; 0 <= lengths[o] <= inner; sizes below 2^63
// Source       Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002; Cao et al. (SDIM),
//              arXiv 2205.10249; Chen et al. (ETA), arXiv 2108.04468
#pragma once

#include <cstdint>

#include "common/arena.h"

namespace recfast::simhash {

// X: float, double, or std::uint16_t for the bits of bfloat16. T: the type of the sums.
template <class X, class T>
struct Args {
  const X* x = nullptr;
  std::int64_t outer = 0;
  std::int64_t outer_stride = 0;
  std::int64_t inner = 0;
  std::int64_t inner_stride = 0;
  const std::int64_t* lengths = nullptr;  // or null: `inner` everywhere
  std::int64_t dim = 0;
  const T* projections = nullptr;
  std::int64_t tables = 0;
  std::int64_t bits = 0;
  std::uint8_t* small = nullptr;  // codes where bits <= 8
  std::int64_t* large = nullptr;  // codes where bits > 8
  T* scratch = nullptr;           // scratch_size() values

  [[nodiscard]] std::int64_t columns() const noexcept { return tables * bits; }
};

// Values of scratch that a call needs with the present number of threads.
[[nodiscard]] std::int64_t scratch_size(std::int64_t dim, std::int64_t columns, bool widened) noexcept;

void run(const Args<float, float>& args) noexcept;
void run(const Args<std::uint16_t, float>& args) noexcept;
void run(const Args<double, double>& args) noexcept;

// --- what the forms share ---

// Rows that go through the product together.
inline constexpr std::int64_t kBlock = 24;

// Bytes of one row's signs: whole groups of 16 columns, and room for a word read at the last byte.
[[nodiscard]] constexpr std::int64_t sign_bytes(std::int64_t columns) noexcept { return padded(columns) / 8 + 16; }

// The signs of `count` <= kBlock rows against R widened with zeros to [dim, columns], columns a multiple of 16: bit h
// of row r is bit h % 8 of byte h / 8 of signs + r * sign_bytes(columns).
template <class T>
struct Block {
  const T* rows[kBlock];
  std::int64_t count;
  std::int64_t dim;
  const T* projections;
  std::int64_t columns;
  std::uint8_t* signs;
};

template <class T>
void signs_scalar(const Block<T>& block) noexcept;
void signs_avx2(const Block<float>& block) noexcept;
void signs_avx512(const Block<float>& block) noexcept;

}  // namespace recfast::simhash
