#include "msd_greedy/msd_greedy.h"

#include "greedy/linear.h"

namespace recfast::msd_greedy {
namespace {

class Distances : public greedy::Linear {
 public:
  using Options = msd_greedy::Options;
  static constexpr bool kFirstByRelevance = true;

  Distances(greedy::User& user, const Options& options, greedy::ByteArena& arena) noexcept
      : Linear(user, arena), mean_(options.mean), sum_(arena.take<double>(user.stride)) {}

  [[nodiscard]] double measure(const item_panels::Rows& rows, std::int64_t item) const noexcept {
    return u_.forms.squared_norm(rows, item);
  }

  void begin() noexcept {
    scale_ = u_.norm_largest > 0.0 ? 1.0 / u_.norm_largest : 0.0;
    square_ = u_.norm_largest * u_.norm_largest;
    std::fill_n(sum_, u_.stride, 0.0);
    oldest_ = 0;
  }

  [[nodiscard]] double amplitude() const noexcept { return u_.diversity * square_; }
  [[nodiscard]] double magnitude() const noexcept { return each() * seen() * (1.0 + square_); }
  [[nodiscard]] double common() const noexcept { return each() * seen(); }
  void scaled() noexcept { restart(); }
  [[nodiscard]] double scale(std::int64_t) const noexcept { return scale_; }

  void see(std::int64_t row) noexcept {
    u_.forms.read(u_.raw, row, scale_, u_.row);
    for (std::int64_t c = 0; c < u_.stride; ++c) sum_[c] += u_.row[c];
    for (; oldest_ < u_.start; ++oldest_) {
      u_.forms.read(u_.raw, u_.sequence[oldest_], scale_, u_.row);
      for (std::int64_t c = 0; c < u_.stride; ++c) sum_[c] -= u_.row[c];
    }
    const double size = std::sqrt(greedy::summed(u_.stride, [&](std::int64_t c) { return sum_[c] * sum_[c]; }));
    next(sum_, each() * square_ / u_.unit, size);
  }

  [[nodiscard]] double drift(std::int64_t b) noexcept {
    return drift_by(b, [&](const double* now, const double* then) {
      return std::sqrt(greedy::summed(u_.stride, [&](std::int64_t c) { return (now[c] - then[c]) * (now[c] - then[c]); }));
    });
  }

  [[nodiscard]] double term(std::int64_t item) noexcept {
    double product = 0.0;
    u_.forms.read(u_.rows, item, scale_, u_.row);
    u_.forms.dots(u_.row, sum_, u_.stride, 1, u_.stride, &product);
    return each() * (seen() - square_ * product);
  }

 private:
  [[nodiscard]] double seen() const noexcept { return static_cast<double>(u_.length - u_.start); }
  [[nodiscard]] double each() const noexcept { return mean_ ? u_.diversity / std::max(seen(), 1.0) : u_.diversity; }

  bool mean_;
  double* sum_;  // [stride] of the rows in the window, of norm <= 1
  double scale_ = 1.0;
  double square_ = 0.0;
  std::int64_t oldest_ = 0;  // in the sequence, of what is in the sum
};

}  // namespace

std::int64_t scratch_bytes(const greedy::Args& args, const Options& options) noexcept {
  return greedy::scratch_bytes<Distances>(args, options);
}

greedy::Outcome run(const greedy::Args& args, const Options& options) noexcept {
  return greedy::run<Distances>(args, options);
}

}  // namespace recfast::msd_greedy
