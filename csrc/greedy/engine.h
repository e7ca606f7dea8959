// The greedy loop of greedy.h over a rule. A rule gives
//   kFirstByRelevance          a pick that sees nothing goes to the greatest relevance
//   Rule(User&, const Options&, ByteArena&)   takes its share of the scratch memory
//   measure(rows, item)        the squared norm of a row (or what bounds it), or -1 where a value is not allowed
//   begin()                    for a user whose diversity is above 0, before anything is seen
//   amplitude(), magnitude()   the greatest size of its term; of all its terms together, for ties
//   common()                   what its term is beyond that of the scan, the same for all items
//   scaled()                   the unit is known
//   see(row)                   an item joins what is seen; user.start may have moved before
//   picked(item)               before that, of picks only; true: amplitude() has grown
//   scale(item)                what its row is multiplied by in panels
//   first(item)                an upper bound (in units) of the term of an item of which nothing is known, with roundings
//   fresh(panel)               whether its bounds are those of the items seen now
//   refresh(panel)             makes user.upper so, with the panel packed; returns the greatest
//   kFallsWithinWindow         old bounds hold (drift is 0) until something leaves the window, when first() holds
//   drift(panel)               by how much (in units) bounds of a panel may have become too low
//   term(item)                 of the score, float64
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/item_panels.h"
#include "common/parallel.h"
#include "common/status.h"
#include "greedy/greedy.h"

namespace recfast::greedy {

inline constexpr std::int64_t kPanel = item_panels::kPanel;
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr float kNever = -std::numeric_limits<float>::infinity();
inline constexpr double kSmallestUnit = 1e-300;
inline constexpr double kUlp = 0x1p-24;  // the relative rounding error of float32
// Scans add up a handful of numbers of size 1 at most: 16 roundings are more than there are.
inline constexpr double kRounding = 16 * kUlp;

// Deals out a thread's scratch memory in aligned pieces; with a null start it only counts.
class ByteArena {
 public:
  explicit ByteArena(std::byte* start) noexcept : start_(start) {}

  template <class V>
  [[nodiscard]] V* take(std::int64_t count) noexcept {
    auto* piece = start_ == nullptr ? nullptr : reinterpret_cast<V*>(start_ + used_);
    used_ += (count * static_cast<std::int64_t>(sizeof(V)) + 63) / 64 * 64;
    return piece;
  }

  [[nodiscard]] std::int64_t used() const noexcept { return used_; }

 private:
  std::byte* start_;
  std::int64_t used_ = 0;
};

// The error of a float32 dot product of `width` terms over the norms of its vectors, both rounded from float64.
[[nodiscard]] inline double dot_error(std::int64_t width) noexcept {
  return 1.01 * kUlp * (static_cast<double>(width) + 4.0);
}

// Bit l: upper[l] >= least.
[[nodiscard]] inline std::uint64_t reaching(const float* upper, float least) noexcept {
  std::uint64_t mask = 0;
#if defined(__SSE2__)
  const __m128 limit = _mm_set1_ps(least);
  for (int l = 0; l < static_cast<int>(kPanel); l += 4) {
    const int four = _mm_movemask_ps(_mm_cmpge_ps(_mm_load_ps(upper + l), limit));
    mask |= static_cast<std::uint64_t>(four) << l;
  }
#else
  for (int l = 0; l < static_cast<int>(kPanel); ++l) mask |= std::uint64_t{upper[l] >= least} << l;
#endif
  return mask;
}

[[nodiscard]] inline float greatest(const float* upper) noexcept {
  using Floats = float __attribute__((vector_size(16), may_alias));
  const auto* values = reinterpret_cast<const Floats*>(upper);
  Floats a = values[0];
  Floats b = values[1];
  for (int i = 2; i < static_cast<int>(kPanel) / 4; i += 2) {
    a = values[i] > a ? values[i] : a;
    b = values[i + 1] > b ? values[i + 1] : b;
  }
  a = b > a ? b : a;
  return std::max(std::max(a[0], a[1]), std::max(a[2], a[3]));
}

// The greatest float that is not above.
[[nodiscard]] inline float rounded_down(double value) noexcept {
  const auto nearest = static_cast<float>(value);
  return static_cast<double>(nearest) > value ? std::nextafter(nearest, kNever) : nearest;
}

// What the loop and the rule know of the user at hand.
struct User {
  const Args& args;
  const item_panels::Forms& forms;
  std::int64_t panels;
  std::int64_t stride;  // of float64 rows
  // By panel of 64 items.
  float* packed;        // [panels, D, 64]
  float* offset;        // [panels, 64] (w r - top) / unit; -inf: may not be picked
  float* upper;         // [panels, 64] an upper bound of the score in units, of some time
  float* bound;         // [panels] the greatest of them
  float* first;         // [panels] the same of an item of which nothing is known
  std::uint8_t* ready;  // [panels] packed
  // By item.
  double* norm;    // measured, by rows' squared norms
  double* score;   // of contenders
  bool* free;
  std::int32_t* order;
  double* row;  // [stride] a row at work
  std::int64_t* sequence;  // rows of shown items, then of picks
  std::int64_t most;       // its capacity
  // The user.
  item_panels::Rows rows;  // by item
  item_panels::Rows raw;   // by row
  std::int64_t index = 0;
  const double* relevance = nullptr;
  double diversity = 0.0;
  double weight = 1.0;
  double top = 0.0;         // the greatest w r
  double span = 0.0;        // from there to the least
  double largest = 0.0;     // |r|
  double norm_largest = 0.0;
  double unit = 1.0;
  std::int64_t length = 0;  // of the sequence
  std::int64_t start = 0;   // where in it begins what the next pick sees

