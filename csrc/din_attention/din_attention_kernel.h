// The kernel itself, for any vector type (see common/vectors.h). A form includes both inside its target region; the standard
// headers and din_attention.h must have been included before, outside it.
#pragma once

namespace recfast::din_attention {

template <class Simd>
struct Kernel : Vectors<Simd> {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Base = Vectors<Simd>;
  using Product = typename Base::Product;
  static constexpr std::int64_t kWidth = Base::kWidth;
  using Base::add;
  using Base::add_scaled;
  using Base::dot;
  using Base::exponential;
  using Base::load;
  using Base::logistic;
  using Base::multiply;
  using Base::splat;
  using Base::store;

  // h = act(z) over `size` values, a multiple of the padding.
  static void activate(Activation activation, T slope, const T* z, T* h, std::int64_t size) noexcept {
    const V zero{};
    const V a = splat(slope);
    switch (activation) {
      case Activation::kPrelu:
        for (std::int64_t i = 0; i < size; i += kWidth) {
          const V x = load(z + i);
          store(h + i, x > zero ? x : a * x);
        }
        break;
      case Activation::kRelu:
        for (std::int64_t i = 0; i < size; i += kWidth) {
          const V x = load(z + i);
          store(h + i, x < zero ? zero : x);
        }
        break;
      case Activation::kSigmoid:
        for (std::int64_t i = 0; i < size; i += kWidth) store(h + i, logistic(load(z + i)));
        break;
      case Activation::kSilu:
        for (std::int64_t i = 0; i < size; i += kWidth) {
          const V x = load(z + i);
          store(h + i, x * logistic(x));
        }
        break;
    }
  }

  // dz = dh * act'(z) in place of dh; adds the slope's gradient to `dslope` [kLanes].
  static void activate_backward(Activation activation, T slope, const T* z, const T* h, T* dh, T* dslope,
                                std::int64_t size) noexcept {
    const V zero{};
    const V one = splat(T{1});
    const V a = splat(slope);
    switch (activation) {
      case Activation::kPrelu: {
        constexpr std::int64_t kParts = kLanes / kWidth;
        V sum[kParts];
        for (std::int64_t part = 0; part < kParts; ++part) sum[part] = load(dslope + part * kWidth);
        for (std::int64_t i = 0; i < size; i += kLanes) {
          for (std::int64_t part = 0; part < kParts; ++part) {
            const std::int64_t at = i + part * kWidth;
            const V x = load(z + at);
            const V d = load(dh + at);
            sum[part] = Simd::fma(d, x > zero ? zero : x, sum[part]);
            store(dh + at, x > zero ? d : a * d);
          }
        }
        for (std::int64_t part = 0; part < kParts; ++part) store(dslope + part * kWidth, sum[part]);
        break;
      }
      case Activation::kRelu:
        for (std::int64_t i = 0; i < size; i += kWidth) store(dh + i, load(z + i) > zero ? load(dh + i) : zero);
        break;
      case Activation::kSigmoid:
        for (std::int64_t i = 0; i < size; i += kWidth) {
          const V y = load(h + i);
          store(dh + i, load(dh + i) * (y * (one - y)));
        }
        break;
      case Activation::kSilu:
        for (std::int64_t i = 0; i < size; i += kWidth) {
          const V x = load(z + i);
          const V y = logistic(x);
          store(dh + i, load(dh + i) * (y * (one + x * (one - y))));
        }
        break;
    }
  }

  // We and be of one candidate.
  static void fold(const Args<T>& args, const Packed<T>& packed, const Work<T>& work, const T* query) noexcept {
    const std::int64_t width = padded(args.shape.hidden1);
    for (std::int64_t i = 0; i < args.shape.dim; ++i) {
      const V q = splat(query[i]);
      for (std::int64_t j = i * width; j < (i + 1) * width; j += kWidth) {
        store(work.folded + j, Simd::fma(q, load(packed.product + j), load(packed.keys + j)));
      }
    }
    multiply({.a = query, .a_row = 0, .a_step = 1, .rows = 1, .depth = args.shape.dim, .b = packed.query,
              .columns = width, .start = packed.b1, .start_row = 0, .c = work.bias});
  }

