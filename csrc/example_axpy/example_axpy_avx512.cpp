#include "example_axpy/example_axpy.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f")

namespace recfast::example_axpy {

void axpy_avx512(const float* x, const float* y, float* out, std::int64_t size, float alpha) noexcept {
  const __m512 a = _mm512_set1_ps(alpha);
  std::int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const __m512 product = _mm512_mul_ps(a, _mm512_loadu_ps(x + i));
    _mm512_storeu_ps(out + i, _mm512_add_ps(product, _mm512_loadu_ps(y + i)));
  }
  if (i < size) {
    // Masked lanes are neither read nor written, so the tail needs no padding.
    const auto rest = static_cast<__mmask16>((1u << (size - i)) - 1u);
    const __m512 product = _mm512_mul_ps(a, _mm512_maskz_loadu_ps(rest, x + i));
    _mm512_mask_storeu_ps(out + i, rest, _mm512_add_ps(product, _mm512_maskz_loadu_ps(rest, y + i)));
  }
}

}  // namespace recfast::example_axpy

#pragma GCC pop_options
#endif
