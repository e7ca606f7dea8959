// Groups the lookups of a batch by row: a stable radix sort of (row, position), and where each row's run begins.
// A row's positions come out ascending, so sums over a run have one order.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>

#include "common/status.h"

namespace recfast {

[[nodiscard]] constexpr std::int64_t group_row(std::uint64_t key) noexcept {
  return static_cast<std::int64_t>(key >> 32);
}
[[nodiscard]] constexpr std::int64_t group_position(std::uint64_t key) noexcept {
  return static_cast<std::int64_t>(key & 0xFFFFFFFFu);
}

// Fills `keys` (n words) with row << 32 | position and sorts them with the help of `other` (n words). Returns whichever
// of the two holds the outcome; where an id lies outside [0, rows), its position is reported and nothing sorted.
// Needs n <= 2^32 and rows <= 2^32.
template <class Index>
[[nodiscard]] std::uint64_t* sort_ids(std::span<const Index> ids, std::int64_t rows, std::uint64_t* keys,
                                      std::uint64_t* other, FirstError& error) noexcept {
  constexpr int kBits = 11;  // a histogram of 8 KB, which stays in the first cache with the heads of its 2048 streams
  constexpr std::uint64_t kBuckets = std::uint64_t{1} << kBits;
  const std::size_t n = ids.size();
  for (std::size_t i = 0; i < n; ++i) {
    const auto id = static_cast<std::uint64_t>(static_cast<std::int64_t>(ids[i]));
    if (id >= static_cast<std::uint64_t>(rows)) {
      error.report(static_cast<std::int64_t>(i));
      return nullptr;
    }
    keys[i] = id << 32 | i;
  }
  const int bits = rows > 1 ? static_cast<int>(std::bit_width(static_cast<std::uint64_t>(rows - 1))) : 0;
  for (int shift = 32; shift < 32 + bits; shift += kBits) {
    std::uint32_t heads[kBuckets] = {};
    for (std::size_t i = 0; i < n; ++i) ++heads[keys[i] >> shift & (kBuckets - 1)];
    std::uint32_t sum = 0;
    for (std::uint32_t& head : heads) {
      const std::uint32_t count = head;
      head = sum;
      sum += count;
    }
    for (std::size_t i = 0; i < n; ++i) other[heads[keys[i] >> shift & (kBuckets - 1)]++] = keys[i];
    std::swap(keys, other);
  }
  return keys;
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

}  // namespace recfast
