#include "code_search/packed.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
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

template <int Lanes>
void bounds(const std::uint64_t* held, std::int64_t spans, std::int64_t rows, const std::uint8_t* lut,
            const std::uint8_t* floors, std::uint8_t* out) noexcept {
  for (std::int64_t span = 0; span < spans; ++span) {
    __m512i sums[Lanes] = {};
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::uint8_t* const values = lut + row * kLevels;
      const std::uint64_t* const lines = held + (span * rows + row) * kLevels * Lanes;
      const __m512i floor = _mm512_set1_epi8(static_cast<char>(floors[row]));
      __m512i least[Lanes];
#pragma GCC unroll 8
      for (int i = 0; i < Lanes; ++i) least[i] = floor;
      for (std::int64_t first = 0; first < kLevels; first += 64) {
        std::uint64_t codes = _mm512_cmplt_epu8_mask(_mm512_loadu_si512(values + first), floor);
        for (; codes != 0; codes &= codes - 1) {
          const std::int64_t code = first + std::countr_zero(codes);
          const std::uint64_t* const line = lines + code * Lanes;
          if constexpr (Lanes == 8) {
            // In order of codes, those of the first codebook lie in few spans.
            const __m512i words = _mm512_loadu_si512(line);
            if (_mm512_test_epi64_mask(words, words) == 0) continue;
          }
          const __m512i value = _mm512_set1_epi8(static_cast<char>(values[code]));
#pragma GCC unroll 8
          for (int i = 0; i < Lanes; ++i) least[i] = _mm512_mask_min_epu8(least[i], line[i], least[i], value);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < Lanes; ++i) sums[i] = _mm512_adds_epu8(sums[i], least[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Lanes; ++i) _mm512_storeu_si512(out + (span * Lanes + i) * kWord, sums[i]);
  }
}

void bounds(const std::uint64_t* held, std::int64_t spans, std::int64_t rows, std::int64_t lanes,
            const std::uint8_t* lut, const std::uint8_t* floors, std::uint8_t* out) noexcept {
  switch (lanes) {
    case 1: return bounds<1>(held, spans, rows, lut, floors, out);
    case 2: return bounds<2>(held, spans, rows, lut, floors, out);
    case 4: return bounds<4>(held, spans, rows, lut, floors, out);
    default: return bounds<8>(held, spans, rows, lut, floors, out);
  }
}

std::uint64_t within(const std::uint8_t* values, int most) noexcept {
  return _mm512_cmple_epu8_mask(_mm512_loadu_si512(values), _mm512_set1_epi8(static_cast<char>(most)));
}

std::int64_t count(const std::uint8_t* values, const std::uint64_t* those, std::int64_t words, int most) noexcept {
  std::int64_t found = 0;
  for (std::int64_t w = 0; w < words; ++w) {
    found += _mm_popcnt_u64(within(values + w * 64, most) & those[w]);
  }
  return found;
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

Forms<std::uint8_t> forms_avx512(std::uint8_t) noexcept { return {seek8, deficits, top, bounds, within, count, count_bits_avx512, reach}; }
Forms<std::uint16_t> forms_avx512(std::uint16_t) noexcept { return {seek16, deficits, top, bounds, within, count, count_bits_avx512, reach}; }

}  // namespace recfast::code_search

#pragma GCC pop_options
#endif
