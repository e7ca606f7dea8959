#include "embedding_update/embedding_update.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")

namespace recfast::embedding_update {
namespace {

constexpr int kUnit = 32;

// 8 blocks of Philox-4x32-10, one in each 64-bit lane. Products need the low halves only, so what is left in the high
// ones does no harm. The lanes' order makes the two final interleavings come out in the order of the columns.
inline void draw_unit(std::uint64_t seed, std::uint32_t step_count, std::uint32_t table_id, std::uint32_t row,
                      std::uint32_t block, float* u) noexcept {
  const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53);
  const __m512i multiplier1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i c0 = _mm512_set1_epi32(static_cast<int>(step_count));
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(table_id));
  __m512i c2 = _mm512_set1_epi32(static_cast<int>(row));
  __m512i c3 = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(block)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(multiplier0, c0);
    const __m512i p1 = _mm512_mul_epu32(multiplier1, c2);
    const __m512i k0 = _mm512_set1_epi32(static_cast<int>(key0));
    const __m512i k1 = _mm512_set1_epi32(static_cast<int>(key1));
    c0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), c1), k0);
    c2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), c3), k1);
    c1 = p1;
    c3 = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
  const __m512i words01 = _mm512_or_si512(_mm512_and_si512(c0, low), _mm512_slli_epi64(c1, 32));
  const __m512i words23 = _mm512_or_si512(_mm512_and_si512(c2, low), _mm512_slli_epi64(c3, 32));
  const __m512 unit = _mm512_set1_ps(0x1p-24f);
  const __m512i first = _mm512_srli_epi32(_mm512_unpacklo_epi64(words01, words23), 8);
  const __m512i second = _mm512_srli_epi32(_mm512_unpackhi_epi64(words01, words23), 8);
  _mm512_storeu_ps(u, _mm512_mul_ps(_mm512_cvtepi32_ps(first), unit));
  _mm512_storeu_ps(u + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(second), unit));
}

#include "embedding_update/embedding_update_rows.h"

}  // namespace

template <class Value>
std::int64_t rows_avx512(const Args<Value>& args, std::int64_t first, std::int64_t last, float* g, float* w) noexcept {
  return rows(args, first, last, g, w);
}

template std::int64_t rows_avx512(const Args<float>&, std::int64_t, std::int64_t, float*, float*) noexcept;
template std::int64_t rows_avx512(const Args<std::int8_t>&, std::int64_t, std::int64_t, float*, float*) noexcept;

}  // namespace recfast::embedding_update

#pragma GCC pop_options
#endif
