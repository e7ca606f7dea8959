#include "dpp_greedy/dpp_greedy.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/arena.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/simd_portable.h"
#include "common/vectors.h"
#include "common/tiles.h"

namespace recfast::dpp_greedy {
namespace {

struct Simd {
  static constexpr std::int64_t kLanes = 4;
  using Floats = float __attribute__((vector_size(16)));
  using Ints = int __attribute__((vector_size(16)));
  using Moves = Portable<float>;

  template <Format format>
  static Floats floats(const std::byte* p) noexcept {
    const item_panels::Rows row{.data = p, .format = format, .width = kLanes};
    Floats x;
    for (std::int64_t l = 0; l < kLanes; ++l) x[l] = static_cast<float>(row.value(0, l));
    return x;
  }

  static const std::int8_t* spread(const std::int8_t* q) noexcept { return q; }

  // Adds to each 32-bit lane the four products of its bytes (without sign) and those of h or l (with sign).
  static void add_products(Ints bytes, const std::int8_t* h, const std::int8_t* l, Ints* high, Ints* low) noexcept {
    for (int j = 0; j < 4; ++j) {
      const Ints byte = (bytes >> (8 * j)) & 255;
      *high += byte * static_cast<int>(h[j]);
      *low += byte * static_cast<int>(l[j]);
    }
  }

  static std::uint64_t bits_at_least(Floats a, Floats b) noexcept {
    std::uint64_t bits = 0;
    for (std::int64_t l = 0; l < kLanes; ++l) bits |= std::uint64_t{a[l] >= b[l]} << l;
    return bits;
  }
};

}  // namespace

#include "dpp_greedy/forms.inl"

constexpr Forms kScalarForms{norms, offsets, pack, encode, refresh, at_least};

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNever = -std::numeric_limits<float>::infinity();
// Below this share the difference 1 - sum <b, q>^2 has lost digits, and the residual vector itself is measured.
constexpr double kCancelled = 1e-2;
// A residual this short is cleared of the directions a second time.
constexpr double kTwice = 0.1;
// Events after which a panel's sums of a sliding window start afresh, so that their error stays small.
constexpr std::int64_t kAfresh = 64;
// Values in all rows from which one user's panels are worth several threads.
constexpr std::int64_t kShared = std::int64_t{1} << 18;

// Deals out a thread's scratch memory in aligned pieces; with a null start it only counts.
class Pieces {
 public:
  explicit Pieces(std::byte* start) noexcept : start_(start) {}

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

struct Entry {
  std::int64_t item;   // of the candidates, or ~row of the table
  bool has_direction;
};

struct Scratch {
  // By panel of 64 items.
  std::uint8_t* codes;    // [panels, groups, 64, 4]
  float* step;            // these as in Panel
  float* delta;
  float* sum;
  float* offset;
  float* upper;
  float* bound;           // [panels] the greatest upper
  float* first_bound;     // [panels] the same for a share of 1
  float* loose;           // [panels] window: what the share may be off through events
  float* error;           // [panels] window: of the basis that the sums began with
  std::int32_t* age;      // [panels] events accounted for; -1: none, begin afresh
  std::int32_t* fresh;    // [panels] window: the event with which the sums began
  bool* packed;           // [panels]
  std::int32_t* stale;    // [panels] panels to bring up to date
  // By item.
  bool* free;             // may be picked, if only by relevance
  float* diagonal;        // S_ii, or -1 where float32 does not hold it
  // By item, float64, filled only for contenders.
  double* base;           // 2 alpha r + log S_ii
  double* scale;          // b_i = scale_i * row
  double* own;            // square of the coordinate of b_i that it shares with no other item, from gamma I
  double* share;          // 1 - sum <b_i, q_t>^2
  double* score;
  std::int32_t* seen;     // directions (window: step) that share and score are of; -1: nothing filled yet
  // The picks.
  double* directions;     // [capacity, stride] q_t: features, then (gamma > 0) the picks' own coordinates
  double* factor;         // window: [capacity, capacity] rows of the picks in terms of the directions, lower triangle
  double* row;            // [stride]
  double* parts;          // [2, capacity]
  std::int8_t* event_codes;  // [ring, 2, groups * 4]
  Direction* events;      // [2 * ring], the second half like the first
  float* event_error;     // [ring]
  std::int8_t* basis_codes;  // window: [capacity, 2, groups * 4]
  Direction* basis;       // window: [capacity]
  Entry* sequence;        // shown items, then picks
  std::int64_t* shown;    // [shown_width] rows, sorted
  std::int64_t panels;
  std::int64_t groups;
  std::int64_t wide;      // padded width of the features
  std::int64_t stride;
  std::int64_t capacity;
  std::int64_t ring;

