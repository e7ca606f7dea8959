// The kernel of negatives_loss over any vector type; see common/vectors.h for what a file that includes this must give,
// and common/tiles.h. A `Simd` may also have bits(mask), the lanes of a comparison as bits.
#pragma once

namespace recfast::negatives_loss {

template <class Simd, class S>
struct Kernel : Tiles<Simd> {
  using Base = Tiles<Simd>;
  using T = typename Simd::T;
  using V = typename Simd::V;
  using I = Id<T>;
  static constexpr std::int64_t kWidth = Base::kWidth;
  static constexpr std::int64_t kParts = kLanes / kWidth;  // vectors of a group of lanes
  using Integers = typename VectorOf<I, kWidth>::Type;
  using Base::load;
  using Base::splat;
  using Base::store;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  static Integers load_ids(const I* p) noexcept {
    Integers v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  static std::uint32_t bits_of(Integers mask) noexcept {
    if constexpr (requires { Simd::bits(mask); }) {
      return Simd::bits(mask);
    } else {
      std::uint32_t bits = 0;
      for (std::int64_t i = 0; i < kWidth; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
      return bits;
    }
  }

  // The comparison that bits_of has read, from bit `from` on.
  static Integers mask_of(std::uint32_t bits, std::int64_t from) noexcept {
    Integers mask;
    for (std::int64_t i = 0; i < kWidth; ++i) mask[i] = -static_cast<I>(bits >> (from + i) & 1u);
    return mask;
  }

  // --- rows ---

  // Whether table rows can be read where they lie, in whole vectors.
  static bool direct(const Args<S>& args) noexcept { return std::is_same_v<S, T> && args.dim() % kLanes == 0; }

  static const T* row_of(const Args<S>& args, std::int64_t id, T* buffer) noexcept {
    if constexpr (std::is_same_v<S, T>) {
      if (direct(args)) return args.table[id];
    }
    Base::read_rows(args.table[id], args.table.stride, 1, args.dim(), T{1}, buffer, padded(args.dim()), 1);
    return buffer;
  }

  static T inverse_norm(const T* row, std::int64_t width) noexcept {
    return T{1} / std::max(std::sqrt(Base::dot(row, row, width)), static_cast<T>(kSmallestNorm));
  }

  // y += x * a over whole vectors.
  [[gnu::always_inline]] static inline void add_row(T* y, const T* a, T x, std::int64_t width) noexcept {
    const V factor = splat(x);
    for (std::int64_t d = 0; d < width; d += kWidth) store(y + d, Simd::fma(factor, load(a + d), load(y + d)));
  }

  // y += sum_i x_i a_i, in the order of i, kept in registers for as long as it grows.
  static void add_rows(T* y, const T* const* a, const T* x, std::int64_t count, std::int64_t width) noexcept {
    std::int64_t d = 0;
    for (; d + 4 * kWidth <= width; d += 4 * kWidth) {
      V sum[4];
      _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) sum[j] = load(y + d + j * kWidth);
      for (std::int64_t i = 0; i < count; ++i) {
        const V factor = splat(x[i]);
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) {
          sum[j] = Simd::fma(factor, load(a[i] + d + j * kWidth), sum[j]);
        }
      }
      _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) store(y + d + j * kWidth, sum[j]);
    }
    for (; d < width; d += kWidth) {
      V sum = load(y + d);
      for (std::int64_t i = 0; i < count; ++i) sum = Simd::fma(splat(x[i]), load(a[i] + d), sum);
      store(y + d, sum);
    }
  }

  static void scale_row(T* y, T x, std::int64_t width) noexcept {
    const V factor = splat(x);
    for (std::int64_t d = 0; d < width; d += kWidth) store(y + d, factor * load(y + d));
  }

  // The gradient of a normalised row, for the row x itself, of norm 1 / inverse: (dy - (y dy) y) / |x|, in place.
  static void project(T* gradient, const T* x, T inverse, std::int64_t width) noexcept {
    if (inverse >= static_cast<T>(1 / kSmallestNorm)) {
      std::fill_n(gradient, width, T{0});
      return;
    }
    const T along = Base::dot(x, gradient, width) * inverse * inverse;
    const V factor = splat(-along);
    const V outer = splat(inverse);
    for (std::int64_t d = 0; d < width; d += kWidth) {
      store(gradient + d, outer * Simd::fma(factor, load(x + d), load(gradient + d)));
    }
  }

  // The gradient of a table row, put into `to`; `gradient` is that of the normalised row, and is used up.
  static void put_row(const Args<S>& args, std::int64_t id, T* gradient, S* to, T* buffer) noexcept {
    const std::int64_t width = padded(args.dim());
    if (args.normalize_table) {
      const T* row = row_of(args, id, buffer);
      project(gradient, row, inverse_norm(row, width), width);
    }
    Base::write_rows(gradient, width, 1, args.dim(), T{1}, to, args.dim());
  }

  // --- preparation ---

