// The kernel itself, for any vector type (see common/vectors.h) and any type of rows. A form includes both inside its
// target region; the standard headers and din_attention.h must have been included before, outside it.
// `Pairs`: void, or a Simd whose fma multiplies pairs of bfloat16, held as the bits of a float, and adds both products.
#pragma once

namespace recfast::din_attention {

// PReLU, or ReLU.
template <class Simd>
RECFAST_INLINED inline typename Simd::V line(typename Simd::V x, typename Simd::V slope, bool relu) noexcept {
  const typename Simd::V zero{};
  if (relu) return x < zero ? zero : x;
  return x > zero ? x : slope * x;
}

// From z in registers to h, as floats, as pairs of bfloat16, or both; z itself is kept where asked for.
template <class Simd, class Pairs>
struct DrawLine {
  using V = typename Simd::V;
  using T = typename Simd::T;
  using Store = typename Vectors<Simd>::Store;
  V slope;
  bool relu;
  T* z;
  T* h;
  T* pairs;
  std::int64_t width;

  template <int R, int J>
  RECFAST_INLINED void operator()(V (&sum)[R][J], std::int64_t row, std::int64_t column) const noexcept {
    if (z != nullptr) Store{z, width}(sum, row, column);
    unrolled<R>([&]<int r>() RECFAST_INLINED {
      unrolled<J>([&]<int j>() RECFAST_INLINED { sum[r][j] = line<Simd>(sum[r][j], slope, relu); });
    });
    if (h != nullptr) Store{h, width}(sum, row, column);
    if constexpr (!std::is_void_v<Pairs>) {
      if (pairs == nullptr) return;
      unrolled<R>([&]<int r>() RECFAST_INLINED {
        const std::int64_t at = (row + r) * width + column;
        unrolled<J>([&]<int j>() RECFAST_INLINED { Pairs::narrow(sum[r][j], pairs, at + j * Vectors<Simd>::kWidth); });
      });
    }
  }
};

// From z in registers to kLanes partial sums of h w3 a row, in the order in which Vectors::dot adds; strip by strip.
template <class Simd>
struct AddScore {
  using V = typename Simd::V;
  using T = typename Simd::T;
  using Base = Vectors<Simd>;
  using Store = typename Base::Store;
  V slope;
  bool relu;
  T* z;
  T* h;
  const T* w3;
  T* lanes;
  std::int64_t width;

  template <int R, int J>
  RECFAST_INLINED void operator()(V (&sum)[R][J], std::int64_t row, std::int64_t column) const noexcept {
    constexpr std::int64_t kWidth = Base::kWidth;
    if (z != nullptr) Store{z, width}(sum, row, column);
    unrolled<R>([&]<int r>() RECFAST_INLINED {
      unrolled<J>([&]<int j>() RECFAST_INLINED { sum[r][j] = line<Simd>(sum[r][j], slope, relu); });
    });
    if (h != nullptr) Store{h, width}(sum, row, column);
    V w[J];
    unrolled<J>([&]<int j>() RECFAST_INLINED { w[j] = Base::load(w3 + column + j * kWidth); });
    unrolled<R>([&]<int r>() RECFAST_INLINED {
      T* own = lanes + (row + r) * kLanes;
      if constexpr (kWidth == kLanes) {
        V total = Base::load(column == 0 ? Base::kZeros : own);
        unrolled<J>([&]<int j>() RECFAST_INLINED { total = Simd::fma(sum[r][j], w[j], total); });
        Base::store(own, total);
      } else {
        unrolled<J>([&]<int j>() RECFAST_INLINED {
          T* part = own + (column + j * kWidth) % kLanes;
          const V total = Base::load(column + j * kWidth < kLanes ? Base::kZeros : part);
          Base::store(part, Simd::fma(sum[r][j], w[j], total));
        });
      }
    });
  }
};

template <class Simd, class E, class Pairs = void>
struct Kernel : Vectors<Simd> {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Base = Vectors<Simd>;
  using Product = typename Base::Product;
  using Store = typename Base::Store;
  static constexpr std::int64_t kWidth = Base::kWidth;
  static constexpr std::int64_t kParts = kLanes / kWidth;
  static constexpr bool kPairs = !std::is_void_v<Pairs>;
  using Base::add;
  using Base::add_scaled;
  using Base::dot;
  using Base::exponential;
  using Base::load;
  using Base::logistic;
  using Base::multiply;
  using Base::splat;
  using Base::store;

