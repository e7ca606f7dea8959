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
#pragma GCC target("avx2,fma")

#include "common/simd_avx2.h"
#include "common/vectors.h"
#include "target_attention/target_attention_kernel.h"

namespace recfast::target_attention {
namespace {

struct Vectors256 : Avx2 {
  static constexpr int kMaxColumns = 2;
  static constexpr int tile_rows(int columns) { return columns == 1 ? 10 : 6; }
  static V max(V a, V b) noexcept { return _mm256_max_ps(a, b); }
  static float highest(V x) noexcept {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
  }
  template <class Ranks>
  static unsigned reach(Ranks a, Ranks b) noexcept {
    __m256i x;
    __m256i y;
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    return 0xFFu & ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(y, x))));
  }

  static void transpose(V (&x)[8]) noexcept {
    V y[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
      x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xEE);
      x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
      x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      y[j] = _mm256_permute2f128_ps(x[j], x[4 + j], 0x20);
      y[4 + j] = _mm256_permute2f128_ps(x[j], x[4 + j], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = y[i];
  }

  static V load_part(const float* p, std::int64_t count) noexcept {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto valid = static_cast<int>(std::min<std::int64_t>(count, 8));
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(valid), lane));
  }
  static V raise(__m128i bits) noexcept {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static V load_wide(const BFloat16* p) noexcept {
    return raise(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static V load_wide_part(const BFloat16* p, std::int64_t count) noexcept {
    alignas(16) BFloat16 part[8]{};
    std::copy_n(p, std::min<std::int64_t>(count, 8), part);
    return raise(_mm_load_si128(reinterpret_cast<const __m128i*>(part)));
  }
};

}  // namespace

constexpr Form<float> kAvx2Float = Kernel<Vectors256, float>::kForm;
constexpr Form<BFloat16> kAvx2BFloat16 = Kernel<Vectors256, BFloat16>::kForm;

}  // namespace recfast::target_attention

#pragma GCC pop_options
#endif