  User(const Args& all, const item_panels::Forms& with, ByteArena& arena) noexcept
      : args(all),
        forms(with),
        panels((all.items + kPanel - 1) / kPanel),
        stride(item_panels::padded_width(all.width)),
        packed(arena.take<float>(panels * kPanel * all.width)),
        offset(arena.take<float>(panels * kPanel)),
        upper(arena.take<float>(panels * kPanel)),
        bound(arena.take<float>(panels)),
        first(arena.take<float>(panels)),
        ready(arena.take<std::uint8_t>(panels)),
        norm(arena.take<double>(panels * kPanel)),
        score(arena.take<double>(panels * kPanel)),
        free(arena.take<bool>(panels * kPanel)),
        order(arena.take<std::int32_t>(all.items)),
        row(arena.take<double>(stride)),
        most(std::min(all.picks, all.items) + all.shown_width) {
    sequence = arena.take<std::int64_t>(most);
  }

  [[nodiscard]] double reach() const noexcept { return weight * span; }
  [[nodiscard]] double offsets() const noexcept { return reach() / unit; }  // the greatest size of one
};

template <class Rule>
class Loop {
 public:
  using Options = typename Rule::Options;

  Loop(const Args& args, const Options& options, const item_panels::Forms& forms, ByteArena& arena) noexcept
      : u_(args, forms, arena), rule_(u_, options, arena) {}

  struct Errors {
    FirstError item;
    FirstError shown;
    FirstError relevance;
  };

  void solve(std::int64_t user, Errors& errors) noexcept {
    if (prepare(user, errors)) pick();
  }