  // Rows as the kernel computes with them.
  struct Tile {
    const T* data;
    std::int64_t stride;
  };

  static T widened(E x) noexcept {
    if constexpr (std::is_same_v<E, BFloat16>) {
      const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    } else {
      return x;
    }
  }

  static E rounded(T x) noexcept {
    if constexpr (std::is_same_v<E, BFloat16>) {
      std::uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      const std::uint32_t nearest = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
      const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
      return {static_cast<std::uint16_t>(nan ? 0x7FC0u : nearest)};
    } else {
      return x;
    }
  }

  static void widen_row(const E* __restrict from, T* __restrict to, std::int64_t width) noexcept {
    for (std::int64_t i = 0; i < width; ++i) to[i] = widened(from[i]);
    for (std::int64_t i = width; i < padded(width); ++i) to[i] = T{0};
  }

  static void round_row(const T* __restrict from, E* __restrict to, std::int64_t width) noexcept {
    for (std::int64_t i = 0; i < width; ++i) to[i] = rounded(from[i]);
  }

  // Rows [at, at + rows), in place where they serve as they are. `whole`: only with zeros up to the padded width.
  static Tile tile_of(const Rows<const E>& from, std::int64_t at, std::int64_t rows, bool whole, T* buffer) noexcept {
    if constexpr (std::is_same_v<E, T>) {
      if (!whole || from.width % kLanes == 0) return {from[at], from.stride};
    }
    const std::int64_t stride = padded(from.width);
    for (std::int64_t r = 0; r < rows; ++r) widen_row(from[at + r], buffer + r * stride, from.width);
    return {buffer, stride};
  }

  static T sum_lanes(const T* lanes) noexcept {
    T part[kLanes];
    std::copy_n(lanes, kLanes, part);
    return Base::sum_lanes(part);
  }

  static bool is_line(Activation activation) noexcept {
    return activation == Activation::kPrelu || activation == Activation::kRelu;
  }

  // h = act(z) over `rows` rows of a layer, for what does not fit between two products.
  static void activate(Activation activation, const DiceLayer<T>& dice, const T* z, T* h, std::int64_t rows,
                       std::int64_t width) noexcept {
    const V one = splat(T{1});
    if (activation == Activation::kDice) {
      for (std::int64_t j = 0; j < width; j += kWidth) {
        const V scale = load(dice.scale + j);
        const V offset = load(dice.offset + j);
        const V alpha = load(dice.alpha + j);
        const V rest = one - alpha;
        for (std::int64_t at = j; at < rows * width; at += width) {
          const V x = load(z + at);
          const V p = logistic(Simd::fma(x, scale, offset));
          store(h + at, x * Simd::fma(rest, p, alpha));
        }
      }
      return;
    }
    const bool silu = activation == Activation::kSilu;
    for (std::int64_t i = 0; i < rows * width; i += kWidth) {
      const V x = load(z + i);
      const V y = logistic(x);
      store(h + i, silu ? x * y : y);
    }
  }