  static void prepare_queries(const Args<S>& args, const Prepared<T>& p, const Work<T>& work,
                              std::int64_t block) noexcept {
    const Blocks blocks(args.rows());
    const std::int64_t first = blocks.first(block);
    const std::int64_t lanes = blocks.first(block + 1) - first;
    const std::int64_t rows = std::min(lanes, args.rows() - first);
    const std::int64_t width = padded(args.dim());
    T* to = p.rows + first * width;
    Base::read_rows(args.queries[first], args.queries.stride, rows, args.dim(), T{1}, to, width, lanes);
    for (std::int64_t r = 0; r < lanes; ++r) {
      const std::int64_t i = first + r;
      p.inverse[i] = T{1};
      p.positive[i] = I{-1};
      p.own[i] = T{0};
      if (r >= rows) continue;
      T* query = to + r * width;
      if (args.normalize_queries) p.inverse[i] = inverse_norm(query, width);
      scale_row(query, args.scale * p.inverse[i], width);
      const std::int64_t id = args.positives[i];
      if (args.skip_positive) p.positive[i] = static_cast<I>(id);
      const T* row = row_of(args, id, work.row);
      T score = Base::dot(query, row, width);
      if (args.normalize_table) score *= inverse_norm(row, width);
      p.own[i] = args.bias == nullptr ? score : score + args.bias[id];
    }
    if (args.form != Columns::kPrivate) Base::turn(to, width, lanes, width, p.turned + first * width, lanes);
  }

  static void prepare_columns(const Args<S>& args, const Prepared<T>& p, const Work<T>& work, std::int64_t first,
                              std::int64_t last) noexcept {
    const std::int64_t width = padded(args.dim());
    for (std::int64_t j = first; j < last; ++j) {
      const std::int64_t id = args.form == Columns::kAll ? args.first + j : args.negatives[j];
      p.ids[j] = static_cast<I>(id);
      p.factor[j] = T{1};
      p.addend[j] = args.bias == nullptr ? T{0} : args.bias[id];
      if (args.log_expected != nullptr) p.addend[j] -= args.log_expected[j];
      if (args.form == Columns::kShared) {
        T* row = p.gathered + j * width;
        Base::read_rows(args.table[id], args.table.stride, 1, args.dim(), T{1}, row, width, 1);
        if (args.normalize_table) p.factor[j] = inverse_norm(row, width);
      } else if (args.normalize_table) {
        p.factor[j] = inverse_norm(row_of(args, id, work.row), width);
      }
    }
  }

  // Rows of columns [first, first + count) that vectors may be read from.
  struct Matrix {
    const T* data;
    std::int64_t stride;
  };

  static Matrix columns_of(const Args<S>& args, const Prepared<T>& p, const Work<T>& work, std::int64_t first,
                           std::int64_t count) noexcept {
    const std::int64_t width = padded(args.dim());
    if (args.form == Columns::kShared) return {p.gathered + first * width, width};
    if constexpr (std::is_same_v<S, T>) {
      if (direct(args)) return {args.table[args.first + first], args.table.stride};
    }
    Base::read_rows(args.table[args.first + first], args.table.stride, count, args.dim(), T{1}, work.columns, width,
                    count);
    return {work.columns, width};
  }

  // --- scores ---

  // Scores before factor and addend, [count, lanes]; minus infinity where a row leaves a column out.
  static void score(const Args<S>& args, const Prepared<T>& p, const Matrix& columns, std::int64_t column,
                    std::int64_t count, std::int64_t first, std::int64_t lanes, T* scores) noexcept {
    Base::multiply_block({.a = columns.data, .a_row = columns.stride, .a_step = 1, .rows = count, .depth = args.dim(),
                          .b = p.turned + first * padded(args.dim()), .b_row = lanes, .columns = lanes, .c = scores,
                          .c_row = lanes, .add = false});
    if (args.excluded == nullptr) return;
    for (std::int64_t i = first; i < std::min(first + lanes, args.rows()); ++i) {
      const std::int64_t* end = args.excluded + args.exclude_offsets[i + 1];
      const std::int64_t* at = std::lower_bound(args.excluded + args.exclude_offsets[i], end, column);
      for (; at < end && *at < column + count; ++at) scores[(*at - column) * lanes + i - first] = -kInfinity;
    }
  }

  // A tile of scores beside what its columns have.
  struct Tile {
    T* scores;
    std::int64_t count;
    std::int64_t lanes;
    const T* factor;
    const T* addend;
    const I* ids;
  };

  [[gnu::always_inline]] static inline V finished(const Tile& t, std::int64_t j, std::int64_t v,
                                                  Integers own) noexcept {
    const V z = Simd::fma(load(t.scores + j * t.lanes + v), splat(t.factor[j]), splat(t.addend[j]));
    const Integers id = t.ids[j] - Integers{};
    return id == own ? splat(-kInfinity) : z;
  }

  // --- elementwise ---

  static V absolute(V x) noexcept { return x < V{} ? -x : x; }

  // ln(1 + e) for e in [0, 1], relative error below 3 eps; 1 / (1 + e) beside it.
  [[gnu::always_inline]] static inline V log1p(V e, V& inverse) noexcept {
    if constexpr (std::is_same_v<T, float>) {
      const V one = splat(1.0f) + e;
      const V two = splat(2.0f) + e;
      const V both = splat(1.0f) / (one * two);
      inverse = two * both;
      const V s = e * one * both;  // ln(1 + e) = 2 atanh(e / (2 + e))
      const V q = s * s;           // at most 1 / 9
      V y = splat(2.0f / 13);
      y = Simd::fma(y, q, splat(2.0f / 11));
      y = Simd::fma(y, q, splat(2.0f / 9));
      y = Simd::fma(y, q, splat(2.0f / 7));
      y = Simd::fma(y, q, splat(2.0f / 5));
      y = Simd::fma(y, q, splat(2.0f / 3));
      y = Simd::fma(y, q, splat(2.0f));
      return y * s;
    } else {
      inverse = splat(T{1}) / (splat(T{1}) + e);
      for (std::int64_t i = 0; i < kWidth; ++i) e[i] = std::log1p(e[i]);
      return e;
    }
  }

