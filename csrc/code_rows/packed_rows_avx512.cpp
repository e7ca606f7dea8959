#include "code_rows/packed_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "common/isa.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512vbmi,avx512vbmi2,bmi,bmi2,lzcnt,popcnt")

#include "code_rows/packed_rows_search.h"
#include "common/best_list_avx512.h"

namespace recfast::code_rows {
namespace {

constexpr std::int64_t kRanked = 320;  // up to here counting how many keys are lower beats sorting

struct Avx512 {
  // kCount rows at a time, their tables in registers.
  template <int kCount, bool kFirst>
  static void add_bounds(const Named* rows, std::int64_t chunks, std::uint8_t* sums) noexcept {
    __m512i tables[kCount];
    const std::uint8_t* levels[kCount];
    const std::uint64_t* present[kCount];
    for (int j = 0; j < kCount; ++j) {
      tables[j] = _mm512_load_si512(rows[j].bounds);
      levels[j] = rows[j].levels;
      present[j] = rows[j].present;
    }
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      __m512i sum = kFirst ? _mm512_setzero_si512() : _mm512_load_si512(sums + chunk * kGroups);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        const std::uint64_t groups = present[j][chunk];
        // The lowest level of a row that is there is 1, and table[0] is 0: groups that are not there add nothing.
        const __m512i level = _mm512_maskz_expand_epi8(groups, _mm512_loadu_si512(levels[j]));
        sum = _mm512_adds_epu8(sum, _mm512_permutexvar_epi8(level, tables[j]));
        levels[j] += std::popcount(groups);
      }
      _mm512_store_si512(sums + chunk * kGroups, sum);
    }
  }

  template <bool kFirst>
  static void add_some(const Named* rows, std::int64_t count, std::int64_t chunks, std::uint8_t* sums) noexcept {
    switch (count) {
      case 1: add_bounds<1, kFirst>(rows, chunks, sums); return;
      case 2: add_bounds<2, kFirst>(rows, chunks, sums); return;
      case 3: add_bounds<3, kFirst>(rows, chunks, sums); return;
      default: add_bounds<4, kFirst>(rows, chunks, sums);
    }
  }

  static void bounds(const Named* rows, std::int64_t count, std::int64_t chunks, std::uint8_t* sums) noexcept {
    add_some<true>(rows, std::min<std::int64_t>(count, 4), chunks, sums);
    for (std::int64_t j = 4; j < count; j += 4) {
      add_some<false>(rows + j, std::min<std::int64_t>(count - j, 4), chunks, sums);
    }
  }

  static std::uint64_t reaching(const std::uint8_t* sums, int low, int high) noexcept {
    const __m512i values = _mm512_load_si512(sums);
    const std::uint64_t least = _mm512_cmpge_epu8_mask(values, _mm512_set1_epi8(static_cast<char>(low)));
    if (high > 255) return least;
    return least & _mm512_cmplt_epu8_mask(values, _mm512_set1_epi8(static_cast<char>(high)));
  }

  static std::uint64_t allowed(std::uint64_t groups, std::int64_t first, const ItemMask& mask) noexcept {
    if (mask.kind != MaskKind::kBits || first + kGroups * 16 > mask.n_items) return allowed_groups(groups, first, mask);
    const std::uint8_t* bits = mask.data + first / 8;
    const __m512i low = _mm512_loadu_si512(bits);
    const __m512i high = _mm512_loadu_si512(bits + 64);
    const std::uint64_t any_low = _mm512_test_epi16_mask(low, low);
    const std::uint64_t any_high = _mm512_test_epi16_mask(high, high);
    return groups & (any_low | any_high << 32);
  }

  // What a row has in one chunk.
  struct Part {
    std::uint64_t present;
    const std::uint32_t* records;
    const float* scores;
    float weight;
    float bias;
  };

