#include "sdim_attention/sdim_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "common/simd_avx2.h"
#include "sdim_attention/sdim_attention_kernel.h"

namespace recfast::sdim_attention {
namespace {

struct Form : Avx2 {
  static V widen(const std::uint16_t* p) noexcept {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static __m256i mask(std::int64_t n) noexcept {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes);
  }
  static std::uint32_t equal16(const std::uint8_t* a, const std::uint8_t* b) noexcept {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    return static_cast<std::uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(first, second)));
  }
  static V load_part(const float* p, std::int64_t n) noexcept { return _mm256_maskload_ps(p, mask(n)); }
  static void store_part(float* p, V v, std::int64_t n) noexcept { _mm256_maskstore_ps(p, mask(n), v); }
};

}  // namespace

Forms<float, float> forms_avx2(float) noexcept { return Kernel<Form, float>::forms(); }
Forms<std::uint16_t, float> forms_avx2(std::uint16_t) noexcept { return Kernel<Form, std::uint16_t>::forms(); }

}  // namespace recfast::sdim_attention

#pragma GCC pop_options
#endif
