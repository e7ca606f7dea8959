// The rows of embedding_update, one thread, over vectors of 16 columns. This file is included, in an unnamed namespace,
// once for each instruction set, after the primitives of that set: F (16 floats), M (16 truths), the arithmetic, and
// for each format the reading (decode) and writing (encode) of 16 columns. All primitives round alike, and nothing is
// contracted, so all copies give the same bits.
//
// A primitive's name is its contract, but for these: larger(a, b) is a > b ? a : b, so b where one is NaN; smaller
// likewise; larger_bits(a, b) is the larger as an integer, so of magnitudes the larger, NaN being the largest, and
// fold_largest the largest lane in that sense; exponent_of(x) is the power of two at or below |x|, reciprocal_of_power
// its inverse; fold sums lanes 8, 4, 2, 1 apart; count_changed(x, y) counts lanes where the two differ, NaN aside.

#define RECFAST_INLINE __attribute__((always_inline))

template <class Body, std::size_t... kIndex>
RECFAST_INLINE inline void unrolled(const Body& body, std::index_sequence<kIndex...>) noexcept {
  (body(static_cast<std::int64_t>(kIndex)), ...);
}

RECFAST_INLINE inline F bounded(F x, F low, F high) noexcept {  // NaN becomes `low`
  return smaller(larger(x, low), high);
}
RECFAST_INLINE inline F bounded_or_nan(F x, F low, F high) noexcept { return smaller(high, larger(low, x)); }

// std::sqrt without the call that sets errno.
RECFAST_INLINE inline float root_of(float x) noexcept { return __builtin_sqrtf(x); }

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

// Rows are taken in blocks, and a block in passes, so that no row waits for the long chains of another: sums over D,
// roots and quotients of one row run beside those of the next. What lies between passes stays in the first cache.
template <Format kFormat, int kVectors>  // kVectors 0: any width
class Block {
  static constexpr bool kStep = has_step(kFormat);
  static constexpr std::int64_t kHeader = kStep ? kHeaderBytes : 0;
  static constexpr std::int64_t kAhead = 24;
  static constexpr std::int64_t kGradientAhead = 16;

 public:
  RECFAST_INLINE Block(const Args& args, const Draws& draws, const Draws& moment_draws, float* buffers) noexcept
      : args_(args),
        rule_(args.rule),
        width_(kVectors > 0 ? 16 * kVectors : args.table.width),
        whole_(width_ / 16),
        tail_(width_ % 16),
        vectors_(padded(width_) / 16),
        size_(block_rows(width_)),
        g_(reinterpret_cast<F*>(buffers)),
        w_(g_ + size_ * vectors_),
        u_(w_ + size_ * vectors_),
        x_(u_ + size_ * vectors_),
        draws_(draws),
        moment_draws_(moment_draws) {}

  RECFAST_INLINE std::int64_t update(std::int64_t first, std::int64_t last) noexcept {
    const bool rowwise =
        rule_.optimizer == Optimizer::kRowwiseAdagrad || rule_.optimizer == Optimizer::kRowwiseAdam;
    std::int64_t clipped = 0;
    for (std::int64_t begin = first; begin < last; begin += size_) {
      const std::int64_t count = std::min(size_, last - begin);
      for (std::int64_t r = 0; r < count; ++r) {
        prefetch(std::min(begin + r + kAhead, args_.groups.runs - 1));
        rows_[r] = row_of(begin + r);
        F* const g = g_ + r * vectors_;
        F* const w = w_ + r * vectors_;
        sum_run(begin + r, g);
        if constexpr (kStep) steps_[r] = read_step(stored(r));
        if (args_.phase == Phase::kSecond) {
          each([&](std::int64_t k) RECFAST_INLINE { w[k] = part(args_.floats + (begin + r) * width_, k); });
          continue;
        }
        read(stored(r), steps_[r], w);
        if (rule_.keep != 1.0f) {
          each([&](std::int64_t k) RECFAST_INLINE { w[k] = mul(w[k], set(rule_.keep)); });
        }
        if (rowwise) rates_[r] = mean_square(g, w);
      }
      if (args_.phase != Phase::kSecond) {
        if (rowwise) find_rates(count);
        for (std::int64_t r = 0; r < count; ++r) optimise(r);
      }
      if (args_.phase == Phase::kFirst) {
        for (std::int64_t r = 0; r < count; ++r) {
          const F* const w = w_ + r * vectors_;
          each([&](std::int64_t k) RECFAST_INLINE { put(args_.floats + (begin + r) * width_, k, w[k]); });
          write(r, false, kUnknown);
        }
        continue;
      }
      if constexpr (kStep) learn(count);
      if (rule_.stochastic && kFormat != Format::kFloat32) draw(draws_, count);
      for (std::int64_t r = 0; r < count; ++r) clipped += write(r, rule_.stochastic, kStep ? largest_[r] : kUnknown);
    }
    return clipped;
  }