  // softplus(x) = max(x, 0) + ln(1 + e^-|x|), and its slope, the sigmoid; both 0 at minus infinity.
  [[gnu::always_inline]] static inline V softplus(V x, V& sigmoid) noexcept {
    const V e = Base::decay(-absolute(x));
    V inverse;
    const V tail = log1p(e, inverse);
    const V zero{};
    const V low = e * inverse;
    sigmoid = x >= zero ? inverse : low;
    sigmoid = x == splat(-kInfinity) ? zero : sigmoid;
    const V sum = (x > zero ? x : zero) + tail;
    return x == splat(-kInfinity) ? zero : sum;
  }

  static T softplus_of(T x) noexcept { return std::max(x, T{0}) + std::log1p(std::exp(-std::abs(x))); }
  static T sigmoid_of(T x) noexcept {
    const T e = std::exp(-std::abs(x));
    return x >= T{0} ? T{1} / (T{1} + e) : e / (T{1} + e);
  }

  // Softmax: sums and maxima carried on. Leaves e^(z - max) / |w| in the tile, and in `rescale` what sums of before are
  // multiplied by, a lane each.
  static void softmax_tile(const Tile& t, const I* positive, T* high, T* sum, T* rescale, bool gradient) noexcept {
    for (std::int64_t v = 0; v < t.lanes; v += kWidth) {
      const Integers own = load_ids(positive + v);
      const V before = load(high + v);
      V top = before;
      for (std::int64_t j = 0; j < t.count; ++j) {
        const V z = finished(t, j, v, own);
        store(t.scores + j * t.lanes + v, z);
        top = Base::larger(z, top);
      }
      V part{};
      for (std::int64_t j = 0; j < t.count; ++j) {
        T* at = t.scores + j * t.lanes + v;
        const V z = load(at);
        V e = Base::decay(z - top);
        e = z == splat(-kInfinity) ? V{} : e;
        part += e;
        if (gradient) store(at, e * splat(t.factor[j]));
      }
      const V factor = Base::decay(before - top);
      store(rescale + v, factor);
      store(high + v, top);
      store(sum + v, Simd::fma(load(sum + v), factor, part));
    }
  }

  // The others: leaves dL/dz / |w| (without weight / K_i) in the tile, and for kContrastive a bit where it is not 0.
  // Returns how many are not 0 (kContrastive).
  template <Loss L>
  static std::int64_t sum_tile(const Tile& t, const Args<S>& args, const Prepared<T>& p, std::int64_t first,
                               std::uint16_t* active, std::int64_t active_row) noexcept {
    const bool gradient = args.direction != nullptr;
    const V margin = splat(args.margin);
    std::int64_t found = 0;
    for (std::int64_t v = 0; v < t.lanes; v += kWidth) {
      const std::int64_t i = first + v;
      const Integers own = load_ids(p.positive + i);
      const V own_score = load(p.own + i);
      V part{};
      V slope{};
      V count{};
      for (std::int64_t j = 0; j < t.count; ++j) {
        T* at = t.scores + j * t.lanes + v;
        const V z = finished(t, j, v, own);
        count += z == splat(-kInfinity) ? V{} : splat(T{1});
        if constexpr (L == Loss::kContrastive) {
          const Integers above = z > margin;
          part += above ? z - margin : V{};
          if (gradient) {
            store(at, above ? splat(t.factor[j]) : V{});
            const std::uint32_t bits = bits_of(above);
            found += std::popcount(bits);
            std::uint16_t& word = active[j * active_row + v / kLanes];
            const std::int64_t shift = v % kLanes;
            word = static_cast<std::uint16_t>((shift == 0 ? 0u : word) | bits << shift);
          }
        } else {
          V sigmoid;
          part += softplus(L == Loss::kPairwise ? z - own_score : z, sigmoid);
          slope += sigmoid;
          if (gradient) store(at, sigmoid * splat(t.factor[j]));
        }
      }
      store(p.sum + i, load(p.sum + i) + part);
      store(p.count + i, load(p.count + i) + count);
      if constexpr (L == Loss::kPairwise) store(p.slope + i, load(p.slope + i) + slope);
    }
    return found;
  }

  // Of a row whose sums are whole: loss and statistic. Returns weight / K_i, or for the softmax 1 / sum.
  static T close_row(const Args<S>& args, const Prepared<T>& p, std::int64_t i) noexcept {
    const T own = p.own[i];
    T* statistic = args.statistic;
    const std::int64_t rows = args.rows();
    T factor;
    T slope;
    T loss;
    if (args.loss == Loss::kSoftmax) {
      const T rest = std::log(p.sum[i]);
      loss = (p.high[i] - own) + rest;
      factor = T{1} / p.sum[i];
      slope = std::expm1(-loss);
      statistic[i] = p.high[i] + rest;
    } else {
      factor = args.weight / std::max(p.count[i], T{1});
      loss = factor * p.sum[i];
      statistic[i] = factor;
      if (args.loss == Loss::kContrastive) {
        const T gap = T{1} - own;
        const bool flat = args.clamp && !(gap > T{0});
        loss += flat ? T{0} : gap;
        slope = flat ? T{0} : T{-1};
      } else if (args.loss == Loss::kPairwise) {
        slope = -factor * p.slope[i];
      } else {
        loss += args.positive_weight * softplus_of(-own);
        slope = -args.positive_weight * sigmoid_of(-own);
      }
    }
    args.losses[i] = loss;
    statistic[rows + i] = own;
    statistic[2 * rows + i] = slope;
    return factor;
  }

