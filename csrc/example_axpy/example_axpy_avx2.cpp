#include "example_axpy/example_axpy.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2")

namespace recfast::example_axpy {

void axpy_avx2(const float* x, const float* y, float* out, std::int64_t size, float alpha) noexcept {
  const __m256 a = _mm256_set1_ps(alpha);
  std::int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m256 product = _mm256_mul_ps(a, _mm256_loadu_ps(x + i));
    _mm256_storeu_ps(out + i, _mm256_add_ps(product, _mm256_loadu_ps(y + i)));
  }
  for (; i < size; ++i) out[i] = alpha * x[i] + y[i];
}

}  // namespace recfast::example_axpy

#pragma GCC pop_options
#endif
