#include "code_postings/code_postings.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "common/parallel.h"

namespace recfast::code_postings {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Positions a block of planes.
constexpr std::int64_t kBlock = 64;

[[nodiscard]] inline bool bit(const std::uint64_t* words, std::int64_t place) noexcept {
  return (words[place / 64] >> (place % 64) & 1) != 0;
}

struct Scratch {
  float* sums;
  std::uint64_t* touched;
  std::uint64_t* named;
  std::int64_t* cursors;
};

template <class Code>
class Search {
 public:
  Search(const Args<Code>& args, std::int64_t query, const Scratch& scratch, Span<Scored> kept) noexcept
      : args_(args),
        scratch_(scratch),
        mask_(args.mask == nullptr ? nullptr : args.mask + query * args.mask_stride),
        codes_(args.codes + args.offsets[query]),
        values_(args.values + args.offsets[query]),
        count_(args.offsets[query + 1] - args.offsets[query]),
        kept_(kept.data()),
        best_(kept.data(), static_cast<std::int64_t>(kept.size())) {}

  TopK& run() noexcept {
    lists();
    rest();
    return best_;
  }

 private:
  // Items that a list holds, tile by tile: within a tile the lists are added in the order of the codebooks.
  void lists() noexcept {
    for (std::int64_t j = 0; j < count_; ++j) scratch_.cursors[j] = args_.indptr[codes_[j]];
    for (;;) {
      std::int64_t next = args_.items;
      for (std::int64_t j = 0; j < count_; ++j) {
        const std::int64_t at = scratch_.cursors[j];
        if (at < args_.indptr[codes_[j] + 1]) next = std::min<std::int64_t>(next, args_.positions[at]);
      }
      if (next == args_.items) return;
      const std::int64_t base = next / kTile * kTile;
      const std::int64_t end = std::min(base + kTile, args_.items);
      // Where a sum of 0 is too low to be kept, it can mark the items that have been looked at.
      if (args_.bias == nullptr && best_.threshold() > 0.0f) {
        positive_tile(base, end);
      } else {
        any_tile(base, end, next);
      }
    }
  }

  // body(place) for each place of list j within the tile, from its cursor on; the cursor's end.
  template <class Body>
  std::int64_t for_places(std::int64_t j, std::int64_t base, std::int64_t end, const Body& body) const noexcept {
    const std::int64_t stop = args_.indptr[codes_[j] + 1];
    std::int64_t at = scratch_.cursors[j];
    for (; at < stop && args_.positions[at] < end; ++at) body(args_.positions[at] - base);
    return at;
  }

  // Adds the lists, then walks them again: most sums are below the threshold, and one comparison each is all they cost.
  void positive_tile(std::int64_t base, std::int64_t end) noexcept {
    for (std::int64_t j = 0; j < count_; ++j) {
      const float value = values_[j];
      for_places(j, base, end, [&](std::int64_t place) { scratch_.sums[place] += value; });
    }
    float threshold = best_.threshold();
    for (std::int64_t j = 0; j < count_; ++j) {
      scratch_.cursors[j] = for_places(j, base, end, [&](std::int64_t place) {
        const float total = scratch_.sums[place];
        scratch_.sums[place] = 0.0f;
        if (!(total >= threshold)) return;
        const std::int64_t slot = allowed_slot(base + place);
        if (slot < 0) return;
        best_.offer(total, name(slot));
        threshold = best_.threshold();
      });
    }
  }

  void any_tile(std::int64_t base, std::int64_t end, std::int64_t next) noexcept {
    std::int64_t highest = next;
    for (std::int64_t j = 0; j < count_; ++j) {
      const float value = values_[j];
      const std::int64_t begin = scratch_.cursors[j];
      const std::int64_t at = for_places(j, base, end, [&](std::int64_t place) {
        scratch_.sums[place] += value;
        scratch_.touched[place / 64] |= std::uint64_t{1} << (place % 64);
      });
      if (at > begin) highest = std::max<std::int64_t>(highest, args_.positions[at - 1]);
      scratch_.cursors[j] = at;
    }
    offer_touched(base, (next - base) / 64, (highest - base) / 64);
  }

