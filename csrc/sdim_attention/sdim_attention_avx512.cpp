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
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")

#include "common/simd_avx512.h"
#include "sdim_attention/sdim_attention_kernel.h"

namespace recfast::sdim_attention {
namespace {

struct Form : Avx512 {
  static V widen(const std::uint16_t* p) noexcept {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static __mmask16 mask(std::int64_t n) noexcept { return static_cast<__mmask16>((1u << n) - 1); }
  static std::uint32_t equal16(const std::uint8_t* a, const std::uint8_t* b) noexcept {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    return static_cast<std::uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(first, second)));
  }
  static V load_part(const float* p, std::int64_t n) noexcept { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store_part(float* p, V v, std::int64_t n) noexcept { _mm512_mask_storeu_ps(p, mask(n), v); }
};

}  // namespace

Forms<float, float> forms_avx512(float) noexcept { return Kernel<Form, float>::forms(); }
Forms<std::uint16_t, float> forms_avx512(std::uint16_t) noexcept { return Kernel<Form, std::uint16_t>::forms(); }

}  // namespace recfast::sdim_attention

#pragma GCC pop_options
#endif
