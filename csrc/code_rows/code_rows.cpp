#include "code_rows/code_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/status.h"

namespace recfast::code_rows {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What one thread works with.
struct Scratch {
  float* sums;
  std::uint64_t* touched;
  std::int64_t* cursors;
};

template <class Id>
void search(const Args<Id>& args, std::int64_t query, const Scratch& scratch, TopK& best) noexcept {
  const std::int64_t* rows = args.rows + query * args.width;
  const float* weights = args.weights == nullptr ? nullptr : args.weights + query * args.width;
  const ItemMask mask = args.masks.of(query, args.n_items);
  for (std::int64_t j = 0; j < args.width; ++j) scratch.cursors[j] = rows[j] < 0 ? 0 : args.indptr[rows[j]];

  for (;;) {
    std::int64_t next = args.n_items;
    for (std::int64_t j = 0; j < args.width; ++j) {
      if (rows[j] >= 0 && scratch.cursors[j] < args.indptr[rows[j] + 1]) {
        next = std::min<std::int64_t>(next, args.item_ids[scratch.cursors[j]]);
      }
    }
    if (next == args.n_items) return;
    const std::int64_t base = next - next % kTile;
    const std::int64_t limit = base + kTile;

    std::int64_t highest = next;
    for (std::int64_t j = 0; j < args.width; ++j) {
      if (rows[j] < 0) continue;
      const float weight = weights == nullptr ? 1.0f : weights[j];
      const float bias = args.row_bias == nullptr ? 0.0f : args.row_bias[rows[j]];
      const std::int64_t end = args.indptr[rows[j] + 1];
      std::int64_t at = scratch.cursors[j];
      const std::int64_t begin = at;
      for (; at < end && args.item_ids[at] < limit; ++at) {
        const std::int64_t slot = args.item_ids[at] - base;
        scratch.sums[slot] += weight * args.scores[at] + bias;
        scratch.touched[slot / 64] |= std::uint64_t{1} << (slot % 64);
      }
      if (at > begin) highest = std::max<std::int64_t>(highest, args.item_ids[at - 1]);
      scratch.cursors[j] = at;
    }

    // Each touched item once, in the order of ids, leaving the scratch as it was found.
    for (std::int64_t word = (next - base) / 64; word <= (highest - base) / 64; ++word) {
      for (std::uint64_t bits = scratch.touched[word]; bits != 0; bits &= bits - 1) {
        const std::int64_t slot = word * 64 + std::countr_zero(bits);
        const float total = scratch.sums[slot];
        scratch.sums[slot] = 0.0f;
        if (total >= best.threshold() && total > -kInfinity && mask.allows(base + slot)) {
          best.offer(total, base + slot);
        }
      }
      scratch.touched[word] = 0;
    }
  }
}

template <class Good>
[[nodiscard]] std::int64_t first_fault(std::int64_t size, const Good& good) noexcept {
  FirstError fault;
  parallel_for(size, 65536, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      if (!good(i)) {
        fault.report(i);
        return;
      }
    }
  });
  return fault.position();
}

}  // namespace

template <class Id>
Faults check(const Args<Id>& args, bool all) noexcept {
  Faults faults{.rows = -1, .weights = -1, .outside = -1, .unsorted = -1, .scores = -1};
  const std::int64_t named = args.queries * args.width;
  faults.rows = first_fault(named, [&](std::int64_t i) { return args.rows[i] >= -1 && args.rows[i] < args.n_rows; });
  if (args.weights != nullptr) {
    faults.weights = first_fault(named, [&](std::int64_t i) { return std::isfinite(args.weights[i]); });
  }
  if (!all) return faults;
  const std::int64_t total = args.indptr[args.n_rows];
  faults.outside = first_fault(
      total, [&](std::int64_t i) { return args.item_ids[i] >= 0 && args.item_ids[i] < args.n_items; });
  faults.scores = first_fault(total, [&](std::int64_t i) { return std::isfinite(args.scores[i]); });
  FirstError unsorted;
  parallel_for(args.n_rows, 1024, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t i = args.indptr[row] + 1; i < args.indptr[row + 1]; ++i) {
        if (args.item_ids[i] <= args.item_ids[i - 1]) {
          unsorted.report(i);
          return;
        }
      }
    }
  });
  faults.unsorted = unsorted.position();
  return faults;
}

template <class Id>
void run(const Args<Id>& args) noexcept {
  const std::int64_t capacity = std::min(args.k, args.n_items);
  parallel_for_each(args.queries, [&](std::int64_t query, int thread) {
    TopK best(args.heaps.data() + thread * capacity, capacity);
    const Scratch scratch{.sums = args.sums.data() + thread * kTile,
                          .touched = args.touched.data() + thread * (kTile / 64),
                          .cursors = args.cursors.data() + thread * args.width};
    if (capacity > 0) search(args, query, scratch, best);
    float* scores = args.out_scores + query * args.k;
    std::int64_t* ids = args.out_ids + query * args.k;
    best.write(scores, ids);
    std::fill(scores + capacity, scores + args.k, -kInfinity);
    std::fill(ids + capacity, ids + args.k, std::int64_t{-1});
  });
}

template Faults check(const Args<std::int32_t>&, bool) noexcept;
template Faults check(const Args<std::int64_t>&, bool) noexcept;
template void run(const Args<std::int32_t>&) noexcept;
template void run(const Args<std::int64_t>&) noexcept;

}  // namespace recfast::code_rows
