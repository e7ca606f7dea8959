#include "code_search/packed.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <limits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512vbmi,popcnt")

namespace recfast::code_search {
namespace {

// The value is in a register from here on. Without it the compiler loads codes anew for each permutation that
// overwrites them, and carries the rows of all codebooks around the loop, most of them spilled: loads then take half
// the time.
[[nodiscard]] __m512i pinned(__m512i value) noexcept {
  __asm__ volatile("" : "+v"(value));
  return value;
}

// A row of deficits in registers: Tables * 64 entries of it.
template <int Tables>
struct Row {
  __m512i part[Tables];

  explicit Row(const std::uint8_t* lut) noexcept {
#pragma GCC unroll 4
    for (int i = 0; i < Tables; ++i) part[i] = pinned(_mm512_loadu_si512(lut + i * 64));
  }

  [[nodiscard]] __m512i operator[](__m512i codes) const noexcept {
    if constexpr (Tables == 1) {
      return _mm512_permutexvar_epi8(codes, part[0]);
    } else if constexpr (Tables == 2) {
      return _mm512_permutex2var_epi8(part[0], codes, part[1]);
    } else {
      const __m512i low = _mm512_permutex2var_epi8(part[0], codes, part[1]);
      const __m512i high = _mm512_permutex2var_epi8(part[2], codes, part[3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
    }
  }
};

template <int Tables>
void add(const std::uint8_t* lut, const std::uint8_t* const* codes, std::int64_t offset, __m512i* sums) noexcept {
  const Row<Tables> row(lut);
#pragma GCC unroll 4
  for (int i = 0; i < kGroup; ++i) {
    sums[i] = _mm512_adds_epu8(sums[i], row[pinned(_mm512_loadu_si512(codes[i] + offset))]);
  }
}

template <int Tables, int Books, bool Listed>
std::int64_t seek(const Sight<std::uint8_t>& sight, std::int64_t first, std::int64_t last,
                  Hit* hits, std::int64_t* next) noexcept {
  const __m512i limit = _mm512_set1_epi8(static_cast<char>(sight.limit));
  const std::int64_t books = Books > 0 ? Books : sight.books;
  const std::int64_t stride = books * kItems;
  std::int64_t count = 0;
  for (std::int64_t at = first; at < last; at += kGroup) {
    std::int64_t blocks[kGroup];
    for (std::int64_t i = 0; i < kGroup; ++i) {
      // Beyond the end the last block stands in.
      const std::int64_t place = std::min(at + i, last - 1);
      blocks[i] = Listed ? sight.list[place] : place;
    }
    const std::uint8_t* planes[kGroup];
    for (std::int64_t i = 0; i < kGroup; ++i) planes[i] = sight.planes + blocks[i] * stride;
    if constexpr (Listed) {
      // The processor foresees no jumps.
      for (std::int64_t i = 0; i < kGroup; ++i) {
        const std::uint8_t* const ahead = sight.planes + sight.list[std::min(at + kGroup + i, last - 1)] * stride;
        for (std::int64_t line = 0; line < books; ++line) _mm_prefetch(ahead + line * kItems, _MM_HINT_T0);
      }
    }
    __m512i sums[kGroup] = {};
#pragma GCC unroll 16
    for (std::int64_t m = 0; m < books; ++m) add<Tables>(sight.lut + m * kLevels, planes, m * kItems, sums);
    if (sight.levels != nullptr) {
      const std::uint8_t* levels[kGroup];
      for (std::int64_t i = 0; i < kGroup; ++i) levels[i] = sight.levels + blocks[i] * kItems;
      add<4>(sight.lut + books * kLevels, levels, 0, sums);
    }
    // No branch on what was found: a wrong guess would throw away the loads that are under way.
    Hit& hit = hits[count];
    hit.at = at;
    std::uint64_t any = 0;
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < kGroup; ++i) {
      std::uint64_t near = _mm512_cmple_epu8_mask(sums[i], limit);
      if constexpr (Listed) near &= sight.allowed[std::min(at + i, last - 1)];
      hit.masks[i] = near;
      any |= near;
    }
    std::int64_t found = any != 0 ? 1 : 0;
    __asm__ volatile("" : "+r"(found));  // or else the compiler makes a branch of it
    count += found;
    if (count == kHits) {
      *next = at + kGroup;
      return count;
    }
  }
  *next = last;
  return count;
}

template <int Tables>
std::int64_t seek(const Sight<std::uint8_t>& sight, std::int64_t first, std::int64_t last,
                  Hit* hits, std::int64_t* next) noexcept {
  const bool listed = sight.list != nullptr;
  switch (sight.books) {
    case 4:
      return listed ? seek<Tables, 4, true>(sight, first, last, hits, next)
                    : seek<Tables, 4, false>(sight, first, last, hits, next);
    case 8:
      return listed ? seek<Tables, 8, true>(sight, first, last, hits, next)
                    : seek<Tables, 8, false>(sight, first, last, hits, next);
    default:
      return listed ? seek<Tables, 0, true>(sight, first, last, hits, next)
                    : seek<Tables, 0, false>(sight, first, last, hits, next);
  }
}

std::int64_t seek8(const Sight<std::uint8_t>& sight, std::int64_t first, std::int64_t last, Hit* hits,
                   std::int64_t* next) noexcept {
  if (sight.entries <= 64) return seek<1>(sight, first, last, hits, next);
  if (sight.entries <= 128) return seek<2>(sight, first, last, hits, next);
  return seek<4>(sight, first, last, hits, next);
}

// Two bytes a code: the rounded sums themselves.
std::int64_t seek16(const Sight<std::uint16_t>& sight, std::int64_t first, std::int64_t last, Hit* hits,
                    std::int64_t* next) noexcept {
  const __m512 theta = _mm512_set1_ps(sight.theta);
  std::int64_t count = 0;
  for (std::int64_t at = first; at < last; at += kGroup) {
    Hit& hit = hits[count];
    hit.at = at;
    std::uint64_t any = 0;
    for (std::int64_t i = 0; i < std::min(kGroup, last - at); ++i) {
      const std::int64_t block = sight.block(at + i);
      hit.masks[i] = 0;
      for (std::int64_t lane = 0; lane < kItems; lane += 16) {
        const std::uint16_t* const codes = sight.planes + block * sight.books * kItems + lane;
        __m512 sum = _mm512_setzero_ps();
        for (std::int64_t m = 0; m < sight.books; ++m) {
          const __m512i places =
              _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + m * kItems)));
          const __m512 terms = _mm512_i32gather_ps(places, sight.table + m * sight.entries, 4);
          sum = m == 0 ? terms : _mm512_add_ps(sum, terms);
        }
        if (sight.bias != nullptr) {
          const std::int64_t rest = sight.size - block * kItems - lane;
          const auto present = static_cast<__mmask16>(rest >= 16 ? 0xffff : rest <= 0 ? 0 : (1 << rest) - 1);
          sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(present, sight.bias + block * kItems + lane));
        }
        hit.masks[i] |= static_cast<std::uint64_t>(_mm512_cmp_ps_mask(sum, theta, _CMP_GE_OQ)) << lane;
      }
      if (sight.list != nullptr) hit.masks[i] &= sight.allowed[at + i];
      any |= hit.masks[i];
    }
    count += any != 0 ? 1 : 0;
    if (count == kHits) {
      *next = at + kGroup;
      return count;
    }
  }
  *next = last;
  return count;
}

