// The rows of embedding_update, one thread, over vectors of 16 columns. This file is included, in an unnamed namespace,
// once for each instruction set, after the primitives of that set: F (16 floats), M (16 truths), the arithmetic, and
// for each format the reading (decode) and writing (encode) of 16 columns. All primitives round alike, and nothing is
// contracted, so all copies give the same bits.
//
// A primitive's name is its contract, but for these: larger(a, b) is a > b ? a : b, so b where one is NaN; smaller
// likewise; exponent_of(x) is the power of two at or below |x|, reciprocal_of_power its inverse; fold sums lanes 8, 4,
// 2, 1 apart.

#define RECFAST_INLINE __attribute__((always_inline))

// The state of 16 * kVectors columns in registers; kVectors 0: any width, in memory.
template <int kVectors>
struct Buffer {
  F value[kVectors];
  RECFAST_INLINE explicit Buffer(float*) noexcept {}
};
template <>
struct Buffer<0> {
  F* value;
  RECFAST_INLINE explicit Buffer(float* memory) noexcept : value(reinterpret_cast<F*>(memory)) {}
};

template <class Body, std::size_t... kIndex>
RECFAST_INLINE inline void unrolled(const Body& body, std::index_sequence<kIndex...>) noexcept {
  (body(static_cast<std::int64_t>(kIndex)), ...);
}

RECFAST_INLINE inline F bounded(F x, F low, F high) noexcept {  // NaN becomes `low`
  return smaller(larger(x, low), high);
}
RECFAST_INLINE inline F bounded_or_nan(F x, F low, F high) noexcept { return smaller(high, larger(low, x)); }

template <Format kFormat>
constexpr float kLowest = kFormat == Format::kFloat8 ? -kFloat8Max : static_cast<float>(lowest_code(kFormat));
template <Format kFormat>
constexpr float kHighest = kFormat == Format::kFloat8 ? kFloat8Max : static_cast<float>(highest_code(kFormat));

// x to a neighbour on the grid of whole numbers: up with probability x - floor(x), or the nearest. Comparing the exact
// fraction, instead of adding u first, leaves no rounding that could bias the draw.
RECFAST_INLINE inline F to_whole(F x, F u, bool stochastic) noexcept {
  if (!stochastic) return rounded(x);
  const F floor = floored(x);
  return add(floor, select(less(u, sub(x, floor)), set(1.0f), zero()));
}

// x to a neighbour on the grid of a binary format whose smallest normal exponent is `emin`. Exact but for the choice.
template <int kMantissa, int kEmin>
RECFAST_INLINE inline F to_grid(F x, F u, bool stochastic) noexcept {
  constexpr float kSmallest = 1.0f / static_cast<float>(1 << -kEmin);
  constexpr auto kSteps = static_cast<float>(1 << kMantissa);
  const F power = larger(exponent_of(x), set(kSmallest));
  const F scaled = mul(mul(x, reciprocal_of_power(power)), set(kSteps));
  return mul(mul(to_whole(scaled, u, stochastic), power), set(1.0f / kSteps));
}

template <Format kFormat, int kVectors>
class Row {
  static constexpr bool kStep = has_step(kFormat);
  static constexpr std::int64_t kBytes = 2 * bits_of(kFormat);  // of 16 columns
  static constexpr std::int64_t kHeader = kStep ? kHeaderBytes : 0;
  static constexpr std::int64_t kAhead = 16;
  static constexpr std::int64_t kGradientAhead = 12;
  using Values = Buffer<kVectors>;

 public:
  RECFAST_INLINE Row(const Args& args, float* buffers) noexcept
      : args_(args),
        rule_(args.rule),
        width_(kVectors > 0 ? 16 * kVectors : args.table.width),
        whole_(width_ / 16),
        tail_(width_ % 16),
        g_(buffers),
        w_(buffers + padded(width_)),
        x_(buffers + 2 * padded(width_)),
        draws_(args.rule.seed, args.rule.step_count, args.rule.table_id),
        moment_draws_(args.rule.seed, args.rule.step_count, args.rule.table_id ^ kMomentDomain) {}

