#include "category_top_k/category_top_k.h"

#include <algorithm>
#include <bit>

#include "common/isa.h"
#include "common/parallel.h"

namespace recfast::category_top_k {
namespace {

template <class Category>
std::uint32_t equal_scalar(const Category* keys, Category category) noexcept {
  std::uint32_t bits = 0;
  for (unsigned i = 0; i < kGroup; ++i) bits |= static_cast<std::uint32_t>(keys[i] == category) << i;
  return bits;
}

template <class Category>
constexpr IsaTable<Equal<Category>> kEqual{
    .scalar = equal_scalar<Category>,
#if defined(__x86_64__)
    .avx2 = equal_avx2,
    .avx512 = equal_avx512,
#endif
};

// The latest of keys[0:length] that are `category`.
template <class Category>
void find(const Args<Category>& args, Equal<Category>* equal, const Category* keys, std::int64_t length,
          Category category, std::int64_t* out) noexcept {
  std::int64_t found = 0;
  std::int64_t last = length;
  if (args.keys_stride == 1) {
    for (; last >= kGroup && found < args.k; last -= kGroup) {
      std::uint32_t same = equal(keys + last - kGroup, category);
      while (same != 0 && found < args.k) {
        const int lane = 31 - std::countl_zero(same);
        same ^= std::uint32_t{1} << lane;
        out[found++] = last - kGroup + lane;
      }
    }
  }
  for (; last > 0 && found < args.k; --last) {
    if (keys[(last - 1) * args.keys_stride] == category) out[found++] = last - 1;
  }
  std::fill(out + found, out + args.k, std::int64_t{-1});
}

template <class Category>
void run_with(const Args<Category>& args) noexcept {
  if (args.k == 0) return;
  Equal<Category>* equal = kEqual<Category>.pick();
  // The answer does not depend on the cut.
  const std::int64_t piece = std::clamp<std::int64_t>(args.rows / (8 * max_threads()), 1, 64);
  parallel_for_each((args.rows + piece - 1) / piece, [&](std::int64_t unit, int) {
    const std::int64_t stop = std::min(args.rows, (unit + 1) * piece);
    std::int64_t user = -1;
    for (std::int64_t c = unit * piece; c < stop; ++c) {
      if (args.candidates == nullptr) {
        user = c;
      } else if (user < 0 || c >= args.candidates[user + 1]) {
        user = std::upper_bound(args.candidates, args.candidates + args.users + 1, c) - args.candidates - 1;
      }
      const Category* keys = args.keys + args.begin[user] * args.keys_stride;
      find(args, equal, keys, args.end[user] - args.begin[user], args.query[c * args.query_stride],
           args.out + c * args.k);
    }
  });
}

}  // namespace

void run(const Args<std::int32_t>& args) noexcept { run_with(args); }
void run(const Args<std::int64_t>& args) noexcept { run_with(args); }

}  // namespace recfast::category_top_k
