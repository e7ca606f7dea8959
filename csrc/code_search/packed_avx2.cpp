#include "code_search/packed.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <limits>

#pragma GCC push_options
#pragma GCC target("avx2,popcnt")

namespace recfast::code_search {
namespace {

__m256i load(const std::uint8_t* from) noexcept { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
void store(std::uint8_t* to, __m256i value) noexcept { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }

// The deficits of 32 codes: 16 entries at a time by the low bits, chosen between by the high ones.
template <int Tables>
__m256i look(const std::uint8_t* lut, __m256i codes) noexcept {
  const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(15));
  __m256i found[Tables];
#pragma GCC unroll 16
  for (int i = 0; i < Tables; ++i) {
    const __m256i part = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lut + i * 16)));
    found[i] = _mm256_shuffle_epi8(part, low);
  }
  // A blend looks at the highest bit of each byte: bit 4 moves there first, then bit 5, ...
  int shift = 3;
#pragma GCC unroll 4
  for (int count = Tables / 2; count >= 1; count /= 2, --shift) {
    const __m256i bit = _mm256_slli_epi16(codes, shift);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], bit);
  }
  return found[0];
}

template <int Tables>
std::int64_t seek(const Sight<std::uint8_t>& sight, std::int64_t first, std::int64_t last,
                  Hit* hits, std::int64_t* next) noexcept {
  const __m256i limit = _mm256_set1_epi8(static_cast<char>(sight.limit));
  const std::int64_t stride = sight.books * kItems;
  std::int64_t count = 0;
  for (std::int64_t at = first; at < last; at += kGroup) {
    Hit& hit = hits[count];
    hit.at = at;
    std::uint64_t any = 0;
    for (std::int64_t i = 0; i < std::min(kGroup, last - at); ++i) {
      const std::int64_t block = sight.block(at + i);
      const std::uint8_t* const planes = sight.planes + block * stride;
      __m256i left = _mm256_setzero_si256();
      __m256i right = _mm256_setzero_si256();
      for (std::int64_t m = 0; m < sight.books; ++m) {
        const std::uint8_t* const lut = sight.lut + m * kLevels;
        left = _mm256_adds_epu8(left, look<Tables>(lut, load(planes + m * kItems)));
        right = _mm256_adds_epu8(right, look<Tables>(lut, load(planes + m * kItems + 32)));
      }
      if (sight.levels != nullptr) {
        const std::uint8_t* const lut = sight.lut + sight.books * kLevels;
        left = _mm256_adds_epu8(left, look<16>(lut, load(sight.levels + block * kItems)));
        right = _mm256_adds_epu8(right, look<16>(lut, load(sight.levels + block * kItems + 32)));
      }
      const auto near = [&](__m256i sum) {
        return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(sum, limit), sum)));
      };
      hit.masks[i] = near(left) | static_cast<std::uint64_t>(near(right)) << 32;
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

std::int64_t seek8(const Sight<std::uint8_t>& sight, std::int64_t first, std::int64_t last, Hit* hits,
                   std::int64_t* next) noexcept {
  if (sight.entries <= 16) return seek<1>(sight, first, last, hits, next);
  if (sight.entries <= 64) return seek<4>(sight, first, last, hits, next);
  return seek<16>(sight, first, last, hits, next);
}

void deficits(const float* values, std::int64_t count, float top, float inverse, std::uint8_t* out) noexcept {
  const __m256 tops = _mm256_set1_ps(top);
  const __m256 scale = _mm256_set1_ps(inverse);
  const __m256 most = _mm256_set1_ps(255.0f);
  std::int64_t c = 0;
  for (; c + 32 <= count; c += 32) {
    const auto steps = [&](std::int64_t at) {
      const __m256 value = _mm256_loadu_ps(values + c + at);
      return _mm256_cvttps_epi32(_mm256_min_ps(_mm256_mul_ps(_mm256_sub_ps(tops, value), scale), most));
    };
    const __m256i a = _mm256_packus_epi32(steps(0), steps(8));
    const __m256i b = _mm256_packus_epi32(steps(16), steps(24));
    // Packing works within halves of a register.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    store(out + c, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order));
  }
  for (; c < count; ++c) out[c] = static_cast<std::uint8_t>(std::min((top - values[c]) * inverse, 255.0f));
  std::fill(out + count, out + kLevels, std::uint8_t{255});
}

