// The rows of embedding_update, one thread. Plain loops that a compiler vectorises: this file is included, in an
// unnamed namespace, once for each instruction set inside its `#pragma GCC target` region. No product is contracted
// with a sum, and sums have lanes of their own, so all copies give the same bits.

constexpr int kLanes = 16;

// To the nearest integer, ties to even, for |x| < 2^22: beyond the constant no bit is left for a fraction.
inline float nearest(float x) noexcept {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (x + kShift) - kShift;
}

inline float floor_small(float x) noexcept {
  const float rounded = nearest(x);
  return rounded > x ? rounded - 1.0f : rounded;
}

inline float fold(float (&lanes)[kLanes]) noexcept {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Buffers hold zeros from the width to padded(width), so these loops need no tail.
inline float sum_of_squares(const float* x, std::int64_t size) noexcept {
  float lanes[kLanes] = {};
  for (std::int64_t d = 0; d < size; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[d + lane] * x[d + lane];
  }
  return fold(lanes);
}

inline float step_gradient(const float* g, const float* w, std::int64_t size, float inverse) noexcept {
  float lanes[kLanes] = {};
  for (std::int64_t d = 0; d < size; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      float x = w[d + lane] * inverse;
      x = x > -128.0f ? x : -128.0f;
      x = x < 127.0f ? x : 127.0f;
      const float inside = nearest(x) - x;
      const float factor = x <= -128.0f ? -128.0f : x >= 127.0f ? 127.0f : inside;
      lanes[lane] += g[d + lane] * factor;
    }
  }
  return fold(lanes);
}

inline float largest_size(const float* x, std::int64_t size) noexcept {
  float lanes[kLanes] = {};
  for (std::int64_t d = 0; d < size; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float magnitude = std::fabs(x[d + lane]);
      lanes[lane] = magnitude > lanes[lane] ? magnitude : lanes[lane];
    }
  }
  float largest = 0.0f;
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// Fills u[0, full): column d has word d % 4 of block d / 4. The includer's draw_unit makes kUnit columns at once.
inline void draw(std::uint64_t seed, std::uint32_t step_count, std::uint32_t table_id, std::uint32_t row,
                 std::int64_t full, float* u) noexcept {
  std::int64_t d = 0;
  for (; d + kUnit <= full; d += kUnit) {
    draw_unit(seed, step_count, table_id, row, static_cast<std::uint32_t>(d / 4), u + d);
  }
  if (d < full) {
    float unit[kUnit];
    draw_unit(seed, step_count, table_id, row, static_cast<std::uint32_t>(d / 4), unit);
    for (std::int64_t i = d; i < full; ++i) u[i] = unit[i - d];
  }
}

// Writes the codes of w / step; returns how many were clipped. `u` null: to the nearest. Spends w.
inline std::int64_t round_row(float* w, std::int64_t full, std::int64_t width, float step, const float* u,
                              std::int8_t* codes) noexcept {
  const float inverse = 1.0f / step;
  std::int32_t clipped = 0;
  for (std::int64_t d = 0; d < full; ++d) {
    float x = w[d] * inverse;
    clipped += static_cast<std::int32_t>(x < -128.0f) + static_cast<std::int32_t>(x > 127.0f);
    x = x > -128.0f ? x : -128.0f;
    w[d] = x < 127.0f ? x : 127.0f;
  }
  if (u == nullptr) {
    for (std::int64_t d = 0; d < full; ++d) w[d] = nearest(w[d]);
  } else {
    // Comparing the exact fraction, instead of adding u first, leaves no rounding that could bias the draw.
    for (std::int64_t d = 0; d < full; ++d) {
      const float floor = floor_small(w[d]);
      w[d] = floor + (u[d] < w[d] - floor ? 1.0f : 0.0f);
    }
  }
  std::int32_t whole[kLanes];
  for (std::int64_t d = 0; d < width; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) whole[lane] = static_cast<std::int32_t>(w[d + lane]);
    const std::int64_t count = width - d < kLanes ? width - d : kLanes;
    if (count == kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) codes[d + lane] = static_cast<std::int8_t>(whole[lane]);
    } else {
      for (std::int64_t lane = 0; lane < count; ++lane) codes[d + lane] = static_cast<std::int8_t>(whole[lane]);
    }
  }
  for (std::int64_t d = width; d < full; ++d) w[d] = 0.0f;
  return clipped;
}

