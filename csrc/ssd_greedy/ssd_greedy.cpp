#include "ssd_greedy/ssd_greedy.h"

#include "greedy/engine.h"

namespace recfast::ssd_greedy {
namespace {

using greedy::kPanel;
using greedy::kUlp;

// Below this share the difference 1 - sum <b, q>^2 has lost digits, and what is left of the row itself is measured.
constexpr double kCancelled = 1e-2;

// x[l] = sqrt(x[l]) of a panel.
void roots(float* x) noexcept {
#if defined(__SSE2__)
  for (std::int64_t l = 0; l < kPanel; l += 4) _mm_store_ps(x + l, _mm_sqrt_ps(_mm_load_ps(x + l)));
#else
  for (std::int64_t l = 0; l < kPanel; ++l) x[l] = std::sqrt(x[l]);
#endif
}

class Outside {
 public:
  using Options = ssd_greedy::Options;
  static constexpr bool kFirstByRelevance = true;
  static constexpr bool kFallsWithinWindow = true;

  Outside(greedy::User& user, const Options& options, greedy::ByteArena& arena) noexcept
      : u_(user),
        options_(options),
        // Rows of D values span no more than D directions; the published form keeps one for each item seen.
        capacity_(options.paper ? user.most : std::min(user.most, user.args.width)),
        share_(arena.take<float>(u_.panels * kPanel)),
        size_(arena.take<float>(u_.panels * kPanel)),
        age_(arena.take<std::int32_t>(u_.panels)),
        from_(arena.take<std::int32_t>(u_.panels)),
        wide_(arena.take<double>(u_.panels * kPanel)),
        seen_(arena.take<std::int32_t>(u_.panels * kPanel)),
        seen_from_(arena.take<std::int32_t>(u_.panels * kPanel)),
        directions_(arena.take<double>(capacity_ * u_.stride)),
        directions32_(arena.take<float>(capacity_ * u_.args.width)),
        parts_(arena.take<double>(capacity_)) {}

  [[nodiscard]] double measure(const item_panels::Rows& rows, std::int64_t item) const noexcept {
    return u_.forms.squared_norm(rows, item);
  }

  void begin() noexcept {
    count_ = first_ = latest_start_ = 0;
    volume_ = scanned_volume_ = 1.0;
    std::fill_n(seen_from_, u_.args.items, -1);
    for (std::int64_t i = 0; i < u_.args.items; ++i) u_.norm[i] = u_.free[i] ? std::sqrt(u_.norm[i]) : 0.0;
  }

  [[nodiscard]] double amplitude() const noexcept {
    return u_.diversity * options_.gamma * scanned_volume_ * u_.norm_largest;
  }
  [[nodiscard]] double magnitude() const noexcept {
    return u_.diversity * options_.gamma * volume_ * u_.norm_largest;
  }
  [[nodiscard]] double common() const noexcept { return 0.0; }

  void scaled() noexcept {
    const double factor = u_.diversity * options_.gamma * scanned_volume_ / u_.unit;
    for (std::int64_t i = 0; i < u_.args.items; ++i) size_[i] = static_cast<float>(factor * u_.norm[i]);
    std::fill(size_ + u_.args.items, size_ + u_.panels * kPanel, 0.0f);
    std::fill_n(from_, u_.panels, -1);
  }

  [[nodiscard]] double scale(std::int64_t item) const noexcept {
    return u_.norm[item] > 0.0 ? 1.0 / u_.norm[item] : 0.0;
  }

  [[nodiscard]] float first(std::int64_t item) const noexcept {
    return size_[item] + static_cast<float>(greedy::kRounding);
  }

  void see(std::int64_t row) noexcept {
    const std::int64_t within = u_.args.window;
    if (options_.paper) {
      // What is about to leave the window still counts for the new direction.
      const std::int64_t before = u_.length - 1;
      first_ = within == 0 ? 0 : std::max<std::int64_t>(0, before - (within - 1));
      count_ = before;
      append(row);
      first_ = u_.start;
    } else if (u_.start == latest_start_) {
      append(row);
    } else {
      count_ = 0;
      for (std::int64_t at = u_.start; at < u_.length; ++at) append(u_.sequence[at]);
    }
    latest_start_ = u_.start;
  }

  [[nodiscard]] bool picked(std::int64_t) noexcept {
    if (!options_.volume) return false;
    volume_ = std::min(volume_ * latest_, kMostVolume);
    if (volume_ <= scanned_volume_) return false;
    scanned_volume_ = volume_;
    return true;
  }

  [[nodiscard]] double drift(std::int64_t) const noexcept { return 0.0; }

  [[nodiscard]] bool fresh(std::int64_t b) const noexcept { return from_[b] == u_.start && age_[b] == count_; }

