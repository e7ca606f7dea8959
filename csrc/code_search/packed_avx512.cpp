#include "code_search/packed.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <limits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512vbmi,popcnt")

namespace recfast::code_search {
namespace {

// The value is in a register from here on. Without it the compiler loads codes anew for each permutation that overwrites
// them, and carries the rows of all codebooks around the loop, most of them spilled: loads then take half the time.
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
    __m512i sums[kGroup] = {};
#pragma GCC unroll 16
    for (std::int64_t m = 0; m < books; ++m) add<Tables>(sight.lut + m * kLevels, planes, m * kItems, sums);
    if (sight.levels != nullptr) {
      const std::uint8_t* levels[kGroup];
      for (std::int64_t i = 0; i < kGroup; ++i) levels[i] = sight.levels + blocks[i] * kItems;
      add<4>(sight.lut + books * kLevels, levels, 0, sums);
    }
    const __m512i least = _mm512_min_epu8(_mm512_min_epu8(sums[0], sums[1]), _mm512_min_epu8(sums[2], sums[3]));
    if (_mm512_cmple_epu8_mask(least, limit) == 0) continue;
    Hit& hit = hits[count++];
    hit.at = at;
    for (int i = 0; i < kGroup; ++i) hit.masks[i] = _mm512_cmple_epu8_mask(sums[i], limit);
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
    const __m512 steps = _mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(tops, value), scale), most);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(steps)));
  }
}

float top(const float* values, std::int64_t count) noexcept {
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (std::int64_t c = 0; c < count; c += 16) {
    const std::int64_t rest = count - c;
    const auto present = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1 << rest) - 1);
    most = _mm512_mask_max_ps(most, present, most, _mm512_maskz_loadu_ps(present, values + c));
  }
  return _mm512_reduce_max_ps(most);
}

void bounds(const std::uint64_t* bitmaps, std::int64_t count, std::int64_t rows, const std::uint8_t* lut,
            std::uint16_t* out) noexcept {
  const __m512i none = _mm512_set1_epi8(-1);
  for (std::int64_t i = 0; i < count; ++i) {
    int sum = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::uint64_t* const bits = bitmaps + (i * rows + row) * kBits;
      const std::uint8_t* const values = lut + row * kLevels;
      __m512i least[kBits];
      for (int w = 0; w < kBits; ++w) {
        least[w] = _mm512_mask_loadu_epi8(none, bits[w], values + w * 64);
      }
      const __m512i all = _mm512_min_epu8(_mm512_min_epu8(least[0], least[1]), _mm512_min_epu8(least[2], least[3]));
      const __m256i half = _mm256_min_epu8(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
      const __m128i quarter = _mm_min_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
      const __m128i pairs = _mm_min_epu8(quarter, _mm_srli_epi16(quarter, 8));
      sum += _mm_cvtsi128_si32(_mm_minpos_epu16(pairs)) & 0xff;
    }
    out[i] = static_cast<std::uint16_t>(std::min(sum, 0xffff));
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

Forms<std::uint8_t> forms_avx512(std::uint8_t) noexcept { return {seek8, deficits, top, bounds, reach}; }
Forms<std::uint16_t> forms_avx512(std::uint16_t) noexcept { return {seek16, deficits, top, bounds, reach}; }

}  // namespace recfast::code_search

#pragma GCC pop_options
#endif