  // dL_i/dq_i from sum_j c_ij w_j, which is used up.
  static void put_direction(const Args<S>& args, const Prepared<T>& p, const Work<T>& work, std::int64_t i, T factor,
                            T* along) noexcept {
    const std::int64_t width = padded(args.dim());
    const std::int64_t id = args.positives[i];
    const T* row = row_of(args, id, work.row);
    T slope = args.statistic[2 * args.rows() + i];
    if (args.normalize_table) slope *= inverse_norm(row, width);
    scale_row(along, factor, width);
    add_row(along, row, slope, width);
    if (args.normalize_queries) {
      Base::read_rows(args.queries[i], args.queries.stride, 1, args.dim(), T{1}, work.other, width, 1);
      project(along, work.other, p.inverse[i], width);
    }
    for (std::int64_t d = 0; d < args.dim(); ++d) args.direction[i * args.dim() + d] = args.scale * along[d];
  }

  // What the sums of a row start from.
  static void open_row(const Args<S>& args, const Prepared<T>& p, std::int64_t i) noexcept {
    p.high[i] = p.own[i];
    p.sum[i] = args.loss == Loss::kSoftmax ? T{1} : T{0};
    p.count[i] = T{0};
    p.slope[i] = T{0};
  }

  // --- forward over columns that rows share ---

  static void forward(const Args<S>& args, const Prepared<T>& p, const Work<T>& work, std::int64_t from,
                      std::int64_t until) noexcept {
    const Blocks blocks(args.rows());
    const std::int64_t width = padded(args.dim());
    const bool gradient = args.direction != nullptr;
    const std::int64_t begin = blocks.first(from);
    const std::int64_t end = blocks.first(until);
    for (std::int64_t i = begin; i < end; ++i) open_row(args, p, i);
    if (gradient) std::fill_n(p.along + begin * width, (end - begin) * width, T{0});
    for (std::int64_t column = 0; column < args.columns; column += args.tile) {
      const std::int64_t count = std::min(args.tile, args.columns - column);
      const Matrix columns = columns_of(args, p, work, column, count);
      for (std::int64_t block = from; block < until; ++block) {
        const std::int64_t first = blocks.first(block);
        const std::int64_t lanes = blocks.first(block + 1) - first;
        score(args, p, columns, column, count, first, lanes, work.scores);
        const Tile tile{work.scores, count, lanes, p.factor + column, p.addend + column, p.ids + column};
        T* along = p.along + first * width;
        if (args.loss == Loss::kSoftmax) {
          T* rescale = work.lanes;
          softmax_tile(tile, p.positive + first, p.high + first, p.sum + first, rescale, gradient);
          if (gradient) {
            for (std::int64_t r = 0; r < lanes; ++r) {
              if (rescale[r] != T{1}) scale_row(along + r * width, rescale[r], width);
            }
          }
        } else if (args.loss == Loss::kContrastive) {
          const std::int64_t active_row = words(args.rows());
          std::uint16_t* active =
              args.active == nullptr ? nullptr : args.active + column * active_row + first / kLanes;
          const std::int64_t found = sum_tile<Loss::kContrastive>(tile, args, p, first, active, active_row);
          if (gradient && sparse(found, count * lanes)) {
            for_each_bit(active, active_row, count, lanes, [&](std::int64_t j, std::int64_t r) {
              add_row(along + r * width, columns.data + j * columns.stride, tile.factor[j], width);
            });
            continue;
          }
        } else if (args.loss == Loss::kPairwise) {
          static_cast<void>(sum_tile<Loss::kPairwise>(tile, args, p, first, nullptr, 0));
        } else {
          static_cast<void>(sum_tile<Loss::kBinary>(tile, args, p, first, nullptr, 0));
        }
        if (gradient) {
          Base::multiply_block({.a = work.scores, .a_row = 1, .a_step = lanes, .rows = lanes, .depth = count,
                                .b = columns.data, .b_row = columns.stride, .columns = width, .c = along,
                                .c_row = width, .add = true});
        }
      }
    }
    for (std::int64_t i = begin; i < std::min(end, args.rows()); ++i) {
      const T factor = close_row(args, p, i);
      if (gradient) put_direction(args, p, work, i, factor, p.along + i * width);
    }
  }

  // Whether so few of the pairs are active that a product of matrices is the longer way.
  static bool sparse(std::int64_t active, std::int64_t pairs) noexcept { return active * 4 < pairs; }

  // f(column, lane) for each bit of a tile, by columns.
  template <class F>
  static void for_each_bit(const std::uint16_t* active, std::int64_t active_row, std::int64_t count,
                           std::int64_t lanes, const F& f) noexcept {
    for (std::int64_t j = 0; j < count; ++j) {
      for (std::int64_t group = 0; group < lanes / kLanes; ++group) {
        for (std::uint32_t bits = active[j * active_row + group]; bits != 0; bits &= bits - 1) {
          f(j, group * kLanes + std::countr_zero(bits));
        }
      }
    }
  }

