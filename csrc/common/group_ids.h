// Groups the lookups of a batch by row: a stable radix sort of (row, position), and where each row's run begins.
// A row's positions come out ascending, so sums over a run have one order.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>
#include <utility>

#include "common/parallel.h"
#include "common/status.h"
#include "embedding_bag/lookups.h"

namespace recfast {

[[nodiscard]] constexpr std::int64_t group_row(std::uint64_t key) noexcept {
  return static_cast<std::int64_t>(key >> 32);
}
[[nodiscard]] constexpr std::int64_t group_position(std::uint64_t key) noexcept {
  return static_cast<std::int64_t>(key & 0xFFFFFFFFu);
}

// Sorts n keys row << 32 | position, in ascending order of position, by row, with the help of `other` (n words).
// Returns whichever of the two holds the outcome. Needs n <= 2^32 and rows <= 2^32.
[[nodiscard]] inline std::uint64_t* sort_keys(std::uint64_t* keys, std::int64_t n, std::int64_t rows,
                                              std::uint64_t* other) noexcept {
  constexpr int kBits = 11;  // a histogram of 8 KB, which stays in the first cache with the heads of its 2048 streams
  constexpr std::uint64_t kBuckets = std::uint64_t{1} << kBits;
  const int bits = rows > 1 ? static_cast<int>(std::bit_width(static_cast<std::uint64_t>(rows - 1))) : 0;
  for (int shift = 32; shift < 32 + bits; shift += kBits) {
    std::uint32_t heads[kBuckets] = {};
    for (std::int64_t i = 0; i < n; ++i) ++heads[keys[i] >> shift & (kBuckets - 1)];
    std::uint32_t sum = 0;
    for (std::uint32_t& head : heads) {
      const std::uint32_t count = head;
      head = sum;
      sum += count;
    }
    for (std::int64_t i = 0; i < n; ++i) other[heads[keys[i] >> shift & (kBuckets - 1)]++] = keys[i];
    std::swap(keys, other);
  }
  return keys;
}

// Fills `keys` (n words) with row << 32 | position and sorts them as sort_keys does; where an id lies outside
// [0, rows), its position is reported and nothing sorted.
template <class Index>
[[nodiscard]] std::uint64_t* sort_ids(std::span<const Index> ids, std::int64_t rows, std::uint64_t* keys,
                                      std::uint64_t* other, FirstError& error) noexcept {
  const std::size_t n = ids.size();
  for (std::size_t i = 0; i < n; ++i) {
    const auto id = static_cast<std::uint64_t>(static_cast<std::int64_t>(ids[i]));
    if (id >= static_cast<std::uint64_t>(rows)) {
      error.report(static_cast<std::int64_t>(i));
      return nullptr;
    }
    keys[i] = id << 32 | i;
  }
  return sort_keys(keys, static_cast<std::int64_t>(n), rows, other);
}

// Writes the first position of each run of equal rows and, after them, n: `starts` holds up to n + 1 entries.
// Returns the number of runs.
[[nodiscard]] inline std::int64_t find_runs(const std::uint64_t* sorted, std::int64_t n,
                                            std::int64_t* starts) noexcept {
  std::int64_t runs = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (i == 0 || group_row(sorted[i]) != group_row(sorted[i - 1])) starts[runs++] = i;
  }
  starts[runs] = n;
  return runs;
}

// What one call of group_lookups leaves behind.
struct Grouped {
  const std::uint64_t* keys;   // [kept], sorted: row << 32 | slot
  const std::int32_t* starts;  // [runs + 1]: where the run of each row that occurs begins
  std::int64_t kept;
  std::int64_t runs;
};

// Groups the lookups of a call, many tables and missing ids included, on as many threads as pay; the outcome is the
// same for any number of them. The slot of a lookup is its bag (by_bag) or its position.
class LookupGrouping {
 public:
  static constexpr int kDigitBits = 11;  // at most: a histogram of 8 KB
  static constexpr std::int64_t kGrain = 16384;