  Scratch(Pieces& pieces, const Args& args) noexcept {
    panels = (args.items + kPanel - 1) / kPanel;
    groups = (args.width + 3) / 4;
    wide = item_panels::padded_width(args.width);
    const bool windowed = args.window > 0;
    // No list is longer than the items; without gamma the features span no more than D directions.
    const std::int64_t most =
        std::min(args.picks + args.shown_width, args.items + (args.candidates == nullptr ? 0 : args.shown_width));
    capacity = args.gamma > 0.0 ? most : std::min(most, args.width);
    if (windowed) capacity = std::min(capacity, args.window);
    stride = wide + (args.gamma > 0.0 ? item_panels::padded_width(capacity) : 0);
    ring = windowed ? capacity + 2 : capacity;
    const std::int64_t slots = panels * kPanel;
    codes = pieces.take<std::uint8_t>(slots * groups * 4);
    step = pieces.take<float>(slots);
    delta = pieces.take<float>(slots);
    sum = pieces.take<float>(slots);
    offset = pieces.take<float>(slots);
    upper = pieces.take<float>(slots);
    bound = pieces.take<float>(panels);
    first_bound = pieces.take<float>(panels);
    loose = pieces.take<float>(windowed ? panels : 0);
    error = pieces.take<float>(windowed ? panels : 0);
    age = pieces.take<std::int32_t>(panels);
    fresh = pieces.take<std::int32_t>(windowed ? panels : 0);
    packed = pieces.take<bool>(panels);
    stale = pieces.take<std::int32_t>(panels);
    free = pieces.take<bool>(args.items);
    diagonal = pieces.take<float>(slots);
    base = pieces.take<double>(args.items);
    scale = pieces.take<double>(args.items);
    own = pieces.take<double>(args.gamma > 0.0 ? args.items : 0);
    share = pieces.take<double>(args.items);
    score = pieces.take<double>(args.items);
    seen = pieces.take<std::int32_t>(args.items);
    directions = pieces.take<double>(capacity * stride);
    factor = pieces.take<double>(windowed ? capacity * capacity : 0);
    row = pieces.take<double>(stride);
    parts = pieces.take<double>(2 * capacity);
    event_codes = pieces.take<std::int8_t>(ring * 2 * groups * 4);
    events = pieces.take<Direction>(2 * ring);
    event_error = pieces.take<float>(ring);
    basis_codes = pieces.take<std::int8_t>(windowed ? capacity * 2 * groups * 4 : 0);
    basis = pieces.take<Direction>(windowed ? capacity : 0);
    sequence = pieces.take<Entry>(most);
    shown = pieces.take<std::int64_t>(args.candidates == nullptr ? 0 : args.shown_width);
  }
};

class User {
 public:
  User(const Args& args, std::int64_t user, Scratch& scratch, const Forms& forms,
       const item_panels::Forms& wide) noexcept
      : args_(args),
        s_(scratch),
        forms_(forms),
        wide_(wide),
        user_(user),
        table_{.data = args.features + user * args.user_stride * args.width * (bits_of(args.format) / 8),
               .format = args.format,
               .width = args.width},
        rows_{.data = table_.data,
              .format = args.format,
              .width = args.width,
              .ids = args.candidates == nullptr ? nullptr : args.candidates + user * args.items},
        relevance32_(static_cast<const float*>(args.relevance) + user * args.items),
        relevance64_(static_cast<const double*>(args.relevance) + user * args.items),
        weight_(args.weight[user]),
        shared_(args.users == 1 && args.items * args.width >= kShared && max_threads() > 1) {}

  // Reads each candidate once: first bounds, and whether everything is finite.
  [[nodiscard]] bool prepare(FirstError& wrong_feature, FirstError& wrong_shown, FirstError& wrong_relevance) noexcept {
    find_candidates();
    greatest_ = -kInfinity;
    bool good = true;
    const double factor = only_relevance() ? 1.0 : weight_;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      const double wanted = factor * relevance(i);
      if (!s_.free[i]) continue;
      if (!std::isfinite(wanted)) [[unlikely]] {
        wrong_relevance.report(user_ * args_.items + i);
        good = false;
      }
      greatest_ = wanted > greatest_ ? wanted : greatest_;
    }
    // Without candidates what was shown is one of the items, or passed over.
    const std::int64_t* shown = args_.shown + user_ * args_.shown_width;
    for (std::int64_t i = 0; args_.candidates != nullptr && i < args_.shown_width; ++i) {
      if (shown[i] < 0 || std::isfinite(wide_.squared_norm(table_, shown[i]))) continue;
      wrong_shown.report(user_ * args_.shown_width + i);
      good = false;
    }
    if (!good) return false;
    std::fill_n(s_.seen, args_.items, -1);
    std::fill_n(s_.packed, s_.panels, false);
    std::fill_n(s_.age, s_.panels, -1);
    for_panels(s_.panels, [&](std::int64_t b) { prepare_panel(b, wrong_feature); });
    return wrong_feature.position() < 0;
  }