  // Scores of `rows` history rows; leaves z1, h1 (and z2, h2) in `work`.
  static void score(const Args<T>& args, const Packed<T>& packed, const Work<T>& work, const T* keys, std::int64_t rows,
                    T* scores) noexcept {
    const Shape& s = args.shape;
    const std::int64_t width1 = padded(s.hidden1);
    const std::int64_t width2 = padded(s.hidden2);
    multiply({.a = keys, .a_row = args.keys.stride, .a_step = 1, .rows = rows, .depth = s.dim, .b = work.folded,
              .columns = width1, .start = work.bias, .start_row = 0, .c = work.z1});
    activate(args.activation, args.weights.slope[0], work.z1, work.h1, rows * width1);
    const T* head = work.h1;
    if (s.hidden2 > 0) {
      multiply({.a = work.h1, .a_row = width1, .a_step = 1, .rows = rows, .depth = s.hidden1, .b = packed.w2,
                .columns = width2, .start = packed.b2, .start_row = 0, .c = work.z2});
      activate(args.activation, args.weights.slope[1], work.z2, work.h2, rows * width2);
      head = work.h2;
    }
    const std::int64_t width = padded(s.head());
    for (std::int64_t r = 0; r < rows; ++r) {
      scores[r] = dot(head + r * width, packed.w3, width) + args.weights.b3[0];
    }
  }

  static T weight_of(Mode mode, T score, T lse) noexcept {
    if (mode == Mode::kSigmoid) return T{1} / (T{1} + std::exp(-score));
    if (mode == Mode::kSoftmax) return std::exp(score - lse);
    return score;
  }

  static void forward(const Args<T>& args, const Packed<T>& packed, const Work<T>& work, std::int64_t user,
                      std::int64_t candidate) noexcept {
    const std::int64_t begin = args.begin[user];
    const std::int64_t length = args.end[user] - begin;
    T* out = args.out[candidate];
    std::fill_n(out, args.shape.value_dim, T{0});
    const bool softmax = args.mode == Mode::kSoftmax;
    if (length <= 0) {
      if (softmax) args.lse[candidate] = T{0};
      return;
    }
    fold(args, packed, work, args.query[candidate]);
    for (std::int64_t l = 0; l < length; l += kTileRows) {
      score(args, packed, work, args.keys[begin + l], std::min(kTileRows, length - l), work.scores + l);
    }
    T lse{0};
    if (softmax) {
      const T highest = *std::max_element(work.scores, work.scores + length);
      T total{0};
      for (std::int64_t l = 0; l < length; ++l) total += std::exp(work.scores[l] - highest);
      lse = highest + std::log(total);
      args.lse[candidate] = lse;
    }
    for (std::int64_t l = 0; l < length; ++l) {
      add_scaled(out, args.values[begin + l], weight_of(args.mode, work.scores[l], lse), args.shape.value_dim);
    }
  }

  static void backward(const Args<T>& args, const Gradients<T>& gradients, const Packed<T>& packed, const Work<T>& work,
                       const Partial<T>& partial, std::int64_t user) noexcept {
    const Shape& s = args.shape;
    const std::int64_t begin = args.begin[user];
    const std::int64_t length = args.end[user] - begin;
    for (std::int64_t l = begin; l < begin + length; ++l) {
      std::fill_n(gradients.keys[l], s.dim, T{0});
      std::fill_n(gradients.values[l], s.value_dim, T{0});
    }
    const std::int64_t first = args.candidates == nullptr ? user : args.candidates[user];
    const std::int64_t last = args.candidates == nullptr ? user + 1 : args.candidates[user + 1];
    const std::int64_t width1 = padded(s.hidden1);
    const std::int64_t turned = padded(s.dim);
    for (std::int64_t c = first; c < last; ++c) {
      if (length <= 0) {
        std::fill_n(gradients.query[c], s.dim, T{0});
        continue;
      }
      const T* query = args.query[c];
      fold(args, packed, work, query);
      // We^T: row j is (Wk - Wd)^T[j] + q * Wp^T[j].
      for (std::int64_t j = 0; j < s.hidden1; ++j) {
        for (std::int64_t i = 0; i < turned; ++i) {
          const T q = i < s.dim ? query[i] : T{0};
          const std::int64_t to = j * turned + i;
          work.folded_turned[to] = packed.keys_turned[to] + q * packed.product_turned[to];
        }
      }
      std::fill_n(work.dfolded, s.dim * width1, T{0});
      std::fill_n(work.dbias, width1, T{0});
      for (std::int64_t l = 0; l < length; l += kTileRows) {
        backward_tile(args, gradients, packed, work, partial, c, begin + l, std::min(kTileRows, length - l));
      }
      T* dquery = gradients.query[c];
      add(partial.b1, work.dbias, width1);
      for (std::int64_t i = 0; i < s.dim; ++i) {
        const std::int64_t row = i * width1;
        dquery[i] = dot(packed.product + row, work.dfolded + row, width1) + dot(packed.query + row, work.dbias, width1);
        const V q = splat(query[i]);
        for (std::int64_t j = 0; j < width1; j += kWidth) {
          const V d = load(work.dfolded + row + j);
          store(partial.keys + row + j, load(partial.keys + row + j) + d);
          store(partial.product + row + j, Simd::fma(q, d, load(partial.product + row + j)));
          store(partial.query + row + j, Simd::fma(q, load(work.dbias + j), load(partial.query + row + j)));
        }
      }
    }
  }

