#include "dpp_greedy/dpp_greedy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/isa.h"
#include "common/parallel.h"

namespace recfast::dpp_greedy {

#define RECFAST_LANES 4
#define RECFAST_REFRESH refresh_scalar
#include "dpp_greedy/refresh.inl"
#undef RECFAST_REFRESH
#undef RECFAST_LANES

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNever = -std::numeric_limits<float>::infinity();
// Below this share the difference 1 - sum <b, q>^2 has lost digits, and the residual vector itself is measured.
constexpr double kCancelled = 1e-2;

constexpr IsaTable<decltype(refresh_scalar)> kForms{
    .scalar = refresh_scalar,
#if defined(__x86_64__)
    .avx2 = refresh_avx2,
    .avx512 = refresh_avx512,
#endif
};

enum class State : std::int8_t { kFree, kSpent, kTaken };

// Eight sums in a fixed order: the compiler may use vectors, and the bits are the same with or without.
template <class A, class B>
[[nodiscard]] double dot(const A* a, const B* b, std::int64_t width) noexcept {
  double sums[8] = {};
  std::int64_t c = 0;
  for (; c + 8 <= width; c += 8) {
    for (int l = 0; l < 8; ++l) sums[l] += static_cast<double>(a[c + l]) * static_cast<double>(b[c + l]);
  }
  double tail = 0.0;
  for (; c < width; ++c) tail += static_cast<double>(a[c]) * static_cast<double>(b[c]);
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])) + tail;
}

// Deals out a thread's scratch memory in aligned pieces; with a null start it only counts.
class Arena {
 public:
  explicit Arena(std::byte* start) noexcept : start_(start) {}

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

struct Scratch {
  // By panel of 64 items.
  float* packed;          // [panels, D, 64] the rows b_i
  float* rel;             // [panels, 64] the share of S_ii that is left, as of `age`
  float* offset;          // [panels, 64] score less log(share), less the greatest such; -inf: may not be picked
  float* upper;           // [panels, 64] upper bound of the score (less the same), as of `age`
  float* bound;           // [panels] the greatest of them
  std::int32_t* age;      // [panels] picks accounted for; -1: not packed yet
  // By item, float64, brought up to date only for contenders.
  double* base;           // 2 alpha r + log S_ii
  double* scale;          // b_i = scale_i * features[i]
  double* own;            // the coordinate of b_i that it shares with no other item, from gamma I
  double* share;          // 1 - sum <b_i, q_t>^2 over the first `seen` picks
  double* score;
  std::int32_t* seen;
  State* state;
  // The picks.
  double* directions;     // [picks, stride] q_t: D features, then (gamma > 0) the picks' own coordinates
  float* directions32;    // [picks, D]
  double* residual;       // [stride]
  std::int64_t* sequence; // shown items, then picks
  std::int64_t stride;
  std::int64_t capacity;  // of directions

  Scratch(Arena& arena, std::int64_t items, std::int64_t width, std::int64_t picks, std::int64_t shown,
          bool regularised) noexcept {
    const std::int64_t panels = (items + kPanel - 1) / kPanel;
    packed = arena.take<float>(panels * kPanel * width);
    rel = arena.take<float>(panels * kPanel);
    offset = arena.take<float>(panels * kPanel);
    upper = arena.take<float>(panels * kPanel);
    bound = arena.take<float>(panels);
    age = arena.take<std::int32_t>(panels);
    base = arena.take<double>(items);
    scale = arena.take<double>(items);
    own = arena.take<double>(items);
    share = arena.take<double>(items);
    score = arena.take<double>(items);
    seen = arena.take<std::int32_t>(items);
    state = arena.take<State>(items);
    // No list is longer than the items, and without gamma the features span no more than D directions.
    const std::int64_t most = std::min(picks + shown, items);
    capacity = regularised ? most : std::min(most, width);
    stride = regularised ? width + most : width;
    directions = arena.take<double>(capacity * stride);
    directions32 = arena.take<float>(capacity * width);
    residual = arena.take<double>(stride);
    sequence = arena.take<std::int64_t>(most);
  }
};

template <class T>
class User {
 public:
  User(const Args<T>& args, std::int64_t user, Scratch& scratch, decltype(refresh_scalar)* form) noexcept
      : args_(args),
        s_(scratch),
        form_(form),
        user_(user),
        panels_((args.items + kPanel - 1) / kPanel),
        features_(args.features + user * args.user_stride),
        relevance_(args.relevance + user * args.items),
        weight_(args.weight[user]) {}

