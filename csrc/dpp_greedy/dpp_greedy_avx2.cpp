#include "dpp_greedy/dpp_greedy.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/arena.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "common/simd_avx2.h"
#include "common/vectors.h"
#include "common/tiles.h"

namespace recfast::dpp_greedy {
namespace {

struct Simd {
  static constexpr std::int64_t kLanes = 8;
  using Floats = float __attribute__((vector_size(32)));
  using Ints = int __attribute__((vector_size(32)));
  using Moves = Avx2;

  template <Format format>
  static Floats floats(const std::byte* p) noexcept {
    if constexpr (format == Format::kFloat64) {
      const auto* values = reinterpret_cast<const double*>(p);
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(_mm256_loadu_pd(values))),
                                  _mm256_cvtpd_ps(_mm256_loadu_pd(values + 4)), 1);
    } else if constexpr (format == Format::kFloat32) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    } else {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (format == Format::kFloat16) return _mm256_cvtph_ps(bits);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
  }

  // Bytes 0 and 2, and bytes 1 and 3, of each lane as 16-bit numbers.
  struct Pairs {
    __m256i even;
    __m256i odd;
  };

  static Pairs spread(const std::int8_t* q) noexcept {
    int four;
    std::memcpy(&four, q, sizeof four);
    const __m256i bytes = _mm256_set1_epi32(four);
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }

  // Adds to each 32-bit lane the four products of its bytes (without sign) and those of h or l (with sign).
  static void add_products(Ints bytes, Pairs h, Pairs l, Ints* high, Ints* low) noexcept {
    const __m256i even = _mm256_and_si256((__m256i)bytes, _mm256_set1_epi16(0xFF));
    const __m256i odd = _mm256_srli_epi16((__m256i)bytes, 8);
    *high += (Ints)_mm256_add_epi32(_mm256_madd_epi16(even, h.even), _mm256_madd_epi16(odd, h.odd));
    *low += (Ints)_mm256_add_epi32(_mm256_madd_epi16(even, l.even), _mm256_madd_epi16(odd, l.odd));
  }

  static std::uint64_t bits_at_least(Floats a, Floats b) noexcept {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
  }
};

}  // namespace

#include "dpp_greedy/forms.inl"

constexpr Forms kAvx2Forms{norms, offsets, pack, encode, refresh, at_least};

}  // namespace recfast::dpp_greedy

#pragma GCC pop_options
#endif