  void solve() noexcept {
    take_shown();
    std::int64_t* indices = args_.indices + user_ * args_.picks;
    double* gains = args_.gains + user_ * args_.picks;
    double log_det = 0.0;
    std::int64_t n = 0;
    for (; n < args_.picks; ++n) {
      double gain = -kInfinity;
      std::int64_t item = -1;
      if (only_relevance()) {
        item = most_relevant();
        if (item >= 0) gain = relevance(item);
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
      ask_ahead(n);
      indices[n] = item;
      gains[n] = gain;
      if (gain > -kInfinity) log_det += gain;
      // Nothing comes after the last pick that would see it.
      if (n + 1 < args_.picks) take(item);
    }
    args_.count[user_] = n;
    args_.log_det[user_] = log_det;
    std::fill(indices + n, indices + args_.picks, -1);
    std::fill(gains + n, gains + args_.picks, -kInfinity);
  }

 private:
  // The rows of the user that this thread is likely to come to next, a part with each pick: reading them is what
  // preparing waits for.
  void ask_ahead(std::int64_t n) const noexcept {
    const std::int64_t next = user_ + omp_get_num_threads();
    if (args_.user_stride == 0 || next >= args_.users) return;
    const std::int64_t bytes = args_.items * args_.width * (bits_of(args_.format) / 8);
    const std::int64_t first = bytes * n / args_.picks / 64 * 64;
    const std::int64_t last = std::min(bytes * (n + 1) / args_.picks, first + (std::int64_t{1} << 14));
    const std::byte* rows = table_.data + (next - user_) * bytes;
    for (std::int64_t at = first; at < last; at += 64) __builtin_prefetch(rows + at, 0, 2);
  }

  [[nodiscard]] bool only_relevance() const noexcept { return std::isinf(weight_); }
  [[nodiscard]] bool windowed() const noexcept { return args_.window > 0; }
  [[nodiscard]] double relevance(std::int64_t i) const noexcept {
    return args_.relevance_is_double ? relevance64_[i] : static_cast<double>(relevance32_[i]);
  }

  template <class Body>
  void for_panels(std::int64_t count, const Body& body) const noexcept {
    if (!shared_) {
      for (std::int64_t b = 0; b < count; ++b) body(b);
      return;
    }
    parallel_for(count, 8, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t b = first; b < last; ++b) body(b);
    });
  }

  void find_candidates() noexcept {
    const std::int64_t length = args_.lengths == nullptr ? args_.items : args_.lengths[user_];
    std::fill_n(s_.free, length, true);
    std::fill(s_.free + length, s_.free + args_.items, false);
    if (args_.mask != nullptr) {
      const bool* mask = args_.mask + user_ * args_.items;
      for (std::int64_t i = 0; i < length; ++i) s_.free[i] = mask[i];
    }
    if (args_.candidates == nullptr) return;
    const std::int64_t* shown = args_.shown + user_ * args_.shown_width;
    if (args_.shown_width > 0) {
      std::copy_n(shown, args_.shown_width, s_.shown);
      std::sort(s_.shown, s_.shown + args_.shown_width);
    }
    for (std::int64_t i = 0; i < length; ++i) {
      const bool was_shown =
          args_.shown_width > 0 && std::binary_search(s_.shown, s_.shown + args_.shown_width, rows_.ids[i]);
      s_.free[i] = s_.free[i] && rows_.ids[i] >= 0 && !was_shown;
    }
  }

  // The first bounds of a panel, for which all of it has to be read.
  void prepare_panel(std::int64_t b, FirstError& wrong_feature) noexcept {
    const std::int64_t first = b * kPanel;
    const std::int64_t count = std::min(kPanel, args_.items - first);
    const bool* free = s_.free + first;
    float* diagonal = s_.diagonal + first;
    float* offset = s_.offset + first;
    forms_.norms(rows_, first, count, free, diagonal);
    alignas(64) float part[kPanel];
    const auto spread = static_cast<float>(1.0 - args_.gamma);
    const auto own = static_cast<float>(args_.gamma);
    bool usual[kPanel];  // whether float32 holds the norm
    bool plain = true;
    for (std::int64_t l = 0; l < count; ++l) {
      const bool normal = diagonal[l] > 1e-20f && diagonal[l] < 1e20f;
      diagonal[l] = normal ? spread * diagonal[l] + own : -1.0f;
      usual[l] = normal && diagonal[l] > 1e-30f;
      plain = plain && usual[l];
    }
    if (!plain) {
      for (std::int64_t l = 0; l < count; ++l) {
        if (usual[l]) continue;
        diagonal[l] = -1.0f;
        if (free[l] && !std::isfinite(wide_.squared_norm(rows_, first + l))) {
          wrong_feature.report(user_ * args_.items + first + l);
        }
      }
    }
    if (only_relevance()) return;
    for (std::int64_t l = 0; l < count; ++l) {
      part[l] = static_cast<float>(std::max(weight_ * relevance(first + l) - greatest_, -1e30));
    }
    // Sums in float32 of sixteen parts, twice what they may be off, so that it is more.
    const float margin = (static_cast<float>(args_.width) / 16.0f + 16.0f) * 1.2e-7f;
    std::fill(part + count, part + kPanel, 0.0f);
    if (plain) {
      forms_.offsets(part, diagonal, count, offset);
    } else {
      for (std::int64_t l = 0; l < count; ++l) {
        if (!free[l]) continue;
        const double exact = diagonal_of(first + l);
        // A zero row under gamma = 0 spans nothing: it is spent before the first pick and stays so.
        offset[l] = exact > 0.0 ? static_cast<float>(static_cast<double>(part[l]) + std::log(exact)) : kNever;
      }
    }
    // Where the two parts cancel, what rounding each of them takes away is no share of their sum.
    for (std::int64_t l = 0; l < count; ++l) {
      offset[l] = free[l] ? offset[l] + (margin + 4e-7f * std::fabs(part[l])) : kNever;
    }
    std::fill(offset + count, offset + kPanel, kNever);
    first_upper(b);
  }