  // kCount rows, or any number of them with 0. With a mask most groups that are looked at hold no allowed item, so
  // that it pays to look at who is there before adding up.
  template <int kCount, bool kMasked>
  static void add_groups(const Named* rows, std::int64_t any, std::int64_t chunk, std::uint64_t groups,
                         std::int64_t first, const ItemMask& mask, Best<Avx512>& best) noexcept {
    const std::int64_t count = kCount == 0 ? any : kCount;
    Part parts[kCount == 0 ? 1 : kCount];
    const auto part_of = [&](std::int64_t j) {
      const Named& row = rows[j];
      const Start start = row.starts[chunk];
      return Part{.present = row.present[chunk],
                  .records = static_cast<const std::uint32_t*>(row.groups) + start.group,
                  .scores = row.scores + start.posting,
                  .weight = row.weight,
                  .bias = row.bias};
    };
    for (int j = 0; j < kCount; ++j) parts[j] = part_of(j);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; groups != 0; groups &= groups - 1) {
      const int group = std::countr_zero(groups);
      const std::int64_t id = first + group * 16;
      const std::uint32_t allowed = kMasked ? mask.sixteen(id) : 0xFFFF;
      if constexpr (kMasked) {
        std::uint32_t there = 0;
#pragma GCC unroll 8
        for (std::int64_t j = 0; j < count; ++j) {
          const Part part = kCount == 0 ? part_of(j) : parts[kCount == 0 ? 0 : j];
          const auto here = static_cast<std::uint32_t>(part.present >> group & 1);
          there |= part.records[std::popcount(_bzhi_u64(part.present, static_cast<unsigned>(group)))] & (0U - here);
        }
        if ((there & allowed) == 0) continue;
      }
      __m512 total = _mm512_setzero_ps();
      std::uint32_t held = 0;
#pragma GCC unroll 8
      for (std::int64_t j = 0; j < count; ++j) {
        const Part part = kCount == 0 ? part_of(j) : parts[kCount == 0 ? 0 : j];
        // Where the row does not hold the group this is a record of another, or the one behind the last.
        const std::uint32_t record = part.records[std::popcount(_bzhi_u64(part.present, static_cast<unsigned>(group)))];
        const auto here = static_cast<std::uint32_t>(part.present >> group & 1);
        const std::uint32_t items = record & 0xFFFF & (0U - here);
        const auto lane = static_cast<__mmask16>(items);
        const __m512 scores = _mm512_maskz_expandloadu_ps(lane, part.scores + (record >> 16));
        const __m512 terms =
            _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(part.weight), scores), _mm512_set1_ps(part.bias));
        total = _mm512_mask_add_ps(total, lane, total, terms);
        held |= items;
      }
      const __m512 theta = _mm512_set1_ps(best.theta);
      std::uint32_t better = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(held & allowed), total, theta, _CMP_GE_OQ);
      if (better == 0) continue;
      const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(static_cast<std::int32_t>(id)), lanes);
      const std::uint32_t equal = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(better), total, theta, _CMP_EQ_OQ);
      better &= ~(equal & static_cast<std::uint32_t>(_mm512_cmpge_epi32_mask(ids, _mm512_set1_epi32(best.theta_id))));
      const auto kept = static_cast<__mmask16>(better);
      _mm512_storeu_ps(best.scores + best.count, _mm512_maskz_compress_ps(kept, total));
      _mm512_storeu_si512(best.ids + best.count, _mm512_maskz_compress_epi32(kept, ids));
      best.count += std::popcount(better);
      if (best.count >= best.capacity) best.cut();
    }
  }

  template <bool kMasked>
  static void by_count(const Named* rows, std::int64_t count, std::int64_t chunk, std::uint64_t groups,
                       std::int64_t first, const ItemMask& mask, Best<Avx512>& best) noexcept {
    switch (count) {
      case 1: add_groups<1, kMasked>(rows, count, chunk, groups, first, mask, best); return;
      case 2: add_groups<2, kMasked>(rows, count, chunk, groups, first, mask, best); return;
      case 3: add_groups<3, kMasked>(rows, count, chunk, groups, first, mask, best); return;
      case 4: add_groups<4, kMasked>(rows, count, chunk, groups, first, mask, best); return;
      default: add_groups<0, kMasked>(rows, count, chunk, groups, first, mask, best);
    }
  }

  static void narrow(const Named* rows, std::int64_t count, std::int64_t chunk, std::uint64_t groups,
                     std::int64_t first, const ItemMask& mask, Best<Avx512>& best) noexcept {
    if (mask.kind == MaskKind::kNone) {
      by_count<false>(rows, count, chunk, groups, first, mask, best);
    } else {
      by_count<true>(rows, count, chunk, groups, first, mask, best);
    }
  }

  static std::int64_t keep(Best<Avx512>& best, std::int32_t least, std::int32_t last) noexcept {
    return keep_avx512(best, least, last);
  }

  static void sort(std::uint64_t* keys, std::int64_t count, float* scores, std::int64_t* ids) noexcept {
    if (count > kRanked) {
      std::sort(keys, keys + count);
      for (std::int64_t i = 0; i < count; ++i) decode(keys[i], scores[i], ids[i]);
      return;
    }
    for (std::int64_t i = 0; i < count; i += 8) {
      const __mmask8 used = static_cast<__mmask8>((1U << std::min<std::int64_t>(8, count - i)) - 1);
      const __m512i mine = _mm512_maskz_loadu_epi64(used, keys + i);
      __m512i lower = _mm512_setzero_si512();
      for (std::int64_t j = 0; j < count; ++j) {
        const __m512i other = _mm512_set1_epi64(static_cast<std::int64_t>(keys[j]));
        lower = _mm512_sub_epi64(lower, _mm512_movm_epi64(_mm512_cmplt_epu64_mask(other, mine)));
      }
      alignas(64) std::int64_t places[8];
      _mm512_store_si512(places, lower);
      for (std::int64_t lane = 0; lane < std::min<std::int64_t>(8, count - i); ++lane) {
        decode(keys[i + lane], scores[places[lane]], ids[places[lane]]);
      }
    }
  }
};

}  // namespace

bool has_avx512_form() noexcept {
  static const bool offered = __builtin_cpu_supports("avx512vbmi2") != 0;
  return offered && has_vbmi();
}

void search_avx512(const Packed& packed, const Query& query, std::int64_t number, std::byte* scratch) noexcept {
  Search<Avx512>(packed, query, number, scratch).run();
}

}  // namespace recfast::code_rows

#pragma GCC pop_options
#endif
