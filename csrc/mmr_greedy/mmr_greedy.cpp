#include "mmr_greedy/mmr_greedy.h"

#include "greedy/engine.h"

namespace recfast::mmr_greedy {
namespace {

using greedy::kNever;
using greedy::kPanel;

class Closest {
 public:
  using Options = mmr_greedy::Options;
  static constexpr bool kFirstByRelevance = true;
  static constexpr bool kFallsWithinWindow = true;

  Closest(greedy::User& user, const Options& options, greedy::ByteArena& arena) noexcept
      : u_(user),
        clip_(options.clip),
        closest_(arena.take<float>(u_.panels * kPanel)),
        age_(arena.take<std::int32_t>(u_.panels)),
        from_(arena.take<std::int32_t>(u_.panels)),
        wide_(arena.take<double>(u_.panels * kPanel)),
        seen_(arena.take<std::int32_t>(u_.panels * kPanel)),
        seen_from_(arena.take<std::int32_t>(u_.panels * kPanel)),
        picks_(arena.take<double>(u_.most * u_.stride)),
        picks32_(arena.take<float>(u_.most * u_.args.width)),
        parts_(arena.take<double>(u_.most)) {}

  [[nodiscard]] double measure(const item_panels::Rows& rows, std::int64_t item) const noexcept {
    return u_.forms.squared_norm(rows, item);
  }

  void begin() noexcept {
    scale_ = u_.norm_largest > 0.0 ? 1.0 / u_.norm_largest : 0.0;
    square_ = u_.norm_largest * u_.norm_largest;
    std::fill_n(seen_from_, u_.args.items, -1);
  }

  [[nodiscard]] double amplitude() const noexcept { return u_.diversity * square_; }
  [[nodiscard]] double magnitude() const noexcept { return amplitude(); }
  [[nodiscard]] double common() const noexcept { return 0.0; }

  void scaled() noexcept {
    factor_ = static_cast<float>(amplitude() / u_.unit);
    slack_ = static_cast<float>(greedy::dot_error(u_.args.width) + greedy::kRounding);
    top_ = square_ > 0.0 ? static_cast<float>(std::min(1.0 / square_, 2.0)) : 2.0f;
    std::fill_n(from_, u_.panels, -1);
  }

  [[nodiscard]] double scale(std::int64_t) const noexcept { return scale_; }

  // No row is further off than the opposite of another.
  [[nodiscard]] float first(std::int64_t) const noexcept { return (clip_ ? 0.0f : factor_) + slack_; }

  void see(std::int64_t row) noexcept {
    double* to = picks_ + (u_.length - 1) * u_.stride;
    float* rounded = picks32_ + (u_.length - 1) * u_.args.width;
    u_.forms.read(u_.raw, row, scale_, to);
    for (std::int64_t c = 0; c < u_.args.width; ++c) rounded[c] = static_cast<float>(to[c]);
  }

  [[nodiscard]] bool picked(std::int64_t) const noexcept { return false; }
  [[nodiscard]] double drift(std::int64_t) const noexcept { return 0.0; }

  [[nodiscard]] bool fresh(std::int64_t b) const noexcept { return from_[b] == u_.start && age_[b] == u_.length; }

  [[nodiscard]] float refresh(std::int64_t b) noexcept {
    constexpr std::int64_t kAtOnce = 8;
    alignas(64) float out[kAtOnce * kPanel];
    float* closest = closest_ + b * kPanel;
    if (from_[b] != u_.start) {
      std::fill_n(closest, kPanel, -2.0f);  // below what any two rows can have
      from_[b] = static_cast<std::int32_t>(u_.start);
      age_[b] = from_[b];
    }
    const std::int64_t width = u_.args.width;
    for (std::int64_t at = age_[b]; at < u_.length; at += kAtOnce) {
      const std::int64_t count = std::min(kAtOnce, u_.length - at);
      u_.forms.products(u_.packed + b * kPanel * width, picks32_ + at * width, width, count, width, out);
      for (std::int64_t v = 0; v < count; ++v) {
        for (std::int64_t l = 0; l < kPanel; ++l) {
          closest[l] = out[v * kPanel + l] > closest[l] ? out[v * kPanel + l] : closest[l];
        }
      }
    }
    age_[b] = static_cast<std::int32_t>(u_.length);
    const float* offset = u_.offset + b * kPanel;
    float* upper = u_.upper + b * kPanel;
    const float low = clip_ ? 0.0f : -2.0f;
    const float high = clip_ ? top_ : 2.0f;
    for (std::int64_t l = 0; l < kPanel; ++l) {
      float m = closest[l] > low ? closest[l] : low;
      m = m < high ? m : high;
      upper[l] = offset[l] - factor_ * m + slack_;
    }
    return greedy::greatest(upper);
  }

  [[nodiscard]] double term(std::int64_t item) noexcept {
    if (u_.start == u_.length) return 0.0;
    if (seen_from_[item] != u_.start) {
      seen_from_[item] = static_cast<std::int32_t>(u_.start);
      seen_[item] = seen_from_[item];
      wide_[item] = -greedy::kInfinity;
    }
    if (const std::int64_t count = u_.length - seen_[item]; count > 0) {
      u_.forms.read(u_.rows, item, scale_, u_.row);
      u_.forms.dots(u_.row, picks_ + seen_[item] * u_.stride, u_.stride, count, u_.stride, parts_);
      for (std::int64_t v = 0; v < count; ++v) wide_[item] = std::max(wide_[item], parts_[v]);
      seen_[item] = static_cast<std::int32_t>(u_.length);
    }
    const double m = wide_[item] * square_;
    return -u_.diversity * (clip_ ? std::clamp(m, 0.0, 1.0) : m);
  }

 private:
  greedy::User& u_;
  bool clip_;
  float* closest_;            // [panels, 64] the greatest product with picks [from, age) of the panel
  std::int32_t* age_;         // [panels]
  std::int32_t* from_;        // [panels]; -1: none yet
  double* wide_;              // [items] the same in float64, brought up to date only for contenders
  std::int32_t* seen_;
  std::int32_t* seen_from_;
  double* picks_;             // [most, stride] rows of norm <= 1
  float* picks32_;            // [most, D]
  double* parts_;             // [most]
  double scale_ = 1.0;
  double square_ = 0.0;
  float factor_ = 0.0f;
  float slack_ = 0.0f;
  float top_ = 0.0f;          // a dot product of 1, of rows as they are packed
};

}  // namespace

std::int64_t scratch_bytes(const greedy::Args& args, const Options& options) noexcept {
  return greedy::scratch_bytes<Closest>(args, options);
}

greedy::Outcome run(const greedy::Args& args, const Options& options) noexcept {
  return greedy::run<Closest>(args, options);
}

}  // namespace recfast::mmr_greedy