  // Bounds for a share of 1.
  void first_upper(std::int64_t b) noexcept {
    const float* offset = s_.offset + b * kPanel;
    float* upper = s_.upper + b * kPanel;
    float best[4] = {kNever, kNever, kNever, kNever};
    for (std::int64_t l = 0; l < kPanel; l += 4) {
      for (std::int64_t j = 0; j < 4; ++j) {
        // What rounding the relevance part, the logarithm and the sums can take away.
        const float raised = offset[l + j] + (1.0f + std::fabs(offset[l + j])) * 1.5e-6f;
        upper[l + j] = offset[l + j] == kNever ? kNever : raised;
        best[j] = upper[l + j] > best[j] ? upper[l + j] : best[j];
      }
    }
    s_.bound[b] = s_.first_bound[b] = std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
  }

  [[nodiscard]] double diagonal_of(std::int64_t item) const noexcept {
    return diagonal_of(rows_, item);
  }

  // 0 where float64 does not hold all digits of it.
  [[nodiscard]] double diagonal_of(const item_panels::Rows& rows, std::int64_t item) const noexcept {
    const double diagonal = (1.0 - args_.gamma) * wide_.squared_norm(rows, item) + args_.gamma;
    return diagonal >= std::numeric_limits<double>::min() ? diagonal : 0.0;
  }