  // Reads each candidate once: norms, first scores, and whether everything is finite.
  [[nodiscard]] bool prepare(FirstError& wrong_feature, FirstError& wrong_relevance) noexcept {
    const bool only_relevance = std::isinf(weight_);
    const std::int64_t length = args_.lengths == nullptr ? args_.items : args_.lengths[user_];
    greatest_ = -kInfinity;
    bool good = true;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      const bool candidate = i < length && (args_.mask == nullptr || args_.mask[user_ * args_.items + i]);
      s_.state[i] = candidate ? State::kFree : State::kTaken;
      if (!candidate) continue;
      const T* row = features_ + i * args_.width;
      const double squared = dot(row, row, args_.width);
      if (!std::isfinite(squared)) {
        std::int64_t c = 0;
        while (c + 1 < args_.width && std::isfinite(row[c])) ++c;
        wrong_feature.report(user_ * args_.user_stride + i * args_.width + c);
        good = false;
      }
      const double wanted = only_relevance ? relevance_[i] : weight_ * relevance_[i];
      if (!std::isfinite(wanted)) {
        wrong_relevance.report(user_ * args_.items + i);
        good = false;
      }
      if (!good || only_relevance) continue;
      const double diagonal = (1.0 - args_.gamma) * squared + args_.gamma;
      // A zero row under gamma = 0 spans nothing: it is spent before the first pick and stays so.
      s_.scale[i] = diagonal > 0.0 ? std::sqrt((1.0 - args_.gamma) / diagonal) : 0.0;
      s_.own[i] = diagonal > 0.0 ? std::sqrt(args_.gamma / diagonal) : 0.0;
      s_.base[i] = diagonal > 0.0 ? wanted + std::log(diagonal) : -kInfinity;
      greatest_ = std::max(greatest_, s_.base[i]);
    }
    return good;
  }

  void solve() noexcept {
    const std::int64_t* shown = args_.shown_width == 0 ? nullptr : args_.shown + user_ * args_.shown_width;
    const bool only_relevance = std::isinf(weight_);
    if (!only_relevance) {
      std::fill(s_.age, s_.age + panels_, -1);
      forget();
    }
    for (std::int64_t i = 0; i < args_.shown_width; ++i) {
      // An item that was shown twice, or is no candidate, was taken before.
      if (shown[i] >= 0 && s_.state[shown[i]] != State::kTaken) take(shown[i], only_relevance);
    }
    std::int64_t* indices = args_.indices + user_ * args_.picks;
    double* gains = args_.gains + user_ * args_.picks;
    double log_det = 0.0;
    std::int64_t n = 0;
    for (; n < args_.picks; ++n) {
      double gain = -kInfinity;
      std::int64_t item = -1;
      if (only_relevance) {
        item = most_relevant();
        if (item >= 0) gain = relevance_[item];
      } else {
        item = select();
        if (item < 0 && args_.exhausted == Exhausted::kRestart && length_ > start_) {
          start_ = length_;
          forget();
          item = select();
        }
        if (item >= 0) {
          gain = s_.score[item];
        } else if (args_.exhausted != Exhausted::kStop) {
          item = most_relevant();
        }
      }
      if (item < 0) break;
      indices[n] = item;
      gains[n] = gain;
      if (gain > -kInfinity) log_det += gain;
      take(item, only_relevance);
    }
    args_.count[user_] = n;
    args_.log_det[user_] = log_det;
    std::fill(indices + n, indices + args_.picks, -1);
    std::fill(gains + n, gains + args_.picks, -kInfinity);
  }

