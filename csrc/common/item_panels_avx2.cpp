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
#pragma GCC target("avx2,fma,f16c")

#include "common/simd_avx2.h"
#include "common/vectors.h"
#include "common/tiles.h"

namespace recfast::item_panels {
namespace {

struct Simd : Avx2 {
  using W = __m256d;
  using Avx2::fma;
  static W fma(W a, W b, W c) noexcept { return _mm256_fmadd_pd(a, b, c); }

  template <Format format>
  static W doubles(const std::byte* p) noexcept {
    if constexpr (format == Format::kFloat64) {
      return _mm256_loadu_pd(reinterpret_cast<const double*>(p));
    } else if constexpr (format == Format::kFloat32) {
      return _mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
    } else {
      const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (format == Format::kFloat16) return _mm256_cvtps_pd(_mm_cvtph_ps(bits));
      return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16)));
    }
  }

  static V float_of(W low, W high) noexcept {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1);
  }

  static double folded(W w) noexcept {
    const __m128d two = _mm256_castpd256_pd128(w) + _mm256_extractf128_pd(w, 1);
    return two[0] + two[1];
  }
};

}  // namespace

#include "common/item_panels.inl"

constexpr Forms kAvx2Forms{read, squared_norm, dots, subtract, pack, products};

}  // namespace recfast::item_panels

#pragma GCC pop_options
#endif