  // One part of a long run.
  RECFAST_INLINE void sum_part(std::int64_t first, std::int64_t last, float* out) noexcept {
    sum(first, last, x_);
    each([&](std::int64_t k) RECFAST_INLINE { store(out + 16 * k, x_[k]); });
  }

  RECFAST_INLINE void slopes(std::int64_t first, std::int64_t last, float* out) noexcept {
    for (std::int64_t run = first; run < last; ++run) {
      rows_[0] = row_of(run);
      sum_run(run, g_);
      each([&](std::int64_t k) RECFAST_INLINE { w_[k] = part(args_.floats + run * width_, k); });
      out[run - first] = slope(g_, w_, read_step(stored(0)), kUnknown);
    }
  }

  RECFAST_INLINE std::int64_t requantize(std::int64_t first, std::int64_t last, float step) noexcept {
    const Grouped& groups = args_.groups;
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
    for (std::int64_t begin = first; begin < last; begin += size_) {
      const std::int64_t count = std::min(size_, last - begin);
      for (std::int64_t r = 0; r < count; ++r) {
        rows_[r] = begin + r;
        F* const w = w_ + r * vectors_;
        if (run < groups.runs && row_of(run) == rows_[r]) {
          each([&](std::int64_t k) RECFAST_INLINE { w[k] = part(args_.floats + run * width_, k); });
          ++run;
        } else {
          read(stored(r), read_step(stored(r)), w);
        }
        steps_[r] = step;
      }
      if (rule_.stochastic) draw(draws_, count);
      for (std::int64_t r = 0; r < count; ++r) clipped += write(r, rule_.stochastic, kUnknown);
    }
    return clipped;
  }

 private:
  // A largest magnitude that nobody has looked for.
  static constexpr float kUnknown = std::numeric_limits<float>::infinity();

