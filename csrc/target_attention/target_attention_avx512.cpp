#include "target_attention/target_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")

#include "common/simd_avx512.h"
#include "common/vectors.h"
#include "target_attention/target_attention_kernel.h"

namespace recfast::target_attention {
namespace {

struct Vectors512 : Avx512 {
  static constexpr int kMaxColumns = 4;
  static constexpr int tile_rows(int columns) { return columns == 1 ? 24 : columns == 2 ? 12 : columns == 3 ? 8 : 6; }
  static V max(V a, V b) noexcept { return _mm512_max_ps(a, b); }
  static float highest(V x) noexcept {
    const __m256 low = _mm512_maskz_extractf32x8_ps(0xFF, x, 0);
    const __m256 half = _mm256_max_ps(low, _mm512_maskz_extractf32x8_ps(0xFF, x, 1));
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
  }
  template <class Ranks>
  static unsigned reach(Ranks a, Ranks b) noexcept {
    __m512i x;
    __m512i y;
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    return _mm512_cmpge_epi32_mask(x, y);
  }

  static V pairs(V a, V b, bool high) noexcept {
    const __m512d x = _mm512_castps_pd(a);
    const __m512d y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  }

  static void transpose(V (&x)[16]) noexcept {
    V y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // now 4 x 4 blocks are turned: x[i + j] holds columns j, 4 + j, 8 + j, 12 + j
      x[i] = pairs(y[i], y[i + 2], false);
      x[i + 1] = pairs(y[i], y[i + 2], true);
      x[i + 2] = pairs(y[i + 1], y[i + 3], false);
      x[i + 3] = pairs(y[i + 1], y[i + 3], true);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V a = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);  // blocks 0 and 2 of both
      const V b = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xDD);  // blocks 1 and 3
      const V c = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
      const V d = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xDD);
      y[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      y[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
      y[8 + j] = _mm512_shuffle_f32x4(a, c, 0xDD);
      y[12 + j] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }

  static __mmask16 first(std::int64_t count) noexcept {
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1u);
  }
  static V load_part(const float* p, std::int64_t count) noexcept { return _mm512_maskz_loadu_ps(first(count), p); }
  static V raise(__m256i bits) noexcept {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static V load_wide(const BFloat16* p) noexcept {
    return raise(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load_wide_part(const BFloat16* p, std::int64_t count) noexcept {
    return raise(_mm256_maskz_loadu_epi16(first(count), p));
  }
};

}  // namespace

constexpr Form<float> kAvx512Float = Kernel<Vectors512, float>::kForm;
constexpr Form<BFloat16> kAvx512BFloat16 = Kernel<Vectors512, BFloat16>::kForm;

}  // namespace recfast::target_attention

#pragma GCC pop_options
#endif
