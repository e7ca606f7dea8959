#include "embedding_update/embedding_update.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/random.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,popcnt,prefer-vector-width=512")

namespace recfast::embedding_update {
namespace {

using F = __m512;
using M = __mmask16;

inline F zero() noexcept { return _mm512_setzero_ps(); }
inline F set(float x) noexcept { return _mm512_set1_ps(x); }
inline F load(const float* p) noexcept { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) noexcept { _mm512_storeu_ps(p, x); }
inline M lanes_below(std::int64_t n) noexcept { return static_cast<M>((1u << n) - 1u); }
inline F load_tail(const float* p, std::int64_t n) noexcept { return _mm512_maskz_loadu_ps(lanes_below(n), p); }
inline void store_tail(float* p, F x, std::int64_t n) noexcept { _mm512_mask_storeu_ps(p, lanes_below(n), x); }
inline F add(F a, F b) noexcept { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) noexcept { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) noexcept { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) noexcept { return _mm512_div_ps(a, b); }
inline F root(F a) noexcept { return _mm512_sqrt_ps(a); }
inline F larger(F a, F b) noexcept { return _mm512_max_ps(a, b); }
inline F smaller(F a, F b) noexcept { return _mm512_min_ps(a, b); }
inline F larger_bits(F a, F b) noexcept {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline F magnitude(F a) noexcept { return _mm512_abs_ps(a); }
inline F floored(F a) noexcept { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline F rounded(F a) noexcept { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline M less(F a, F b) noexcept { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline M between(F low, F x, F high) noexcept { return _mm512_mask_cmp_ps_mask(less(low, x), x, high, _CMP_LT_OQ); }
inline F select(M m, F yes, F no) noexcept { return _mm512_mask_blend_ps(m, no, yes); }
inline M lanes_equal(const std::int32_t* p, std::int64_t n, std::int32_t x) noexcept {
  return _mm512_cmpeq_epi32_mask(_mm512_maskz_loadu_epi32(lanes_below(n), p), _mm512_set1_epi32(x)) & lanes_below(n);
}

inline std::int64_t count_changed(F x, F y) noexcept {
  return __builtin_popcount(_mm512_cmp_ps_mask(x, y, _CMP_NEQ_OQ));
}

inline F exponent_of(F x) noexcept { return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x7F800000))); }
inline F reciprocal_of_power(F x) noexcept {
  return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(0x7F000000), _mm512_castps_si512(x)));
}

inline float fold(F x) noexcept {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float fold_largest(F x) noexcept {
  return std::bit_cast<float>(_mm512_reduce_max_epi32(_mm512_castps_si512(x)));
}

inline F bfloat16_bits(__m512i raised, F x) noexcept {
  const F cut = _mm512_castsi512_ps(_mm512_and_si512(raised, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  return select(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)), cut);
}
inline F bfloat16_drawn(F x, F u) noexcept {
  const __m512i draw = _mm512_cvttps_epi32(mul(u, set(65536.0f)));
  return bfloat16_bits(_mm512_add_epi32(_mm512_castps_si512(x), draw), x);
}
inline F bfloat16_nearest(F x) noexcept {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return bfloat16_bits(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), x);
}

#include "embedding_update/embedding_update_x86.h"

inline F of_bytes(__m128i bytes) noexcept { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
inline __m128i to_bytes(F x) noexcept { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)); }

template <Format kFormat>
inline F decode(const std::uint8_t* codes) noexcept {
  if constexpr (kFormat == Format::kBFloat16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  } else if constexpr (kFormat == Format::kFloat16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  } else if constexpr (kFormat == Format::kFloat8) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const F values = mul(_mm512_cvtph_ps(half_of_float8(wide)), set(256.0f));
    return select(_mm512_cmp_ps_mask(magnitude(values), set(480.0f), _CMP_EQ_OQ),
                  set(std::numeric_limits<float>::quiet_NaN()), values);
  } else if constexpr (kFormat == Format::kInt8) {
    return of_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  } else if constexpr (kFormat == Format::kInt4) {
    return of_bytes(bytes_of_int4(codes));
  } else if constexpr (kFormat == Format::kInt2) {
    return of_bytes(bytes_of_int2(codes));
  } else {
    return _mm512_loadu_ps(codes);
  }
}

template <Format kFormat>
inline void encode(std::uint8_t* codes, F x) noexcept {
  if constexpr (kFormat == Format::kBFloat16) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), halves);
  } else if constexpr (kFormat == Format::kFloat16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  } else if constexpr (kFormat == Format::kFloat8) {
    const __m256i half = _mm512_cvtps_ph(mul(x, set(1.0f / 256.0f)), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm256_cvtepi16_epi8(float8_of_half(half)));
  } else if constexpr (kFormat == Format::kInt8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), to_bytes(x));
  } else if constexpr (kFormat == Format::kInt4) {
    put_int4(codes, to_bytes(x));
  } else if constexpr (kFormat == Format::kInt2) {
    put_int2(codes, to_bytes(x));
  } else {
    _mm512_storeu_ps(codes, x);
  }
}