  // How many pieces the bags are cut into, each with a histogram of its own.
  [[nodiscard]] static std::int64_t pieces(std::int64_t total, std::int64_t bags, int threads) noexcept {
    return std::max<std::int64_t>(1, std::min({static_cast<std::int64_t>(threads), bags, total / kGrain}));
  }

  // 32-bit words of scratch for histograms.
  [[nodiscard]] static std::int64_t histogram_words(std::int64_t pieces) noexcept {
    return std::max<std::int64_t>(pieces, 3) << kDigitBits;
  }

  // keys, other: [total] words; starts: [total + 1]; counts: [pieces + 1]; total < 2^31, rows <= 2^32.
  // Where an id is wrong, its position is reported and nothing is grouped.
  [[nodiscard]] static Grouped run(const embedding_bag::Lookups& lookups, bool by_bag, std::uint64_t* keys,
                                   std::uint64_t* other, std::int32_t* starts, std::uint32_t* histograms,
                                   std::int64_t* counts, std::int64_t pieces, FirstError& error) noexcept {
    const auto last_row = static_cast<std::uint64_t>(std::max<std::int64_t>(lookups.rows, 2) - 1);
    const int bits = static_cast<int>(std::bit_width(last_row));
    const int passes = (bits + kDigitBits - 1) / kDigitBits;
    const int digit = (bits + passes - 1) / passes;
    const Digits digits{passes, digit};
    const std::int64_t bags = lookups.bags;
    std::fill(histograms, histograms + (std::max<std::int64_t>(pieces, passes) << digit), 0u);

    // Keys of piece p lie in [begin(bag_at(p)), + counts[p]) to begin with.
    parallel_for_each(pieces, [&](std::int64_t piece, int) {
      const std::int64_t first = bags * piece / pieces;
      const std::int64_t last = bags * (piece + 1) / pieces;
      std::uint32_t* const histogram = histograms + (piece << digit);
      const int levels = pieces == 1 ? passes : 1;
      counts[piece] =
          lookups.wide ? fill<std::int64_t>(lookups, by_bag, first, last, keys, digits, levels, histogram, error)
                       : fill<std::int32_t>(lookups, by_bag, first, last, keys, digits, levels, histogram, error);
    });
    if (error.position() >= 0) return {};
    std::int64_t kept = 0;
    for (std::int64_t piece = 0; piece < pieces; ++piece) kept += counts[piece];

    for (int pass = 0; pass < passes; ++pass) {
      const int shift = 32 + pass * digit;
      const std::uint64_t mask = (std::uint64_t{1} << digit) - 1;
      const auto part = [&](std::int64_t piece) -> std::pair<std::int64_t, std::int64_t> {
        if (pass > 0) return {kept * piece / pieces, kept * (piece + 1) / pieces};
        const std::int64_t from = lookups.begin(bags * piece / pieces);
        return {from, from + counts[piece]};
      };
      if (pass > 0 && pieces > 1) {
        parallel_for_each(pieces, [&](std::int64_t piece, int) {
          std::uint32_t* const histogram = histograms + (piece << digit);
          std::fill(histogram, histogram + (std::int64_t{1} << digit), 0u);
          const auto [from, to] = part(piece);
          for (std::int64_t i = from; i < to; ++i) ++histogram[keys[i] >> shift & mask];
        });
      }
      std::uint32_t* const level = histograms + (pieces == 1 ? static_cast<std::int64_t>(pass) << digit : 0);
      std::uint32_t sum = 0;
      for (std::uint64_t bucket = 0; bucket <= mask; ++bucket) {
        for (std::int64_t piece = 0; piece < pieces; ++piece) {
          std::uint32_t& head = level[(static_cast<std::uint64_t>(piece) << digit) + bucket];
          const std::uint32_t count = head;
          head = sum;
          sum += count;
        }
      }
      parallel_for_each(pieces, [&](std::int64_t piece, int) {
        std::uint32_t* const heads = level + (piece << digit);
        const auto [from, to] = part(piece);
        for (std::int64_t i = from; i < to; ++i) other[heads[keys[i] >> shift & mask]++] = keys[i];
      });
      std::swap(keys, other);
    }
    return {keys, starts, kept, mark_runs(keys, kept, starts, counts, pieces)};
  }