  // dz = dh act'(z) in place of dh, added up over the rows into `dbias` (a gradient of the layer's bias).
  static void activate_backward(Activation activation, T slope, const DiceLayer<T>& dice, const DiceSums<T>& sums,
                                const T* z, const T* h, T* dh, T* dslope, T* dbias, std::int64_t rows,
                                std::int64_t width) noexcept {
    const V zero{};
    const V one = splat(T{1});
    // `lanes` [kLanes], if any, takes what `derivative` adds to its last argument.
    const auto through = [&](T* lanes, auto&& derivative) noexcept {
      for (std::int64_t j = 0; j < width; j += kWidth) {
        V sum = load(dbias + j);
        V other = lanes == nullptr ? zero : load(lanes + j % kLanes);
        for (std::int64_t at = j; at < rows * width; at += width) {
          const V d = derivative(at, load(dh + at), other);
          store(dh + at, d);
          sum += d;
        }
        store(dbias + j, sum);
        if (lanes != nullptr) store(lanes + j % kLanes, other);
      }
    };
    switch (activation) {
      case Activation::kPrelu: {
        const V a = splat(slope);
        through(dslope, [&](std::int64_t at, V d, V& other) noexcept {
          const V x = load(z + at);
          other = Simd::fma(d, x > zero ? zero : x, other);
          return x > zero ? d : a * d;
        });
        break;
      }
      case Activation::kRelu:
        through(nullptr, [&](std::int64_t at, V d, V&) noexcept { return load(z + at) > zero ? d : zero; });
        break;
      case Activation::kSigmoid:
        through(nullptr, [&](std::int64_t at, V d, V&) noexcept {
          const V y = load(h + at);
          return d * (y * (one - y));
        });
        break;
      case Activation::kSilu:
        through(nullptr, [&](std::int64_t at, V d, V&) noexcept {
          const V x = load(z + at);
          const V y = logistic(x);
          return d * (y * (one + x * (one - y)));
        });
        break;
      case Activation::kDice:
        for (std::int64_t j = 0; j < width; j += kWidth) {
          const V scale = load(dice.scale + j);
          const V offset = load(dice.offset + j);
          const V alpha = load(dice.alpha + j);
          const V rest = one - alpha;
          const V mean = load(dice.mean + j);
          const V inverse = load(dice.inverse + j);
          const V mean_dt = load(dice.mean_dt + j);
          const V mean_dtx = load(dice.mean_dtx + j);
          V dalpha = load(sums.alpha + j);
          V dgain = load(sums.gain + j);
          V dshift = load(sums.shift + j);
          V sum = load(dbias + j);
          for (std::int64_t at = j; at < rows * width; at += width) {
            const V x = load(z + at);
            const V d = load(dh + at);
            const V p = logistic(Simd::fma(x, scale, offset));
            const V normal = (x - mean) * inverse;
            const V dx = d * x;
            const V dt = dx * rest * (p * (one - p));
            dalpha = Simd::fma(dx, one - p, dalpha);
            dgain = Simd::fma(dt, normal, dgain);
            dshift += dt;
            const V dz = Simd::fma(scale, dt - Simd::fma(normal, mean_dtx, mean_dt), d * Simd::fma(rest, p, alpha));
            store(dh + at, dz);
            sum += dz;
          }
          store(sums.alpha + j, dalpha);
          store(sums.gain + j, dgain);
          store(sums.shift + j, dshift);
          store(dbias + j, sum);
        }
        break;
    }
  }

  // W2 as packed.w2_pairs.
  static void pack_pairs(const Shape& s, const Packed<T>& packed) noexcept {
    if constexpr (kPairs) {
      const std::int64_t width = padded(s.hidden2);
      std::fill_n(packed.w2_pairs, padded(s.hidden1) / 2 * width, T{0});
      for (std::int64_t i = 0; i < s.hidden1; i += 2) {
        const T* even = packed.w2 + i * width;
        for (std::int64_t j = 0; j < width; j += kWidth) {
          const V odd = i + 1 < s.hidden1 ? load(even + width + j) : V{};
          store(packed.w2_pairs + i / 2 * width + j, Pairs::pair(load(even + j), odd));
        }
      }
    }
  }

  static bool splits(std::int64_t length) noexcept { return length <= (kPairs ? kSplitRowsInPairs : kSplitRows); }

  // Makes candidate c ready for the layers: its row in work.query, We (unless its history is too short) and be.
  static void fold(const Args<E>& args, const Packed<T>& packed, const Work<T>& work, std::int64_t c,
                   std::int64_t length) noexcept {
    const std::int64_t dim = args.shape.dim;
    const std::int64_t width = padded(args.shape.hidden1);
    const T* query = work.query;
    widen_row(args.query[c], work.query, dim);
    multiply({.a = query, .a_row = 0, .a_step = 1, .rows = 1, .depth = dim, .b = packed.query,
              .columns = width, .start = packed.b1, .start_row = 0, .c = work.bias});
    if (splits(length)) return;
    const auto row = [&](std::int64_t i, std::int64_t j) noexcept {
      const std::int64_t at = i * width + j;
      return Simd::fma(splat(query[i]), load(packed.product + at), load(packed.keys + at));
    };
    if constexpr (kPairs) {
      for (std::int64_t i = 0; i < dim; i += 2) {
        for (std::int64_t j = 0; j < width; j += kWidth) {
          store(work.folded + i / 2 * width + j, Pairs::pair(row(i, j), i + 1 < dim ? row(i + 1, j) : V{}));
        }
      }
    } else {
      for (std::int64_t i = 0; i < dim; ++i) {
        for (std::int64_t j = 0; j < width; j += kWidth) store(work.folded + i * width + j, row(i, j));
      }
    }
  }

