#include "common/item_panels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/arena.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "common/simd_avx512.h"
#include "common/vectors.h"
#include "common/tiles.h"

namespace recfast::item_panels {
namespace {

struct Simd : Avx512 {
  using W = __m512d;
  using Avx512::fma;
  static W fma(W a, W b, W c) noexcept { return _mm512_fmadd_pd(a, b, c); }

  template <Format format>
  static W doubles(const std::byte* p) noexcept {
    if constexpr (format == Format::kFloat64) {
      return _mm512_loadu_pd(p);
    } else if constexpr (format == Format::kFloat32) {
      return _mm512_cvtps_pd(_mm256_loadu_ps(reinterpret_cast<const float*>(p)));
    } else {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (format == Format::kFloat16) return _mm512_cvtps_pd(_mm256_cvtph_ps(bits));
      return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
    }
  }

  static V float_of(W low, W high) noexcept {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
  }

  static double folded(W w) noexcept {
    const __m256d four = _mm512_castpd512_pd256(w) + _mm512_extractf64x4_pd(w, 1);
    const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
    return two[0] + two[1];
  }
};

}  // namespace

#include "common/item_panels.inl"

constexpr Forms kAvx512Forms{read, squared_norm, dots, subtract, pack, products};

}  // namespace recfast::item_panels

#pragma GCC pop_options
#endif