 private:
  [[nodiscard]] std::int64_t most_relevant() const noexcept {
    std::int64_t best = -1;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      if (s_.state[i] != State::kTaken && (best < 0 || relevance_[i] > relevance_[best])) best = i;
    }
    return best;
  }

  // Back to no picks; the items that were taken stay so.
  void forget() noexcept {
    directions_ = 0;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      s_.share[i] = 1.0;
      s_.seen[i] = 0;
      if (s_.state[i] == State::kSpent) s_.state[i] = State::kFree;
      if (s_.state[i] == State::kFree && s_.base[i] == -kInfinity) s_.state[i] = State::kSpent;
    }
    for (std::int64_t b = 0; b < panels_; ++b) {
      if (s_.age[b] > 0) s_.age[b] = 0;
      float bound = kNever;
      for (std::int64_t l = 0; l < kPanel; ++l) {
        const std::int64_t i = b * kPanel + l;
        // The clamp can only raise a bound. It also keeps -inf for what may not be picked.
        const bool free = i < args_.items && s_.state[i] == State::kFree;
        const float offset = free ? static_cast<float>(std::max(s_.base[i] - greatest_, -1e30)) : kNever;
        s_.rel[i] = 1.0f;
        s_.offset[i] = offset;
        // The share is 1 and its logarithm 0; only the offset has been rounded.
        s_.upper[i] = free ? offset + (1.0f - offset) * 5e-7f : kNever;
        bound = std::max(bound, s_.upper[i]);
      }
      s_.bound[b] = bound;
    }
  }

  void remove(std::int64_t item, State why) noexcept {
    s_.state[item] = why;
    s_.offset[item] = kNever;
    s_.upper[item] = kNever;
  }

  // Puts an item at the end of the sequence and its direction into what later picks see.
  void take(std::int64_t item, bool only_relevance) noexcept {
    if (only_relevance) {
      s_.state[item] = State::kTaken;
      return;
    }
    remove(item, State::kTaken);
    s_.sequence[length_++] = item;
    if (args_.window > 0 && length_ - start_ > args_.window - 1) {
      start_ = length_ - (args_.window - 1);
      forget();
      for (std::int64_t at = start_; at < length_; ++at) append(s_.sequence[at]);
    } else {
      append(item);
    }
  }

  // share_i after all picks so far, in float64.
  [[nodiscard]] double share(std::int64_t item) noexcept {
    const T* row = features_ + item * args_.width;
    for (std::int64_t v = s_.seen[item]; v < directions_; ++v) {
      const double part = dot(row, s_.directions + v * s_.stride, args_.width) * s_.scale[item];
      s_.share[item] -= part * part;
    }
    s_.seen[item] = static_cast<std::int32_t>(directions_);
    if (s_.share[item] > kCancelled) return s_.share[item];
    project(item);
    return dot(s_.residual, s_.residual, coordinates()) + s_.own[item] * s_.own[item];
  }

  // How many coordinates the directions so far have: the features, and under gamma one for each of them.
  [[nodiscard]] std::int64_t coordinates() const noexcept {
    return args_.width + (args_.gamma > 0.0 ? directions_ : 0);
  }

  // residual = b_item, its own coordinate left out, less its projection on the directions.
  void project(std::int64_t item) noexcept {
    const T* row = features_ + item * args_.width;
    for (std::int64_t c = 0; c < args_.width; ++c) s_.residual[c] = static_cast<double>(row[c]) * s_.scale[item];
    std::fill(s_.residual + args_.width, s_.residual + coordinates(), 0.0);
    remove_directions();
  }

  // Modified Gram-Schmidt.
  void remove_directions() noexcept {
    const std::int64_t size = coordinates();
    for (std::int64_t v = 0; v < directions_; ++v) {
      const double* q = s_.directions + v * s_.stride;
      const double part = dot(s_.residual, q, size);
      for (std::int64_t c = 0; c < size; ++c) s_.residual[c] -= part * q[c];
    }
  }

  void append(std::int64_t item) noexcept {
    if (s_.base[item] == -kInfinity || directions_ == s_.capacity) return;
    if (share(item) < kSpent) return;  // it adds nothing to the span
    project(item);
    remove_directions();  // a second time, against what rounding left
    const std::int64_t size = coordinates();
    double* q = s_.directions + directions_ * s_.stride;
    float* rounded = s_.directions32 + directions_ * args_.width;
    const double inverse = 1.0 / std::sqrt(dot(s_.residual, s_.residual, size) + s_.own[item] * s_.own[item]);
    for (std::int64_t c = 0; c < size; ++c) q[c] = s_.residual[c] * inverse;
    if (args_.gamma > 0.0) {
      // Earlier directions are zero in this coordinate, and later ones read it.
      std::fill(q + size, q + s_.stride, 0.0);
      q[size] = s_.own[item] * inverse;
    }
    for (std::int64_t c = 0; c < args_.width; ++c) rounded[c] = static_cast<float>(q[c]);
    ++directions_;
  }

  void pack(std::int64_t b) noexcept {
    float* panel = s_.packed + b * kPanel * args_.width;
    for (std::int64_t l = 0; l < kPanel; ++l) {
      const std::int64_t i = b * kPanel + l;
      if (i >= args_.items || s_.state[i] == State::kTaken) {
        for (std::int64_t c = 0; c < args_.width; ++c) panel[c * kPanel + l] = 0.0f;
        continue;
      }
      const T* row = features_ + i * args_.width;
      for (std::int64_t c = 0; c < args_.width; ++c) {
        panel[c * kPanel + l] = static_cast<float>(static_cast<double>(row[c]) * s_.scale[i]);
      }
    }
  }

  // Brings a panel's float32 bounds up to date.
  void refresh(std::int64_t b) noexcept {
    if (s_.age[b] == directions_) return;
    if (s_.age[b] < 0) {
      // With no picks yet the first bounds stand, and nothing need be packed.
      if (directions_ == 0) return;
      pack(b);
      s_.age[b] = 0;
    }
    const auto t = static_cast<double>(directions_);
    constexpr double u = 0x1p-24;
    const double d = static_cast<double>(args_.width) + 4.0;
    const double slack = 1.01 * u * (2.0 * d * std::sqrt(t) + 2.0 * t + 4.0) + t * d * u * d * u;
    const std::int64_t at = b * kPanel;
    s_.bound[b] = form_(s_.packed + at * args_.width, s_.directions32 + s_.age[b] * args_.width,
                           directions_ - s_.age[b], args_.width, static_cast<float>(slack), s_.offset + at, s_.rel + at,
                           s_.upper + at);
    s_.age[b] = static_cast<std::int32_t>(directions_);
  }

  [[nodiscard]] static double tie(double best) noexcept { return kTie + kTieRelative * std::abs(best); }

  // The score from which an item counts, on the scale of `upper`.
  [[nodiscard]] double needed(double best) const noexcept {
    return best == -kInfinity ? -kInfinity : best - tie(best) - greatest_;
  }

  // Whether the item is still in play; its float64 score is then up to date.
  [[nodiscard]] bool evaluate(std::int64_t item) noexcept {
    const double left = share(item);
    if (left < kSpent) {
      remove(item, State::kSpent);
      return false;
    }
    s_.score[item] = s_.base[item] + std::log(left);
    return true;
  }

  void contend(std::int64_t b, double* best) noexcept {
    const std::int64_t last = std::min((b + 1) * kPanel, args_.items);
    for (std::int64_t i = b * kPanel; i < last; ++i) {
      if (s_.upper[i] == kNever || static_cast<double>(s_.upper[i]) < needed(*best)) continue;
      if (evaluate(i)) *best = std::max(*best, s_.score[i]);
    }
  }

  [[nodiscard]] std::int64_t select() noexcept { return args_.exact ? select_exact() : select_fast(); }

  // The next pick, or -1 when every free item is spent.
  [[nodiscard]] std::int64_t select_exact() noexcept {
    // The panel of the greatest bound comes first: its winner lets most others be skipped.
    const std::int64_t first = std::max_element(s_.bound, s_.bound + panels_) - s_.bound;
    double best = -kInfinity;
    if (panels_ > 0 && s_.bound[first] > kNever) {
      refresh(first);
      contend(first, &best);
    }
    for (std::int64_t b = 0; b < panels_; ++b) {
      if (b == first || s_.bound[b] == kNever || static_cast<double>(s_.bound[b]) < needed(best)) continue;
      refresh(b);
      if (static_cast<double>(s_.bound[b]) >= needed(best)) contend(b, &best);
    }
    if (best == -kInfinity) return -1;
    // Whatever may tie with the best has been evaluated, for its bound was above what was then needed.
    const double least = best - tie(best);
    for (std::int64_t b = 0; b < panels_; ++b) {
      if (static_cast<double>(s_.bound[b]) < needed(best)) continue;
      const std::int64_t last = std::min((b + 1) * kPanel, args_.items);
      for (std::int64_t i = b * kPanel; i < last; ++i) {
        if (s_.upper[i] != kNever && static_cast<double>(s_.upper[i]) >= needed(best) && s_.score[i] >= least) return i;
      }
    }
    return -1;
  }

  // Trusts the float32 bounds: at most float32's error away from the best.
  [[nodiscard]] std::int64_t select_fast() noexcept {
    for (;;) {
      float best = kNever;
      std::int64_t item = -1;
      const auto look = [&](std::int64_t b) {
        refresh(b);
        const std::int64_t last = std::min((b + 1) * kPanel, args_.items);
        for (std::int64_t i = b * kPanel; i < last; ++i) {
          if (s_.upper[i] > best || (s_.upper[i] == best && i < item)) {
            best = s_.upper[i];
            item = i;
          }
        }
      };
      const std::int64_t first = std::max_element(s_.bound, s_.bound + panels_) - s_.bound;
      if (panels_ > 0 && s_.bound[first] > kNever) look(first);
      for (std::int64_t b = 0; b < panels_; ++b) {
        if (b != first && s_.bound[b] > kNever && s_.bound[b] >= best) look(b);
      }
      if (item < 0 || evaluate(item)) return item;
    }
  }

  const Args<T>& args_;
  Scratch& s_;
  decltype(refresh_scalar)* form_;
  std::int64_t user_;
  std::int64_t panels_;
  const T* features_;
  const double* relevance_;
  double weight_;
  double greatest_ = 0.0;
  std::int64_t directions_ = 0;
  std::int64_t length_ = 0;  // of the sequence
  std::int64_t start_ = 0;   // where in it the picks begin that the next one sees
};

}  // namespace

std::int64_t scratch_bytes(std::int64_t items, std::int64_t width, std::int64_t picks, std::int64_t shown_width,
                           bool regularised) noexcept {
  Arena arena(nullptr);
  [[maybe_unused]] const Scratch scratch(arena, items, width, picks, shown_width, regularised);
  return arena.used();
}

template <class T>
Outcome run(const Args<T>& args) noexcept {
  const auto form = kForms.pick();
  const bool regularised = args.gamma > 0.0;
  const std::int64_t bytes = scratch_bytes(args.items, args.width, args.picks, args.shown_width, regularised);
  FirstError wrong_feature;
  FirstError wrong_relevance;
  parallel_for_each(args.users, [&](std::int64_t index, int thread) {
    Arena arena(args.scratch + thread * bytes);
    Scratch scratch(arena, args.items, args.width, args.picks, args.shown_width, regularised);
    User<T> user(args, index, scratch, form);
    if (user.prepare(wrong_feature, wrong_relevance)) user.solve();
  });
  return {.wrong_feature = wrong_feature.position(), .wrong_relevance = wrong_relevance.position()};
}

template Outcome run(const Args<float>&) noexcept;
template Outcome run(const Args<double>&) noexcept;

}  // namespace recfast::dpp_greedy
