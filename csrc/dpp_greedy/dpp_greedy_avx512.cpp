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
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

#include "common/simd_avx512.h"
#include "common/vectors.h"
#include "common/tiles.h"

namespace recfast::dpp_greedy {
namespace {

struct Simd {
  static constexpr std::int64_t kLanes = 16;
  using Floats = float __attribute__((vector_size(64)));
  using Ints = int __attribute__((vector_size(64)));
  using Moves = Avx512;

  template <Format format>
  static Floats floats(const std::byte* p) noexcept {
    if constexpr (format == Format::kFloat64) {
      const auto* values = reinterpret_cast<const double*>(p);
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(values))),
                                _mm512_cvtpd_ps(_mm512_loadu_pd(values + 8)), 1);
    } else if constexpr (format == Format::kFloat32) {
      return _mm512_loadu_ps(p);
    } else {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (format == Format::kFloat16) return _mm512_cvtph_ps(bits);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
  }

  static __m512i spread(const std::int8_t* q) noexcept {
    int four;
    std::memcpy(&four, q, sizeof four);
    return _mm512_set1_epi32(four);
  }

  // Adds to each 32-bit lane the four products of its bytes (without sign) and those of h or l (with sign).
  static void add_products(Ints bytes, __m512i h, __m512i l, Ints* high, Ints* low) noexcept {
    *high = (Ints)_mm512_dpbusd_epi32((__m512i)*high, (__m512i)bytes, h);
    *low = (Ints)_mm512_dpbusd_epi32((__m512i)*low, (__m512i)bytes, l);
  }

  static std::uint64_t bits_at_least(Floats a, Floats b) noexcept {
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
  }
};

}  // namespace

#include "dpp_greedy/forms.inl"

constexpr Forms kVnniForms{norms, offsets, pack, encode, refresh, at_least};

}  // namespace recfast::dpp_greedy

#pragma GCC pop_options
#endif
