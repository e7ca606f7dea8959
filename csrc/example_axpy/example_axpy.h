// example_axpy: out[i] = alpha * x[i] + y[i]. The pattern of an op, to be copied.
//
// Shapes       x, y, out: [N], contiguous
// Dtypes       float32 or float64, the same for all; alpha in that type
// Rounding     the product and the sum are rounded apart (no FMA), so every instruction set gives the same bits
// Error bound  |out - exact| <= eps * (2 |alpha x| + |y|)
// Limits       N < 2^63; out may not overlap x or y in part
// Source       level 1 BLAS (Lawson et al., ACM TOMS 5, 1979)
#pragma once

#include "common/span.h"

namespace recfast::example_axpy {

template <class T>
struct Args {
  Span<const T> x;
  Span<const T> y;
  Span<T> out;
  T alpha;
};

// Threaded, dispatched by instruction set.
void run(const Args<float>& args) noexcept;
void run(const Args<double>& args) noexcept;

// The forms behind it, one thread each.
void axpy_scalar(const float* x, const float* y, float* out, std::int64_t size, float alpha) noexcept;
void axpy_avx2(const float* x, const float* y, float* out, std::int64_t size, float alpha) noexcept;
void axpy_avx512(const float* x, const float* y, float* out, std::int64_t size, float alpha) noexcept;

}  // namespace recfast::example_axpy