  // --- backward over columns that rows share ---

  static void begin_backward(const Args<S>& args, const Gradients<S>& gradients, const Prepared<T>& p) noexcept {
    const std::int64_t rows = args.rows();
    for (std::int64_t i = 0; i < padded(rows); ++i) {
      const bool there = i < rows;
      const T gradient = there ? gradients.losses[i] : T{0};
      p.own[i] = there ? args.statistic[rows + i] : T{0};
      p.slope[i] = there ? gradient * args.statistic[2 * rows + i] : T{0};
      const T level = there ? args.statistic[i] : T{0};
      p.high[i] = level;
      p.sum[i] = args.loss == Loss::kSoftmax ? gradient : gradient * level;
    }
  }

  // dL/dz of a tile, in place, and where asked for its sums over the rows.
  template <Loss L>
  static void slope_tile(const Tile& t, const Prepared<T>& p, std::int64_t first, T* sums) noexcept {
    for (std::int64_t v = 0; v < t.lanes; v += kWidth) {
      const std::int64_t i = first + v;
      const Integers own = load_ids(p.positive + i);
      const V own_score = load(p.own + i);
      const V high = load(p.high + i);
      const V gradient = load(p.sum + i);
      for (std::int64_t j = 0; j < t.count; ++j) {
        const V z = finished(t, j, v, own);
        V slope;
        if constexpr (L == Loss::kSoftmax) {
          slope = Base::decay(z - high);
          slope = z == splat(-kInfinity) ? V{} : slope;
        } else {
          static_cast<void>(softplus(L == Loss::kPairwise ? z - own_score : z, slope));
        }
        slope *= gradient;
        store(t.scores + j * t.lanes + v, slope);
        if (sums != nullptr) store(sums + j * kLanes, load(sums + j * kLanes) + slope);
      }
    }
  }

  static void backward(const Args<S>& args, const Gradients<S>& gradients, const Prepared<T>& p, const Work<T>& work,
                       std::int64_t number) noexcept {
    const Blocks blocks(args.rows());
    const std::int64_t width = padded(args.dim());
    const bool shared = args.form == Columns::kShared;
    const std::int64_t column = number * args.tile;
    const std::int64_t count = std::min(args.tile, args.columns - column);
    T* dcolumns = shared ? p.dgathered + column * width : work.dcolumns;
    T* sums = gradients.bias == nullptr ? nullptr : work.lanes;
    std::fill_n(dcolumns, count * width, T{0});
    if (sums != nullptr) std::fill_n(sums, count * kLanes, T{0});
    const Matrix columns =
        args.loss == Loss::kContrastive ? Matrix{nullptr, 0} : columns_of(args, p, work, column, count);
    for (std::int64_t block = 0; block < blocks.count; ++block) {
      const std::int64_t first = blocks.first(block);
      const std::int64_t lanes = blocks.first(block + 1) - first;
      const T* rows = p.rows + first * width;
      const Tile tile{work.scores, count, lanes, p.factor + column, p.addend + column, p.ids + column};
      if (args.loss == Loss::kContrastive) {
        const std::int64_t active_row = words(args.rows());
        const std::uint16_t* active = args.active + column * active_row + first / kLanes;
        std::int64_t found = 0;
        for_each_bit(active, active_row, count, lanes, [&](std::int64_t j, std::int64_t r) {
          ++found;
          if (sums != nullptr) sums[j * kLanes] += p.sum[first + r];
        });
        if (sparse(found, count * lanes)) {
          for_each_bit(active, active_row, count, lanes, [&](std::int64_t j, std::int64_t r) {
            add_row(dcolumns + j * width, rows + r * width, p.sum[first + r], width);
          });
          continue;
        }
        for (std::int64_t j = 0; j < count; ++j) {
          for (std::int64_t v = 0; v < lanes; v += kWidth) {
            const Integers above = mask_of(active[j * active_row + v / kLanes], v % kLanes);
            store(work.scores + j * lanes + v, above ? load(p.sum + first + v) : V{});
          }
        }
      } else {
        score(args, p, columns, column, count, first, lanes, work.scores);
        if (args.loss == Loss::kSoftmax) {
          slope_tile<Loss::kSoftmax>(tile, p, first, sums);
        } else if (args.loss == Loss::kPairwise) {
          slope_tile<Loss::kPairwise>(tile, p, first, sums);
        } else {
          slope_tile<Loss::kBinary>(tile, p, first, sums);
        }
      }
      Base::multiply_block({.a = work.scores, .a_row = lanes, .a_step = 1, .rows = count, .depth = lanes, .b = rows,
                            .b_row = width, .columns = width, .c = dcolumns, .c_row = width, .add = true});
    }
    if (shared) {
      if (sums != nullptr) {
        for (std::int64_t j = 0; j < count; ++j) p.dbias[column + j] = sum_part(sums + j * kLanes);
      }
      return;
    }
    // The groups are those of the positives.
    const Groups& g = gradients.groups;
    std::int64_t run = std::lower_bound(g.ids, g.ids + g.runs, args.first + column) - g.ids;
    for (std::int64_t j = 0; j < count; ++j) {
      const std::int64_t id = args.first + column + j;
      T sum = sums == nullptr ? T{0} : sum_part(sums + j * kLanes);
      T* row = dcolumns + j * width;
      if (run < g.runs && g.ids[run] == id) add_positives(p, g, run++, 0, width, row, sum);
      put_row(args, id, row, gradients.table + id * args.dim(), work.row);
      if (sums != nullptr) gradients.bias[id] = sum;
    }
  }

