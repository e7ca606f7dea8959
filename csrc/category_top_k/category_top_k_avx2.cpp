#include "category_top_k/category_top_k.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2")

namespace recfast::category_top_k {
namespace {

__m256i load(const void* p) noexcept { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

}  // namespace

std::uint32_t equal_avx2(const std::int32_t* keys, std::int32_t category) noexcept {
  const __m256i wanted = _mm256_set1_epi32(category);
  std::uint32_t bits = 0;
  for (unsigned i = 0; i < kGroup; i += 8) {
    const __m256i same = _mm256_cmpeq_epi32(load(keys + i), wanted);
    bits |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same))) << i;
  }
  return bits;
}

std::uint32_t equal_avx2(const std::int64_t* keys, std::int64_t category) noexcept {
  const __m256i wanted = _mm256_set1_epi64x(category);
  std::uint32_t bits = 0;
  for (unsigned i = 0; i < kGroup; i += 4) {
    const __m256i same = _mm256_cmpeq_epi64(load(keys + i), wanted);
    bits |= static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(same))) << i;
  }
  return bits;
}

}  // namespace recfast::category_top_k

#pragma GCC pop_options
#endif