  // Rows of bfloat16 as pairs: in place where every row starts on a pair and ends on one.
  static Tile pairs_of(const Rows<const E>& from, std::int64_t at, std::int64_t rows, T* buffer) noexcept {
    const auto address = reinterpret_cast<std::uintptr_t>(from.data);
    if (from.width % 2 == 0 && from.stride % 2 == 0 && address % sizeof(T) == 0) {
      return {reinterpret_cast<const T*>(from[at]), from.stride / 2};
    }
    const std::int64_t stride = padded(from.width);
    auto* bytes = reinterpret_cast<unsigned char*>(buffer);
    for (std::int64_t r = 0; r < rows; ++r) {
      unsigned char* row = bytes + r * stride * 2;
      std::memcpy(row, from[at + r], static_cast<std::size_t>(from.width) * sizeof(E));
      std::memset(row + from.width * 2, 0, static_cast<std::size_t>(stride - from.width) * sizeof(E));
    }
    return {buffer, stride / 2};
  }

  // z1 of history rows [at, at + rows), given to `finish` in tiles.
  template <class Finish>
  static void first_layer(const Args<E>& args, const Packed<T>& packed, const Work<T>& work, std::int64_t at,
                          std::int64_t rows, std::int64_t length, const Finish& finish) noexcept {
    const std::int64_t dim = args.shape.dim;
    const std::int64_t width = padded(args.shape.hidden1);
    if (splits(length)) {
      for (std::int64_t r = 0; r < rows; ++r) {
        T* row = work.split + r * 2 * dim;
        for (std::int64_t i = 0; i < dim; ++i) {
          row[i] = widened(args.keys[at + r][i]);
          row[dim + i] = row[i] * work.query[i];
        }
      }
      multiply({.a = work.split, .a_row = 2 * dim, .a_step = 1, .rows = rows, .depth = 2 * dim, .b = packed.keys,
                .columns = width, .start = work.bias, .start_row = 0, .c = nullptr}, finish);
      return;
    }
    if constexpr (kPairs) {
      const Tile keys = pairs_of(args.keys, at, rows, work.keys);
      Vectors<Pairs>::multiply({.a = keys.data, .a_row = keys.stride, .a_step = 1, .rows = rows, .depth = (dim + 1) / 2,
                                .b = work.folded, .columns = width, .start = work.bias, .start_row = 0, .c = nullptr},
                               finish);
    } else {
      const Tile keys = tile_of(args.keys, at, rows, false, work.keys);
      multiply({.a = keys.data, .a_row = keys.stride, .a_step = 1, .rows = rows, .depth = dim, .b = work.folded,
                .columns = width, .start = work.bias, .start_row = 0, .c = nullptr}, finish);
    }
  }

  // A layer that hands on h (and, with `keep`, z). Lines are drawn while z is in registers.
  template <class Multiply>
  static void layer(Activation activation, T slope, const DiceLayer<T>& dice, T* z, T* h, T* pairs, bool keep,
                    std::int64_t rows, std::int64_t width, const Multiply& multiply_into) noexcept {
    if (is_line(activation)) {
      multiply_into(DrawLine<Simd, Pairs>{splat(slope), activation == Activation::kRelu, keep ? z : nullptr,
                                          keep || pairs == nullptr ? h : nullptr, pairs, width});
      return;
    }
    multiply_into(Store{z, width});
    activate(activation, dice, z, h, rows, width);
    if constexpr (kPairs) {
      if (pairs != nullptr) {
        for (std::int64_t i = 0; i < rows * width; i += kWidth) Pairs::narrow(load(h + i), pairs, i);
      }
    }
  }

  // z2, given to `finish` in tiles.
  template <class Finish>
  static void second_layer(const Args<E>& args, const Packed<T>& packed, const Work<T>& work, std::int64_t rows,
                           const Finish& finish) noexcept {
    const Shape& s = args.shape;
    const std::int64_t width1 = padded(s.hidden1);
    const std::int64_t width2 = padded(s.hidden2);
    if constexpr (kPairs) {
      Vectors<Pairs>::multiply({.a = work.pairs, .a_row = width1 / 2, .a_step = 1, .rows = rows,
                                .depth = (s.hidden1 + 1) / 2, .b = packed.w2_pairs, .columns = width2,
                                .start = packed.b2, .start_row = 0, .c = nullptr}, finish);
    } else {
      multiply({.a = work.h1, .a_row = width1, .a_step = 1, .rows = rows, .depth = s.hidden1, .b = packed.w2,
                .columns = width2, .start = packed.b2, .start_row = 0, .c = nullptr}, finish);
    }
  }

