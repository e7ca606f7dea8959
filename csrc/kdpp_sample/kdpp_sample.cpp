#include "kdpp_sample/kdpp_sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "common/arena.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/random.h"

namespace recfast::kdpp_sample {

#define RECFAST_SOLVE solve_scalar
#include "kdpp_sample/solve.inl"
#undef RECFAST_SOLVE

namespace {

constexpr IsaTable<decltype(solve_scalar)> kForms{
    .scalar = solve_scalar,
#if defined(__x86_64__)
    .avx2 = solve_avx2,
    .avx512 = solve_avx512,
#endif
};

[[nodiscard]] constexpr std::int64_t whole(std::int64_t size) noexcept { return (size + kLanes - 1) / kLanes * kLanes; }

// A thread's memory for users of up to so many items; with a null start it only counts. Returns the bytes.
std::int64_t deal(double* start, std::int64_t items, std::int64_t width, std::int64_t picks, bool regularised,
                  Problem& p, std::int64_t** positions) noexcept {
  Arena<double> arena(start);
  const auto integers = [&](std::int64_t size) { return reinterpret_cast<std::int64_t*>(arena.take(size)); };
  const std::int64_t rank = regularised ? items : std::min(items, width);
  const std::int64_t most = std::min(picks, rank);
  const std::int64_t longest = std::max(whole(items), whole(width));
  p.rows = arena.take(whole(items) * whole(width));
  p.own = arena.take(regularised ? items : 0);
  p.dual = arena.take(!regularised && width < items ? width * whole(width) : 0);
  p.factor = arena.take(rank * longest);
  p.left = arena.take(longest);
  p.limit = arena.take(longest);
  p.squared = arena.take(rank);
  p.values = arena.take(rank);
  p.ratios = arena.take((rank + 1) * most);
  p.weights = arena.take(width * whole(rank));
  p.vectors = arena.take(whole(items) * whole(rank));
  p.cumulative = arena.take(items * whole(rank));
  p.directions = arena.take(most * whole(most));
  p.row = arena.take(whole(most));
  p.order = integers(rank);
  p.columns = integers(rank);
  p.chosen = integers(most);
  p.taken = reinterpret_cast<bool*>(arena.take(whole(items) / kLanes));
  *positions = integers(items);
  return arena.used() * static_cast<std::int64_t>(sizeof(double));
}

// Fills the rows of the user's candidates and returns the greatest quality.
template <class T>
double gather(const Args<T>& args, std::int64_t user, Problem& p, std::int64_t* positions, FirstError& wrong_feature,
              FirstError& wrong_quality, bool& good) noexcept {
  const std::int64_t length = args.lengths == nullptr ? args.items : args.lengths[user];
  const double* quality = args.quality == nullptr ? nullptr : args.quality + user * args.items;
  std::int64_t candidates = 0;
  double greatest = -std::numeric_limits<double>::infinity();
  for (std::int64_t i = 0; i < length; ++i) {
    if (args.mask != nullptr && !args.mask[user * args.items + i]) continue;
    positions[candidates++] = i;
    const double value = quality == nullptr ? 0.0 : quality[i];
    if (!std::isfinite(value)) {
      wrong_quality.report(user * args.items + i);
      good = false;
      return greatest;
    }
    greatest = std::max(greatest, value);
  }
  const double shared = std::sqrt(1.0 - args.gamma);
  std::int64_t kept = 0;
  for (std::int64_t c = 0; c < candidates; ++c) {
    const std::int64_t i = positions[c];
    const T* feature = args.features + user * args.user_stride + i * args.width;
    const double below = quality == nullptr ? 0.0 : quality[i] - greatest;
    const double weight = std::exp(below);
    double* row = p.rows + kept * p.width_stride;
    double squared = 0.0;
    for (std::int64_t d = 0; d < args.width; ++d) {
      const auto value = static_cast<double>(feature[d]);
      squared += value * value;
      row[d] = shared * weight * value;
    }
    if (!std::isfinite(squared)) {
      std::int64_t d = 0;
      while (d + 1 < args.width && std::isfinite(static_cast<double>(feature[d]))) ++d;
      wrong_feature.report(user * args.user_stride + i * args.width + d);
      good = false;
      return greatest;
    }
    if (below < -kRange) continue;
    std::fill(row + args.width, row + p.width_stride, 0.0);
    if (p.regularised) p.own[kept] = args.gamma * weight * weight;
    positions[kept++] = i;
  }
  std::fill(p.rows + kept * p.width_stride, p.rows + whole(kept) * p.width_stride, 0.0);
  p.items = kept;
  return greatest;
}

}  // namespace

std::int64_t scratch_bytes(std::int64_t items, std::int64_t width, std::int64_t picks, bool regularised) noexcept {
  Problem problem;
  std::int64_t* positions = nullptr;
  return deal(nullptr, items, width, picks, regularised, problem, &positions);
}

template <class T>
Outcome run(const Args<T>& args) noexcept {
  const auto form = kForms.pick();
  const bool regularised = args.gamma > 0.0;
  const std::int64_t bytes = scratch_bytes(args.items, args.width, args.picks, regularised);
  FirstError wrong_feature;
  FirstError wrong_quality;
  parallel_for_each(args.users, [&](std::int64_t user, int thread) {
    Problem p;
    std::int64_t* positions = nullptr;
    deal(reinterpret_cast<double*>(args.scratch + thread * bytes), args.items, args.width, args.picks, regularised, p,
         &positions);
    p.width = args.width;
    p.width_stride = whole(args.width);
    p.samples = args.samples;
    p.sample_stride = args.picks;
    p.regularised = regularised;
    p.seed = args.seed;
    p.key = static_cast<std::uint64_t>(args.keys == nullptr ? user : args.keys[user]);
    p.indices = args.indices + user * args.samples * args.picks;
    bool good = true;
    const double greatest = gather(args, user, p, positions, wrong_feature, wrong_quality, good);
    if (!good) return;
    p.item_stride = whole(p.items);
    p.picks = std::min({args.picks, p.items, regularised ? p.items : p.width});
    form(p);
    for (std::int64_t sample = 0; sample < args.samples; ++sample) {
      std::int64_t* out = p.indices + sample * args.picks;
      for (std::int64_t n = 0; n < args.picks; ++n) out[n] = n < p.count ? positions[out[n]] : -1;
    }
    args.count[user] = p.count;
    args.log_normaliser[user] = p.count == 0 ? 0.0 : p.log_normaliser + 2.0 * greatest * static_cast<double>(p.count);
  });
  return {.wrong_feature = wrong_feature.position(), .wrong_quality = wrong_quality.position()};
}

template Outcome run(const Args<float>&) noexcept;
template Outcome run(const Args<double>&) noexcept;

}  // namespace recfast::kdpp_sample
