#include "dpp_greedy_kernel/dpp_greedy_kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"

namespace recfast::dpp_greedy_kernel {
namespace {

using dpp_greedy::Exhausted;
using item_panels::Rows;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Errors {
  FirstError not_finite;
  FirstError negative;
  FirstError asymmetric;
  FirstError indefinite;
  FirstError relevance;
};

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

struct Scratch {
  double* rows;            // [capacity, stride] the Cholesky rows
  double* diagonal;        // [stride] S'_ii
  double* left;            // [stride] rho_i
  double* base;            // [stride] 2 alpha r + log S'_ii
  double* parts;           // [capacity]
  float* base32;           // [stride] base less the greatest; -inf: may not be picked
  float* share;            // [stride]
  float* score;            // [stride]
  bool* free;              // [stride] may be picked, if only by relevance
  std::int64_t* sequence;  // shown items, then picks
  std::int64_t stride;
  std::int64_t capacity;

  Scratch(Pieces& pieces, const Args& args) noexcept {
    const std::int64_t most = std::min(args.picks + args.shown_width, args.items);
    capacity = args.window > 0 ? std::min(most, args.window) : most;
    stride = item_panels::padded_width(args.items);
    rows = pieces.take<double>(capacity * stride);
    diagonal = pieces.take<double>(stride);
    left = pieces.take<double>(stride);
    base = pieces.take<double>(stride);
    parts = pieces.take<double>(capacity);
    base32 = pieces.take<float>(stride);
    share = pieces.take<float>(stride);
    score = pieces.take<float>(stride);
    free = pieces.take<bool>(stride);
    sequence = pieces.take<std::int64_t>(most);
  }
};

class User {
 public:
  User(const Args& args, std::int64_t user, Scratch& scratch, Errors& errors) noexcept
      : args_(args),
        s_(scratch),
        errors_(errors),
        wide_(item_panels::forms()),
        user_(user),
        matrix_{.data = args.similarity +
                        (args.is_shared ? 0 : user * args.items * args.items) * (args.is_double ? 8 : 4),
                .format = args.is_double ? Format::kFloat64 : Format::kFloat32,
                .width = args.items},
        relevance_(args.relevance + user * args.items),
        weight_(args.weight[user]),
        unit_(args.is_double ? 0x1p-53 : 0x1p-24) {}

  [[nodiscard]] bool prepare() noexcept {
    const std::int64_t length = args_.lengths == nullptr ? args_.items : args_.lengths[user_];
    greatest_ = -kInfinity;
    bool good = true;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      s_.free[i] = i < length && (args_.mask == nullptr || args_.mask[user_ * args_.items + i]);
      s_.base[i] = -kInfinity;
      s_.diagonal[i] = 1.0;
      if (!s_.free[i]) continue;
      const double wanted = only_relevance() ? relevance_[i] : weight_ * relevance_[i];
      const double given = matrix_.value(i, i);
      if (!std::isfinite(wanted)) good = wrong(errors_.relevance, user_ * args_.items + i);
      if (!std::isfinite(given)) good = wrong(errors_.not_finite, place(i, i));
      if (given < 0.0) good = wrong(errors_.negative, place(i, i));
      if (!good) continue;
      s_.diagonal[i] = (1.0 - args_.gamma) * given + args_.gamma;
      // A zero diagonal spans nothing: it is spent before the first pick and stays so.
      if (s_.diagonal[i] > 0.0) s_.base[i] = wanted + std::log(s_.diagonal[i]);
      greatest_ = std::max(greatest_, s_.base[i]);
    }
    return good;
  }

