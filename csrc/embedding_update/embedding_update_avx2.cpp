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
#pragma GCC target("avx2,f16c")

namespace recfast::embedding_update {
namespace {

struct F {
  __m256 low;  // columns 0 .. 7
  __m256 high;
};
using M = F;  // all bits of a lane, or none

inline F zero() noexcept { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set(float x) noexcept { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) noexcept { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) noexcept {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline M lanes_below(std::int64_t n) noexcept {
  const __m256i count = _mm256_set1_epi32(static_cast<int>(n));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)))};
}
inline F load_tail(const float* p, std::int64_t n) noexcept {
  const M below = lanes_below(n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(below.low)),
          _mm256_maskload_ps(p + 8, _mm256_castps_si256(below.high))};
}
inline void store_tail(float* p, F x, std::int64_t n) noexcept {
  const M below = lanes_below(n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(below.low), x.low);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(below.high), x.high);
}
inline F add(F a, F b) noexcept { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F sub(F a, F b) noexcept { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F mul(F a, F b) noexcept { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F div(F a, F b) noexcept { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F root(F a) noexcept { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
inline F larger(F a, F b) noexcept { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F smaller(F a, F b) noexcept { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F intersection(F a, F b) noexcept { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
inline F of_bits(int bits) noexcept {
  return {_mm256_castsi256_ps(_mm256_set1_epi32(bits)), _mm256_castsi256_ps(_mm256_set1_epi32(bits))};
}
inline __m256 larger_bits(__m256 a, __m256 b) noexcept {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline F larger_bits(F a, F b) noexcept { return {larger_bits(a.low, b.low), larger_bits(a.high, b.high)}; }
inline F magnitude(F a) noexcept { return intersection(a, of_bits(0x7FFFFFFF)); }
inline F floored(F a) noexcept { return {_mm256_floor_ps(a.low), _mm256_floor_ps(a.high)}; }
inline F rounded(F a) noexcept {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}
inline M less(F a, F b) noexcept {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)};
}
inline M between(F low, F x, F high) noexcept { return intersection(less(low, x), less(x, high)); }
inline F select(M m, F yes, F no) noexcept {
  return {_mm256_blendv_ps(no.low, yes.low, m.low), _mm256_blendv_ps(no.high, yes.high, m.high)};
}
inline M lanes_equal(const std::int32_t* p, std::int64_t n, std::int32_t x) noexcept {
  const M below = lanes_below(n);
  const __m256i wanted = _mm256_set1_epi32(x);
  const __m256i low = _mm256_maskload_epi32(p, _mm256_castps_si256(below.low));
  const __m256i high = _mm256_maskload_epi32(p + 8, _mm256_castps_si256(below.high));
  return intersection(below, {_mm256_castsi256_ps(_mm256_cmpeq_epi32(low, wanted)),
                              _mm256_castsi256_ps(_mm256_cmpeq_epi32(high, wanted))});
}

inline std::int64_t count_changed(F x, F y) noexcept {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, _CMP_NEQ_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, _CMP_NEQ_OQ));
  const int changed = low | high << 8;
  return changed == 0 ? 0 : __builtin_popcount(static_cast<unsigned>(changed));
}

inline F exponent_of(F x) noexcept { return intersection(x, of_bits(0x7F800000)); }
inline F reciprocal_of_power(F x) noexcept {
  const __m256i top = _mm256_set1_epi32(0x7F000000);
  return {_mm256_castsi256_ps(_mm256_sub_epi32(top, _mm256_castps_si256(x.low))),
          _mm256_castsi256_ps(_mm256_sub_epi32(top, _mm256_castps_si256(x.high)))};
}

inline float fold(F x) noexcept {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float fold_largest(F x) noexcept {
  const __m256i eight = _mm256_max_epi32(_mm256_castps_si256(x.low), _mm256_castps_si256(x.high));
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  return std::bit_cast<float>(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1))));
}

inline __m256 bfloat16_bits(__m256i raised, __m256 x) noexcept {
  const __m256 cut =
      _mm256_castsi256_ps(_mm256_and_si256(raised, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  return _mm256_blendv_ps(cut, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)),
                          _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
inline __m256 bfloat16_drawn(__m256 x, __m256 u) noexcept {
  const __m256i draw = _mm256_cvttps_epi32(_mm256_mul_ps(u, _mm256_set1_ps(65536.0f)));
  return bfloat16_bits(_mm256_add_epi32(_mm256_castps_si256(x), draw), x);
}
inline __m256 bfloat16_nearest(__m256 x) noexcept {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return bfloat16_bits(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), x);
}
inline F bfloat16_drawn(F x, F u) noexcept { return {bfloat16_drawn(x.low, u.low), bfloat16_drawn(x.high, u.high)}; }
inline F bfloat16_nearest(F x) noexcept { return {bfloat16_nearest(x.low), bfloat16_nearest(x.high)}; }

#include "embedding_update/embedding_update_x86.h"

inline F of_bytes(__m128i bytes) noexcept {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
// 16 words to 16 halves, saturating, in their order.
inline __m256i to_halves(__m256i low, __m256i high) noexcept {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
}
inline __m128i to_bytes(F x) noexcept {
  const __m256i halves = to_halves(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
  return _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

template <Format kFormat>
inline F decode(const std::uint8_t* codes) noexcept {
  const auto* at = reinterpret_cast<const __m128i*>(codes);
  if constexpr (kFormat == Format::kBFloat16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1)), 16))};
  } else if constexpr (kFormat == Format::kFloat16) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
  } else if constexpr (kFormat == Format::kFloat8) {
    const __m256i half = half_of_float8(_mm256_cvtepu8_epi16(_mm_loadu_si128(at)));
    const F small = {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
                     _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
    const F values = mul(small, set(256.0f));
    const F sizes = magnitude(values);
    const M nan = {_mm256_cmp_ps(sizes.low, _mm256_set1_ps(480.0f), _CMP_EQ_OQ),
                   _mm256_cmp_ps(sizes.high, _mm256_set1_ps(480.0f), _CMP_EQ_OQ)};
    return select(nan, set(std::numeric_limits<float>::quiet_NaN()), values);
  } else if constexpr (kFormat == Format::kInt8) {
    return of_bytes(_mm_loadu_si128(at));
  } else if constexpr (kFormat == Format::kInt4) {
    return of_bytes(bytes_of_int4(codes));
  } else if constexpr (kFormat == Format::kInt2) {
    return of_bytes(bytes_of_int2(codes));
  } else {
    return load(reinterpret_cast<const float*>(codes));
  }
}

inline __m256i halves_of(F x) noexcept {
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
}

template <Format kFormat>
inline void encode(std::uint8_t* codes, F x) noexcept {
  if constexpr (kFormat == Format::kBFloat16) {
    // An arithmetic shift, so that packing with saturation keeps all 16 bits.
    const __m256i low = _mm256_srai_epi32(_mm256_castps_si256(x.low), 16);
    const __m256i halves = to_halves(low, _mm256_srai_epi32(_mm256_castps_si256(x.high), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), halves);
  } else if constexpr (kFormat == Format::kFloat16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), halves_of(x));
  } else if constexpr (kFormat == Format::kFloat8) {
    const __m256i wide = float8_of_half(halves_of(mul(x, set(1.0f / 256.0f))));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes),
                     _mm_packus_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
  } else if constexpr (kFormat == Format::kInt8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), to_bytes(x));
  } else if constexpr (kFormat == Format::kInt4) {
    put_int4(codes, to_bytes(x));
  } else if constexpr (kFormat == Format::kInt2) {
    put_int2(codes, to_bytes(x));
  } else {
    store(reinterpret_cast<float*>(codes), x);
  }
}