  // Scores of history rows [at, at + rows) in work.scores. `keep`: leaves z1, h1 (and z2, h2) in `work`.
  static void score(const Args<E>& args, const Packed<T>& packed, const Work<T>& work, std::int64_t at,
                    std::int64_t rows, std::int64_t length, bool keep) noexcept {
    const Shape& s = args.shape;
    const bool two = s.hidden2 > 0;
    const std::int64_t width = padded(s.head());
    const auto first = [&](const auto& finish) noexcept {
      first_layer(args, packed, work, at, rows, length, finish);
    };
    const auto second = [&](const auto& finish) noexcept { second_layer(args, packed, work, rows, finish); };
    if (two) {
      layer(args.activation, args.weights.slope[0], packed.dice1, work.z1, work.h1, kPairs ? work.pairs : nullptr, keep,
            rows, padded(s.hidden1), first);
    }
    T* z = two ? work.z2 : work.z1;
    T* h = two ? work.h2 : work.h1;
    const T slope = args.weights.slope[two ? 1 : 0];
    const AddScore<Simd> last{splat(slope), args.activation == Activation::kRelu, keep ? z : nullptr,
                              keep ? h : nullptr, packed.w3, work.lanes, width};
    const T bias = args.weights.b3[0];
    if (is_line(args.activation)) {
      if (two) {
        second(last);
      } else {
        first(last);
      }
      for (std::int64_t r = 0; r < rows; ++r) work.scores[r] = sum_lanes(work.lanes + r * kLanes) + bias;
      return;
    }
    if (two) {
      layer(args.activation, slope, packed.dice2, z, h, nullptr, keep, rows, width, second);
    } else {
      layer(args.activation, slope, packed.dice1, z, h, nullptr, keep, rows, width, first);
    }
    for (std::int64_t r = 0; r < rows; ++r) work.scores[r] = dot(h + r * width, packed.w3, width) + bias;
  }

  // work.weights from work.scores; softmax's are exp(score - lse).
  static void weigh(Mode mode, const Work<T>& work, T lse) noexcept {
    for (std::int64_t i = 0; i < padded(kTileRows); i += kWidth) {
      const V x = load(work.scores + i);
      store(work.weights + i, mode == Mode::kSigmoid ? logistic(x) : mode == Mode::kSoftmax ? exponential(x - splat(lse)) : x);
    }
  }

  // out += sum_r weights[r] values[r], whole vectors.
  static void gather(T* out, const T* weights, Tile values, std::int64_t rows, std::int64_t width) noexcept {
    constexpr std::int64_t kGroup = 4;
    std::int64_t j = 0;
    for (; j + kGroup * kWidth <= width; j += kGroup * kWidth) {
      V sum[kGroup];
      for (std::int64_t g = 0; g < kGroup; ++g) sum[g] = load(out + j + g * kWidth);
      const T* row = values.data + j;
      for (std::int64_t r = 0; r < rows; ++r, row += values.stride) {
        const V p = splat(weights[r]);
        for (std::int64_t g = 0; g < kGroup; ++g) sum[g] = Simd::fma(p, load(row + g * kWidth), sum[g]);
      }
      for (std::int64_t g = 0; g < kGroup; ++g) store(out + j + g * kWidth, sum[g]);
    }
    for (; j < width; j += kWidth) {
      V sum = load(out + j);
      for (std::int64_t r = 0; r < rows; ++r) {
        sum = Simd::fma(splat(weights[r]), load(values.data + r * values.stride + j), sum);
      }
      store(out + j, sum);
    }
  }