// 8 blocks of Philox, one in each 64-bit lane, make 64 columns. Products need the low halves only, so what is left in
// the high ones does no harm. The lanes' order makes the interleavings at the end come out in the order of the columns.
constexpr int kDrawn = 4;

class Draws {
 public:
  Draws(std::uint64_t seed, std::uint32_t step_count, std::uint32_t table_id) noexcept
      : step_count_(step_count), table_id_(table_id) {
    for (int round = 0; round < Philox::kRounds; ++round) {
      const auto turn = static_cast<std::uint32_t>(round);
      key0_[round] = static_cast<int>(static_cast<std::uint32_t>(seed) + turn * 0x9E3779B9u);
      key1_[round] = static_cast<int>(static_cast<std::uint32_t>(seed >> 32) + turn * 0xBB67AE85u);
    }
  }

  void make(std::int64_t row, std::int64_t unit, F* u) const noexcept {
    fill(_mm512_set1_epi32(static_cast<int>(row)), _mm512_add_epi64(_mm512_set1_epi64(8 * unit), blocks()), u);
  }

  // The draws of several short rows of kVectors registers; reads 4 / kVectors places of `rows`.
  template <int kVectors>
  void make_rows(const std::int64_t* rows, F* u) const noexcept {
    constexpr int kShift = kVectors == 1 ? 1 : 2;  // blocks of a row: 2 or 4
    const __m512i places = _mm512_srli_epi64(blocks(), kShift);
    const __m512i found = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)));
    fill(_mm512_permutexvar_epi64(places, found),
         _mm512_and_si512(blocks(), _mm512_set1_epi64((1 << kShift) - 1)), u);
  }

 private:
  static __m512i blocks() noexcept { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }

  void fill(__m512i row, __m512i block, F* u) const noexcept {
    constexpr int kXor = 0x96;
    const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53);
    const __m512i multiplier1 = _mm512_set1_epi64(0xCD9E8D57);
    __m512i c0 = _mm512_set1_epi32(static_cast<int>(step_count_));
    __m512i c1 = _mm512_set1_epi32(static_cast<int>(table_id_));
    __m512i c2 = row;
    __m512i c3 = block;
#pragma GCC unroll 7
    for (int round = 0; round < Philox::kRounds; ++round) {
      const __m512i p0 = _mm512_mul_epu32(multiplier0, c0);
      const __m512i p1 = _mm512_mul_epu32(multiplier1, c2);
      c0 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi32(key0_[round]), kXor);
      c2 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi32(key1_[round]), kXor);
      c1 = p1;
      c3 = p0;
    }
    const __m512i low01 = _mm512_unpacklo_epi64(c0, c1);
    const __m512i low23 = _mm512_unpacklo_epi64(c2, c3);
    const __m512i high01 = _mm512_unpackhi_epi64(c0, c1);
    const __m512i high23 = _mm512_unpackhi_epi64(c2, c3);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    u[0] = uniform(_mm512_permutex2var_epi64(low01, first, low23));
    u[1] = uniform(_mm512_permutex2var_epi64(low01, second, low23));
    u[2] = uniform(_mm512_permutex2var_epi64(high01, first, high23));
    u[3] = uniform(_mm512_permutex2var_epi64(high01, second, high23));
  }

  // Words in the low halves of 64-bit lanes: an even column takes its word, the odd one after it the halves exchanged;
  // of both the upper 24 bits. One shuffle of bytes duplicates, exchanges and shifts.
  static F uniform(__m512i words) noexcept {
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(1, 2, 3, -1, 3, 0, 1, -1, 9, 10, 11, -1, 11, 8, 9, -1));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(words, order)), _mm512_set1_ps(0x1p-24f));
  }

  std::uint32_t step_count_;
  std::uint32_t table_id_;
  int key0_[Philox::kRounds];
  int key1_[Philox::kRounds];
};

#include "embedding_update/embedding_update_rows.h"

}  // namespace

const Functions& functions_avx512(Format format, std::int64_t width) noexcept {
  switch (width) {
    case 16: return functions_of<1>(format);
    case 32: return functions_of<2>(format);
    case 64: return functions_of<4>(format);
    case 128: return functions_of<8>(format);
    default: return functions_of<0>(format);
  }
}

}  // namespace recfast::embedding_update

#pragma GCC pop_options
#endif
