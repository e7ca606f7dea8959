#include "code_search/code_search.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/parallel.h"
#include "common/status.h"

namespace recfast::code_search {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Scores are made a block at a time, then compared, so that the sums run without a branch between them.
constexpr std::int64_t kBlock = 64;

// A piece smaller than this is not worth a heap and a merge of its own.
constexpr std::int64_t kMinPiece = 16384;

// Values checked at once; only a faulty run is searched for the place.
constexpr std::int64_t kRun = 4096;

// Books > 0 fixes the number of codebooks at compile time; 0 reads it.
template <int Books, class Code>
[[nodiscard]] inline float sum(const float* table, const Code* codes, std::int64_t books,
                               std::int64_t entries) noexcept {
  const std::int64_t count = Books > 0 ? Books : books;
  float total = table[codes[0]];
  for (std::int64_t m = 1; m < count; ++m) total += table[m * entries + codes[m]];
  return total;
}

// Whether any of the bytes first[0:size] is not zero.
[[nodiscard]] inline bool any(const std::uint8_t* first, std::int64_t size) noexcept {
  if (size == kBlock) {
    std::uint64_t words[kBlock / 8];
    std::memcpy(words, first, sizeof words);
    std::uint64_t all = 0;
    for (const std::uint64_t word : words) all |= word;
    return all != 0;
  }
  return std::any_of(first, first + size, [](std::uint8_t byte) { return byte != 0; });
}

template <int Books, class Code>
void scan(const Args<Code>& args, std::int64_t query, std::int64_t first, std::int64_t last, TopK& best) noexcept {
  const float* table = args.table + query * args.books * args.entries;
  const std::uint8_t* mask = args.mask == nullptr ? nullptr : args.mask + query * args.mask_stride;
  float totals[kBlock];
  for (std::int64_t start = first; start < last; start += kBlock) {
    const std::int64_t size = std::min(kBlock, last - start);
    const Code* codes = args.codes + start * args.books;
    if (mask == nullptr && args.live == nullptr) {
      for (std::int64_t j = 0; j < size; ++j) {
        totals[j] = sum<Books>(table, codes + j * args.books, args.books, args.entries);
      }
    } else {
      if (mask != nullptr && !any(mask + start, size)) continue;
      if (args.live != nullptr && !any(args.live + start, size)) continue;
      for (std::int64_t j = 0; j < size; ++j) {
        const bool allowed =
            (mask == nullptr || mask[start + j] != 0) && (args.live == nullptr || args.live[start + j] != 0);
        totals[j] = allowed ? sum<Books>(table, codes + j * args.books, args.books, args.entries) : -kInfinity;
      }
    }
    if (args.bias != nullptr) {
      for (std::int64_t j = 0; j < size; ++j) totals[j] += args.bias[start + j];
    }
    float threshold = best.threshold();
    for (std::int64_t j = 0; j < size; ++j) {
      // Both comparisons are false for the NaN that -inf makes of an overflowed sum.
      if (totals[j] >= threshold && totals[j] > -kInfinity) {
        best.offer(totals[j], args.ids == nullptr ? start + j : args.ids[start + j]);
        threshold = best.threshold();
      }
    }
  }
}

template <class Code>
void scan(const Args<Code>& args, std::int64_t query, std::int64_t first, std::int64_t last, TopK& best) noexcept {
  switch (args.books) {
    case 4:
      return scan<4>(args, query, first, last, best);
    case 8:
      return scan<8>(args, query, first, last, best);
    case 16:
      return scan<16>(args, query, first, last, best);
    default:
      return scan<0>(args, query, first, last, best);
  }
}

// Writes row `query` of the answer; the heap holds min(k, N) entries at most.
template <class Code>
void write(const Args<Code>& args, std::int64_t query, std::int64_t capacity, TopK& best) noexcept {
  float* scores = args.scores + query * args.k;
  std::int64_t* found = args.found + query * args.k;
  best.write(scores, found);
  std::fill(scores + capacity, scores + args.k, -kInfinity);
  std::fill(found + capacity, found + args.k, std::int64_t{-1});
}

template <class Good>
[[nodiscard]] std::int64_t first_fault(std::int64_t size, const Good& good) noexcept {
  FirstError fault;
  parallel_for(size, 16 * kRun, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t start = begin; start < end; start += kRun) {
      const std::int64_t stop = std::min(start + kRun, end);
      bool all = true;
      for (std::int64_t i = start; i < stop; ++i) all &= good(i);
      if (all) continue;
      std::int64_t at = start;
      while (good(at)) ++at;
      fault.report(at);
      return;
    }
  });
  return fault.position();
}

}  // namespace