  [[nodiscard]] std::int64_t most_relevant() const noexcept {
    std::int64_t best = -1;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      if (s_.free[i] && (best < 0 || relevance(i) > relevance(best))) best = i;
    }
    return best;
  }

  void take_shown() noexcept {
    const std::int64_t* shown = args_.shown + user_ * args_.shown_width;
    for (std::int64_t i = 0; i < args_.shown_width; ++i) {
      if (shown[i] < 0) continue;
      if (args_.candidates == nullptr) {
        // An item that was shown twice, or is no candidate, is taken already.
        if (s_.free[shown[i]]) take(shown[i]);
      } else if (std::find(shown, shown + i, shown[i]) == shown + i) {
        enter(~shown[i]);
      }
    }
  }

  // Back to no picks; the items that were taken stay so.
  void forget() noexcept {
    directions_ = 0;
    events_ = 0;
    spent_ = 0;
    spread_ = 0.0;
    ++step_;
    std::fill_n(s_.seen, args_.items, -1);
    for (std::int64_t b = 0; b < s_.panels; ++b) {
      s_.age[b] = -1;
      for (std::int64_t l = 0; l < kPanel; ++l) {
        const std::int64_t i = b * kPanel + l;
        if (s_.offset[i] > kNever || i >= args_.items || !s_.free[i]) continue;
        // It was spent.
        const double exact = diagonal_of(i);
        if (exact <= 0.0) continue;
        s_.offset[i] = static_cast<float>(std::max(weight_ * relevance(i) - greatest_, -1e30) + std::log(exact));
        if (s_.packed[b] && s_.step[i] == 0.0f) s_.packed[b] = false;
      }
      first_upper(b);
    }
  }

  // Not again before the next event (window), or not at all.
  void spend(std::int64_t item) noexcept {
    s_.upper[item] = kNever;
    if (!windowed()) s_.offset[item] = kNever;
  }

  void take(std::int64_t item) noexcept {
    s_.free[item] = false;
    if (only_relevance()) return;
    s_.offset[item] = s_.upper[item] = kNever;
    if (windowed()) {
      const std::int64_t b = item / kPanel;
      float best = kNever;
      for (std::int64_t i = b * kPanel; i < (b + 1) * kPanel; ++i) best = std::max(best, s_.offset[i]);
      if (best == kNever) s_.first_bound[b] = kNever;
      s_.first_bound[b] = std::min(s_.first_bound[b], best + (1.0f + std::fabs(best)) * 1.5e-6f);
    }
    enter(item);
  }

  // Puts an item at the end of the sequence and its direction into what later picks see.
  void enter(std::int64_t item) noexcept {
    if (only_relevance()) return;
    if (windowed() && length_ - start_ == args_.window - 1) {
      if (length_ > start_) leave();
      if (args_.window == 1) ++start_;
    }
    s_.sequence[length_++] = {item, false};
    if (args_.window == 1) return;
    append(length_ - 1, true);
  }

  // The oldest pick of the window leaves it.
  void leave() noexcept {
    const Entry oldest = s_.sequence[start_++];
    if (spent_ > 0) {
      // What was within the span of the oldest may now be outside the others'.
      rebuild();
      return;
    }
    if (!oldest.has_direction) return;
    const std::int64_t m = directions_;
    const std::int64_t k = s_.capacity;
    double* f = s_.factor;
    double* first = s_.directions;
    for (std::int64_t i = 1; i < m; ++i) {
      const double length = std::hypot(f[i * k], f[i * k + i]);
      const double cosine = f[i * k + i] / length;
      const double sine = f[i * k] / length;
      for (std::int64_t r = i; r < m; ++r) {
        const double a = f[r * k + i];
        const double z = f[r * k];
        f[r * k + i] = cosine * a + sine * z;
        f[r * k] = cosine * z - sine * a;
      }
      double* q = s_.directions + i * s_.stride;
      for (std::int64_t c = 0; c < s_.stride; ++c) {
        const double a = q[c];
        const double z = first[c];
        q[c] = cosine * a + sine * z;
        first[c] = cosine * z - sine * a;
      }
    }
    push_event(first, -1.0f);
    for (std::int64_t r = 1; r < m; ++r) {
      for (std::int64_t c = 1; c <= r; ++c) f[(r - 1) * k + c - 1] = f[r * k + c];
    }
    std::copy(first + s_.stride, first + m * s_.stride, first);
    --directions_;
    ++step_;
    ++left_;
    std::copy_n(s_.first_bound, s_.panels, s_.bound);
    if (left_ == kAfresh) {
      left_ = 0;
      rebuild();
    }
  }

  // The directions of the window from its items alone.
  void rebuild() noexcept {
    directions_ = 0;
    spent_ = 0;
    for (std::int64_t at = start_; at < length_; ++at) append(at, false);
    ++step_;
    std::fill_n(s_.age, s_.panels, -1);
    std::copy_n(s_.first_bound, s_.panels, s_.bound);
  }

  void push_event(const double* q, float sign) noexcept {
    const std::int64_t at = events_ % s_.ring;
    std::int8_t* codes = s_.event_codes + at * 2 * s_.groups * 4;
    const float error =
        forms_.encode(q, args_.width, s_.groups, codes, codes + s_.groups * 4, &s_.events[at]);
    s_.events[at].sign = sign;
    s_.events[at + s_.ring] = s_.events[at];
    s_.event_error[at] = error;
    spread_ += static_cast<double>(error) * static_cast<double>(error);
    ++events_;
  }

  // Reads b of an item or a table row into `row`, its own coordinate left out; returns the square of that.
  [[nodiscard]] double read(std::int64_t item, bool* zero) noexcept {
    const item_panels::Rows& rows = item < 0 ? table_ : rows_;
    const std::int64_t at = item < 0 ? ~item : item;
    const double diagonal = diagonal_of(rows, at);
    *zero = !(diagonal > 0.0);
    if (*zero) return 0.0;
    wide_.read(rows, at, std::sqrt((1.0 - args_.gamma) / diagonal), s_.row);
    return args_.gamma / diagonal;
  }

  // Takes the directions out of `row`, twice; what was taken out stands in `parts`.
  void project() noexcept {
    std::fill(s_.row + s_.wide, s_.row + s_.stride, 0.0);
    double* again = s_.parts + s_.capacity;
    wide_.dots(s_.row, s_.directions, s_.stride, directions_, s_.wide, s_.parts);
    wide_.subtract(s_.row, s_.directions, s_.stride, s_.parts, directions_, s_.stride);
    const double left = squared(s_.row, s_.stride);
    if (left > kTwice) return;
    wide_.dots(s_.row, s_.directions, s_.stride, directions_, s_.stride, again);
    wide_.subtract(s_.row, s_.directions, s_.stride, again, directions_, s_.stride);
    for (std::int64_t v = 0; v < directions_; ++v) s_.parts[v] += again[v];
  }

  [[nodiscard]] double squared(const double* x, std::int64_t size) const noexcept {
    double sum = 0.0;
    wide_.dots(x, x, 0, 1, size, &sum);
    return sum;
  }

  // The direction of a place in the sequence.
  void append(std::int64_t place, bool as_event) noexcept {
    Entry& entry = s_.sequence[place];
    entry.has_direction = false;
    bool zero = false;
    const double own = read(entry.item, &zero);
    if (zero) return;
    project();
    const double left = squared(s_.row, s_.stride) + own;
    if (directions_ == s_.capacity || left < std::min(args_.epsilon, kNoDirection)) {
      ++spent_;
      return;
    }
    const double length = std::sqrt(left);
    const double inverse = 1.0 / length;
    double* q = s_.directions + directions_ * s_.stride;
    for (std::int64_t c = 0; c < s_.stride; ++c) q[c] = s_.row[c] * inverse;
    if (args_.gamma > 0.0) q[s_.wide + private_slot(place)] = std::sqrt(own) * inverse;
    if (windowed()) {
      double* f = s_.factor + directions_ * s_.capacity;
      std::copy_n(s_.parts, directions_, f);
      f[directions_] = length;
    }
    entry.has_direction = true;
    ++directions_;
    ++step_;
    if (as_event) push_event(q, 1.0f);
  }

  // Which coordinate beyond the features is the pick's own. In a window, one that no other pick in it has.
  [[nodiscard]] std::int64_t private_slot(std::int64_t place) const noexcept {
    return windowed() ? place % s_.capacity : directions_;
  }

  void pack(std::int64_t b) noexcept {
    alignas(64) double scale[kPanel]{};
    const std::int64_t first = b * kPanel;
    const std::int64_t count = std::min(kPanel, args_.items - first);
    for (std::int64_t l = 0; l < count; ++l) {
      if (s_.offset[first + l] == kNever) continue;
      const double diagonal =
          s_.diagonal[first + l] > 0.0f ? static_cast<double>(s_.diagonal[first + l]) : diagonal_of(first + l);
      scale[l] = diagonal > 0.0 ? std::sqrt((1.0 - args_.gamma) / diagonal) : 0.0;
    }
    forms_.pack(rows_, first, scale, panel(b));
    s_.packed[b] = true;
  }

  [[nodiscard]] Panel panel(std::int64_t b) const noexcept {
    const std::int64_t at = b * kPanel;
    return {.codes = s_.codes + at * s_.groups * 4,
            .step = s_.step + at,
            .delta = s_.delta + at,
            .sum = s_.sum + at,
            .offset = s_.offset + at,
            .upper = s_.upper + at};
  }

  // Codes of the whole basis of a window, for panels that begin afresh.
  void encode_basis() noexcept {
    if (basis_step_ == step_) return;
    basis_step_ = step_;
    double squares = 0.0;
    for (std::int64_t v = 0; v < directions_; ++v) {
      std::int8_t* codes = s_.basis_codes + v * 2 * s_.groups * 4;
      const float error = forms_.encode(s_.directions + v * s_.stride, args_.width, s_.groups, codes,
                                        codes + s_.groups * 4, &s_.basis[v]);
      squares += static_cast<double>(error) * static_cast<double>(error);
    }
    // |b'| is at most 2: b has norm 1 at most, and is no further from its codes.
    basis_error_ = static_cast<float>(2.0 * std::sqrt(squares));
  }

  [[nodiscard]] bool is_stale(std::int64_t b) const noexcept {
    // With no picks yet the first bounds stand, and nothing need be packed.
    return s_.age[b] != events_ && events_ > 0;
  }

  // Brings a panel's bounds up to date.
  void refresh(std::int64_t b) noexcept {
    if (!is_stale(b)) return;
    if (!s_.packed[b]) pack(b);
    const std::int64_t at = b * kPanel;
    const bool afresh = s_.age[b] < 0;
    if (afresh) std::fill_n(s_.sum + at, kPanel, 0.0f);
    // What each product and the sums lose to rounding, relative to sums of 1 (and of what has left a window) in all.
    constexpr float kRounding = 1.5e-7f;
    if (!windowed()) {
      const std::int64_t from = afresh ? 0 : s_.age[b];
      const auto error = static_cast<float>(2.0 * std::sqrt(spread_));
      s_.bound[b] = forms_.refresh(panel(b), s_.events + from, events_ - from, s_.groups, error,
                                   static_cast<float>(events_ + 16) * kRounding);
    } else if (afresh || events_ - s_.age[b] >= directions_ || events_ - s_.fresh[b] > kAfresh) {
      encode_basis();
      std::fill_n(s_.sum + at, kPanel, 0.0f);
      // Of the basis now, whatever of it leaves: 2 |b' Q| is up to 4, which the share of later sums does not tell.
      s_.loose[b] = 4.0f * basis_error_;
      s_.error[b] = basis_error_;
      s_.fresh[b] = static_cast<std::int32_t>(events_);
      s_.bound[b] = forms_.refresh(panel(b), s_.basis, directions_, s_.groups, basis_error_,
                                   static_cast<float>(directions_ + 16) * kRounding);
    } else {
      const std::int64_t from = s_.age[b];
      // |<b', q>^2 - <b', q'>^2| <= 2 |b'|^2 eta + (|b'| eta)^2, |b'| <= 2.
      for (std::int64_t e = from; e < events_; ++e) s_.loose[b] += 9.0f * s_.event_error[e % s_.ring];
      s_.bound[b] = forms_.refresh(panel(b), s_.events + from % s_.ring, events_ - from, s_.groups, s_.error[b],
                                   s_.loose[b] + static_cast<float>(s_.ring + 2 * kAfresh + 16) * kRounding);
    }
    s_.age[b] = static_cast<std::int32_t>(events_);
  }

  [[nodiscard]] static double tie(double best) noexcept { return kTie + kTieRelative * std::abs(best); }

  // The score from which an item counts, on the scale of `upper`.
  [[nodiscard]] double needed(double best) const noexcept {
    if (best == -kInfinity) return -kInfinity;
    return (args_.exact ? best - tie(best) : best + kFast) - greatest_;
  }

  [[nodiscard]] std::int32_t stamp() const noexcept {
    return static_cast<std::int32_t>(windowed() ? step_ : directions_);
  }

  // Whether the item is still in play; its float64 score is then up to date.
  [[nodiscard]] bool evaluate(std::int64_t item) noexcept {
    const bool is_new = s_.seen[item] < 0;
    if (is_new) {
      const double diagonal = diagonal_of(item);
      s_.base[item] = weight_ * relevance(item) + std::log(diagonal);
      s_.scale[item] = std::sqrt((1.0 - args_.gamma) / diagonal);
      if (args_.gamma > 0.0) s_.own[item] = args_.gamma / diagonal;
    } else if (s_.seen[item] == stamp()) {
      return true;
    }
    double left = 1.0;
    if (directions_ > 0) {
      const std::int64_t from = windowed() || is_new ? 0 : s_.seen[item];
      wide_.read(rows_, item, s_.scale[item], s_.row);
      wide_.dots(s_.row, s_.directions + from * s_.stride, s_.stride, directions_ - from, s_.wide, s_.parts);
      left = from == 0 ? 1.0 : s_.share[item];
      for (std::int64_t v = 0; v < directions_ - from; ++v) left -= s_.parts[v] * s_.parts[v];
      s_.share[item] = left;
      if (left <= kCancelled) {
        project();
        left = squared(s_.row, s_.stride) + (args_.gamma > 0.0 ? s_.own[item] : 0.0);
      }
    } else {
      s_.share[item] = 1.0;
    }
    s_.seen[item] = stamp();
    if (left < args_.epsilon) {
      spend(item);
      return false;
    }
    s_.score[item] = s_.base[item] + std::log(left);
    return true;
  }

  // Before the first pick, when norms alone may tell items apart: whether an item is below `best` without a logarithm.
  // log(x) <= log(y) + (x - y) / y.
  [[nodiscard]] bool is_below(std::int64_t item, double best) const noexcept {
    if (directions_ > 0 || s_.seen[item] >= 0 || best == -kInfinity) return false;
    const double wanted = weight_ * relevance(item);
    const double upper = wanted + first_log_ + (diagonal_of(item) - first_diagonal_) / first_diagonal_;
    return upper < best - tie(best) - 4e-15 * (std::abs(wanted) + std::abs(first_log_) + 1.0);
  }

  void contend(std::int64_t item, double* best) noexcept {
    if (is_below(item, *best) || !evaluate(item)) return;
    if (s_.score[item] > *best) {
      *best = s_.score[item];
      best_item_ = item;
      if (directions_ == 0) first_log_ = std::log(first_diagonal_ = diagonal_of(item));
    }
  }

  // The same in float32, rounded down; -inf, which is what may not be picked, is never reached.
  [[nodiscard]] static float threshold(double least) noexcept {
    constexpr float kLeast = std::numeric_limits<float>::lowest();
    const auto near = static_cast<float>(std::max(least, static_cast<double>(kLeast)));
    return static_cast<double>(near) > least ? std::nextafter(near, kLeast) : near;
  }

  void contend_panel(std::int64_t b, double* best) noexcept {
    const std::int64_t first = b * kPanel;
    const float* upper = s_.upper + first;
    const std::uint64_t most = forms_.at_least(upper, std::max(s_.bound[b], threshold(needed(*best))));
    // That of the greatest bound comes first.
    const int top = std::countr_zero(most);
    if (most != 0) contend(first + top, best);
    std::uint64_t rest = forms_.at_least(upper, threshold(needed(*best)));
    if (most != 0) rest &= ~(std::uint64_t{1} << top);
    for (; rest != 0; rest &= rest - 1) {
      const int l = std::countr_zero(rest);
      if (static_cast<double>(upper[l]) >= needed(*best)) contend(first + l, best);
    }
  }

  // The next pick, or -1 when every free item is spent.
  [[nodiscard]] std::int64_t select() noexcept {
    // The panel of the greatest bound comes first: its winner lets most others be skipped.
    const std::int64_t first = std::max_element(s_.bound, s_.bound + s_.panels) - s_.bound;
    double best = -kInfinity;
    best_item_ = -1;
    if (s_.panels == 0 || s_.bound[first] == kNever) return -1;
    refresh(first);
    contend_panel(first, &best);
    // Fast selection depends on the bounds, which then may not depend on the order of what follows.
    if (shared_ || !args_.exact) refresh_all(first, best);
    float least = threshold(needed(best));
    for (std::int64_t b = 0; b < s_.panels; ++b) {
      if (s_.bound[b] < least || b == first) continue;
      refresh(b);
      if (s_.bound[b] < least) continue;
      contend_panel(b, &best);
      least = threshold(needed(best));
    }
    if (best == -kInfinity) return -1;
    if (!args_.exact) return best_item_;
    // Whatever may tie with the best has been looked at, for its bound was above what was then needed.
    const double equal = best - tie(best);
    for (std::int64_t b = 0; b <= best_item_ / kPanel; ++b) {
      if (s_.bound[b] < least) continue;
      for (std::uint64_t rest = forms_.at_least(s_.upper + b * kPanel, least); rest != 0; rest &= rest - 1) {
        const std::int64_t i = b * kPanel + std::countr_zero(rest);
        if (s_.seen[i] == stamp() && s_.score[i] >= equal) return i;
      }
    }
    return best_item_;
  }

  // All panels that may matter, by several threads.
  void refresh_all(std::int64_t done, double best) noexcept {
    const float least = threshold(needed(best));
    std::int64_t count = 0;
    for (std::int64_t b = 0; b < s_.panels; ++b) {
      if (b == done || s_.bound[b] < least || !is_stale(b)) continue;
      s_.stale[count++] = static_cast<std::int32_t>(b);
    }
    if (count > 0 && windowed()) encode_basis();
    for_panels(count, [&](std::int64_t at) { refresh(s_.stale[at]); });
  }

  const Args& args_;
  Scratch& s_;
  const Forms& forms_;
  const item_panels::Forms& wide_;
  std::int64_t user_;
  item_panels::Rows table_;
  item_panels::Rows rows_;
  const float* relevance32_;
  const double* relevance64_;
  double weight_;
  bool shared_;                   // one user by several threads
  double greatest_ = 0.0;         // of 2 alpha r
  double spread_ = 0.0;           // sum of squares of the events' errors
  double first_diagonal_ = 1.0;   // of the best item so far, before the first pick
  double first_log_ = 0.0;
  float basis_error_ = 0.0f;
  std::int64_t best_item_ = -1;
  std::int64_t directions_ = 0;
  std::int64_t events_ = 0;
  std::int64_t step_ = 0;         // counts changes of the directions
  std::int64_t basis_step_ = -1;  // when their codes were made
  std::int64_t left_ = 0;         // picks that have left the window since its directions were made afresh
  std::int64_t spent_ = 0;        // picks in the window that added no direction
  std::int64_t length_ = 0;       // of the sequence
  std::int64_t start_ = 0;        // where in it the picks begin that the next one sees
};

}  // namespace