  // Lanes past the first vector of a group are not in use.
  static T sum_part(const T* lanes) noexcept {
    T sum = lanes[0];
    for (std::int64_t i = 1; i < kWidth; ++i) sum += lanes[i];
    return sum;
  }

  // The entries of a group from `offset` on are positives of row entry - offset.
  static void add_positives(const Prepared<T>& p, const Groups& g, std::int64_t run, std::int64_t offset,
                            std::int64_t width, T* row, T& bias) noexcept {
    for (std::uint32_t e = g.starts[run]; e < g.starts[run + 1]; ++e) {
      const std::int64_t entry = g.order[e];
      if (entry < offset) continue;
      const T slope = p.slope[entry - offset];
      add_row(row, p.rows + (entry - offset) * width, slope, width);
      bias += slope;
    }
  }

  static void join(const Args<S>& args, const Gradients<S>& gradients, const Prepared<T>& p, const Work<T>& work,
                   std::int64_t first, std::int64_t last) noexcept {
    const std::int64_t width = padded(args.dim());
    const Groups& g = gradients.groups;
    const std::int64_t columns = args.form == Columns::kShared ? args.columns : 0;
    for (std::int64_t run = first; run < last; ++run) {
      const std::int64_t id = g.ids[run];
      // kAll: rows before the first column are in no tile.
      if (args.form == Columns::kAll && id >= args.first) break;
      T* sum = work.other;
      T bias = 0;
      std::fill_n(sum, width, T{0});
      for (std::uint32_t e = g.starts[run]; e < g.starts[run + 1]; ++e) {
        const std::int64_t entry = g.order[e];
        if (entry >= columns) break;
        Base::add(sum, p.dgathered + entry * width, width);
        if (gradients.bias != nullptr) bias += p.dbias[entry];
      }
      add_positives(p, g, run, columns, width, sum, bias);
      put_row(args, id, sum, gradients.table + (gradients.sparse ? run : id) * args.dim(), work.row);
      if (gradients.bias != nullptr) gradients.bias[id] = bias;
    }
  }

  // --- private lists ---

  static constexpr std::int64_t kAhead = 32;  // rows that are asked for before they are read

  // The rows of kWidth ids, of which the last is before `end`.
  static void ask_for(const Args<S>& args, const std::int64_t* ids, const std::int64_t* end) noexcept {
    if (ids + kWidth > end) return;
    const auto* table = reinterpret_cast<const char*>(args.table.data);
    const std::int64_t stride = args.table.stride * static_cast<std::int64_t>(sizeof(S));
    const std::int64_t bytes = args.dim() * static_cast<std::int64_t>(sizeof(S));
    for (std::int64_t r = 0; r < kWidth; ++r) {
      const char* row = table + ids[r] * stride;
      for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
    }
  }

  // Lane r of the answer is the sum of the lanes of x[r].
  static V sums_of(V (&x)[kWidth]) noexcept {
    return sums_of(x, std::make_integer_sequence<std::int64_t, kWidth>{});
  }
  template <std::int64_t... i>
  static V sums_of(V (&x)[kWidth], std::integer_sequence<std::int64_t, i...>) noexcept {
    _Pragma("GCC unroll 8") for (std::int64_t left = kWidth; left > 1; left /= 2) {
      _Pragma("GCC unroll 16") for (std::int64_t r = 0; r < left / 2; ++r) {
        const V a = x[2 * r];
        const V b = x[2 * r + 1];
        x[r] = __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
      }
    }
    return x[0];
  }

  // Dot products of kWidth pairs of rows.
  template <bool OneQuery>
  [[gnu::always_inline]] static inline V dots(const T* const* rows, const T* const* queries,
                                              std::int64_t width) noexcept {
    V x[kWidth];
    _Pragma("GCC unroll 16") for (std::int64_t r = 0; r < kWidth; ++r) x[r] = V{};
    for (std::int64_t d = 0; d < width; d += kWidth) {
      if constexpr (OneQuery) {
        const V q = load(queries[0] + d);
        _Pragma("GCC unroll 16") for (std::int64_t r = 0; r < kWidth; ++r) {
          x[r] = Simd::fma(load(rows[r] + d), q, x[r]);
        }
      } else {
        _Pragma("GCC unroll 16") for (std::int64_t r = 0; r < kWidth; ++r) {
          x[r] = Simd::fma(load(rows[r] + d), load(queries[r] + d), x[r]);
        }
      }
    }
    return sums_of(x);
  }

  static V inverse_norms(const T* const* rows, std::int64_t width) noexcept {
    T norms[kWidth];
    store(norms, dots<false>(rows, rows, width));
    for (T& norm : norms) norm = std::sqrt(norm);
    const V norm = load(norms);
    return splat(T{1}) / Base::larger(norm, splat(static_cast<T>(kSmallestNorm)));
  }

  static bool leaves_out(const Args<S>& args, std::int64_t i, std::int64_t id) noexcept {
    if (args.skip_positive && args.positives[i] == id) return true;
    return args.excluded != nullptr && std::binary_search(args.excluded + args.exclude_offsets[i],
                                                          args.excluded + args.exclude_offsets[i + 1], id);
  }

