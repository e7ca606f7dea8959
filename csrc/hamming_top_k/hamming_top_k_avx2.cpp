#include "hamming_top_k/hamming_top_k.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>
#include <cstdint>

#pragma GCC push_options
#pragma GCC target("avx2,popcnt")

namespace recfast::hamming_top_k {
namespace {

__m256i load(const void* p) noexcept { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Bits set in each byte, by looking up its two halves.
__m256i bits_of_bytes(__m256i x) noexcept {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
}

// Four rows, one a 64-bit lane.
__m256i four(const Planes& keys, const std::uint64_t* query, std::int64_t row) noexcept {
  __m256i sum = _mm256_setzero_si256();
  for (std::int64_t w = 0; w < keys.words; ++w) {
    const __m256i differ = _mm256_xor_si256(_mm256_set1_epi64x(static_cast<long long>(query[w])),
                                            load(keys.planes + w * keys.stride + row));
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bits_of_bytes(differ), _mm256_setzero_si256()));
  }
  return sum;
}

void distances(const Planes& keys, const std::uint64_t* query, std::uint16_t* out) noexcept {
  std::int64_t row = 0;
  // Four vectors of four 64-bit lanes become one of sixteen 16-bit lanes: lane i of `mixed` holds rows i, 4 + i, 8 + i
  // and 12 + i, which is then turned.
  const __m256i pairs = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15,  //
                                         0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  const __m256i halves = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; row + 16 <= keys.length; row += 16) {
    __m256i mixed = four(keys, query, row);
    mixed = _mm256_or_si256(mixed, _mm256_slli_epi64(four(keys, query, row + 4), 16));
    mixed = _mm256_or_si256(mixed, _mm256_slli_epi64(four(keys, query, row + 8), 32));
    mixed = _mm256_or_si256(mixed, _mm256_slli_epi64(four(keys, query, row + 12), 48));
    mixed = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(mixed, pairs), halves);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row), mixed);
  }
  for (; row < keys.length; ++row) {
    int sum = 0;
    for (std::int64_t w = 0; w < keys.words; ++w) sum += std::popcount(query[w] ^ keys.planes[w * keys.stride + row]);
    out[row] = static_cast<std::uint16_t>(sum);
  }
  for (; row % kGroup != 0; ++row) out[row] = kFar;
}

// Unsigned x <= limit: the smaller of the two is x.
__m256i at_most(__m256i x, __m256i limit) noexcept { return _mm256_cmpeq_epi16(_mm256_min_epu16(x, limit), x); }

std::int64_t count(const std::uint16_t* distances, std::int64_t groups, std::uint16_t limit) noexcept {
  const __m256i most = _mm256_set1_epi16(static_cast<short>(limit));
  std::int64_t total = 0;
  for (std::int64_t group = 0; group < groups;) {
    // Lanes of 16 bits are emptied long before they overflow.
    const std::int64_t stop = group + 16384 < groups ? group + 16384 : groups;
    __m256i counts = _mm256_setzero_si256();
    for (; group < stop; ++group) {
      const std::uint16_t* from = distances + group * kGroup;
      counts = _mm256_sub_epi16(counts, at_most(load(from), most));
      counts = _mm256_sub_epi16(counts, at_most(load(from + 16), most));
    }
    std::uint16_t lanes[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), counts);
    for (const std::uint16_t lane : lanes) total += lane;
  }
  return total;
}

std::uint32_t near(const std::uint16_t* group, std::uint16_t limit) noexcept {
  const __m256i most = _mm256_set1_epi16(static_cast<short>(limit));
  const __m256i bytes = _mm256_packs_epi16(at_most(load(group), most), at_most(load(group + 16), most));
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
}

}  // namespace

Forms forms_avx2() noexcept { return {distances, count, near}; }

}  // namespace recfast::hamming_top_k

#pragma GCC pop_options
#endif