  RECFAST_INLINE std::int64_t update(std::int64_t first, std::int64_t last) noexcept {
    std::int64_t clipped = 0;
    for (std::int64_t run = first; run < last; ++run) {
      prefetch(std::min(run + kAhead, args_.groups.runs - 1));
      const std::int64_t row = group_row(args_.groups.keys[args_.groups.starts[run]]);
      std::uint8_t* const stored = args_.table.data + row * args_.table.stride;
      sum_run(run);
      float step = 1.0f;
      if constexpr (kStep) step = read_step(stored);
      if (args_.phase == Phase::kSecond) {
        each([&](std::int64_t k) RECFAST_INLINE { w_.value[k] = part(args_.floats + run * width_, k); });
      } else {
        each([&](std::int64_t k) RECFAST_INLINE { w_.value[k] = read(stored, step, k); });
        optimise(row);
      }
      if (args_.phase == Phase::kFirst) {
        each([&](std::int64_t k) RECFAST_INLINE { put(args_.floats + run * width_, k, w_.value[k]); });
        write(stored, step, row, false);
        continue;
      }
      if constexpr (kStep) step = learn(step, row);
      clipped += write(stored, step, row, rule_.stochastic);
    }
    return clipped;
  }

  // One part of a long run.
  RECFAST_INLINE void sum_part(std::int64_t first, std::int64_t last, float* out) noexcept {
    sum(first, last, x_);
    each([&](std::int64_t k) RECFAST_INLINE { store(out + 16 * k, x_.value[k]); });
  }

  RECFAST_INLINE void slopes(std::int64_t first, std::int64_t last, float* out) noexcept {
    for (std::int64_t run = first; run < last; ++run) {
      const std::int64_t row = group_row(args_.groups.keys[args_.groups.starts[run]]);
      sum_run(run);
      each([&](std::int64_t k) RECFAST_INLINE { w_.value[k] = part(args_.floats + run * width_, k); });
      out[run - first] = slope(read_step(args_.table.data + row * args_.table.stride));
    }
  }

  RECFAST_INLINE std::int64_t requantize(std::int64_t first, std::int64_t last, float step) noexcept {
    const Grouped& groups = args_.groups;
    const auto row_of = [&](std::int64_t run) { return group_row(groups.keys[groups.starts[run]]); };
    std::int64_t run = 0;
    for (std::int64_t end = groups.runs; run < end;) {  // the first run at or after `first`
      const std::int64_t middle = (run + end) / 2;
      if (row_of(middle) < first) {
        run = middle + 1;
      } else {
        end = middle;
      }
    }
    std::int64_t clipped = 0;
    for (std::int64_t row = first; row < last; ++row) {
      std::uint8_t* const stored = args_.table.data + row * args_.table.stride;
      if (run < groups.runs && row_of(run) == row) {
        each([&](std::int64_t k) RECFAST_INLINE { w_.value[k] = part(args_.floats + run * width_, k); });
        ++run;
      } else {
        const float old = read_step(stored);
        each([&](std::int64_t k) RECFAST_INLINE { w_.value[k] = read(stored, old, k); });
      }
      clipped += write(stored, step, row, rule_.stochastic);
    }
    return clipped;
  }

 private:
  template <class Body>
  RECFAST_INLINE void each(const Body& body) const noexcept {
    if constexpr (kVectors > 0) {
      unrolled(body, std::make_index_sequence<kVectors>{});
    } else {
      const std::int64_t vectors = whole_ + (tail_ > 0);
      for (std::int64_t k = 0; k < vectors; ++k) body(k);
    }
  }

  // Columns 16k .. 16k + 15 of a row of floats, zeros beyond the width.
  RECFAST_INLINE F part(const float* values, std::int64_t k) const noexcept {
    if constexpr (kVectors == 0) {
      if (k >= whole_) return load_tail(values + 16 * k, tail_);
    }
    return load(values + 16 * k);
  }

  RECFAST_INLINE void put(float* values, std::int64_t k, F x) const noexcept {
    if constexpr (kVectors == 0) {
      if (k >= whole_) return store_tail(values + 16 * k, x, tail_);
    }
    store(values + 16 * k, x);
  }

  template <Format kOf>
  RECFAST_INLINE F codes(const std::uint8_t* row, std::int64_t k) const noexcept {
    constexpr std::int64_t bytes = 2 * bits_of(kOf);
    if constexpr (kVectors == 0) {
      if (k >= whole_) {
        std::uint8_t padded_codes[64] = {};
        std::memcpy(padded_codes, row + bytes * k, static_cast<std::size_t>(code_bytes(kOf, tail_)));
        return select(lanes_below(tail_), decode<kOf>(padded_codes), zero());
      }
    }
    return decode<kOf>(row + bytes * k);
  }

