#include "category_top_k/category_top_k.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw")

namespace recfast::category_top_k {

std::uint32_t equal_avx512(const std::int32_t* keys, std::int32_t category) noexcept {
  const __m512i wanted = _mm512_set1_epi32(category);
  const std::uint32_t low = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(keys), wanted);
  const std::uint32_t high = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(keys + 16), wanted);
  return low | high << 16;
}

std::uint32_t equal_avx512(const std::int64_t* keys, std::int64_t category) noexcept {
  const __m512i wanted = _mm512_set1_epi64(category);
  std::uint32_t bits = 0;
  for (unsigned i = 0; i < kGroup; i += 8) {
    bits |= static_cast<std::uint32_t>(_mm512_cmpeq_epi64_mask(_mm512_loadu_si512(keys + i), wanted)) << i;
  }
  return bits;
}

}  // namespace recfast::category_top_k

#pragma GCC pop_options
#endif