void deficits(const float* values, std::int64_t count, float top, float inverse, std::uint8_t* out) noexcept {
  const __m512 tops = _mm512_set1_ps(top);
  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512 most = _mm512_set1_ps(255.0f);
  for (std::int64_t c = 0; c < kLevels; c += 16) {
    const std::int64_t rest = count - c;
    const auto present = static_cast<__mmask16>(rest >= 16 ? 0xffff : rest <= 0 ? 0 : (1 << rest) - 1);
    // What is not there gets the deficit of -inf.
    const __m512 value =
        _mm512_mask_loadu_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), present, values + c);
    const __m512 steps = _mm512_maskz_min_ps(0xffff, _mm512_mul_ps(_mm512_sub_ps(tops, value), scale), most);
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_maskz_cvttps_epi32(0xffff, steps));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), bytes);
  }
}

float top(const float* values, std::int64_t count) noexcept {
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (std::int64_t c = 0; c < count; c += 16) {
    const std::int64_t rest = count - c;
    const auto present = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1 << rest) - 1);
    most = _mm512_mask_max_ps(most, present, most, _mm512_maskz_loadu_ps(present, values + c));
  }
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, most);
  const __m256 half = _mm256_max_ps(_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8));
  const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}

// Two vectors of bytes to one of pairs, the smaller of two each time.
template <int Bytes>
__m512i zip(__m512i a, __m512i b) noexcept {
  if constexpr (Bytes == 1) return _mm512_min_epu8(_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
  if constexpr (Bytes == 2) return _mm512_min_epu8(_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
  return _mm512_min_epu8(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

void bounds(const std::uint64_t* bitmaps, std::int64_t count, std::int64_t rows, const std::uint8_t* lut,
            std::uint16_t* out) noexcept {
  const __m512i none = _mm512_set1_epi8(-1);
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t sum = 0;
    // Eight rows meet in the bytes of a 64-bit lane. Rows that are not there have deficit 0.
    for (std::int64_t first = 0; first < rows; first += 8) {
      __m512i row[8];
#pragma GCC unroll 8
      for (std::int64_t r = 0; r < 8; ++r) {
        row[r] = _mm512_setzero_si512();
        if (first + r >= rows) continue;
        const std::uint64_t* const bits = bitmaps + (i * rows + first + r) * kBits;
        const std::uint8_t* const values = lut + (first + r) * kLevels;
        __m512i least[kBits];
        for (int w = 0; w < kBits; ++w) least[w] = _mm512_mask_loadu_epi8(none, bits[w], values + w * 64);
        row[r] = _mm512_min_epu8(_mm512_min_epu8(least[0], least[1]), _mm512_min_epu8(least[2], least[3]));
      }
      const __m512i low = zip<2>(zip<1>(row[0], row[1]), zip<1>(row[2], row[3]));
      const __m512i high = zip<2>(zip<1>(row[4], row[5]), zip<1>(row[6], row[7]));
      const __m512i all = zip<4>(low, high);
      const __m256i half = _mm256_min_epu8(_mm512_castsi512_si256(all), _mm512_maskz_extracti32x8_epi32(0xff, all, 1));
      const __m128i quarter = _mm_min_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
      const __m128i one = _mm_min_epu8(quarter, _mm_unpackhi_epi64(quarter, quarter));
      sum += _mm_cvtsi128_si32(_mm_sad_epu8(one, _mm_setzero_si128()));
    }
    out[i] = static_cast<std::uint16_t>(std::min<std::int64_t>(sum, 0xffff));
  }
}

std::int64_t reach(const std::int32_t* keys, std::int64_t count, std::int32_t key) noexcept {
  const __m512i least = _mm512_set1_epi32(key);
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < count; i += 16) {
    const std::int64_t rest = count - i;
    const auto present = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1 << rest) - 1);
    found += _mm_popcnt_u32(_mm512_mask_cmpge_epi32_mask(present, _mm512_maskz_loadu_epi32(present, keys + i), least));
  }
  return found;
}

}  // namespace

void pack_words_avx512(const std::uint8_t* mask, std::int64_t words, std::uint64_t* out) noexcept {
  for (std::int64_t w = 0; w < words; ++w) {
    const __m512i bytes = _mm512_loadu_si512(mask + w * kItems);
    out[w] = _mm512_test_epi8_mask(bytes, bytes);
  }
}

std::int64_t count_bits_avx512(const std::uint64_t* words, std::int64_t count) noexcept {
  std::int64_t bits = 0;
  for (std::int64_t w = 0; w < count; ++w) bits += _mm_popcnt_u64(words[w]);
  return bits;
}

Forms<std::uint8_t> forms_avx512(std::uint8_t) noexcept { return {seek8, deficits, top, bounds, reach}; }
Forms<std::uint16_t> forms_avx512(std::uint16_t) noexcept { return {seek16, deficits, top, bounds, reach}; }

}  // namespace recfast::code_search

#pragma GCC pop_options
#endif