 private:
  // Reads each candidate once: what there is, norms, and whether everything is allowed.
  [[nodiscard]] bool prepare(std::int64_t user, Errors& errors) noexcept {
    const Args& args = u_.args;
    u_.index = user;
    u_.raw = {.data = args.features + user * args.user_stride, .format = args.format, .width = args.width,
              .ids = nullptr};
    u_.rows = u_.raw;
    if (args.candidates != nullptr) u_.rows.ids = args.candidates + user * args.items;
    u_.relevance = args.relevance + user * args.items;
    u_.diversity = args.diversity[user];
    u_.weight = 1.0 - u_.diversity;
    u_.length = u_.start = 0;
    const std::int64_t length = args.lengths == nullptr ? args.items : args.lengths[user];
    const bool* mask = args.mask == nullptr ? nullptr : args.mask + user * args.items;
    bool good = true;
    double norm = 0.0;
    double low = kInfinity;
    double high = -kInfinity;
    std::fill(u_.free + args.items, u_.free + u_.panels * kPanel, false);
    for (std::int64_t i = 0; i < args.items; ++i) {
      const bool candidate =
          i < length && (mask == nullptr || mask[i]) && (u_.rows.ids == nullptr || u_.rows.ids[i] >= 0);
      u_.free[i] = candidate;
      if (!candidate) continue;
      const double measured = rule_.measure(u_.rows, i);
      if (!(measured >= 0.0 && measured <= kLargest)) {
        errors.item.report(user * args.items + i);
        good = false;
      }
      u_.norm[i] = measured;
      norm = std::max(norm, measured);
      const double r = u_.relevance[i];
      if (!(std::abs(r) <= kLargest)) {
        errors.relevance.report(user * args.items + i);
        good = false;
      }
      low = std::min(low, r);
      high = std::max(high, r);
    }
    const std::int64_t* shown = args.shown_width == 0 ? nullptr : args.shown + user * args.shown_width;
    for (std::int64_t s = 0; s < args.shown_width; ++s) {
      if (shown[s] < 0) continue;
      if (args.candidates == nullptr) {
        // An item that was shown twice, or is no candidate, is not free.
        if (!u_.free[shown[s]]) continue;
        u_.free[shown[s]] = false;
      } else {
        if (std::find(u_.sequence, u_.sequence + u_.length, shown[s]) != u_.sequence + u_.length) continue;
        const double measured = rule_.measure(u_.raw, shown[s]);
        if (!(measured >= 0.0 && measured <= kLargest)) {
          errors.shown.report(user * args.shown_width + s);
          good = false;
        }
        norm = std::max(norm, measured);
        for (std::int64_t i = 0; i < args.items; ++i) u_.free[i] = u_.free[i] && u_.rows.ids[i] != shown[s];
      }
      u_.sequence[u_.length++] = shown[s];
    }
    u_.top = u_.weight * high;
    u_.span = high - low;
    u_.largest = std::max(std::abs(high), std::abs(low));
    u_.norm_largest = std::sqrt(norm);
    return good;
  }

  void pick() noexcept {
    const Args& args = u_.args;
    std::int64_t* indices = args.indices + u_.index * args.picks;
    double* gains = args.gains + u_.index * args.picks;
    std::int64_t left = std::count(u_.free, u_.free + args.items, true);
    left = std::min(left, args.picks);
    const std::int64_t n = u_.diversity == 0.0 ? by_relevance(left, indices, gains) : by_score(left, indices, gains);
    args.count[u_.index] = n;
    std::fill(indices + n, indices + args.picks, -1);
    std::fill(gains + n, gains + args.picks, -kInfinity);
  }

  std::int64_t by_relevance(std::int64_t count, std::int64_t* indices, double* gains) noexcept {
    std::int64_t candidates = 0;
    for (std::int64_t i = 0; i < u_.args.items; ++i) {
      if (u_.free[i]) u_.order[candidates++] = static_cast<std::int32_t>(i);
    }
    std::partial_sort(u_.order, u_.order + count, u_.order + candidates, [&](std::int32_t a, std::int32_t b) {
      return u_.relevance[a] > u_.relevance[b] || (u_.relevance[a] == u_.relevance[b] && a < b);
    });
    for (std::int64_t n = 0; n < count; ++n) {
      indices[n] = u_.order[n];
      gains[n] = u_.relevance[u_.order[n]];
    }
    return count;
  }

  std::int64_t by_score(std::int64_t count, std::int64_t* indices, double* gains) noexcept {
    if (count == 0) return 0;
    std::fill(u_.ready, u_.ready + u_.panels, std::uint8_t{0});
    rule_.begin();
    rescale();
    const std::int64_t shown = u_.length;
    u_.length = 0;
    for (std::int64_t s = 0; s < shown; ++s) see(u_.sequence[s]);
    for (std::int64_t n = 0; n < count; ++n) {
      const bool blind = Rule::kFirstByRelevance && u_.start == u_.length;
      const std::int64_t item = blind ? most_relevant() : u_.args.exact ? select_exact() : select_fast();
      indices[n] = item;
      gains[n] = evaluate(item);
      if (n + 1 == count) break;
      remove(item);
      if (rule_.picked(item)) rescale();
      see(u_.rows.row(item));
    }
    return count;
  }