  // False where the matrix was found to be no kernel.
  void solve() noexcept {
    if (!only_relevance()) forget();
    for (std::int64_t i = 0; i < args_.shown_width; ++i) {
      const std::int64_t item = args_.shown[user_ * args_.shown_width + i];
      if (item >= 0 && s_.free[item] && !take(item)) return;
    }
    std::int64_t* indices = args_.indices + user_ * args_.picks;
    double* gains = args_.gains + user_ * args_.picks;
    double log_det = 0.0;
    std::int64_t n = 0;
    for (; n < args_.picks; ++n) {
      double gain = -kInfinity;
      std::int64_t item = -1;
      if (only_relevance()) {
        item = most_relevant();
        if (item >= 0) gain = relevance_[item];
      } else {
        item = select(&gain);
        if (item < 0 && args_.exhausted == Exhausted::kRestart && length_ > start_) {
          start_ = length_;
          forget();
          item = select(&gain);
        }
        if (item < 0 && args_.exhausted != Exhausted::kStop) item = most_relevant();
      }
      if (item < 0) break;
      indices[n] = item;
      gains[n] = gain;
      if (gain > -kInfinity) log_det += gain;
      if (!take(item)) return;
    }
    args_.count[user_] = n;
    args_.log_det[user_] = log_det;
    std::fill(indices + n, indices + args_.picks, -1);
    std::fill(gains + n, gains + args_.picks, -kInfinity);
  }

 private:
  [[nodiscard]] bool only_relevance() const noexcept { return std::isinf(weight_); }
  [[nodiscard]] std::int64_t place(std::int64_t row, std::int64_t column) const noexcept {
    return (user_ * args_.items + row) * args_.items + column;
  }
  static bool wrong(FirstError& error, std::int64_t position) noexcept {
    error.report(position);
    return false;
  }

  [[nodiscard]] std::int64_t most_relevant() const noexcept {
    std::int64_t best = -1;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      if (s_.free[i] && (best < 0 || relevance_[i] > relevance_[best])) best = i;
    }
    return best;
  }

  void forget() noexcept {
    size_ = 0;
    least_ = 1.0;
    std::copy_n(s_.diagonal, args_.items, s_.left);
    for (std::int64_t i = 0; i < args_.items; ++i) {
      s_.base32[i] = s_.free[i] ? static_cast<float>(std::max(s_.base[i] - greatest_, -1e30)) : kNever;
    }
  }

  // Puts an item at the end of the sequence and its row into what later picks see; false where the matrix is wrong.
  [[nodiscard]] bool take(std::int64_t item) noexcept {
    s_.free[item] = false;
    if (only_relevance()) return true;
    s_.base32[item] = kNever;
    for (std::int64_t at = start_; at < length_; ++at) {
      if (!agrees(item, s_.sequence[at])) return wrong(errors_.asymmetric, place(item, s_.sequence[at]));
    }
    if (length_ == 0) {
      for (std::int64_t i = 0; i < args_.items; ++i) {
        if (s_.free[i] && !agrees(item, i)) return wrong(errors_.asymmetric, place(item, i));
      }
    }
    s_.sequence[length_++] = item;
    if (args_.window == 0 || length_ - start_ <= args_.window - 1) return append(item);
    start_ = length_ - (args_.window - 1);
    forget();
    for (std::int64_t at = start_; at < length_; ++at) {
      if (!append(s_.sequence[at])) return false;
    }
    return true;
  }

  [[nodiscard]] bool agrees(std::int64_t i, std::int64_t j) const noexcept {
    if (!std::isfinite(matrix_.value(i, j))) return true;  // which is said when the row is read
    const double difference = std::abs(matrix_.value(i, j) - matrix_.value(j, i));
    return !(difference > 64.0 * unit_ * std::sqrt(matrix_.value(i, i) * matrix_.value(j, j)));
  }