  template <class Body>
  RECFAST_INLINE void each(const Body& body) const noexcept {
    if constexpr (kVectors > 0) {
      unrolled(body, std::make_index_sequence<kVectors>{});
    } else {
      for (std::int64_t k = 0; k < vectors_; ++k) body(k);
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

  RECFAST_INLINE void read(const std::uint8_t* from, float step, F* w) const noexcept {
    each([&](std::int64_t k) RECFAST_INLINE {
      w[k] = codes<kFormat>(from + kHeader, k);
      if constexpr (kStep) w[k] = mul(set(step), w[k]);
    });
  }

  RECFAST_INLINE std::int64_t row_of(std::int64_t run) const noexcept {
    return group_row(args_.groups.keys[args_.groups.starts[run]]);
  }

  // The row in place r of the block, as it is stored.
  RECFAST_INLINE std::uint8_t* stored(std::int64_t r) const noexcept {
    return args_.table.data + rows_[r] * args_.table.stride;
  }

  RECFAST_INLINE static void prefetch_bytes(const void* address, std::int64_t bytes) noexcept {
    const auto* line = static_cast<const char*>(address);
    for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
    __builtin_prefetch(line + bytes - 1, 0, 2);
  }

  RECFAST_INLINE void prefetch(std::int64_t run) const noexcept {
    const std::int64_t row = row_of(run);
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

  RECFAST_INLINE void sum(std::int64_t first, std::int64_t last, F* to) const noexcept {
    const SlotGradient& gradient = args_.gradient;
    const std::uint64_t* const keys = args_.groups.keys;
    const std::int64_t end = args_.groups.kept - 1;
    const bool plain = gradient.coefficient == nullptr && gradient.argmax == nullptr;
    F out[kVectors > 0 ? kVectors : 1];  // in registers where the width is known
    F* const sums = kVectors > 0 ? out : to;
    each([&](std::int64_t k) RECFAST_INLINE { sums[k] = zero(); });
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t later = gradient.bag(group_position(keys[std::min(i + kGradientAhead, end)]));
      for (std::int64_t d = 0; d < width_; d += 16) {
        __builtin_prefetch(gradient.grad + later * width_ + d, 0, 2);
      }
      const std::int64_t slot = group_position(keys[i]);
      const std::int64_t bag = gradient.bag(slot);
      const float* const grad = gradient.grad + bag * width_;
      if (plain) {
        each([&](std::int64_t k) RECFAST_INLINE { sums[k] = add(sums[k], part(grad, k)); });
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
        sums[k] = add(sums[k], x);
      });
    }
    if constexpr (kVectors > 0) {
      each([&](std::int64_t k) RECFAST_INLINE { to[k] = out[k]; });
    }
  }

  // g = grad_scale * the sum of the run.
  RECFAST_INLINE void sum_run(std::int64_t run, F* g) noexcept {
    const std::int64_t first = args_.groups.starts[run];
    const std::int64_t last = args_.groups.starts[run + 1];
    sum(first, std::min(last, first + kPart), g);
    if (last - first > kPart) [[unlikely]] add_parts(run, first, last, g);
    if (rule_.grad_scale != 1.0f) {
      const F scale = set(rule_.grad_scale);
      each([&](std::int64_t k) RECFAST_INLINE { g[k] = mul(g[k], scale); });
    }
  }

  RECFAST_INLINE void add_parts(std::int64_t run, std::int64_t first, std::int64_t last, F* g) noexcept {
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
        each([&](std::int64_t k) RECFAST_INLINE { g[k] = add(g[k], x_[k]); });
      } else {
        each([&](std::int64_t k) RECFAST_INLINE { g[k] = add(g[k], load(sums + 16 * k)); });
        sums += padded(width_);
      }
    }
  }

  RECFAST_INLINE F pull(F g, F w) const noexcept {  // h
    return rule_.decay == 0.0f ? g : add(g, mul(set(rule_.decay), w));
  }

  RECFAST_INLINE float mean_square(const F* g, const F* w) const noexcept {
    F squares = zero();
    each([&](std::int64_t k) RECFAST_INLINE {
      const F h = pull(g[k], w[k]);
      squares = add(squares, mul(h, h));
    });
    return fold(squares) / static_cast<float>(width_);
  }

  // From the mean squares of the block's rows: their second moments, and the rates these give.
  RECFAST_INLINE void find_rates(std::int64_t count) noexcept {
    const State& state = args_.state;
    const bool adam = rule_.optimizer == Optimizer::kRowwiseAdam;
    for (std::int64_t r = 0; r < count; ++r) {
      float& second = state.row[rows_[r] * state.row_stride + state.second_column];
      second = adam ? rule_.beta2 * second + rule_.one_less_beta2 * rates_[r] : second + rates_[r];
      rates_[r] = (adam ? rule_.adam_rate : rule_.lr) / (root_of(second) + rule_.eps);
    }
  }

  RECFAST_INLINE void optimise(std::int64_t r) noexcept {
    const State& state = args_.state;
    const F* const g = g_ + r * vectors_;
    F* const w = w_ + r * vectors_;
    float* const second = state.second + rows_[r] * width_;
    auto* const moment = static_cast<std::uint8_t*>(state.moment) + rows_[r] * state.moment_stride;
    auto* const first = reinterpret_cast<float*>(moment);
    switch (rule_.optimizer) {
      case Optimizer::kSgd:
      case Optimizer::kRowwiseAdagrad: {
        const F rate = set(rule_.optimizer == Optimizer::kSgd ? rule_.lr : rates_[r]);
        each([&](std::int64_t k) RECFAST_INLINE { w[k] = sub(w[k], mul(rate, pull(g[k], w[k]))); });
        return;
      }
      case Optimizer::kAdagrad:
        each([&](std::int64_t k) RECFAST_INLINE {
          const F h = pull(g[k], w[k]);
          const F v = add(part(second, k), mul(h, h));
          put(second, k, v);
          w[k] = sub(w[k], div(mul(set(rule_.lr), h), add(root(v), set(rule_.eps))));
        });
        return;
      case Optimizer::kAdam:
        each([&](std::int64_t k) RECFAST_INLINE {
          const F h = pull(g[k], w[k]);
          const F m = first_moment(part(first, k), h);
          const F v = add(mul(set(rule_.beta2), part(second, k)), mul(set(rule_.one_less_beta2), mul(h, h)));
          put(first, k, m);
          put(second, k, v);
          w[k] = sub(w[k], div(mul(set(rule_.adam_rate), m), add(root(v), set(rule_.eps))));
        });
        return;
      case Optimizer::kRowwiseAdam: {
        const F rate = set(rates_[r]);
        const F step = set(state.moment_short ? read_at<float>(moment) : 0.0f);
        each([&](std::int64_t k) RECFAST_INLINE {
          const F old = state.moment_short ? mul(step, codes<Format::kInt8>(moment + kHeaderBytes, k)) : part(first, k);
          const F m = first_moment(old, pull(g[k], w[k]));
          if (state.moment_short) {
            x_[k] = m;
          } else {
            put(first, k, m);
          }
          w[k] = sub(w[k], mul(rate, m));
        });
        if (state.moment_short) write_moment(moment, rows_[r]);
        return;
      }
    }
  }

  RECFAST_INLINE F first_moment(F old, F h) const noexcept {
    return add(mul(set(rule_.beta1), old), mul(set(rule_.one_less_beta1), h));
  }

  // The 8-bit first moment, from x.
  RECFAST_INLINE void write_moment(std::uint8_t* moment, std::int64_t row) noexcept {
    const float step = largest_number_of(x_) * (1.000001f / 127.0f);
    const bool usable = step >= kSmallestStep && step <= std::numeric_limits<float>::max();
    const float written = usable ? step : 0.0f;
    const F inverse = set(usable ? 1.0f / step : 0.0f);
    std::memcpy(moment, &written, sizeof written);
    F u[kDrawn]{};
    each([&](std::int64_t k) RECFAST_INLINE {
      if (rule_.stochastic && k % kDrawn == 0) moment_draws_.make(row, k / kDrawn, u);
      const F x = bounded(mul(x_[k], inverse), set(-127.0f), set(127.0f));
      put_codes<Format::kInt8>(moment + kHeaderBytes, k, to_whole(x, u[k % kDrawn], rule_.stochastic));
    });
  }

  // The largest magnitude, NaN where there is one.
  RECFAST_INLINE float largest_of(const F* values) const noexcept {
    F largest = zero();
    each([&](std::int64_t k) RECFAST_INLINE { largest = larger_bits(magnitude(values[k]), largest); });
    return fold_largest(largest);
  }

  // NaN aside.
  RECFAST_INLINE float largest_number_of(const F* values) const noexcept {
    F largest = zero();
    each([&](std::int64_t k) RECFAST_INLINE { largest = larger(magnitude(values[k]), largest); });
    return fold_largest(largest);
  }

  // sum_d g_d * c(w'_d / step); `largest` is that of w' or kUnknown. Rows that lie wholly inside the range, which most
  // do, need not be compared with it column by column.
  RECFAST_INLINE float slope(const F* g, const F* w, float step, float largest) const noexcept {
    const float inverse = 1.0f / step;
    F sums = zero();
    if (largest * inverse < kHighest<kFormat>) {
      each([&](std::int64_t k) RECFAST_INLINE {
        const F x = mul(w[k], set(inverse));
        sums = add(sums, mul(g[k], sub(rounded(x), x)));
      });
      return fold(sums);
    }
    const F low = set(kLowest<kFormat>);
    const F high = set(kHighest<kFormat>);
    each([&](std::int64_t k) RECFAST_INLINE {
      const F x = bounded(mul(w[k], set(inverse)), low, high);
      sums = add(sums, mul(g[k], select(between(low, x, high), sub(rounded(x), x), x)));
    });
    return fold(sums);
  }

  // The new step sizes of the block's rows, and the largest magnitudes of w'.
  RECFAST_INLINE void learn(std::int64_t count) noexcept {
    for (std::int64_t r = 0; r < count; ++r) largest_[r] = largest_of(w_ + r * vectors_);
    if (rule_.step_rule != StepRule::kFixed) {
      for (std::int64_t r = 0; r < count; ++r) {
        rates_[r] = rule_.step_scale * slope(g_ + r * vectors_, w_ + r * vectors_, steps_[r], largest_[r]);
      }
      for (std::int64_t r = 0; r < count; ++r) steps_[r] = moved_step(steps_[r], rates_[r], rows_[r]);
    }
    if (!rule_.grow) return;
    for (std::int64_t r = 0; r < count; ++r) {
      const float largest = largest_[r] == largest_[r] ? largest_[r] : largest_number_of(w_ + r * vectors_);
      // A little more than needed, so that no rounding lifts the largest weight over the last code.
      const float needed = largest * (1.000001f / kHighest<kFormat>);
      if (needed > steps_[r] && needed <= std::numeric_limits<float>::max()) steps_[r] = needed;
    }
  }

  RECFAST_INLINE float moved_step(float step, float t, std::int64_t row) const noexcept {
    float* const state = args_.state.row + row * args_.state.row_stride;
    float move = t;
    if (rule_.step_rule == StepRule::kAdagrad) {
      float& v = state[args_.state.step_second_column];
      v += t * t;
      move = t / (root_of(v) + kStepEps);
    } else if (rule_.step_rule == StepRule::kAdam) {
      float& v = state[args_.state.step_second_column];
      float& m = state[args_.state.step_first_column];
      m = rule_.beta1 * m + rule_.one_less_beta1 * t;
      v = rule_.beta2 * v + rule_.one_less_beta2 * (t * t);
      move = m * rule_.step_correction1 / (root_of(v * rule_.step_correction2) + kStepEps);
    }
    const float moved = step - rule_.step_lr * move;
    switch (rule_.step_floor) {
      case StepFloor::kClamp: return moved < kStepFloor ? kStepFloor : moved;
      case StepFloor::kAbs: return std::fabs(moved) + kStepShift;
      case StepFloor::kNone: return moved <= kSmallestStep ? step : moved;
    }
    return step;
  }

  // The draws of the block's rows, into u.
  template <class Generator>  // a parameter, since only some sets have make_rows
  RECFAST_INLINE void draw(const Generator& draws, std::int64_t count) noexcept {
    if constexpr (kVectors > 0 && kVectors < kDrawn) {
      constexpr std::int64_t kTogether = kDrawn / kVectors;
      for (std::int64_t r = 0; r < count; r += kTogether) {
        draws.template make_rows<kVectors>(rows_ + r, u_ + r * kVectors);
      }
    } else {
      F rest[kDrawn];
      for (std::int64_t r = 0; r < count; ++r) {
        F* const u = u_ + r * vectors_;
        std::int64_t k = 0;
        for (; k + kDrawn <= vectors_; k += kDrawn) draws.make(rows_[r], k / kDrawn, u + k);
        if (kVectors == 0 && k < vectors_) {
          draws.make(rows_[r], k / kDrawn, rest);
          for (; k < vectors_; ++k) u[k] = rest[k % kDrawn];
        }
      }
    }
  }

  // Returns how many values lay outside the range; `largest` is the largest magnitude of w', or kUnknown.
  RECFAST_INLINE std::int64_t write(std::int64_t r, bool stochastic, float largest) noexcept {
    const F* const w = w_ + r * vectors_;
    if constexpr (kFormat == Format::kFloat32) {
      std::uint8_t* const to = stored(r);
      each([&](std::int64_t k) RECFAST_INLINE { put(reinterpret_cast<float*>(to), k, w[k]); });
      return 0;
    } else if constexpr (kStep) {
      std::uint8_t* const to = stored(r);
      const float inverse = 1.0f / steps_[r];
      std::memcpy(to, &steps_[r], sizeof(float));
      if (largest * inverse <= kHighest<kFormat>) {  // none to be clipped, no NaN
        each([&](std::int64_t k) RECFAST_INLINE { write_part(r, k, mul(w[k], set(inverse)), stochastic); });
        return 0;
      }
      std::int64_t clipped = 0;
      each([&](std::int64_t k) RECFAST_INLINE {
        const F x = mul(w[k], set(inverse));
        const F inside = bounded(x, set(kLowest<kFormat>), set(kHighest<kFormat>));
        clipped += count_changed(x, inside);
        write_part(r, k, inside, stochastic);
      });
      return clipped;
    } else {
      constexpr float limit = kFormat == Format::kFloat16 ? kFloat16Max : kBFloat16Max;
      std::int64_t clipped = 0;
      each([&](std::int64_t k) RECFAST_INLINE {
        const F inside = bounded_or_nan(w[k], set(-limit), set(limit));
        clipped += count_changed(w[k], inside);
        write_part(r, k, inside, stochastic);
      });
      return clipped;
    }
  }

  // Rounds 16 columns that lie inside the range, and writes their codes.
  RECFAST_INLINE void write_part(std::int64_t r, std::int64_t k, F inside, bool stochastic) const noexcept {
    const F u = u_[r * vectors_ + k];
    F x;
    if constexpr (is_integer(kFormat)) {
      x = to_whole(inside, u, stochastic);
    } else if constexpr (kFormat == Format::kFloat8) {
      x = to_grid<3, -6>(inside, u, stochastic);
    } else if constexpr (kFormat == Format::kFloat16) {
      x = to_grid<10, -14>(inside, u, stochastic);
    } else {
      x = stochastic ? bfloat16_drawn(inside, u) : bfloat16_nearest(inside);
    }
    put_codes<kFormat>(stored(r) + kHeader, k, x);
  }

  // Copies, since a vector that is stored may alias anything but what never left this function.
  const Args args_;
  const Rule rule_;
  std::int64_t width_;
  std::int64_t whole_;
  std::int64_t tail_;
  std::int64_t vectors_;
  std::int64_t size_;
  F* g_;  // [size, vectors]
  F* w_;  // likewise
  F* u_;  // likewise
  F* x_;  // [vectors]
  std::int64_t rows_[kBlockRows + 4] = {};  // make_rows reads beyond the last
  float steps_[kBlockRows];
  float rates_[kBlockRows];
  float largest_[kBlockRows];
  const Draws& draws_;
  const Draws& moment_draws_;
};

