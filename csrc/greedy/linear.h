// Rules whose term is linear in an item's row: score = w r_i + common - unit * <x_i, h>, x_i the row as packed. However
// many items were seen since a panel was last looked at, one product brings it up to date.
#pragma once

#include "greedy/engine.h"

namespace recfast::greedy {

class Linear {
 public:
  static constexpr bool kFallsWithinWindow = false;

  Linear(User& user, ByteArena& arena) noexcept
      : u_(user),
        past_(arena.take<double>((user.most + 2) * user.stride)),
        drift_(arena.take<double>(user.most + 2)),
        drift_of_(arena.take<std::int32_t>(user.most + 2)),
        age_(arena.take<std::int32_t>(user.panels)),
        h32_(arena.take<float>(user.args.width)) {}

  [[nodiscard]] float first(std::int64_t) const noexcept { return static_cast<float>(kRounding * u_.offsets()); }
  [[nodiscard]] bool picked(std::int64_t) const noexcept { return false; }
  [[nodiscard]] bool fresh(std::int64_t b) const noexcept { return age_[b] == step_; }

  [[nodiscard]] float refresh(std::int64_t b) noexcept {
    alignas(64) float out[kPanel];
    const std::int64_t width = u_.args.width;
    u_.forms.products(u_.packed + b * kPanel * width, h32_, width, 1, width, out);
    const float* offset = u_.offset + b * kPanel;
    float* upper = u_.upper + b * kPanel;
    for (std::int64_t l = 0; l < kPanel; ++l) upper[l] = offset[l] - out[l] + slack_;
    age_[b] = step_;
    return greatest(upper);
  }

 protected:
  // Step 0: h = 0, for which upper bounds are the offsets.
  void restart() noexcept {
    step_ = 0;
    std::fill_n(past_, u_.stride, 0.0);
    std::fill_n(age_, u_.panels, 0);
    std::fill_n(h32_, u_.args.width, 0.0f);
    std::fill_n(drift_of_, u_.most + 2, -1);
    slack_ = static_cast<float>(kRounding * u_.offsets());
  }

  // The next step's h = factor * vector; `size` bounds |<x, h>| / factor for any row.
  void next(const double* vector, double factor, double size) noexcept {
    double* h = past_ + ++step_ * u_.stride;
    for (std::int64_t c = 0; c < u_.stride; ++c) h[c] = factor * vector[c];
    for (std::int64_t c = 0; c < u_.args.width; ++c) h32_[c] = static_cast<float>(h[c]);
    size *= std::abs(factor);
    // In proportion to what there is: where relevance does not count, terms may shrink by many orders along a list.
    slack_ = static_cast<float>(dot_error(u_.args.width) * size + kRounding * (u_.offsets() + size));
  }

  // rise(now, then): by how much <x, -h> may have grown.
  template <class Rise>
  [[nodiscard]] double drift_by(std::int64_t b, const Rise& rise) noexcept {
    const std::int32_t age = age_[b];
    if (age == step_) return 0.0;
    if (drift_of_[age] != step_) {
      drift_of_[age] = step_;
      // Its own rounding is far below a millionth.
      drift_[age] = 1.000001 * rise(past_ + step_ * u_.stride, past_ + age * u_.stride);
    }
    return drift_[age];
  }

  User& u_;

 private:
  double* past_;           // [most + 2, stride] h of every step
  double* drift_;          // [most + 2] by how much bounds of that step may have become too low
  std::int32_t* drift_of_; // [most + 2] at which step
  std::int32_t* age_;      // [panels] the step of its bounds
  float* h32_;             // [D]
  std::int32_t step_ = 0;
  float slack_ = 0.0f;
};

// Sums of values in eight parts, whose order the compiler may keep in vectors.
template <class F>
[[nodiscard]] double summed(std::int64_t size, const F& value) noexcept {
  double sums[8] = {};
  for (std::int64_t c = 0; c < size; c += 8) {
    for (int l = 0; l < 8; ++l) sums[l] += value(c + l);
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

}  // namespace recfast::greedy