  [[nodiscard]] std::int64_t most_relevant() const noexcept {
    std::int64_t best = -1;
    for (std::int64_t i = 0; i < u_.args.items; ++i) {
      if (u_.free[i] && (best < 0 || u_.relevance[i] > u_.relevance[best])) best = i;
    }
    return best;
  }

  // Offsets and first bounds of all items.
  void rescale() noexcept {
    // Its inverse is finite; where all terms are smaller bounds tell nothing apart, and float64 does.
    u_.unit = std::max({u_.reach(), rule_.amplitude(), kSmallestUnit});
    rule_.scaled();
    tie_ = kTie * (u_.weight * u_.largest + rule_.magnitude());
    const double inverse = 1.0 / u_.unit;
    for (std::int64_t b = 0; b < u_.panels; ++b) {
      for (std::int64_t i = b * kPanel; i < (b + 1) * kPanel; ++i) {
        u_.offset[i] =
            u_.free[i] ? static_cast<float>((u_.weight * u_.relevance[i] - u_.top) * inverse) : kNever;
        u_.upper[i] = u_.free[i] ? u_.offset[i] + rule_.first(i) : kNever;
      }
      renew(b);
      u_.bound[b] = u_.first[b];
    }
  }

  void renew(std::int64_t b) noexcept {
    float most = kNever;
    for (std::int64_t i = b * kPanel; i < (b + 1) * kPanel; ++i) {
      if (u_.free[i]) most = std::max(most, u_.offset[i] + rule_.first(i));
    }
    u_.first[b] = most;
  }

  void remove(std::int64_t item) noexcept {
    u_.free[item] = false;
    u_.offset[item] = kNever;
    u_.upper[item] = kNever;
    const std::int64_t b = item / kPanel;
    // Other panels' bounds may be those of items of which nothing is known, above what their items last had.
    if (rule_.fresh(b)) u_.bound[b] = greatest(u_.upper + b * kPanel);
    if (u_.args.window > 0) renew(b);
  }

  void see(std::int64_t row) noexcept {
    u_.sequence[u_.length++] = row;
    const std::int64_t before = u_.start;
    if (u_.args.window > 0) u_.start = std::max(u_.start, u_.length - (u_.args.window - 1));
    rule_.see(row);
    // Bounds may rest on what has left the window.
    if (u_.start != before && Rule::kFallsWithinWindow) std::copy_n(u_.first, u_.panels, u_.bound);
    tie_ = kTie * (u_.weight * u_.largest + rule_.magnitude());
  }

  [[nodiscard]] double evaluate(std::int64_t item) noexcept {
    return u_.score[item] = u_.weight * u_.relevance[item] + rule_.term(item);
  }

  // The bound from which an item counts.
  [[nodiscard]] double needed(double best) const noexcept { return (best - tie_ - u_.top - rule_.common()) / u_.unit; }

  [[nodiscard]] double bound(std::int64_t b) noexcept {
    return u_.bound[b] == kNever ? -kInfinity : static_cast<double>(u_.bound[b]) + rule_.drift(b);
  }

  void refresh(std::int64_t b) noexcept {
    if (rule_.fresh(b)) return;
    if (u_.ready[b] == 0) {
      alignas(64) double scale[kPanel];
      for (std::int64_t l = 0; l < kPanel; ++l) scale[l] = u_.free[b * kPanel + l] ? rule_.scale(b * kPanel + l) : 0.0;
      u_.forms.pack(u_.rows, b * kPanel, scale, u_.packed + b * kPanel * u_.args.width);
      u_.ready[b] = 1;
    }
    u_.bound[b] = rule_.refresh(b);
  }

  // The best score so far, and the bound from which another item counts.
  struct Best {
    double score = -kInfinity;
    double enough = -kInfinity;
  };

  void contend(std::int64_t item, Best* best) noexcept {
    if (const double score = evaluate(item); score > best->score) *best = {score, needed(score)};
  }