const Forms& forms() noexcept {
#if defined(__x86_64__)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni") != 0;
  if (has_vnni && active_isa() >= Isa::kAvx512) return kVnniForms;
  if (active_isa() >= Isa::kAvx2) return kAvx2Forms;
#endif
  return kScalarForms;
}

std::int64_t scratch_bytes(const Args& args) noexcept {
  Pieces pieces(nullptr);
  [[maybe_unused]] const Scratch scratch(pieces, args);
  return pieces.used();
}

Outcome run(const Args& args) noexcept {
  const Forms& chosen = forms();
  const item_panels::Forms& wide = item_panels::forms();
  const std::int64_t bytes = scratch_bytes(args);
  FirstError wrong_feature;
  FirstError wrong_shown;
  FirstError wrong_relevance;
  parallel_for_each(args.users, [&](std::int64_t index, int thread) {
    Pieces pieces(args.scratch + thread * bytes);
    Scratch scratch(pieces, args);
    User user(args, index, scratch, chosen, wide);
    if (user.prepare(wrong_feature, wrong_shown, wrong_relevance)) user.solve();
  });
  return {.wrong_feature = wrong_feature.position(),
          .wrong_shown = wrong_shown.position(),
          .wrong_relevance = wrong_relevance.position()};
}

}  // namespace recfast::dpp_greedy