  // History rows [at, at + rows) and candidate c.
  static void backward_tile(const Args<T>& args, const Gradients<T>& gradients, const Packed<T>& packed,
                            const Work<T>& work, const Partial<T>& partial, std::int64_t c, std::int64_t at,
                            std::int64_t rows) noexcept {
    const Shape& s = args.shape;
    const std::int64_t width1 = padded(s.hidden1);
    const std::int64_t width2 = padded(s.hidden2);
    const bool two = s.hidden2 > 0;
    const bool softmax = args.mode == Mode::kSoftmax;
    const T* grad = gradients.grad[c];
    const T lse = softmax ? args.lse[c] : T{0};
    const T mean = softmax ? dot(grad, args.out[c], s.value_dim) : T{0};
    score(args, packed, work, args.keys[at], rows, work.scores);

    const T* head = two ? work.h2 : work.h1;
    T* dhead = two ? work.dz2 : work.dz1;
    const std::int64_t width = padded(s.head());
    for (std::int64_t r = 0; r < rows; ++r) {
      const T p = weight_of(args.mode, work.scores[r], lse);
      const T dp = dot(grad, args.values[at + r], s.value_dim);
      add_scaled(gradients.values[at + r], grad, p, s.value_dim);
      T ds = dp;
      if (softmax) ds = p * (dp - mean);
      if (args.mode == Mode::kSigmoid) ds = dp * p * (T{1} - p);
      // A constant added to every score cancels in the softmax: that gradient is 0, not its rounding.
      if (!softmax) partial.b3[0] += ds;
      const V d = splat(ds);
      for (std::int64_t j = 0; j < width; j += kWidth) {
        store(partial.w3 + j, Simd::fma(d, load(head + r * width + j), load(partial.w3 + j)));
        store(dhead + r * width + j, d * load(packed.w3 + j));
      }
    }
    if (two) {
      activate_backward(args.activation, args.weights.slope[1], work.z2, work.h2, work.dz2, partial.slope2,
                        rows * width2);
      for (std::int64_t r = 0; r < rows; ++r) add(partial.b2, work.dz2 + r * width2, width2);
      multiply({.a = work.h1, .a_row = 1, .a_step = width1, .rows = s.hidden1, .depth = rows, .b = work.dz2,
                .columns = width2, .start = partial.w2, .start_row = width2, .c = partial.w2});
      multiply({.a = work.dz2, .a_row = width2, .a_step = 1, .rows = rows, .depth = s.hidden2, .b = packed.w2_turned,
                .columns = width1, .start = nullptr, .start_row = 0, .c = work.dz1});
    }
    activate_backward(args.activation, args.weights.slope[0], work.z1, work.h1, work.dz1, partial.slope1,
                      rows * width1);
    for (std::int64_t r = 0; r < rows; ++r) add(work.dbias, work.dz1 + r * width1, width1);
    multiply({.a = work.dz1, .a_row = width1, .a_step = 1, .rows = rows, .depth = s.hidden1, .b = work.folded_turned,
              .columns = padded(s.dim), .start = nullptr, .start_row = 0, .c = work.dkeys});
    for (std::int64_t r = 0; r < rows; ++r) {
      T* dkeys = gradients.keys[at + r];
      for (std::int64_t i = 0; i < s.dim; ++i) dkeys[i] += work.dkeys[r * padded(s.dim) + i];
    }
    multiply({.a = args.keys[at], .a_row = 1, .a_step = args.keys.stride, .rows = s.dim, .depth = rows, .b = work.dz1,
              .columns = width1, .start = work.dfolded, .start_row = width1, .c = work.dfolded});
  }
};

}  // namespace recfast::din_attention