  // Offers the touched items of a tile, leaving the scratch as it was found.
  void offer_touched(std::int64_t base, std::int64_t first, std::int64_t last) noexcept {
    float threshold = best_.threshold();
    for (std::int64_t word = first; word <= last; ++word) {
      for (std::uint64_t bits = scratch_.touched[word]; bits != 0; bits &= bits - 1) {
        const std::int64_t place = word * 64 + std::countr_zero(bits);
        const std::int64_t position = base + place;
        float total = scratch_.sums[place];
        scratch_.sums[place] = 0.0f;
        if (args_.bias != nullptr) total += args_.bias[position];
        // Both comparisons are false for the NaN that -inf makes of an overflowed sum.
        if (total >= threshold && total > -kInfinity) {
          const std::int64_t slot = allowed_slot(position);
          if (slot < 0) continue;
          best_.offer(total, name(slot));
          threshold = best_.threshold();
        }
      }
      scratch_.touched[word] = 0;
    }
  }

  // Items that no list holds, best first, until the next cannot enter the answer.
  void rest() noexcept {
    if (best_.full() && best_.threshold() > 0.0f && args_.bias == nullptr) return;
    for (std::int64_t j = 0; j < count_; ++j) scratch_.named[codes_[j] / 64] |= std::uint64_t{1} << (codes_[j] % 64);
    for (std::int64_t i = 0; i < args_.items; ++i) {
      const std::int64_t position = args_.order == nullptr ? i : args_.order[i];
      const float score = args_.bias == nullptr ? 0.0f : 0.0f + args_.bias[position];
      if (score == -kInfinity) break;
      if (best_.full()) {
        // Every later item goes after this one, so it need not even be allowed for the search to be over.
        const std::int64_t slot = args_.slots == nullptr ? position : args_.slots[position];
        if (!goes_before({score, name(slot)}, kept_[0])) break;
      }
      const std::int64_t slot = allowed_slot(position);
      if (slot >= 0 && !held(position)) best_.offer(score, name(slot));
    }
    for (std::int64_t j = 0; j < count_; ++j) scratch_.named[codes_[j] / 64] = 0;
  }

  [[nodiscard]] std::int64_t name(std::int64_t slot) const noexcept {
    return args_.ids == nullptr ? slot : args_.ids[slot];
  }

  // The slot, or -1 where the item is not live or not allowed.
  [[nodiscard]] std::int64_t allowed_slot(std::int64_t position) const noexcept {
    if (args_.live != nullptr && !bit(args_.live, position)) return -1;
    const std::int64_t slot = args_.slots == nullptr ? position : args_.slots[position];
    return mask_ == nullptr || bit(mask_, slot) ? slot : -1;
  }

  // Whether a list of the query holds the item.
  [[nodiscard]] bool held(std::int64_t position) const noexcept {
    const Code* const codes = args_.planes + position / kBlock * kBlock * args_.books + position % kBlock;
    for (std::int64_t m = 0; m < args_.books; ++m) {
      if (bit(scratch_.named, m * args_.entries + codes[m * kBlock])) return true;
    }
    return false;
  }

  const Args<Code>& args_;
  const Scratch& scratch_;
  const std::uint64_t* mask_;
  const std::int64_t* codes_;
  const float* values_;
  std::int64_t count_;
  const Scored* kept_;
  TopK best_;
};

// body(position, code) for the items of one codebook, in the order of positions.
template <class Code, class Body>
inline void for_codes(const Code* planes, std::int64_t items, std::int64_t books, std::int64_t book,
                      const Body& body) noexcept {
  for (std::int64_t start = 0; start < items; start += kBlock) {
    const Code* const codes = planes + start * books + book * kBlock;
    const std::int64_t size = std::min(kBlock, items - start);
    for (std::int64_t j = 0; j < size; ++j) body(start + j, static_cast<std::int64_t>(codes[j]));
  }
}

}  // namespace