inline Draws draws_of(const Rule& rule, std::uint32_t domain) noexcept {
  return {rule.seed, rule.step_count, rule.table_id ^ domain};
}

template <Format kFormat, int kVectors>
std::int64_t rows(const Args& args, std::int64_t first, std::int64_t last, float* buffers) noexcept {
  const Draws draws = draws_of(args.rule, 0);
  const Draws moment_draws = draws_of(args.rule, kMomentDomain);
  return Block<kFormat, kVectors>(args, draws, moment_draws, buffers).update(first, last);
}

inline void part(const Args& args, std::int64_t first, std::int64_t last, float* buffers, float* out) noexcept {
  const Draws draws = draws_of(args.rule, 0);
  Block<Format::kFloat32, 0>(args, draws, draws, buffers).sum_part(first, last, out);
}

template <Format kFormat>
void slopes(const Args& args, std::int64_t first, std::int64_t last, float* buffers, float* out) noexcept {
  const Draws draws = draws_of(args.rule, 0);
  if constexpr (has_step(kFormat)) Block<kFormat, 0>(args, draws, draws, buffers).slopes(first, last, out);
}

template <Format kFormat>
std::int64_t requantize(const Args& args, std::int64_t first, std::int64_t last, float step, float* buffers) noexcept {
  const Draws draws = draws_of(args.rule, 0);
  if constexpr (has_step(kFormat)) {
    return Block<kFormat, 0>(args, draws, draws, buffers).requantize(first, last, step);
  }
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