  template <Format kOf>
  RECFAST_INLINE void put_codes(std::uint8_t* row, std::int64_t k, F x) const noexcept {
    constexpr std::int64_t bytes = 2 * bits_of(kOf);
    if constexpr (kVectors == 0) {
      if (k >= whole_) {
        std::uint8_t padded_codes[64];
        encode<kOf>(padded_codes, x);
        std::memcpy(row + bytes * k, padded_codes, static_cast<std::size_t>(code_bytes(kOf, tail_)));
        return;
      }
    }
    encode<kOf>(row + bytes * k, x);
  }

  RECFAST_INLINE static float read_step(const std::uint8_t* stored) noexcept {
    const auto step = read_at<float>(stored);
    return step < kSmallestStep ? kStepFloor : step;
  }

  RECFAST_INLINE F read(const std::uint8_t* stored, float step, std::int64_t k) const noexcept {
    const F values = codes<kFormat>(stored + kHeader, k);
    if constexpr (kStep) return mul(set(step), values);
    return values;
  }

  RECFAST_INLINE static void prefetch_bytes(const void* address, std::int64_t bytes) noexcept {
    const auto* line = static_cast<const char*>(address);
    for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
    __builtin_prefetch(line + bytes - 1, 0, 2);
  }

  RECFAST_INLINE void prefetch(std::int64_t run) const noexcept {
    const std::int64_t row = group_row(args_.groups.keys[args_.groups.starts[run]]);
    const State& state = args_.state;
    prefetch_bytes(args_.table.data + row * args_.table.stride, kHeader + code_bytes(kFormat, width_));
    if (state.row != nullptr) __builtin_prefetch(state.row + row * state.row_stride, 0, 2);
    if (args_.phase == Phase::kSecond) return;
    if (state.moment != nullptr) {
      prefetch_bytes(static_cast<std::uint8_t*>(state.moment) + row * state.moment_stride,
                     state.moment_short ? kHeaderBytes + width_ : 4 * width_);
    }
    if (state.second != nullptr) prefetch_bytes(state.second + row * width_, 4 * width_);
  }