template <class Code>
void count(const Code* planes, std::int64_t items, std::int64_t books, std::int64_t entries,
           std::int64_t* counts) noexcept {
  parallel_for_each(books, [&](std::int64_t book, int) {
    std::int64_t* const own = counts + book * entries;
    std::fill(own, own + entries, std::int64_t{0});
    for_codes(planes, items, books, book, [&](std::int64_t, std::int64_t code) { ++own[code]; });
  });
}

template <class Code>
void build(const Code* planes, std::int64_t items, std::int64_t books, std::int64_t entries, std::int64_t* indptr,
           std::int32_t* positions, std::int64_t* starts) noexcept {
  count(planes, items, books, entries, starts);
  indptr[0] = 0;
  for (std::int64_t code = 0; code < books * entries; ++code) {
    indptr[code + 1] = indptr[code] + starts[code];
    starts[code] = indptr[code];
  }
  // Every codebook names every item once, so the lists of a codebook are a piece of their own.
  parallel_for_each(books, [&](std::int64_t book, int) {
    std::int64_t* const own = starts + book * entries;
    for_codes(planes, items, books, book, [&](std::int64_t position, std::int64_t code) {
      positions[own[code]++] = static_cast<std::int32_t>(position);
    });
  });
}

Faults check(Span<const std::int64_t> codes, Span<const float> values, Span<const std::int64_t> offsets,
             std::int64_t limit) noexcept {
  Faults faults{.outside = -1, .unsorted = -1, .values = -1};
  const auto first = [](std::int64_t& fault, std::int64_t at) {
    if (fault < 0) fault = at;
  };
  for (std::size_t query = 0; query + 1 < offsets.size(); ++query) {
    for (std::int64_t i = offsets[query]; i < offsets[query + 1]; ++i) {
      const auto at = static_cast<std::size_t>(i);
      if (codes[at] < 0 || codes[at] >= limit) first(faults.outside, i);
      if (i > offsets[query] && codes[at] <= codes[at - 1]) first(faults.unsorted, i);
      if (!(values[at] < kInfinity)) first(faults.values, i);  // nor is NaN
    }
  }
  return faults;
}

template <class Code>
void run(const Args<Code>& args) noexcept {
  const std::int64_t capacity = std::min(args.k, args.items);
  const std::int64_t tile = std::min(kTile, (args.items + kBlock - 1) / kBlock * kBlock);
  const std::int64_t words = (args.books * args.entries + 63) / 64;
  parallel_for_each(args.queries, [&](std::int64_t query, int thread) {
    const Scratch scratch{.sums = args.sums.data() + thread * tile,
                          .touched = args.touched.data() + thread * (tile / 64),
                          .named = args.named.data() + thread * words,
                          .cursors = args.cursors.data() + thread * args.longest};
    float* const scores = args.scores + query * args.k;
    std::int64_t* const found = args.found + query * args.k;
    if (capacity > 0) {
      Search<Code> search(args, query, scratch,
                          {args.heaps.data() + thread * capacity, static_cast<std::size_t>(capacity)});
      search.run().write(scores, found);
    }
    std::fill(scores + capacity, scores + args.k, -kInfinity);
    std::fill(found + capacity, found + args.k, std::int64_t{-1});
  });
}

template void count(const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t, std::int64_t*) noexcept;
template void count(const std::uint16_t*, std::int64_t, std::int64_t, std::int64_t, std::int64_t*) noexcept;
template void build(const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t, std::int64_t*, std::int32_t*,
                    std::int64_t*) noexcept;
template void build(const std::uint16_t*, std::int64_t, std::int64_t, std::int64_t, std::int64_t*, std::int32_t*,
                    std::int64_t*) noexcept;
template void run(const Args<std::uint8_t>&) noexcept;
template void run(const Args<std::uint16_t>&) noexcept;

}  // namespace recfast::code_postings