  static void forward(const Args<E>& args, const Packed<T>& packed, const Work<T>& work, std::int64_t user,
                      std::int64_t candidate) noexcept {
    const std::int64_t begin = args.begin[user];
    const std::int64_t length = args.end[user] - begin;
    const std::int64_t width = padded(args.shape.value_dim);
    const bool softmax = args.mode == Mode::kSoftmax;
    std::fill_n(work.out, width, T{0});
    // Softmax: the highest score so far, and the sum of all exp(score - highest), to which `out` belongs too.
    T highest = std::numeric_limits<T>::lowest();
    T total{0};
    if (length > 0) fold(args, packed, work, candidate, length);
    for (std::int64_t l = 0; l < length; l += kTileRows) {
      const std::int64_t rows = std::min(kTileRows, length - l);
      score(args, packed, work, begin + l, rows, length, false);
      if (softmax) {
        T high = highest;
        for (std::int64_t r = 0; r < rows; ++r) high = std::max(high, work.scores[r]);
        if (high > highest) {
          const T shrunk = l == 0 ? T{0} : std::exp(highest - high);
          highest = high;
          total *= shrunk;
          for (std::int64_t j = 0; j < width; ++j) work.out[j] *= shrunk;
        }
      }
      weigh(args.mode, work, highest);
      if (softmax) {
        for (std::int64_t r = 0; r < rows; ++r) total += work.weights[r];
      }
      gather(work.out, work.weights, tile_of(args.values, begin + l, rows, true, work.values), rows, width);
    }
    if (softmax) {
      args.lse[candidate] = length > 0 ? highest + std::log(total) : T{0};
      if (length > 0) {
        for (std::int64_t j = 0; j < width; ++j) work.out[j] /= total;
      }
    }
    round_row(work.out, args.out[candidate], args.shape.value_dim);
  }

  // Adds `rows` rows of z to `moments`: their own mean and squares first, then the two joined in double.
  static void add_moments(Moments& moments, const T* z, std::int64_t rows, std::int64_t width) noexcept {
    const V share = splat(T{1} / static_cast<T>(rows));
    const auto old = static_cast<double>(moments.count);
    const auto fresh = static_cast<double>(rows);
    const double part = fresh / (old + fresh);
    for (std::int64_t j = 0; j < width; j += kWidth) {
      V sum{};
      for (std::int64_t at = j; at < rows * width; at += width) sum += load(z + at);
      const V mean = sum * share;
      V squares{};
      V rest{};
      for (std::int64_t at = j; at < rows * width; at += width) {
        const V x = load(z + at) - mean;
        squares = Simd::fma(x, x, squares);
        rest += x;
      }
      for (std::int64_t i = 0; i < kWidth; ++i) {
        // `rest` is what rounding left of the sum of deviations.
        const double own = static_cast<double>(mean[i]) + static_cast<double>(rest[i]) / fresh;
        const double step = own - moments.mean[j + i];
        moments.mean[j + i] += step * part;
        moments.squares[j + i] += static_cast<double>(squares[i]) + step * step * old * part;
      }
    }
    moments.count += rows;
  }

  static void moments(const Args<E>& args, const Packed<T>& packed, const Work<T>& work, Moments& sums,
                      std::int64_t user, std::int64_t candidate, Layer which) noexcept {
    const Shape& s = args.shape;
    const std::int64_t begin = args.begin[user];
    const std::int64_t length = args.end[user] - begin;
    if (length <= 0) return;
    const std::int64_t width1 = padded(s.hidden1);
    const std::int64_t width2 = padded(s.hidden2);
    fold(args, packed, work, candidate, length);
    for (std::int64_t l = 0; l < length; l += kTileRows) {
      const std::int64_t rows = std::min(kTileRows, length - l);
      const auto first = [&](const auto& finish) noexcept {
        first_layer(args, packed, work, begin + l, rows, length, finish);
      };
      if (which == Layer::kFirst) {
        first(Store{work.z1, width1});
        add_moments(sums, work.z1, rows, width1);
        continue;
      }
      layer(args.activation, T{0}, packed.dice1, work.z1, work.h1, kPairs ? work.pairs : nullptr, false, rows, width1,
            first);
      second_layer(args, packed, work, rows, Store{work.z2, width2});
      add_moments(sums, work.z2, rows, width2);
    }
  }