template <class Value>
inline std::int64_t update_row(const Args<Value>& args, const std::uint64_t* first, const std::uint64_t* last, float* g,
                        float* w) noexcept {
  constexpr bool kCodes = std::is_same_v<Value, std::int8_t>;
  const std::int64_t width = args.table.width;
  const std::int64_t full = padded(width);
  const std::int64_t row = group_row(*first);
  Value* const stored = args.table[row];

  embedding_bag::sum_run(args.gradient, first, last, g);
  if (args.grad_scale != 1.0f) {
    for (std::int64_t d = 0; d < width; ++d) g[d] *= args.grad_scale;
  }
  float step = 1.0f;
  if constexpr (kCodes) {
    step = std::max(args.step[row], kStepFloor);
    std::int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) w[d + lane] = step * static_cast<float>(stored[d + lane]);
    }
    for (; d < width; ++d) w[d] = step * static_cast<float>(stored[d]);
  } else {
    for (std::int64_t d = 0; d < width; ++d) w[d] = stored[d];
  }

  const float decay = args.weight_decay;
  float* const moment = args.moment;
  if (args.optimizer == Optimizer::kAdagrad) {
    float* const m = moment + row * width;
    for (std::int64_t d = 0; d < width; ++d) {
      const float h = g[d] + decay * w[d];
      m[d] += h * h;
      w[d] -= args.lr * h / (std::sqrt(m[d]) + args.eps);
    }
  } else {
    float rate = args.lr;
    if (args.optimizer == Optimizer::kRowwiseAdagrad) {
      float squares;
      if (decay == 0.0f) {
        squares = sum_of_squares(g, full);
      } else {
        float lanes[kLanes] = {};
        for (std::int64_t d = 0; d < full; d += kLanes) {
          for (int lane = 0; lane < kLanes; ++lane) {
            const float h = g[d + lane] + decay * w[d + lane];
            lanes[lane] += h * h;
          }
        }
        squares = fold(lanes);
      }
      moment[row] += squares / static_cast<float>(width);
      rate = args.lr / (std::sqrt(moment[row]) + args.eps);
    }
    for (std::int64_t d = 0; d < width; ++d) w[d] -= rate * (g[d] + decay * w[d]);
  }

  if constexpr (!kCodes) {
    for (std::int64_t d = 0; d < width; ++d) stored[d] = w[d];
    return 0;
  } else {
    if (args.step_rule != StepRule::kFixed) {
      float t = args.step_scale * step_gradient(g, w, full, 1.0f / step);
      if (args.step_rule == StepRule::kAdagrad) {
        float& v = args.step_moment[row];
        v += t * t;
        t /= std::sqrt(v) + kStepEps;
      }
      step = std::max(step - args.step_lr * t, kStepFloor);
    }
    if (args.grow) {
      // A little more than needed, so that no rounding lifts the largest weight over the last code.
      const float needed = largest_size(w, full) * (1.000001f / 127.0f);
      if (needed > step && needed <= std::numeric_limits<float>::max()) step = needed;
    }
    args.step[row] = step;
    float* u = nullptr;
    if (args.stochastic) {
      u = g;  // the gradient has done its work
      draw(args.seed, args.step_count, args.table_id, static_cast<std::uint32_t>(row), full, u);
    }
    const std::int64_t clipped = round_row(w, full, width, step, u, stored);
    if (u != nullptr) {
      for (std::int64_t d = width; d < full; ++d) u[d] = 0.0f;
    }
    return clipped;
  }
}

// Runs [first, last) with the buffers g and w of padded(width) values, zeros beyond the width before and after.
template <class Value>
inline std::int64_t rows(const Args<Value>& args, std::int64_t first, std::int64_t last, float* g, float* w) noexcept {
  constexpr std::int64_t kAhead = 8;
  const auto bytes = args.table.width * static_cast<std::int64_t>(sizeof(Value));
  std::int64_t count = 0;
  for (std::int64_t index = first; index < last; ++index) {
    if (index + kAhead < args.runs) {
      const std::uint64_t next = args.sorted[args.starts[index + kAhead]];
      const std::int64_t row = group_row(next);
      const auto* line = reinterpret_cast<const char*>(args.table[row]);
      for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 1, 2);
      const float* grad = args.gradient.at(group_position(next));
      for (std::int64_t d = 0; d < args.table.width; d += 16) __builtin_prefetch(grad + d, 0, 2);
      if (args.step != nullptr) __builtin_prefetch(args.step + row, 1, 2);
      if (args.optimizer == Optimizer::kRowwiseAdagrad) __builtin_prefetch(args.moment + row, 1, 2);
      if (args.step_rule == StepRule::kAdagrad) __builtin_prefetch(args.step_moment + row, 1, 2);
    }
    count += update_row(args, args.sorted + args.starts[index], args.sorted + args.starts[index + 1], g, w);
  }
  return count;
}