  static T addend_of(const Args<S>& args, std::int64_t id, std::int64_t at) noexcept {
    const T bias = args.bias == nullptr ? T{0} : args.bias[id];
    return args.log_expected == nullptr ? bias : bias - args.log_expected[at];
  }

  static void forward_private(const Args<S>& args, const Prepared<T>& p, const Work<T>& work, std::int64_t begin,
                              std::int64_t end) noexcept {
    const std::int64_t width = padded(args.dim());
    const std::int64_t columns = args.columns;
    const bool gradient = args.direction != nullptr;
    T* scores = work.scores;
    T* factors = work.scores + kChunk;
    using WideIds = typename VectorOf<std::int64_t, kWidth>::Type;
    const bool in_place = direct(args);
    const auto* table = reinterpret_cast<const T*>(args.table.data);  // only where it is one
    const bool extras = args.bias != nullptr || args.log_expected != nullptr || args.excluded != nullptr;
    const std::int64_t* end_of_ids = args.negatives + args.rows() * columns;
    for (std::int64_t i = begin; i < end; ++i) {
      open_row(args, p, i);
      const T* query = p.rows + i * width;
      const Integers own = p.positive[i] - Integers{};
      T* along = gradient ? p.along + i * width : nullptr;
      if (gradient) std::fill_n(along, width, T{0});
      for (std::int64_t column = 0; column < columns; column += kChunk) {
        const std::int64_t count = std::min(kChunk, columns - column);
        const std::int64_t* ids = args.negatives + i * columns + column;
        const T* rows[kChunk];
        for (std::int64_t j = 0; j < count; j += kWidth) {
          const std::int64_t batch = std::min(kWidth, count - j);
          ask_for(args, ids + j + kAhead, end_of_ids);
          for (std::int64_t r = 0; r < batch; ++r) {
            rows[j + r] = in_place ? table + ids[j + r] * args.table.stride
                                   : row_of(args, ids[j + r], work.columns + (j + r) * width);
          }
          for (std::int64_t r = batch; r < kWidth; ++r) rows[j + r] = rows[j];
          const V dot = dots<true>(rows + j, &query, width);
          const V factor = args.normalize_table ? inverse_norms(rows + j, width) : splat(T{1});
          WideIds wide{};
          std::memcpy(&wide, ids + j, static_cast<std::size_t>(batch) * sizeof(std::int64_t));
          Integers out = __builtin_convertvector(wide, Integers) == own;
          V addend{};
          if (extras) {
            for (std::int64_t r = 0; r < batch; ++r) {
              const std::int64_t id = ids[j + r];
              addend[r] = addend_of(args, id, i * columns + column + j + r);
              if (leaves_out(args, i, id)) out[r] = I{-1};
            }
          }
          for (std::int64_t r = batch; r < kWidth; ++r) out[r] = I{-1};
          const V z = Simd::fma(dot, factor, addend);
          store(scores + j, out != Integers{} ? splat(-kInfinity) : z);
          store(factors + j, factor);
        }
        private_chunk(args, p, work, i, column, count);
        if (!gradient) continue;
        // Scores have become slopes; of kContrastive most are 0.
        std::int64_t kept = 0;
        for (std::int64_t j = 0; j < count; ++j) {
          rows[kept] = rows[j];
          scores[kept] = scores[j] * factors[j];
          kept += args.loss != Loss::kContrastive || scores[j] != T{0} ? 1 : 0;
        }
        add_rows(along, rows, scores, kept, width);
      }
      const T factor = close_row(args, p, i);
      if (gradient) put_direction(args, p, work, i, factor, along);
    }
  }

  // The chunk's scores into the sums of the row, and slopes into their place.
  static void private_chunk(const Args<S>& args, const Prepared<T>& p, const Work<T>& work, std::int64_t i,
                            std::int64_t column, std::int64_t count) noexcept {
    const std::int64_t width = padded(args.dim());
    T* scores = work.scores;
    const std::int64_t whole = (count + kWidth - 1) / kWidth * kWidth;
    V part{};
    V slopes{};
    V counted{};
    if (args.loss == Loss::kSoftmax) {
      V top = splat(p.high[i]);
      for (std::int64_t j = 0; j < whole; j += kWidth) top = Base::larger(load(scores + j), top);
      T highest = top[0];
      for (std::int64_t r = 1; r < kWidth; ++r) highest = std::max(highest, top[r]);
      for (std::int64_t j = 0; j < whole; j += kWidth) {
        const V z = load(scores + j);
        V e = Base::decay(z - splat(highest));
        e = z == splat(-kInfinity) ? V{} : e;
        part += e;
        store(scores + j, e);
      }
      const T rescale = Base::decay(splat(p.high[i] - highest))[0];
      if (args.direction != nullptr && rescale != T{1}) scale_row(p.along + i * width, rescale, width);
      p.sum[i] = p.sum[i] * rescale + lanes_of(part);
      p.high[i] = highest;
      return;
    }
    for (std::int64_t j = 0; j < whole; j += kWidth) {
      const V z = load(scores + j);
      counted += z == splat(-kInfinity) ? V{} : splat(T{1});
      if (args.loss == Loss::kContrastive) {
        const Integers above = z > splat(args.margin);
        part += above ? z - splat(args.margin) : V{};
        store(scores + j, above ? splat(T{1}) : V{});
        if (args.active != nullptr) {
          std::uint16_t& word = args.active[i * words(args.columns) + (column + j) / kLanes];
          const std::int64_t shift = j % kLanes;
          word = static_cast<std::uint16_t>((shift == 0 ? 0u : word) | bits_of(above) << shift);
        }
      } else {
        V sigmoid;
        part += softplus(args.loss == Loss::kPairwise ? z - splat(p.own[i]) : z, sigmoid);
        slopes += sigmoid;
        store(scores + j, sigmoid);
      }
    }
    p.sum[i] += lanes_of(part);
    p.count[i] += lanes_of(counted);
    p.slope[i] += lanes_of(slopes);
  }