  static void backward(const Args<E>& args, const Gradients<E>& gradients, const Packed<T>& packed, const Work<T>& work,
                       const Partial<T>& partial, const Segment<T>& segment, Reach reach) noexcept {
    const Shape& s = args.shape;
    const std::int64_t begin = args.begin[segment.user];
    const std::int64_t length = args.end[segment.user] - begin;
    const std::int64_t width1 = padded(s.hidden1);
    const std::int64_t turned = padded(s.dim);
    const bool all = reach == Reach::kAll;
    const bool folded = all && gradients.folded();
    for (std::int64_t c = segment.first; c < segment.last; ++c) {
      if (length <= 0) {
        if (all && gradients.query.data != nullptr) std::fill_n(gradients.query[c], s.dim, E{});
        continue;
      }
      fold(args, packed, work, c, length);
      widen_row(gradients.grad[c], work.grad, s.value_dim);
      if (all && gradients.keys.data != nullptr) {
        // We^T: row j is (Wk - Wd)^T[j] + q * Wp^T[j].
        for (std::int64_t j = 0; j < s.hidden1; ++j) {
          for (std::int64_t i = j * turned; i < (j + 1) * turned; i += kWidth) {
            store(work.folded_turned + i, Simd::fma(load(work.query + (i - j * turned)), load(packed.product_turned + i),
                                                    load(packed.keys_turned + i)));
          }
        }
      }
      if (folded) std::fill_n(work.dfolded, s.dim * width1, T{0});
      std::fill_n(work.dbias, width1, T{0});
      for (std::int64_t l = 0; l < length; l += kTileRows) {
        backward_tile(args, gradients, packed, work, partial, segment, c, l, std::min(kTileRows, length - l), reach);
      }
      if (folded) unfold(args, gradients, packed, work, partial, c);
    }
  }

  // From the gradients of We and be to those of W1, b1 and the candidate.
  static void unfold(const Args<E>& args, const Gradients<E>& gradients, const Packed<T>& packed, const Work<T>& work,
                     const Partial<T>& partial, std::int64_t c) noexcept {
    const std::int64_t dim = args.shape.dim;
    const std::int64_t width = padded(args.shape.hidden1);
    add(partial.b1, work.dbias, width);
    for (std::int64_t i = 0; i < dim; ++i) {
      const std::int64_t row = i * width;
      if (gradients.query.data != nullptr) {
        gradients.query[c][i] = rounded(dot(packed.product + row, work.dfolded + row, width) +
                                        dot(packed.query + row, work.dbias, width));
      }
      if (gradients.weights.w1 == nullptr) continue;
      const V q = splat(work.query[i]);
      for (std::int64_t j = 0; j < width; j += kWidth) {
        const V d = load(work.dfolded + row + j);
        store(partial.keys + row + j, load(partial.keys + row + j) + d);
        store(partial.product + row + j, Simd::fma(q, d, load(partial.product + row + j)));
        store(partial.query + row + j, Simd::fma(q, load(work.dbias + j), load(partial.query + row + j)));
      }
    }
  }

  // Positions [l, l + rows) of the segment's user, and candidate c.
  static void backward_tile(const Args<E>& args, const Gradients<E>& gradients, const Packed<T>& packed,
                            const Work<T>& work, const Partial<T>& partial, const Segment<T>& segment, std::int64_t c,
                            std::int64_t l, std::int64_t rows, Reach reach) noexcept {
    const Shape& s = args.shape;
    const std::int64_t begin = args.begin[segment.user];
    const std::int64_t length = args.end[segment.user] - begin;
    const std::int64_t at = begin + l;
    const std::int64_t width1 = padded(s.hidden1);
    const std::int64_t width2 = padded(s.hidden2);
    const std::int64_t key_width = padded(s.dim);
    const std::int64_t value_width = padded(s.value_dim);
    const bool two = s.hidden2 > 0;
    const bool all = reach == Reach::kAll;
    const bool fresh = c == segment.first;
    const bool want_keys = all && gradients.keys.data != nullptr;
    const bool want_values = all && gradients.values.data != nullptr;
    T* dkeys = segment.dkeys + (segment.passing ? 0 : l * key_width);
    T* dvalues = segment.dvalues + (segment.passing ? 0 : l * value_width);

    score(args, packed, work, at, rows, length, true);
    const Tile values = tile_of(args.values, at, rows, true, work.values);
    score_backward(args, gradients, work, partial, values, c, rows, all);
    if (want_values) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const V p = splat(work.weights[r]);
        T* row = dvalues + r * value_width;
        for (std::int64_t j = 0; j < value_width; j += kWidth) {
          store(row + j, Simd::fma(p, load(work.grad + j), fresh ? V{} : load(row + j)));
        }
      }
    }
    if (want_values && segment.passing && (args.own_values || !want_keys)) hand_on(gradients.values, dvalues, at, rows);
    if (!gradients.scores()) return;