  RECFAST_INLINE void sum(std::int64_t first, std::int64_t last, Values& out) const noexcept {
    const SlotGradient& gradient = args_.gradient;
    const std::uint64_t* const keys = args_.groups.keys;
    const std::int64_t end = args_.groups.kept - 1;
    const bool plain = gradient.coefficient == nullptr && gradient.argmax == nullptr;
    each([&](std::int64_t k) RECFAST_INLINE { out.value[k] = zero(); });
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t later = gradient.bag(group_position(keys[std::min(i + kGradientAhead, end)]));
      for (std::int64_t d = 0; d < width_; d += 16) {
        __builtin_prefetch(gradient.grad + later * width_ + d, 0, 2);
      }
      const std::int64_t slot = group_position(keys[i]);
      const std::int64_t bag = gradient.bag(slot);
      const float* const grad = gradient.grad + bag * width_;
      if (plain) {
        each([&](std::int64_t k) RECFAST_INLINE { out.value[k] = add(out.value[k], part(grad, k)); });
        continue;
      }
      const F factor = set(gradient.coefficient == nullptr ? 1.0f : gradient.coefficient[slot]);
      const std::int32_t* const chosen = gradient.argmax == nullptr ? nullptr : gradient.argmax + bag * width_;
      each([&](std::int64_t k) RECFAST_INLINE {
        F x = mul(factor, part(grad, k));
        if (chosen != nullptr) {
          const std::int64_t lanes = std::min<std::int64_t>(16, width_ - 16 * k);
          x = select(lanes_equal(chosen + 16 * k, lanes, static_cast<std::int32_t>(slot)), x, zero());
        }
        out.value[k] = add(out.value[k], x);
      });
    }
  }

  // g = grad_scale * the sum of the run.
  RECFAST_INLINE void sum_run(std::int64_t run) noexcept {
    const std::int64_t first = args_.groups.starts[run];
    const std::int64_t last = args_.groups.starts[run + 1];
    sum(first, std::min(last, first + kPart), g_);
    if (last - first > kPart) [[unlikely]] add_parts(run, first, last);
    if (rule_.grad_scale != 1.0f) {
      const F scale = set(rule_.grad_scale);
      each([&](std::int64_t k) RECFAST_INLINE { g_.value[k] = mul(g_.value[k], scale); });
    }
  }

  RECFAST_INLINE void add_parts(std::int64_t run, std::int64_t first, std::int64_t last) noexcept {
    const float* sums = nullptr;
    if (args_.part_sums != nullptr) {
      const LongRun* const found =
          std::lower_bound(args_.long_runs, args_.long_runs + args_.long_run_count, run,
                           [](const LongRun& long_run, std::int64_t wanted) { return long_run.run < wanted; });
      sums = args_.part_sums + found->first_part * padded(width_);
    }
    for (std::int64_t from = first + kPart; from < last; from += kPart) {
      if (sums == nullptr) {
        sum(from, std::min(last, from + kPart), x_);
        each([&](std::int64_t k) RECFAST_INLINE { g_.value[k] = add(g_.value[k], x_.value[k]); });
      } else {
        each([&](std::int64_t k) RECFAST_INLINE { g_.value[k] = add(g_.value[k], load(sums + 16 * k)); });
        sums += padded(width_);
      }
    }
  }

  RECFAST_INLINE F pull(std::int64_t k) const noexcept {  // h
    return rule_.decay == 0.0f ? g_.value[k] : add(g_.value[k], mul(set(rule_.decay), w_.value[k]));
  }

  RECFAST_INLINE float mean_square() const noexcept {
    F squares = zero();
    each([&](std::int64_t k) RECFAST_INLINE {
      const F h = pull(k);
      squares = add(squares, mul(h, h));
    });
    return fold(squares) / static_cast<float>(width_);
  }

  RECFAST_INLINE void descend(float rate) noexcept {
    const F factor = set(rate);
    each([&](std::int64_t k) RECFAST_INLINE { w_.value[k] = sub(w_.value[k], mul(factor, pull(k))); });
  }

  RECFAST_INLINE void optimise(std::int64_t row) noexcept {
    const State& state = args_.state;
    if (rule_.keep != 1.0f) {
      each([&](std::int64_t k) RECFAST_INLINE { w_.value[k] = mul(w_.value[k], set(rule_.keep)); });
    }
    switch (rule_.optimizer) {
      case Optimizer::kSgd: return descend(rule_.lr);
      case Optimizer::kRowwiseAdagrad: {
        float& second = state.row[row * state.row_stride + state.second_column];
        second += mean_square();
        return descend(rule_.lr / (std::sqrt(second) + rule_.eps));
      }
      case Optimizer::kAdagrad: {
        float* const second = state.second + row * width_;
        each([&](std::int64_t k) RECFAST_INLINE {
          const F h = pull(k);
          const F v = add(part(second, k), mul(h, h));
          put(second, k, v);
          w_.value[k] = sub(w_.value[k], div(mul(set(rule_.lr), h), add(root(v), set(rule_.eps))));
        });
        return;
      }
      case Optimizer::kAdam: {
        float* const first = static_cast<float*>(state.moment) + row * width_;
        float* const second = state.second + row * width_;
        each([&](std::int64_t k) RECFAST_INLINE {
          const F h = pull(k);
          const F m = first_moment(part(first, k), h);
          const F v = add(mul(set(rule_.beta2), part(second, k)), mul(set(rule_.one_less_beta2), mul(h, h)));
          put(first, k, m);
          put(second, k, v);
          w_.value[k] = sub(w_.value[k], div(mul(set(rule_.adam_rate), m), add(root(v), set(rule_.eps))));
        });
        return;
      }
      case Optimizer::kRowwiseAdam: {
        float& second = state.row[row * state.row_stride + state.second_column];
        second = rule_.beta2 * second + rule_.one_less_beta2 * mean_square();
        const F rate = set(rule_.adam_rate / (std::sqrt(second) + rule_.eps));
        auto* const first = static_cast<std::uint8_t*>(state.moment) + row * state.moment_stride;
        if (state.moment_short) {
          const F step = set(read_at<float>(first));
          each([&](std::int64_t k) RECFAST_INLINE {
            x_.value[k] = first_moment(mul(step, codes<Format::kInt8>(first + kHeaderBytes, k)), pull(k));
          });
        } else {
          each([&](std::int64_t k) RECFAST_INLINE {
            x_.value[k] = first_moment(part(reinterpret_cast<const float*>(first), k), pull(k));
            put(reinterpret_cast<float*>(first), k, x_.value[k]);
          });
        }
        each([&](std::int64_t k) RECFAST_INLINE { w_.value[k] = sub(w_.value[k], mul(rate, x_.value[k])); });
        if (state.moment_short) write_moment(first, row);
        return;
      }
    }
  }

  RECFAST_INLINE F first_moment(F old, F h) const noexcept {
    return add(mul(set(rule_.beta1), old), mul(set(rule_.one_less_beta1), h));
  }

  // The 8-bit first moment, from x.
  RECFAST_INLINE void write_moment(std::uint8_t* stored, std::int64_t row) noexcept {
    const float largest = largest_of(x_);
    const float step = largest * (1.000001f / 127.0f);
    const bool usable = step >= kSmallestStep && step <= std::numeric_limits<float>::max();
    const float written = usable ? step : 0.0f;
    const F inverse = set(usable ? 1.0f / step : 0.0f);
    std::memcpy(stored, &written, sizeof written);
    draws_for(moment_draws_, row, [&](std::int64_t k, F u) RECFAST_INLINE {
      const F x = bounded(mul(x_.value[k], inverse), set(-127.0f), set(127.0f));
      put_codes<Format::kInt8>(stored + kHeaderBytes, k, to_whole(x, u, rule_.stochastic));
    });
  }

  RECFAST_INLINE float largest_of(const Values& values) const noexcept {
    F largest = zero();
    each([&](std::int64_t k) RECFAST_INLINE { largest = larger(magnitude(values.value[k]), largest); });
    return fold_largest(largest);
  }

  // sum_d g_d * c(w'_d / step)
  RECFAST_INLINE float slope(float step) const noexcept {
    const F inverse = set(1.0f / step);
    const F low = set(kLowest<kFormat>);
    const F high = set(kHighest<kFormat>);
    F sums = zero();
    each([&](std::int64_t k) RECFAST_INLINE {
      const F x = bounded(mul(w_.value[k], inverse), low, high);
      F factor = sub(rounded(x), x);
      factor = select(less(low, x), factor, low);
      factor = select(less(x, high), factor, high);
      sums = add(sums, mul(g_.value[k], factor));
    });
    return fold(sums);
  }

  RECFAST_INLINE float learn(float step, std::int64_t row) noexcept {
    if (rule_.step_rule != StepRule::kFixed) {
      float* const state = args_.state.row == nullptr ? nullptr : args_.state.row + row * args_.state.row_stride;
      const float t = rule_.step_scale * slope(step);
      float move = t;
      if (rule_.step_rule == StepRule::kAdagrad) {
        float& v = state[args_.state.step_second_column];
        v += t * t;
        move = t / (std::sqrt(v) + kStepEps);
      } else if (rule_.step_rule == StepRule::kAdam) {
        float& v = state[args_.state.step_second_column];
        float& m = state[args_.state.step_first_column];
        m = rule_.beta1 * m + rule_.one_less_beta1 * t;
        v = rule_.beta2 * v + rule_.one_less_beta2 * (t * t);
        move = m * rule_.step_correction1 / (std::sqrt(v * rule_.step_correction2) + kStepEps);
      }
      const float moved = step - rule_.step_lr * move;
      switch (rule_.step_floor) {
        case StepFloor::kClamp: step = moved < kStepFloor ? kStepFloor : moved; break;
        case StepFloor::kAbs: step = std::fabs(moved) + kStepShift; break;
        case StepFloor::kNone: step = moved <= kSmallestStep ? step : moved; break;
      }
    }
    if (rule_.grow) {
      // A little more than needed, so that no rounding lifts the largest weight over the last code.
      const float needed = largest_of(w_) * (1.000001f / kHighest<kFormat>);
      if (needed > step && needed <= std::numeric_limits<float>::max()) step = needed;
    }
    return step;
  }

  // body(k, draws of columns 16k .. 16k + 15)
  template <class Body>
  RECFAST_INLINE void draws_for(const Draws& draws, std::int64_t row, const Body& body) const noexcept {
    if (!rule_.stochastic) {
      each([&](std::int64_t k) RECFAST_INLINE { body(k, zero()); });
      return;
    }
    if constexpr (kVectors > 0) {
      F u[(kVectors + kDrawn - 1) / kDrawn * kDrawn];
      constexpr int kUnits = (kVectors + kDrawn - 1) / kDrawn;
      unrolled([&](std::int64_t unit) RECFAST_INLINE { draws.make(row, unit, u + unit * kDrawn); },
               std::make_index_sequence<kUnits>{});
      each([&](std::int64_t k) RECFAST_INLINE { body(k, u[k]); });
    } else {
      F u[kDrawn];
      const std::int64_t vectors = whole_ + (tail_ > 0);
      for (std::int64_t k = 0; k < vectors; ++k) {
        if (k % kDrawn == 0) draws.make(row, k / kDrawn, u);
        body(k, u[k % kDrawn]);
      }
    }
  }

  // Returns how many values lay outside the range.
  RECFAST_INLINE std::int64_t write(std::uint8_t* stored, float step, std::int64_t row, bool stochastic) noexcept {
    if constexpr (kFormat == Format::kFloat32) {
      each([&](std::int64_t k) RECFAST_INLINE { put(reinterpret_cast<float*>(stored), k, w_.value[k]); });
      return 0;
    } else {
      if constexpr (kStep) std::memcpy(stored, &step, sizeof step);
      const F inverse = set(1.0f / step);
      std::int64_t clipped = 0;
      const auto one = [&](std::int64_t k, F u) RECFAST_INLINE {
        F x = w_.value[k];
        if constexpr (kStep) x = mul(x, inverse);
        constexpr float limit = kFormat == Format::kFloat16 ? kFloat16Max : kBFloat16Max;
        const F low = set(kStep ? kLowest<kFormat> : -limit);
        const F high = set(kStep ? kHighest<kFormat> : limit);
        clipped += count_outside(x, low, high);
        x = kStep ? bounded(x, low, high) : bounded_or_nan(x, low, high);
        if constexpr (is_integer(kFormat)) {
          x = to_whole(x, u, stochastic);
        } else if constexpr (kFormat == Format::kFloat8) {
          x = to_grid<3, -6>(x, u, stochastic);
        } else if constexpr (kFormat == Format::kFloat16) {
          x = to_grid<10, -14>(x, u, stochastic);
        } else {
          x = stochastic ? bfloat16_drawn(x, u) : bfloat16_nearest(x);
        }
        put_codes<kFormat>(stored + kHeader, k, x);
      };
      if (stochastic) {
        draws_for(draws_, row, one);
      } else {
        each([&](std::int64_t k) RECFAST_INLINE { one(k, zero()); });
      }
      return clipped;
    }
  }

  const Args& args_;
  const Rule& rule_;
  std::int64_t width_;
  std::int64_t whole_;
  std::int64_t tail_;
  Values g_;
  Values w_;
  Values x_;
  Draws draws_;
  Draws moment_draws_;
};