Cut cut_for(std::int64_t queries, std::int64_t items) noexcept {
  const std::int64_t threads = max_threads();
  std::int64_t pieces = 1;
  if (queries > 0 && queries < threads) {
    pieces = std::clamp<std::int64_t>(items / kMinPiece, 1, (threads + queries - 1) / queries);
  }
  // Uncut, a heap belongs to a thread; cut, to a piece, and one more to each query for the merge.
  return {.pieces = pieces, .heaps = pieces == 1 ? threads : queries * (pieces + 1)};
}

template <class Code>
Faults check(const Args<Code>& args, bool all) noexcept {
  Faults faults{.table = -1, .codes = -1, .bias = -1};
  // NaN is not below infinity either.
  faults.table = first_fault(args.queries * args.books * args.entries,
                             [&](std::int64_t i) { return args.table[i] < kInfinity; });
  if (!all) return faults;
  if (args.entries <= std::numeric_limits<Code>::max()) {
    const Code limit = static_cast<Code>(args.entries);
    faults.codes = first_fault(args.items * args.books, [&](std::int64_t i) { return args.codes[i] < limit; });
  }
  if (args.bias != nullptr) {
    faults.bias = first_fault(args.items, [&](std::int64_t i) { return args.bias[i] < kInfinity; });
  }
  return faults;
}

template <class Code>
void run(const Args<Code>& args) noexcept {
  const std::int64_t capacity = std::min(args.k, args.items);
  const Cut cut = cut_for(args.queries, args.items);
  if (cut.pieces == 1) {
    parallel_for_each(args.queries, [&](std::int64_t query, int thread) {
      TopK best(args.heaps.data() + thread * capacity, capacity);
      if (capacity > 0) scan(args, query, 0, args.items, best);
      write(args, query, capacity, best);
    });
    return;
  }
  Scored* const merged = args.heaps.data() + args.queries * cut.pieces * capacity;
  parallel_for_each(args.queries * cut.pieces, [&](std::int64_t task, int) {
    const std::int64_t piece = task % cut.pieces;
    Scored* const kept = args.heaps.data() + task * capacity;
    TopK best(kept, capacity);
    scan(args, task / cut.pieces, args.items * piece / cut.pieces, args.items * (piece + 1) / cut.pieces, best);
    // No kept entry scores -inf, so this marks the end of a heap that is not full.
    if (!best.full()) kept[best.size()].score = -kInfinity;
  });
  parallel_for_each(args.queries, [&](std::int64_t query, int) {
    TopK best(merged + query * capacity, capacity);
    for (std::int64_t piece = 0; piece < cut.pieces; ++piece) {
      const Scored* const kept = args.heaps.data() + (query * cut.pieces + piece) * capacity;
      for (std::int64_t i = 0; i < capacity && kept[i].score > -kInfinity; ++i) best.offer(kept[i].score, kept[i].id);
    }
    write(args, query, capacity, best);
  });
}

template Faults check(const Args<std::uint8_t>&, bool) noexcept;
template Faults check(const Args<std::uint16_t>&, bool) noexcept;
template void run(const Args<std::uint8_t>&) noexcept;
template void run(const Args<std::uint16_t>&) noexcept;

}  // namespace recfast::code_search