    const T* head = two ? work.h2 : work.h1;
    T* dhead = two ? work.dz2 : work.dz1;
    const std::int64_t width = padded(s.head());
    for (std::int64_t j = 0; j < width; j += kWidth) {
      const V w = load(packed.w3 + j);
      V sum = load(partial.w3 + j);
      for (std::int64_t r = 0; r < rows; ++r) {
        const V d = splat(work.dscores[r]);
        sum = Simd::fma(d, load(head + r * width + j), sum);
        store(dhead + r * width + j, d * w);
      }
      store(partial.w3 + j, sum);
    }
    if (!gradients.layers()) return;
    if (two) {
      activate_backward(args.activation, args.weights.slope[1], packed.dice2, partial.dice2, work.z2, work.h2, work.dz2,
                        partial.slope2, partial.b2, rows, width2);
      if (reach == Reach::kLast) return;
      if (all && gradients.weights.w2 != nullptr) {
        multiply({.a = work.h1, .a_row = 1, .a_step = width1, .rows = s.hidden1, .depth = rows, .b = work.dz2,
                  .columns = width2, .start = partial.w2, .start_row = width2, .c = partial.w2});
      }
      if (all && !gradients.into_first()) return;
      multiply({.a = work.dz2, .a_row = width2, .a_step = 1, .rows = rows, .depth = s.hidden2, .b = packed.w2_turned,
                .columns = width1, .start = nullptr, .start_row = 0, .c = work.dz1});
    }
    activate_backward(args.activation, args.weights.slope[0], packed.dice1, partial.dice1, work.z1, work.h1, work.dz1,
                      partial.slope1, work.dbias, rows, width1);
    if (!all) return;
    if (want_keys) {
      // Where the values are the keys, their part is there already.
      const T* start = fresh && args.own_values ? nullptr : dkeys;
      multiply({.a = work.dz1, .a_row = width1, .a_step = 1, .rows = rows, .depth = s.hidden1, .b = work.folded_turned,
                .columns = key_width, .start = start, .start_row = key_width, .c = dkeys});
    }
    if (gradients.folded()) {
      const Tile keys = tile_of(args.keys, at, rows, false, work.keys);
      multiply({.a = keys.data, .a_row = 1, .a_step = keys.stride, .rows = s.dim, .depth = rows, .b = work.dz1,
                .columns = width1, .start = work.dfolded, .start_row = width1, .c = work.dfolded});
    }
    if (want_keys && segment.passing) hand_on(gradients.keys, dkeys, at, rows);
  }

  // Gathered gradients of history rows to where they are wanted.
  static void hand_on(const Rows<E>& to, const T* from, std::int64_t at, std::int64_t rows) noexcept {
    for (std::int64_t r = 0; r < rows; ++r) round_row(from + r * padded(to.width), to[at + r], to.width);
  }

  // work.dscores and work.weights of a tile.
  static void score_backward(const Args<E>& args, const Gradients<E>& gradients, const Work<T>& work,
                             const Partial<T>& partial, Tile values, std::int64_t c, std::int64_t rows,
                             bool all) noexcept {
    const bool softmax = args.mode == Mode::kSoftmax;
    const std::int64_t width = padded(args.shape.value_dim);
    weigh(args.mode, work, softmax ? args.lse[c] : T{0});
    if (!gradients.scores()) return;
    T mean{0};
    if (softmax) {
      widen_row(args.out[c], work.out, args.shape.value_dim);
      mean = dot(work.grad, work.out, width);
    }
    T sum{0};
    for (std::int64_t r = 0; r < rows; ++r) {
      const T p = work.weights[r];
      const T dp = dot(work.grad, values.data + r * values.stride, width);
      T ds = dp;
      if (softmax) ds = p * (dp - mean);
      if (args.mode == Mode::kSigmoid) ds = dp * p * (T{1} - p);
      work.dscores[r] = ds;
      sum += ds;
    }
    // A constant added to every score cancels in the softmax: that gradient is 0, not its rounding.
    if (all && !softmax) partial.b3[0] += sum;
  }
};

}  // namespace recfast::din_attention
