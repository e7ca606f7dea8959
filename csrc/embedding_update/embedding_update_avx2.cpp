#include "embedding_update/embedding_update.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx2")

namespace recfast::embedding_update {
namespace {

constexpr int kUnit = 16;

// 4 blocks of Philox-4x32-10, one in each 64-bit lane. Products need the low halves only, so what is left in the high
// ones does no harm. The lanes' order makes the two final interleavings come out in the order of the columns.
inline void draw_unit(std::uint64_t seed, std::uint32_t step_count, std::uint32_t table_id, std::uint32_t row,
                      std::uint32_t block, float* u) noexcept {
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53);
  const __m256i multiplier1 = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i c0 = _mm256_set1_epi32(static_cast<int>(step_count));
  __m256i c1 = _mm256_set1_epi32(static_cast<int>(table_id));
  __m256i c2 = _mm256_set1_epi32(static_cast<int>(row));
  __m256i c3 = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(block)), _mm256_set_epi64x(3, 1, 2, 0));
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(multiplier0, c0);
    const __m256i p1 = _mm256_mul_epu32(multiplier1, c2);
    const __m256i k0 = _mm256_set1_epi32(static_cast<int>(key0));
    const __m256i k1 = _mm256_set1_epi32(static_cast<int>(key1));
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), k0);
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), k1);
    c1 = p1;
    c3 = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
  const __m256i words01 = _mm256_or_si256(_mm256_and_si256(c0, low), _mm256_slli_epi64(c1, 32));
  const __m256i words23 = _mm256_or_si256(_mm256_and_si256(c2, low), _mm256_slli_epi64(c3, 32));
  const __m256 unit = _mm256_set1_ps(0x1p-24f);
  const __m256i first = _mm256_srli_epi32(_mm256_unpacklo_epi64(words01, words23), 8);
  const __m256i second = _mm256_srli_epi32(_mm256_unpackhi_epi64(words01, words23), 8);
  _mm256_storeu_ps(u, _mm256_mul_ps(_mm256_cvtepi32_ps(first), unit));
  _mm256_storeu_ps(u + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(second), unit));
}

#include "embedding_update/embedding_update_rows.h"

}  // namespace

template <class Value>
std::int64_t rows_avx2(const Args<Value>& args, std::int64_t first, std::int64_t last, float* g, float* w) noexcept {
  return rows(args, first, last, g, w);
}

template std::int64_t rows_avx2(const Args<float>&, std::int64_t, std::int64_t, float*, float*) noexcept;
template std::int64_t rows_avx2(const Args<std::int8_t>&, std::int64_t, std::int64_t, float*, float*) noexcept;

}  // namespace recfast::embedding_update

#pragma GCC pop_options
#endif
