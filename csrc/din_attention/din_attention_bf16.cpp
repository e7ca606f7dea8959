#include "din_attention/din_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma")

#include "common/simd_avx512.h"
#include "common/vectors.h"
#include "din_attention/din_attention_kernel.h"

namespace recfast::din_attention {
namespace {

// A vector of pairs of bfloat16, in the bits of floats.
struct Pairs : Avx512 {
  // c + a.first * b.first + a.second * b.second
  static V fma(V a, V b, V c) noexcept {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  // The pairs (first[i], second[i]).
  static V pair(V first, V second) noexcept {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // x as bfloat16 from value `at` on.
  static void narrow(V x, float* to, std::int64_t at) noexcept {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + at / 2), (__m256i)_mm512_cvtneps_pbh(x));
  }
};

}  // namespace

Form<BFloat16> form_bf16() noexcept {
  using K = Kernel<Avx512, BFloat16, Pairs>;
  return {.pairs = true, .forward = K::forward, .moments = K::moments, .backward = K::backward,
          .pack_pairs = K::pack_pairs};
}

}  // namespace recfast::din_attention

#pragma GCC pop_options
#endif