 private:
  struct Digits {
    int passes;
    int bits;
  };

  template <class Index>
  static std::int64_t fill(const embedding_bag::Lookups& lookups, bool by_bag, std::int64_t first, std::int64_t last,
                           std::uint64_t* keys, Digits digits, int levels, std::uint32_t* histogram,
                           FirstError& error) noexcept {
    const auto* ids = static_cast<const Index*>(lookups.indices);
    const std::uint64_t mask = (std::uint64_t{1} << digits.bits) - 1;
    std::uint64_t* const begin = keys + lookups.begin(first);
    std::uint64_t* out = begin;
    std::int64_t feature = 0;
    for (std::int64_t bag = first; bag < last; ++bag) {
      feature = lookups.feature_of(bag, feature);
      const bool whole = lookups.features == 0;
      const auto limit = static_cast<std::uint64_t>(whole ? lookups.rows : lookups.feature_rows[feature]);
      const auto start = static_cast<std::uint64_t>(whole ? 0 : lookups.feature_first[feature]);
      const std::int64_t to = lookups.begin(bag + 1);
      for (std::int64_t i = lookups.begin(bag); i < to; ++i) {
        const auto id = static_cast<std::uint64_t>(static_cast<std::int64_t>(ids[i]));
        if (id >= limit) [[unlikely]] {
          if (!lookups.skip_missing || ids[i] != -1) error.report(i);
          continue;
        }
        const std::uint64_t row = start + id;
        *out++ = row << 32 | static_cast<std::uint64_t>(by_bag ? bag : i);
        ++histogram[row & mask];
        if (levels > 1) ++histogram[(1 << digits.bits) + (row >> digits.bits & mask)];
        if (levels > 2) ++histogram[(2 << digits.bits) + (row >> 2 * digits.bits)];
      }
    }
    return out - begin;
  }

  static std::int64_t mark_runs(const std::uint64_t* keys, std::int64_t kept, std::int32_t* starts,
                                std::int64_t* counts, std::int64_t pieces) noexcept {
    const auto begins = [&](std::int64_t i) { return i == 0 || group_row(keys[i]) != group_row(keys[i - 1]); };
    if (pieces > 1) {
      parallel_for_each(pieces, [&](std::int64_t piece, int) {
        std::int64_t count = 0;
        const std::int64_t to = kept * (piece + 1) / pieces;
        for (std::int64_t i = kept * piece / pieces; i < to; ++i) count += begins(i);
        counts[piece + 1] = count;
      });
    }
    std::int64_t runs = 0;
    if (pieces == 1) {
      for (std::int64_t i = 0; i < kept; ++i) {  // no branch: whether a run begins is anyone's guess
        starts[runs] = static_cast<std::int32_t>(i);
        runs += begins(i);
      }
    } else {
      counts[0] = 0;
      for (std::int64_t piece = 1; piece <= pieces; ++piece) counts[piece] += counts[piece - 1];
      runs = counts[pieces];
      parallel_for_each(pieces, [&](std::int64_t piece, int) {
        std::int64_t at = counts[piece];
        const std::int64_t to = kept * (piece + 1) / pieces;
        for (std::int64_t i = kept * piece / pieces; i < to; ++i) {
          if (begins(i)) starts[at++] = static_cast<std::int32_t>(i);
        }
      });
    }
    starts[runs] = static_cast<std::int32_t>(kept);
    return runs;
  }
};

}  // namespace recfast