  void contend_all(std::int64_t b, Best* best) noexcept {
    const float* upper = u_.upper + b * kPanel;
    for (std::uint64_t left = reaching(upper, rounded_down(best->enough)); left != 0; left &= left - 1) {
      const int l = std::countr_zero(left);
      if (upper[l] != kNever && static_cast<double>(upper[l]) >= best->enough) contend(b * kPanel + l, best);
    }
  }

  // There is a free item.
  [[nodiscard]] std::int64_t select_exact() noexcept {
    // The panel of the greatest bound comes first: its winner lets most others be skipped.
    std::int64_t first = 0;
    double most = -kInfinity;
    for (std::int64_t b = 0; b < u_.panels; ++b) {
      if (const double here = bound(b); here > most) {
        most = here;
        first = b;
      }
    }
    Best best;
    refresh(first);
    // In it the item of the greatest bound, without which half the panel would be evaluated on the way up.
    const std::uint64_t top = reaching(u_.upper + first * kPanel, u_.bound[first]);
    if (top != 0) contend(first * kPanel + std::countr_zero(top), &best);
    contend_all(first, &best);
    for (std::int64_t b = 0; b < u_.panels; ++b) {
      if (b == first || u_.bound[b] == kNever || bound(b) < best.enough) continue;
      refresh(b);
      if (static_cast<double>(u_.bound[b]) >= best.enough) contend_all(b, &best);
    }
    // Whatever may tie with the best has been evaluated, for its bound was above what was then needed.
    const double least = best.score - tie_;
    const double enough = best.enough;
    for (std::int64_t b = 0; b < u_.panels; ++b) {
      if (u_.bound[b] == kNever || bound(b) < enough) continue;
      for (std::uint64_t left = reaching(u_.upper + b * kPanel, rounded_down(enough)); left != 0; left &= left - 1) {
        const std::int64_t i = b * kPanel + std::countr_zero(left);
        if (static_cast<double>(u_.upper[i]) >= enough && u_.score[i] >= least) return i;
      }
    }
    return -1;  // cannot be
  }

  // Trusts the float32 bounds: at most float32's error away from the best.
  [[nodiscard]] std::int64_t select_fast() noexcept {
    float best = kNever;
    std::int64_t item = -1;
    const auto look = [&](std::int64_t b) {
      refresh(b);
      const float* upper = u_.upper + b * kPanel;
      if (u_.bound[b] < best) return;
      for (std::int64_t l = 0; l < kPanel; ++l) {
        const std::int64_t i = b * kPanel + l;
        if (upper[l] > best || (upper[l] == best && u_.free[i] && i < item)) {
          best = upper[l];
          item = i;
        }
      }
    };
    std::int64_t first = 0;
    for (std::int64_t b = 1; b < u_.panels; ++b) {
      if (bound(b) > bound(first)) first = b;
    }
    look(first);
    for (std::int64_t b = 0; b < u_.panels; ++b) {
      if (b != first && u_.bound[b] > kNever && bound(b) >= static_cast<double>(best)) look(b);
    }
    return item;
  }

  User u_;
  Rule rule_;
  double tie_ = 0.0;
};

template <class Rule>
[[nodiscard]] std::int64_t scratch_bytes(const Args& args, const typename Rule::Options& options) noexcept {
  ByteArena arena(nullptr);
  [[maybe_unused]] const Loop<Rule> loop(args, options, item_panels::forms(), arena);
  return arena.used();
}

// Threaded over users.
template <class Rule>
Outcome run(const Args& args, const typename Rule::Options& options) noexcept {
  const item_panels::Forms& forms = item_panels::forms();
  const std::int64_t bytes = scratch_bytes<Rule>(args, options);
  typename Loop<Rule>::Errors errors;
  parallel_for_each(args.users, [&](std::int64_t user, int thread) {
    ByteArena arena(args.scratch + thread * bytes);
    Loop<Rule> loop(args, options, forms, arena);
    loop.solve(user, errors);
  });
  return {.item = errors.item.position(), .shown = errors.shown.position(), .relevance = errors.relevance.position()};
}

}  // namespace recfast::greedy