  [[nodiscard]] float refresh(std::int64_t b) noexcept {
    constexpr std::int64_t kAtOnce = 8;
    alignas(64) float out[kAtOnce * kPanel];
    float* share = share_ + b * kPanel;
    if (from_[b] != u_.start) {
      std::fill_n(share, kPanel, 1.0f);
      from_[b] = static_cast<std::int32_t>(u_.start);
      age_[b] = static_cast<std::int32_t>(first_);
    }
    const std::int64_t width = u_.args.width;
    for (std::int64_t at = age_[b]; at < count_; at += kAtOnce) {
      const std::int64_t count = std::min(kAtOnce, count_ - at);
      u_.forms.products(u_.packed + b * kPanel * width, directions32_ + at * width, width, count, width, out);
      for (std::int64_t v = 0; v < count; ++v) {
        for (std::int64_t l = 0; l < kPanel; ++l) share[l] -= out[v * kPanel + l] * out[v * kPanel + l];
      }
    }
    age_[b] = static_cast<std::int32_t>(count_);
    const auto t = static_cast<double>(count_ - first_);
    const double d = static_cast<double>(width) + 4.0;
    const auto slack = static_cast<float>(1.01 * kUlp * (2.0 * d * std::sqrt(t) + 2.0 * t + 4.0) +
                                          t * d * kUlp * d * kUlp);
    // Of numbers up to 1, the volume's share of what the sizes were made with.
    const auto volume = static_cast<float>(volume_ / scanned_volume_);
    for (std::int64_t l = 0; l < kPanel; ++l) {
      const float most = share[l] + slack;
      out[l] = most > 0.0f ? most : 0.0f;
    }
    roots(out);
    const float* offset = u_.offset + b * kPanel;
    const float* size = size_ + b * kPanel;
    float* upper = u_.upper + b * kPanel;
    constexpr auto kMore = static_cast<float>(greedy::kRounding);
    for (std::int64_t l = 0; l < kPanel; ++l) upper[l] = offset[l] + volume * size[l] * out[l] + kMore;
    return greedy::greatest(upper);
  }

  [[nodiscard]] double term(std::int64_t item) noexcept {
    latest_ = u_.norm[item] * std::sqrt(left(item));
    return u_.diversity * options_.gamma * volume_ * latest_;
  }

 private:
  // The item's share of its squared norm that is left.
  [[nodiscard]] double left(std::int64_t item) noexcept {
    if (seen_from_[item] != u_.start) {
      seen_from_[item] = static_cast<std::int32_t>(u_.start);
      seen_[item] = static_cast<std::int32_t>(first_);
      wide_[item] = 1.0;
    }
    if (wide_[item] == 0.0 || count_ == first_) return wide_[item];
    u_.forms.read(u_.rows, item, scale(item), u_.row);
    const std::int64_t from = seen_[item];
    u_.forms.dots(u_.row, directions_ + from * u_.stride, u_.stride, count_ - from, u_.stride, parts_);
    for (std::int64_t v = 0; v < count_ - from; ++v) wide_[item] -= parts_[v] * parts_[v];
    seen_[item] = static_cast<std::int32_t>(count_);
    if (wide_[item] > kCancelled) return wide_[item];
    const double measured = take_directions();
    if (measured >= kSpent) return measured;
    // As long as nothing leaves the window it stays spent, and its bound need not allow for float32.
    wide_[item] = 0.0;
    if (u_.args.window == 0) size_[item] = 0.0f;
    return 0.0;
  }

  // user.row, of norm 1 or 0, less its projection on the directions; returns the squared norm that is left.
  [[nodiscard]] double take_directions() noexcept {
    const double* directions = directions_ + first_ * u_.stride;
    const std::int64_t count = count_ - first_;
    for (int pass = 0; pass < 2; ++pass) {  // the second against what rounding left
      u_.forms.dots(u_.row, directions, u_.stride, count, u_.stride, parts_);
      u_.forms.subtract(u_.row, directions, u_.stride, parts_, count, u_.stride);
    }
    double squared = 0.0;
    u_.forms.dots(u_.row, u_.row, u_.stride, 1, u_.stride, &squared);
    return squared;
  }

  void append(std::int64_t row) noexcept {
    if (count_ == capacity_) return;
    const double norm = std::sqrt(u_.forms.squared_norm(u_.raw, row));
    u_.forms.read(u_.raw, row, norm > 0.0 ? 1.0 / norm : 0.0, u_.row);
    const double squared = take_directions();
    const bool spent = squared < kSpent;
    if (spent && !options_.paper) return;  // it adds nothing to the span
    double* to = directions_ + count_ * u_.stride;
    float* rounded = directions32_ + count_ * u_.args.width;
    const double inverse = spent ? 0.0 : 1.0 / std::sqrt(squared);
    for (std::int64_t c = 0; c < u_.stride; ++c) to[c] = u_.row[c] * inverse;
    for (std::int64_t c = 0; c < u_.args.width; ++c) rounded[c] = static_cast<float>(to[c]);
    ++count_;
  }

  greedy::User& u_;
  Options options_;
  std::int64_t capacity_;
  float* share_;              // [panels, 64] of the squared norm, what is left outside directions [first, age) of the panel
  float* size_;               // [panels, 64] the term of an item of which all is left, in units
  std::int32_t* age_;         // [panels]
  std::int32_t* from_;        // [panels] the start of the window then; -1: none yet
  double* wide_;              // [items] the share in float64, brought up to date only for contenders; 0: spent
  std::int32_t* seen_;
  std::int32_t* seen_from_;
  double* directions_;        // [capacity, stride] orthonormal
  float* directions32_;       // [capacity, D]
  double* parts_;             // [capacity]
  std::int64_t first_ = 0;    // directions [first, count) count
  std::int64_t count_ = 0;
  std::int64_t latest_start_ = 0;
  double volume_ = 1.0;
  double scanned_volume_ = 1.0;  // that sizes were made with; never below the volume
  double latest_ = 0.0;          // sqrt(rho) of the item looked at last
};

}  // namespace

std::int64_t scratch_bytes(const greedy::Args& args, const Options& options) noexcept {
  return greedy::scratch_bytes<Outside>(args, options);
}

greedy::Outcome run(const greedy::Args& args, const Options& options) noexcept {
  return greedy::run<Outside>(args, options);
}

}  // namespace recfast::ssd_greedy
