#include "xquad_greedy/xquad_greedy.h"

#include <cstring>

#include "greedy/linear.h"

namespace recfast::xquad_greedy {
namespace {

class Topics : public greedy::Linear {
 public:
  using Options = xquad_greedy::Options;
  static constexpr bool kFirstByRelevance = false;

  Topics(greedy::User& user, const Options& options, greedy::ByteArena& arena) noexcept
      : Linear(user, arena), all_(options.preferences), left_(arena.take<double>(user.stride)) {}

  [[nodiscard]] double measure(const item_panels::Rows& rows, std::int64_t item) const noexcept {
    if (rows.format == Format::kFloat32 && all_within(rows.at(item), rows.width)) return 1.0;
    u_.forms.read(rows, item, 1.0, u_.row);
    int good = 1;
    for (std::int64_t c = 0; c < u_.stride; ++c) good &= static_cast<int>(u_.row[c] >= 0.0) & (u_.row[c] <= 1.0);
    return good != 0 ? 1.0 : -1.0;
  }

  void begin() noexcept {
    wanted_ = all_ + u_.index * u_.args.width;
    total_ = 0.0;
    for (std::int64_t c = 0; c < u_.args.width; ++c) total_ += wanted_[c];
    std::fill_n(left_, u_.stride, 0.0);
    std::copy_n(wanted_, u_.args.width, left_);
  }

  [[nodiscard]] double amplitude() const noexcept { return u_.diversity * total_; }
  [[nodiscard]] double magnitude() const noexcept { return amplitude(); }
  [[nodiscard]] double common() const noexcept { return 0.0; }

  void scaled() noexcept {
    restart();
    advance();
  }

  [[nodiscard]] double scale(std::int64_t) const noexcept { return 1.0; }

  void see(std::int64_t row) noexcept {
    if (u_.args.window == 0) {
      serve(row);
    } else {
      std::copy_n(wanted_, u_.args.width, left_);
      for (std::int64_t at = u_.start; at < u_.length; ++at) serve(u_.sequence[at]);
    }
    advance();
  }

  [[nodiscard]] double drift(std::int64_t b) noexcept {
    return drift_by(b, [&](const double* now, const double* then) {
      return greedy::summed(u_.stride, [&](std::int64_t c) { return then[c] > now[c] ? then[c] - now[c] : 0.0; });
    });
  }

  [[nodiscard]] double term(std::int64_t item) noexcept {
    double product = 0.0;
    u_.forms.read(u_.rows, item, 1.0, u_.row);
    u_.forms.dots(u_.row, left_, u_.stride, 1, u_.stride, &product);
    return u_.diversity * product;
  }

 private:
  // Whether all are in [0, 1], by their bits: those of numbers without sign are in the order of the numbers. (-0.0, which
  // is allowed too, is left to the slower way.)
  [[nodiscard]] static bool all_within(const std::byte* row, std::int64_t width) noexcept {
    constexpr std::uint32_t kOne = 0x3F800000;
    std::uint32_t signs = 0;
    for (std::int64_t c = 0; c < width; ++c) {
      std::uint32_t bits;
      std::memcpy(&bits, row + c * 4, sizeof bits);
      signs |= bits | (kOne - bits);
    }
    return signs >> 31 == 0;
  }

  void serve(std::int64_t row) noexcept {
    u_.forms.read(u_.raw, row, 1.0, u_.row);
    for (std::int64_t c = 0; c < u_.stride; ++c) left_[c] *= 1.0 - u_.row[c];
  }

  void advance() noexcept {
    next(left_, -u_.diversity / u_.unit, greedy::summed(u_.stride, [&](std::int64_t c) { return left_[c]; }));
  }

  const double* all_;
  const double* wanted_ = nullptr;  // [Z]
  double* left_;                    // [stride] of that, what is not served
  double total_ = 0.0;  // of wanted
};

}  // namespace

std::int64_t scratch_bytes(const greedy::Args& args, const Options& options) noexcept {
  return greedy::scratch_bytes<Topics>(args, options);
}

greedy::Outcome run(const greedy::Args& args, const Options& options) noexcept {
  return greedy::run<Topics>(args, options);
}

}  // namespace recfast::xquad_greedy