// 4 blocks of Philox, one in each 64-bit lane, make 32 columns. Products need the low halves only, so what is left in
// the high ones does no harm. The lanes' order makes the interleavings at the end come out in the order of the columns.
constexpr int kDrawn = 2;

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
    const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53);
    const __m256i multiplier1 = _mm256_set1_epi64x(0xCD9E8D57);
    __m256i c0 = _mm256_set1_epi32(static_cast<int>(step_count_));
    __m256i c1 = _mm256_set1_epi32(static_cast<int>(table_id_));
    __m256i c2 = _mm256_set1_epi32(static_cast<int>(row));
    __m256i c3 = _mm256_add_epi64(_mm256_set1_epi64x(4 * unit), _mm256_setr_epi64x(0, 2, 1, 3));
    for (int round = 0; round < Philox::kRounds; ++round) {
      const __m256i p0 = _mm256_mul_epu32(multiplier0, c0);
      const __m256i p1 = _mm256_mul_epu32(multiplier1, c2);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi32(key0_[round]));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi32(key1_[round]));
      c1 = p1;
      c3 = p0;
    }
    // Blocks lie in lanes as 0, 2 | 1, 3; unpacking gives words 0, 1 and 2, 3 of blocks 0 | 1 and of blocks 2 | 3.
    const __m256i low01 = _mm256_unpacklo_epi64(c0, c1);
    const __m256i low23 = _mm256_unpacklo_epi64(c2, c3);
    const __m256i high01 = _mm256_unpackhi_epi64(c0, c1);
    const __m256i high23 = _mm256_unpackhi_epi64(c2, c3);
    u[0] = {uniform(_mm256_permute2x128_si256(low01, low23, 0x20)),
            uniform(_mm256_permute2x128_si256(low01, low23, 0x31))};
    u[1] = {uniform(_mm256_permute2x128_si256(high01, high23, 0x20)),
            uniform(_mm256_permute2x128_si256(high01, high23, 0x31))};
  }

 private:
  // Words in the low halves of 64-bit lanes: an even column takes its word, the odd one after it the halves exchanged;
  // of both the upper 24 bits. One shuffle of bytes duplicates, exchanges and shifts.
  static __m256 uniform(__m256i words) noexcept {
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 2, 3, -1, 3, 0, 1, -1, 9, 10, 11, -1, 11, 8, 9, -1));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(words, order)), _mm256_set1_ps(0x1p-24f));
  }

  std::uint32_t step_count_;
  std::uint32_t table_id_;
  int key0_[Philox::kRounds];
  int key1_[Philox::kRounds];
};

#include "embedding_update/embedding_update_rows.h"

}  // namespace

const Functions& functions_avx2(Format format, std::int64_t) noexcept { return functions_of<0>(format); }

}  // namespace recfast::embedding_update

#pragma GCC pop_options
#endif