template <Format kFormat, int kVectors>
std::int64_t rows(const Args& args, std::int64_t first, std::int64_t last, float* buffers) noexcept {
  return Row<kFormat, kVectors>(args, buffers).update(first, last);
}

inline void part(const Args& args, std::int64_t first, std::int64_t last, float* buffers, float* out) noexcept {
  Row<Format::kFloat32, 0>(args, buffers).sum_part(first, last, out);
}

template <Format kFormat>
void slopes(const Args& args, std::int64_t first, std::int64_t last, float* buffers, float* out) noexcept {
  if constexpr (has_step(kFormat)) Row<kFormat, 0>(args, buffers).slopes(first, last, out);
}

template <Format kFormat>
std::int64_t requantize(const Args& args, std::int64_t first, std::int64_t last, float step, float* buffers) noexcept {
  if constexpr (has_step(kFormat)) return Row<kFormat, 0>(args, buffers).requantize(first, last, step);
  return 0;
}

template <Format kFormat, int kVectors>
constexpr Functions kFunctions{rows<kFormat, kVectors>, part, slopes<kFormat>, requantize<kFormat>};

// The functions for rows of kVectors registers or, with 0, of any width.
template <int kVectors>
const Functions& functions_of(Format format) noexcept {
  switch (format) {
    case Format::kBFloat16: return kFunctions<Format::kBFloat16, kVectors>;
    case Format::kFloat16: return kFunctions<Format::kFloat16, kVectors>;
    case Format::kFloat8: return kFunctions<Format::kFloat8, kVectors>;
    case Format::kInt8: return kFunctions<Format::kInt8, kVectors>;
    case Format::kInt4: return kFunctions<Format::kInt4, kVectors>;
    case Format::kInt2: return kFunctions<Format::kInt2, kVectors>;
    default: return kFunctions<Format::kFloat32, kVectors>;
  }
}

#undef RECFAST_INLINE