  [[nodiscard]] bool append(std::int64_t item) noexcept {
    const double rho = s_.left[item];
    if (size_ == s_.capacity || !(rho > std::min(args_.epsilon, dpp_greedy::kNoDirection) * s_.diagonal[item])) {
      return true;  // it adds nothing to the span
    }
    double* row = s_.rows + size_ * s_.stride;
    wide_.read(matrix_, item, 1.0 - args_.gamma, row);
    for (std::int64_t v = 0; v < size_; ++v) s_.parts[v] = s_.rows[v * s_.stride + item];
    row[item] += args_.gamma;
    wide_.subtract(row, s_.rows, s_.stride, s_.parts, size_, s_.stride);
    const double inverse = 1.0 / std::sqrt(rho);
    for (std::int64_t i = 0; i < s_.stride; ++i) row[i] *= inverse;
    least_ = std::min(least_, rho / s_.diagonal[item]);
    ++size_;
    // What rounding of the matrix's own entries can make of a rho of 0, which the smallest of the picks' divides.
    const double allowed = -64.0 * static_cast<double>(size_ + 1) * unit_ / least_;
    bool good = true;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      // Also of items that were taken: a window enters them again.
      s_.left[i] -= row[i] * row[i];
      if (s_.free[i] && !(s_.left[i] >= allowed * s_.diagonal[i])) [[unlikely]] {
        // A NaN or an infinity comes from the row just read, for what was read before has been found to be finite.
        good = std::isfinite(matrix_.value(item, i)) ? wrong(errors_.indefinite, user_ * args_.items + i)
                                                     : wrong(errors_.not_finite, place(item, i));
      }
    }
    return good;
  }

  [[nodiscard]] std::int64_t select(double* gain) noexcept {
    float best32 = kNever;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      const double share = s_.left[i] / s_.diagonal[i];
      const bool spent = !(share >= args_.epsilon);
      s_.share[i] = spent || !(share > 1e-30) ? 1.0f : static_cast<float>(share);
      s_.score[i] = spent ? kNever : s_.base32[i];
    }
    const dpp_greedy::Forms& forms = dpp_greedy::forms();
    forms.offsets(s_.score, s_.share, args_.items, s_.score);
    for (std::int64_t i = 0; i < args_.items; ++i) best32 = s_.score[i] > best32 ? s_.score[i] : best32;
    if (best32 == kNever) return -1;
    // float32 is off by less than 2e-6 (1 + |base| + |log|), the logarithm is above -70, and base is their difference.
    const float least = best32 - 4e-6f * (150.0f + std::fabs(best32));
    double best = -kInfinity;
    for (std::int64_t i = 0; i < args_.items; ++i) {
      if (s_.score[i] >= least && s_.score[i] > kNever) best = std::max(best, score(i));
    }
    const double equal = best - (dpp_greedy::kTie + dpp_greedy::kTieRelative * std::abs(best));
    for (std::int64_t i = 0; i < args_.items; ++i) {
      if (s_.score[i] < least || s_.score[i] == kNever) continue;
      *gain = score(i);
      if (*gain >= equal) return i;
    }
    return -1;
  }

  [[nodiscard]] double score(std::int64_t i) const noexcept {
    return s_.base[i] + std::log(s_.left[i] / s_.diagonal[i]);
  }

  const Args& args_;
  Scratch& s_;
  Errors& errors_;
  const item_panels::Forms& wide_;
  std::int64_t user_;
  Rows matrix_;
  const double* relevance_;
  double weight_;
  double unit_;             // rounding of the entries
  double greatest_ = 0.0;
  double least_ = 1.0;      // smallest share of a pick when it was picked
  std::int64_t size_ = 0;   // Cholesky rows
  std::int64_t length_ = 0; // of the sequence
  std::int64_t start_ = 0;  // where in it the picks begin that the next one sees
};

}  // namespace

std::int64_t scratch_bytes(const Args& args) noexcept {
  Pieces pieces(nullptr);
  [[maybe_unused]] const Scratch scratch(pieces, args);
  return pieces.used();
}

Outcome run(const Args& args) noexcept {
  const std::int64_t bytes = scratch_bytes(args);
  Errors errors;
  parallel_for_each(args.users, [&](std::int64_t index, int thread) {
    Pieces pieces(args.scratch + thread * bytes);
    Scratch scratch(pieces, args);
    User user(args, index, scratch, errors);
    if (user.prepare()) user.solve();
  });
  return {.not_finite = errors.not_finite.position(),
          .negative = errors.negative.position(),
          .asymmetric = errors.asymmetric.position(),
          .indefinite = errors.indefinite.position(),
          .relevance = errors.relevance.position()};
}

}  // namespace recfast::dpp_greedy_kernel