float top(const float* values, std::int64_t count) noexcept {
  __m256 most = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  std::int64_t c = 0;
  for (; c + 8 <= count; c += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(values + c));
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, most);
  float best = *std::max_element(lanes, lanes + 8);
  for (; c < count; ++c) best = std::max(best, values[c]);
  return best;
}

std::uint64_t within(const std::uint8_t* values, int most) noexcept {
  const __m256i limit = _mm256_set1_epi8(static_cast<char>(most));
  const auto half = [&](const std::uint8_t* from) {
    const __m256i bytes = load(from);
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(bytes, limit), bytes)));
  };
  return half(values) | static_cast<std::uint64_t>(half(values + 32)) << 32;
}

void bounds(const std::uint64_t* held, std::int64_t spans, std::int64_t rows, std::int64_t lanes,
            const std::uint8_t* lut, const std::uint8_t* floors, std::uint8_t* out) noexcept {
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  for (std::int64_t span = 0; span < spans; ++span) {
    std::uint8_t* const sums = out + span * lanes * kWord;
    std::fill_n(sums, lanes * kWord, std::uint8_t{0});
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::uint8_t* const values = lut + row * kLevels;
      const std::uint64_t* const lines = held + (span * rows + row) * kLevels * lanes;
      const int floor = floors[row];
      std::int32_t codes[kLevels];
      std::int64_t count = 0;
      for (std::int64_t first = 0; floor > 0 && first < kLevels; first += 64) {
        for (std::uint64_t below = within(values + first, floor - 1); below != 0; below &= below - 1) {
          codes[count++] = static_cast<std::int32_t>(first + std::countr_zero(below));
        }
      }
      for (std::int64_t half = 0; half < 2 * lanes; ++half) {
        __m256i least = _mm256_set1_epi8(static_cast<char>(floor));
        for (std::int64_t i = 0; i < count; ++i) {
          const std::uint64_t word = lines[codes[i] * lanes + half / 2];
          const auto groups = static_cast<std::int32_t>(word >> (half % 2 * 32));
          const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(groups), spread);
          const __m256i absent = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), _mm256_setzero_si256());
          const __m256i value = _mm256_set1_epi8(static_cast<char>(values[codes[i]]));
          least = _mm256_min_epu8(least, _mm256_or_si256(absent, value));
        }
        store(sums + half * 32, _mm256_adds_epu8(load(sums + half * 32), least));
      }
    }
  }
}

std::int64_t count(const std::uint8_t* values, const std::uint64_t* those, std::int64_t words, int most) noexcept {
  std::int64_t found = 0;
  for (std::int64_t w = 0; w < words; ++w) {
    found += _mm_popcnt_u64(within(values + w * 64, most) & those[w]);
  }
  return found;
}

std::int64_t reach(const std::int32_t* keys, std::int64_t count, std::int32_t key) noexcept {
  std::int32_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) found += keys[i] >= key ? 1 : 0;
  return found;
}

}  // namespace

void pack_words_avx2(const std::uint8_t* mask, std::int64_t words, std::uint64_t* out) noexcept {
  const auto bits = [](const std::uint8_t* bytes) {
    // 0 or 1 moves to the highest bit of its byte.
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(load(bytes), 7)));
  };
  for (std::int64_t w = 0; w < words; ++w) {
    out[w] = bits(mask + w * kItems) | static_cast<std::uint64_t>(bits(mask + w * kItems + 32)) << 32;
  }
}

std::int64_t count_bits_avx2(const std::uint64_t* words, std::int64_t count) noexcept {
  std::int64_t bits = 0;
  for (std::int64_t w = 0; w < count; ++w) bits += _mm_popcnt_u64(words[w]);
  return bits;
}

Forms<std::uint8_t> forms_avx2(std::uint8_t) noexcept { return {seek8, deficits, top, bounds, within, count, count_bits_avx2, reach}; }
Forms<std::uint16_t> forms_avx2(std::uint16_t) noexcept {
  return {seek_none<std::uint16_t>, deficits, top, bounds, within, count, count_bits_avx2, reach};
}

}  // namespace recfast::code_search

#pragma GCC pop_options
#endif