  static T lanes_of(V x) noexcept {
    T lanes[kWidth];
    store(lanes, x);
    return sum_part(lanes);
  }

  // Entries in the order of their ids, kWidth at a time: their scores once more, their slopes, and what they add to the
  // row of their id.
  static void backward_private(const Args<S>& args, const Gradients<S>& gradients, const Prepared<T>& p,
                               const Work<T>& work, std::int64_t from, std::int64_t until) noexcept {
    const std::int64_t width = padded(args.dim());
    const Groups& g = gradients.groups;
    const std::int64_t pairs = args.rows() * args.columns;
    const auto columns = static_cast<std::uint32_t>(args.columns);
    const bool scored = args.loss != Loss::kContrastive;
    T* sum = work.other;
    T bias = 0;
    std::fill_n(sum, width, T{0});
    std::int64_t run = from;          // whose row `sum` is
    std::int64_t ahead = from;        // the one the next entry to be read belongs to
    const T* row = nullptr;           // of `ahead`
    T inverse = 1;
    const auto next_row = [&](std::int64_t slot) noexcept {
      row = row_of(args, g.ids[ahead], work.columns + slot * width);
      inverse = args.normalize_table ? inverse_norm(row, width) : T{1};
    };
    const std::int64_t last = g.starts[until];
    for (std::int64_t e = g.starts[from]; e < last; e += kWidth) {
      const std::int64_t batch = std::min(kWidth, last - e);
      const T* rows[kWidth];
      const T* queries[kWidth];
      std::int64_t owner[kWidth];
      bool fixed[kWidth];
      V factor{};
      V addend{};
      V own{};
      V high{};
      V slope{};
      for (std::int64_t r = 0; r < kWidth; ++r) {
        const std::int64_t entry = g.order[std::min(e + r, last - 1)];
        if (r < batch) {
          const bool new_run = e + r == g.starts[ahead + 1];
          if (new_run) ++ahead;
          // A batch has buffers of its own, so a widened row that it begins with is read anew.
          if (scored && (new_run || row == nullptr || (r == 0 && !direct(args)))) next_row(r);
        }
        owner[r] = ahead;
        rows[r] = row;
        const std::int64_t i =
            entry < pairs ? static_cast<std::int64_t>(static_cast<std::uint32_t>(entry) / columns) : entry - pairs;
        queries[r] = p.rows + i * width;
        if (entry >= pairs) {
          slope[r] = p.slope[i];
          fixed[r] = true;
        } else {
          fixed[r] = !scored;
          slope[r] = p.sum[i];
          if (!scored) continue;
          factor[r] = inverse;
          addend[r] = leaves_out(args, i, g.ids[ahead]) ? -kInfinity : addend_of(args, g.ids[ahead], entry);
          own[r] = args.loss == Loss::kSoftmax ? T{0} : p.own[i];
          high[r] = p.high[i];
        }
      }
      if (scored) {
        const V z = Simd::fma(dots<false>(rows, queries, width), factor, addend);
        V of_score;
        if (args.loss == Loss::kSoftmax) {
          of_score = Base::decay(z - high);
          of_score = z == splat(-kInfinity) ? V{} : of_score;
        } else {
          static_cast<void>(softplus(args.loss == Loss::kPairwise ? z - own : z, of_score));
        }
        for (std::int64_t r = 0; r < kWidth; ++r) {
          if (!fixed[r]) slope[r] *= of_score[r];
        }
      }
      T slopes[kWidth];
      store(slopes, slope);
      for (std::int64_t r = 0; r < batch;) {
        if (owner[r] != run) {
          put_group(args, gradients, work, run, sum, bias);
          run = owner[r];
        }
        std::int64_t next = r;
        for (; next < batch && owner[next] == run; ++next) bias += slopes[next];
        add_rows(sum, queries + r, slopes + r, next - r, width);
        r = next;
      }
    }
    if (from < until) put_group(args, gradients, work, run, sum, bias);
  }

  static void put_group(const Args<S>& args, const Gradients<S>& gradients, const Work<T>& work, std::int64_t run,
                        T* sum, T& bias) noexcept {
    const std::int64_t id = gradients.groups.ids[run];
    const std::int64_t width = padded(args.dim());
    put_row(args, id, sum, gradients.table + (gradients.sparse ? run : id) * args.dim(), work.row);
    if (gradients.bias != nullptr) gradients.bias[id] = bias;
    std::fill_n(sum, width, T{0});
    bias = 0;
  }
};

template <class Simd, class S>
Form<S> form_of() noexcept {
  using K = Kernel<Simd, S>;
  return {.prepare_queries = K::prepare_queries,
          .prepare_columns = K::prepare_columns,
          .forward = K::forward,
          .begin_backward = K::begin_backward,
          .backward = K::backward,
          .join = K::join,
          .forward_private = K::forward_private,
          .backward_private = K::backward_private};
}

}  // namespace recfast::negatives_loss
