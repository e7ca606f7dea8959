#include "hamming_top_k/hamming_top_k.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>
#include <cstdint>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512vpopcntdq,popcnt")

namespace recfast::hamming_top_k {
namespace {

void distances(const Planes& keys, const std::uint64_t* query, std::uint16_t* out) noexcept {
  std::int64_t row = 0;
  for (; row < keys.length; row += 8) {
    const std::int64_t rest = keys.length - row;
    const auto mask = static_cast<__mmask8>(rest >= 8 ? 0xff : (1 << rest) - 1);
    __m512i sum = _mm512_setzero_si512();
    for (std::int64_t w = 0; w < keys.words; ++w) {
      const __m512i key = _mm512_maskz_loadu_epi64(mask, keys.planes + w * keys.stride + row);
      const __m512i asked = _mm512_set1_epi64(static_cast<long long>(query[w]));
      sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(key, asked)));
    }
    // kFar beyond the history; a group has room for it.
    sum = _mm512_mask_mov_epi64(_mm512_set1_epi64(kFar), mask, sum);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + row), _mm512_cvtepi64_epi16(sum));
  }
  for (; row % kGroup != 0; row += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + row), _mm_set1_epi16(-1));
}

__m512i load(const std::uint16_t* group) noexcept { return _mm512_loadu_si512(group); }

std::int64_t count(const std::uint16_t* distances, std::int64_t groups, std::uint16_t limit) noexcept {
  const __m512i most = _mm512_set1_epi16(static_cast<short>(limit));
  std::int64_t total = 0;
  for (std::int64_t group = 0; group < groups; ++group) {
    total += std::popcount(_mm512_cmple_epu16_mask(load(distances + group * kGroup), most));
  }
  return total;
}

std::uint32_t near(const std::uint16_t* group, std::uint16_t limit) noexcept {
  return _mm512_cmple_epu16_mask(load(group), _mm512_set1_epi16(static_cast<short>(limit)));
}

}  // namespace

Forms forms_avx512() noexcept { return {distances, count, near}; }

}  // namespace recfast::hamming_top_k

#pragma GCC pop_options
#endif
