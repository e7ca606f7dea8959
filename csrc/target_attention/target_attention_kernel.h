// The kernel itself, for any vector type (see common/vectors.h). A form includes both inside its target region; the
// standard headers and target_attention.h must have been included before, outside it. `Simd` gives on top:
//   tile_rows(J), transpose(V (&)[W]), load_part(p, count), load_wide(BFloat16*), load_wide_part(BFloat16*, count),
//   max(a, b), highest(V), reach(a, b) (of whole numbers: a bit for each lane with a >= b).
#pragma once

#include "target_attention/target_attention_dense.h"

namespace recfast::target_attention {

template <class Simd, class In>
struct Kernel : Dense<Simd> {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Base = Dense<Simd>;
  static constexpr std::int64_t kWidth = Base::kWidth;
  static constexpr std::int64_t kParts = kLanes / kWidth;
  using Base::dot;
  using Base::load;
  using Base::logistic;
  using Base::multiply_block;
  using Base::multiply_scores;
  using Base::multiply_scores_turned;
  using Base::power_of_two;
  using Base::power_of_two_scalar;
  using Base::splat;
  using Base::store;
  using Base::sum_lanes;

  using Word = std::make_unsigned_t<Rank<T>>;
  typedef Word Words __attribute__((vector_size(sizeof(V))));

  static V widen(const In* p) noexcept {
    if constexpr (std::is_same_v<In, T>) {
      return load(p);
    } else {
      return Simd::load_wide(p);
    }
  }
  static V widen_part(const In* p, std::int64_t count) noexcept {
    if constexpr (std::is_same_v<In, T>) {
      return Simd::load_part(p, count);
    } else {
      return Simd::load_wide_part(p, count);
    }
  }

  // to [padded(width)] = a row, widened with zeros.
  static void widen_row(const In* __restrict from, T* __restrict to, std::int64_t width) noexcept {
    std::int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) store(to + i, widen(from + i));
    if (i < width) {
      store(to + i, widen_part(from + i, width - i));
      i += kWidth;
    }
    for (; i < padded(width); i += kWidth) store(to + i, V{});
  }

  // to = factor * from, rounded to nearest, ties to even.
  static void narrow_row(const T* __restrict from, In* __restrict to, std::int64_t width, T factor) noexcept {
    const V by = splat(factor);
    std::int64_t i = 0;
    if constexpr (std::is_same_v<In, T>) {
      for (; i + kWidth <= width; i += kWidth) store(to + i, load(from + i) * by);
      for (; i < width; ++i) to[i] = from[i] * factor;
    } else {
      for (; i < width; i += kWidth) {  // `from` is padded, like all rows of sums
        const V value = load(from + i) * by;
        Words bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        bits = value == value ? bits : 0x7FC0u - Words{};
        std::uint16_t halves[kWidth];
        for (std::int64_t j = 0; j < kWidth; ++j) halves[j] = static_cast<std::uint16_t>(bits[j]);
        if (i + kWidth <= width) {
          std::memcpy(to + i, &halves, sizeof halves);
        } else {
          std::memcpy(to + i, &halves, static_cast<std::size_t>(width - i) * sizeof(In));
        }
      }
    }
  }

  // turned [width, Stride]: turned[d, l] = rows[l][offset + d]. The lanes past row n - 1, up to a multiple of kLanes,
  // hold that row again: numbers that nobody reads, and all loads alike.
  template <int Stride>
  static void turn(const In* const* rows, std::int64_t n, std::int64_t offset, std::int64_t width,
                   T* turned) noexcept {
    const std::int64_t lanes = padded(n);
    for (std::int64_t l = 0; l < lanes; l += kWidth) {
      const In* row[kWidth];
      for (std::int64_t i = 0; i < kWidth; ++i) row[i] = rows[std::min(l + i, n - 1)] + offset;
      std::int64_t d = 0;
      for (; d + kWidth <= width; d += kWidth) {
        V x[kWidth];
#pragma GCC unroll 16
        for (std::int64_t i = 0; i < kWidth; ++i) x[i] = widen(row[i] + d);
        Simd::transpose(x);
#pragma GCC unroll 16
        for (std::int64_t i = 0; i < kWidth; ++i) store(turned + (d + i) * Stride + l, x[i]);
      }
      if (d == width) continue;
      const std::int64_t rest = width - d;
      V x[kWidth];
#pragma GCC unroll 16
      for (std::int64_t i = 0; i < kWidth; ++i) x[i] = widen_part(row[i] + d, rest);
      Simd::transpose(x);
      for (std::int64_t i = 0; i < rest; ++i) store(turned + (d + i) * Stride + l, x[i]);
    }
  }

  // Rows of a tile of one head, as an operand: in place where they fit, else widened into `buffer`.
  struct Operand {
    const T* data;
    std::int64_t row;
  };
  static Operand operand(const In* const* rows, std::int64_t n, std::int64_t offset, std::int64_t width,
                         std::int64_t stride, T* buffer) noexcept {
    if constexpr (std::is_same_v<In, T>) {
      if (stride != 0 && width % kLanes == 0) return {rows[0] + offset, stride};
    }
    const std::int64_t row = padded(width);
    for (std::int64_t l = 0; l < n; ++l) widen_row(rows[l] + offset, buffer + l * row, width);
    return {buffer, row};
  }

  // A tile of rows: where each begins. `stride` 0: they lie anywhere.
  struct Tile {
    const In* key[kTile];
    const In* value[kTile];
    std::int64_t n = 0;
    std::int64_t key_stride = 0;
    std::int64_t value_stride = 0;
    std::int64_t next = 0;       // the row at which the tile after this one begins, of this user or of the next one,
    std::int64_t next_rows = 0;  // and how many it has
  };

  // The tile that begins at row `from` of a piece.
  static void point(const Args<In>& a, const Piece& p, std::int64_t from, Tile& tile) noexcept {
    const Shape& s = a.shape;
    const std::int64_t n = std::min(kTile, p.to - from);
    const std::int64_t first = s.begin[p.user] + from;
    tile.n = n;
    tile.next = first + n;
    tile.next_rows = std::min(kTile, s.length(p.user) - from - n);
    if (tile.next_rows <= 0 && p.user + 1 < s.users) {
      tile.next = s.begin[p.user + 1];
      tile.next_rows = std::min(kTile, s.length(p.user + 1));
    }
    tile.key_stride = n > 1 ? a.keys.stride : a.shape.heads * a.shape.dim;
    tile.value_stride = n > 1 ? a.values.stride : a.shape.heads * a.shape.value_dim;
    for (std::int64_t l = 0; l < n; ++l) {
      tile.key[l] = a.keys[first + l];
      tile.value[l] = a.values[first + l];
    }
  }

  // Gathers listed rows that lie in [from, to) until the tile is full; `next` is where to go on. `index` takes the
  // rows, counted from `from`.
  static void gather(const Args<In>& a, const Piece& p, const std::int64_t* list, std::int64_t& next, Tile& tile,
                     std::int64_t* index) noexcept {
    const std::int64_t begin = a.shape.begin[p.user];
    tile.n = 0;
    tile.key_stride = tile.value_stride = 0;
    for (; next < a.shape.listed && tile.n < kTile; ++next) {
      const std::int64_t row = list[next];
      if (row < p.from || row >= p.to) continue;
      tile.key[tile.n] = a.keys[begin + row];
      tile.value[tile.n] = a.values[begin + row];
      index[tile.n] = row - p.from;
      ++tile.n;
    }
  }

  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  // Lanes of group g that lie before row n; the rest becomes -inf.
  static V valid(V x, std::int64_t first, std::int64_t n) noexcept {
    alignas(64) static constexpr T kIota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(kIota) < splat(static_cast<T>(n - first)) ? x : splat(kNone);
  }

  // highest[c] = max(highest[c], scale * max_l s[c, l]) and factor[c] = 2^(before - highest[c]). Groups: the tile's
  // rows in units of kLanes.
  template <int Groups>
  static void raise(const T* s, std::int64_t n, std::int64_t count, T scale, T* highest, T* factor) noexcept {
    constexpr std::int64_t kLast = (Groups - 1) * kLanes;
    for (std::int64_t c = 0; c < count; ++c, s += kTile) {
      V top = valid(load(s + kLast), kLast, n);
      for (std::int64_t i = kWidth; i < kLanes; i += kWidth) {
        top = Simd::max(valid(load(s + kLast + i), kLast + i, n), top);
      }
      for (std::int64_t i = 0; i < kLast; i += kWidth) top = Simd::max(load(s + i), top);
      factor[c] = Simd::highest(top) * scale;
    }
    for (std::int64_t c = 0; c < count; c += kWidth) {  // rows are padded
      const V before = load(highest + c);
      const V now = Simd::max(load(factor + c), before);
      store(highest + c, now);
      store(factor + c, power_of_two(before - now));
    }
  }

  // Scores become weights 2^(scale * s - highest), which are added to what `factor` leaves of `weight`.
  template <int Groups>
  static void soften(T* s, std::int64_t n, std::int64_t count, T scale, const T* highest, const T* factor,
                     T* weight, Pace& pace) noexcept {
    constexpr std::int64_t kLast = (Groups - 1) * kLanes;
    const V by = splat(scale);
    for (std::int64_t c = 0; c < count; ++c, s += kTile, weight += kLanes) {
      const V reference = splat(highest[c]);
      const V shrink = splat(factor[c]);
      for (std::int64_t part = 0; part < kLanes; part += kWidth) {
        V sum = load(weight + part) * shrink;
        for (std::int64_t i = part; i <= kLast + part; i += kLanes) {
          V x = Simd::fma(load(s + i), by, -reference);
          if (i >= kLast) x = valid(x, i, n);
          const V p = power_of_two(x);
          store(s + i, p);
          sum += p;
        }
        store(weight + part, sum);
      }
      if (c % 4 == 0) pace.step();
    }
  }

  template <int Groups>
  static void soften_block(T* s, std::int64_t n, std::int64_t count, T scale, T* highest, T* factor,
                           T* weight, Pace& pace) noexcept {
    if constexpr (Groups > 1) {
      if (n <= (Groups - 1) * kLanes) {
        return soften_block<Groups - 1>(s, n, count, scale, highest, factor, weight, pace);
      }
    }
    raise<Groups>(s, n, count, scale, highest, factor);
    soften<Groups>(s, n, count, scale, highest, factor, weight, pace);
  }

  // The same without a softmax: each weight comes from its own score.
  static void weigh(Score score, T* s, std::int64_t n, T scale) noexcept {
    const V factor = splat(scale);
    for (std::int64_t i = 0; i < padded(n); i += kWidth) {
      V y = load(s + i) * factor;
      if (score == Score::kRelu) y = y < V{} ? V{} : y;
      if (score == Score::kSilu) y = y * logistic(y);
      store(s + i, y);
    }
  }

  // What products are multiplied by; its sign is in the queries, so that the highest product is the highest score.
  static T score_scale(const Args<In>& a) noexcept {
    constexpr double kLog2E = 1.4426950408889634;
    const double size = std::abs(a.scale);
    return static_cast<T>(a.score == Score::kSoftmax ? size * kLog2E : size);
  }

  // turned [H, width, kBlock] = the heads of rows first, first + 1, ..., times `sign`.
  static void load_turned(const Rows<const In>& rows, std::int64_t heads, std::int64_t width, std::int64_t first,
                          std::int64_t count, T sign, T* turned) noexcept {
    if (count == 1) {  // without turning 15 rows of nothing
      for (std::int64_t h = 0; h < heads; ++h, turned += width * kBlock) {
        const In* from = rows[first] + h * width;
        for (std::int64_t d = 0; d < width; d += kWidth) {
          const std::int64_t n = std::min(kWidth, width - d);
          T value[kWidth];
          store(value, n == kWidth ? widen(from + d) : widen_part(from + d, n));
          for (std::int64_t i = 0; i < n; ++i) turned[(d + i) * kBlock] = value[i] * sign;
        }
      }
      return;
    }
    const In* row[kBlock]{};
    for (std::int64_t c = 0; c < count; ++c) row[c] = rows[first + c];
    for (std::int64_t h = 0; h < heads; ++h) turn<kBlock>(row, count, h * width, width, turned + h * width * kBlock);
    if (sign == T{1}) return;
    for (std::int64_t d = 0; d < heads * width; ++d) {
      for (std::int64_t c = 0; c < count; ++c) turned[d * kBlock + c] *= sign;
    }
  }

  static T sign_of(const Args<In>& a) noexcept { return a.scale < 0 ? T{-1} : T{1}; }

  static Ahead ahead(const In* first, std::int64_t rows, std::int64_t stride, std::int64_t width) noexcept {
    constexpr std::int64_t kBytes = sizeof(In);
    return {first, rows, stride * kBytes, width * kBytes};
  }

  // The rows after a tile, where it is known where they lie.
  static Pace pace_of(const Args<In>& a, const Tile& tile) noexcept {
    const Shape& s = a.shape;
    Pace pace;
    if (tile.key_stride == 0 || tile.next_rows <= 0) return pace;
    pace.keys = ahead(a.keys[tile.next], tile.next_rows, a.keys.stride, s.heads * s.dim);
    pace.values = ahead(a.values[tile.next], tile.next_rows, a.values.stride, s.heads * s.value_dim);
    return pace;
  }

  static void add_tile(const Args<In>& a, const Work<T>& w, const Tile& tile, std::int64_t count, bool first) noexcept {
    const Shape& s = a.shape;
    const T scale = score_scale(a);
    const bool softmax = a.score == Score::kSoftmax;
    Pace pace = pace_of(a, tile);
    const std::int64_t lines = std::max(pace.keys.lines(), pace.values.lines()) / (3 * s.heads) + 1;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      turn<kTile>(tile.key, tile.n, h * s.dim, s.dim, w.turned);
      multiply_block({w.query + h * s.dim * kBlock, count, s.dim, w.turned, kTile, padded(tile.n), w.scores, kTile,
                      false, nullptr, &pace, lines});
      const std::int64_t at = h * kBlock;
      pace.over(lines, (count + 3) / 4);
      if (softmax) {
        soften_block<kTile / kLanes>(w.scores, tile.n, count, scale, w.highest + at, w.factor, w.weight + at * kLanes,
                                     pace);
      } else {
        for (std::int64_t c = 0; c < count; ++c) weigh(a.score, w.scores + c * kTile, tile.n, scale);
      }
      const Operand v = operand(tile.value, tile.n, h * s.value_dim, s.value_dim, tile.value_stride, w.rows);
      multiply_scores({w.scores, count, tile.n, v.data, v.row, s.value_width(), w.sum + at * s.value_width(),
                       s.value_width(), !first, softmax ? w.factor : nullptr, &pace, lines});
    }
  }

  static void start_block(const Args<In>& a, const Work<T>& w, std::int64_t count) noexcept {
    const Shape& s = a.shape;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      std::fill_n(w.highest + h * kBlock, kBlock, std::numeric_limits<T>::lowest());
      std::fill_n(w.weight + h * kBlock * kLanes, count * kLanes, T{0});
    }
  }

  static void finish(const Args<In>& a, std::int64_t candidate, std::int64_t h, const T* sum, T highest,
                     T inverse) noexcept {
    const Shape& s = a.shape;
    const bool softmax = a.score == Score::kSoftmax;
    narrow_row(sum, a.out[candidate] + h * s.value_dim, s.value_dim, softmax ? inverse : T{1});
    if (!softmax) return;
    T* statistics = a.statistics + 2 * (candidate * s.heads + h);
    statistics[0] = highest;
    statistics[1] = inverse;
  }

  static void finish_empty(const Args<In>& a, std::int64_t candidate) noexcept {
    const Shape& s = a.shape;
    std::fill_n(a.out[candidate], s.heads * s.value_dim, In{});
    if (a.score == Score::kSoftmax) std::fill_n(a.statistics + 2 * candidate * s.heads, 2 * s.heads, T{0});
  }

  // The sum of each row's kLanes values, in the order of sum_lanes; rows count up to a multiple of kLanes.
  static void sum_rows(const T* rows, std::int64_t count, T* sums) noexcept {
    if (count == 1) {
      T lanes[kLanes];
      std::copy_n(rows, kLanes, lanes);
      sums[0] = sum_lanes(lanes);
      return;
    }
    for (std::int64_t first = 0; first < count; first += kWidth) {
      V lane[kLanes];
      for (std::int64_t part = 0; part < kLanes; part += kWidth) {
        V x[kWidth];
        for (std::int64_t i = 0; i < kWidth; ++i) x[i] = load(rows + (first + i) * kLanes + part);
        Simd::transpose(x);
        for (std::int64_t i = 0; i < kWidth; ++i) lane[part + i] = x[i];
      }
#pragma GCC unroll 4
      for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (std::int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
      }
      store(sums + first, lane[0]);
    }
  }

  static void finish_block(const Args<In>& a, const Work<T>& w, std::int64_t first, std::int64_t count,
                           T* partial) noexcept {
    const Shape& s = a.shape;
    const std::int64_t step = s.heads * (s.value_width() + kLanes);
    for (std::int64_t h = 0; h < s.heads; ++h) {
      alignas(64) T total[kBlock];
      sum_rows(w.weight + h * kBlock * kLanes, count, total);
      if (partial == nullptr) {
        for (std::int64_t c = 0; c < count; c += kWidth) store(total + c, splat(T{1}) / load(total + c));
      }
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t at = h * kBlock + c;
        const T* sum = w.sum + at * s.value_width();
        if (partial == nullptr) {
          finish(a, first + c, h, sum, w.highest[at], total[c]);
        } else {
          T* to = partial + c * step + h * (s.value_width() + kLanes);
          std::copy_n(sum, s.value_width(), to);
          to[s.value_width()] = w.highest[at];
          to[s.value_width() + 1] = total[c];
        }
      }
    }
  }

  static void attend(const Args<In>& a, const Work<T>& w, const Piece& p, T* partial) noexcept {
    const std::int64_t count = p.last - p.first;
    if (p.from == p.to) {
      for (std::int64_t c = p.first; c < p.last; ++c) finish_empty(a, c);
      return;
    }
    Tile tile;
    if (a.shape.listed < 0) {
      load_turned(a.query, a.shape.heads, a.shape.dim, p.first, count, sign_of(a), w.query);
      start_block(a, w, count);
      for (std::int64_t l = p.from; l < p.to; l += kTile) {
        point(a, p, l, tile);
        add_tile(a, w, tile, count, l == p.from);
      }
      finish_block(a, w, p.first, count, partial);
      return;
    }
    std::int64_t index[kTile];
    for (std::int64_t c = p.first; c < p.last; ++c) {
      load_turned(a.query, a.shape.heads, a.shape.dim, c, 1, sign_of(a), w.query);
      start_block(a, w, 1);
      const std::int64_t* list = a.listed + c * a.shape.listed;
      std::int64_t next = 0;
      bool first = true;
      while (next < a.shape.listed) {
        gather(a, p, list, next, tile, index);
        if (tile.n == 0) break;
        add_tile(a, w, tile, 1, first);
        first = false;
      }
      if (first) {
        finish_empty(a, c);
      } else {
        finish_block(a, w, c, 1, nullptr);
      }
    }
  }

  static void merge(const Args<In>& a, const T* partial, std::int64_t parts, std::int64_t step,
                    std::int64_t candidate) noexcept {
    const Shape& s = a.shape;
    const std::int64_t width = s.value_width();
    T* sum = const_cast<T*>(partial);  // the first part becomes the sum
    for (std::int64_t h = 0; h < s.heads; ++h, sum += width + kLanes) {
      T highest = sum[width];
      T weight = sum[width + 1];
      for (std::int64_t part = 1; part < parts; ++part) {
        const T* other = sum + part * step;
        T keep{1};
        T take{1};
        if (a.score == Score::kSoftmax) {
          const T top = highest < other[width] ? other[width] : highest;
          keep = power_of_two_scalar(highest - top);
          take = power_of_two_scalar(other[width] - top);
          highest = top;
          weight = weight * keep + other[width + 1] * take;
        }
        for (std::int64_t i = 0; i < width; i += kWidth) {
          store(sum + i, load(sum + i) * splat(keep) + load(other + i) * splat(take));
        }
      }
      finish(a, candidate, h, sum, highest, T{1} / weight);
    }
  }

  // --- backward ---

  static void load_gradients(const Args<In>& a, const Gradients<In>& g, const Work<T>& w, std::int64_t first,
                             std::int64_t count) noexcept {
    const Shape& s = a.shape;
    const bool softmax = a.score == Score::kSoftmax;
    load_turned(a.query, s.heads, s.dim, first, count, sign_of(a), w.query);
    load_turned(g.grad, s.heads, s.value_dim, first, count, T{1}, w.turned_grad);
    for (std::int64_t h = 0; h < s.heads; ++h) {
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t at = h * kBlock + c;
        widen_row(a.query[first + c] + h * s.dim, w.query_rows + at * s.width(), s.dim);
        T* grad = w.grad + at * s.value_width();
        widen_row(g.grad[first + c] + h * s.value_dim, grad, s.value_dim);
        if (!softmax) continue;
        widen_row(a.out[first + c] + h * s.value_dim, w.rows, s.value_dim);
        w.delta[at] = dot(grad, w.rows, s.value_width());
        w.highest[at] = a.statistics[2 * ((first + c) * s.heads + h)];
        w.inverse[at] = a.statistics[2 * ((first + c) * s.heads + h) + 1];
      }
    }
  }

  // s and dp become p and scale * ds.
  static void differentiate(const Args<In>& a, T* s, T* ds, std::int64_t n, T highest, T inverse,
                            T delta) noexcept {
    const V factor = splat(score_scale(a));
    const V scale = splat(static_cast<T>(a.scale));
    const V one = splat(T{1});
    const V reference = splat(highest);
    const V total = splat(inverse);
    const V mean = splat(delta);
    for (std::int64_t i = 0; i < padded(n); i += kWidth) {
      const V product = load(s + i);
      const V y = product * factor;
      V p = y;
      V d = load(ds + i);
      switch (a.score) {
        case Score::kSoftmax:
          p = power_of_two(Simd::fma(product, factor, -reference)) * total;
          d = p * (d - mean);
          break;
        case Score::kRelu:
          p = y < V{} ? V{} : y;
          d = y > V{} ? d : V{};
          break;
        case Score::kSilu: {
          const V gate = logistic(y);
          p = y * gate;
          d = d * gate * (one + y * (one - gate));
          break;
        }
        case Score::kNone:
          break;
      }
      store(s + i, p);
      store(ds + i, d * scale);
    }
  }

  // Where the gradients of a tile's rows are summed: row l of head h lies at h * head + l * row.
  struct Target {
    T* keys;
    std::int64_t key_head;
    std::int64_t key_row;
    T* values;
    std::int64_t value_head;
    std::int64_t value_row;
  };

  static Target aside(const Args<In>& a, const Work<T>& w) noexcept {
    const std::int64_t width = a.shape.width();
    const std::int64_t value_width = a.shape.value_width();
    return {w.dkeys, kTile * width, width, w.dvalues, kTile * value_width, value_width};
  }

  // dquery points to the block's first row and to head 0; rows lie H Dqp apart.
  static void backward_tile(const Args<In>& a, const Gradients<In>& g, const Work<T>& w, const Tile& tile,
                            std::int64_t count, T* dquery, const Target& to, bool first) noexcept {
    const Shape& s = a.shape;
    const std::int64_t width = s.width();
    const std::int64_t value_width = s.value_width();
    const bool scores_too = g.query != nullptr || g.keys != nullptr;
    Pace pace = pace_of(a, tile);
    const std::int64_t lines = std::max(pace.keys.lines(), pace.values.lines()) / (3 * s.heads) + 1;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const T* query = w.query_rows + h * kBlock * width;
      const T* grad = w.grad + h * kBlock * value_width;
      const std::int64_t lanes = padded(tile.n);
      turn<kTile>(tile.key, tile.n, h * s.dim, s.dim, w.turned);
      multiply_block({w.query + h * s.dim * kBlock, count, s.dim, w.turned, kTile, lanes, w.scores, kTile, false,
                      nullptr, &pace, lines});
      if (scores_too) {
        turn<kTile>(tile.value, tile.n, h * s.value_dim, s.value_dim, w.turned_values);
        multiply_block({w.turned_grad + h * s.value_dim * kBlock, count, s.value_dim, w.turned_values, kTile, lanes,
                        w.dscores, kTile, false, nullptr, &pace, lines});
      }
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t at = h * kBlock + c;
        const bool softmax = a.score == Score::kSoftmax;
        differentiate(a, w.scores + c * kTile, w.dscores + c * kTile, tile.n, softmax ? w.highest[at] : T{0},
                      softmax ? w.inverse[at] : T{0}, softmax ? w.delta[at] : T{0});
      }
      if (g.values != nullptr) {
        multiply_scores_turned({w.scores, tile.n, count, grad, value_width, value_width, to.values + h * to.value_head,
                                to.value_row, !first, nullptr});
      }
      if (g.keys != nullptr) {
        multiply_scores_turned({w.dscores, tile.n, count, query, width, width, to.keys + h * to.key_head, to.key_row,
                                !first, nullptr});
      }
      if (g.query != nullptr) {
        const Operand k = operand(tile.key, tile.n, h * s.dim, s.dim, tile.key_stride, w.rows);
        multiply_scores({w.dscores, count, tile.n, k.data, k.row, width, dquery + h * width, s.heads * width, true,
                         nullptr, &pace, lines});
      }
    }
  }

  // Row l of head h lies at from + (h * kTile + l) * padded(width).
  static void write_rows(const T* from, In* to, std::int64_t n, std::int64_t heads, std::int64_t width) noexcept {
    for (std::int64_t l = 0; l < n; ++l) {
      for (std::int64_t h = 0; h < heads; ++h) {
        narrow_row(from + (h * kTile + l) * padded(width), to + (l * heads + h) * width, width, T{1});
      }
    }
  }

  static void backward_shared(const Args<In>& a, const Gradients<In>& g, const Work<T>& w, const Piece& p,
                              T* dquery) noexcept {
    const Shape& s = a.shape;
    const std::int64_t row = s.heads * s.width();
    const std::int64_t candidates = p.last - p.first;
    const std::int64_t blocks = (candidates + kBlock - 1) / kBlock;
    Tile tile;
    for (std::int64_t l = p.from; l < p.to; l += kTile) {
      point(a, p, l, tile);
      const std::int64_t at = (g.begin[p.user] + l) * s.heads;
      In* keys = g.keys == nullptr ? nullptr : g.keys + at * s.dim;
      In* values = g.values == nullptr ? nullptr : g.values + at * s.value_dim;
      // Where the gradient's own rows are whole vectors, sums are made in them.
      Target to = aside(a, w);
      bool direct_keys = false;
      bool direct_values = false;
      if constexpr (std::is_same_v<In, T>) {
        direct_keys = keys != nullptr && s.dim % kLanes == 0;
        direct_values = values != nullptr && s.value_dim % kLanes == 0;
        if (direct_keys) to.keys = keys, to.key_head = s.dim, to.key_row = s.heads * s.dim;
        if (direct_values) to.values = values, to.value_head = s.value_dim, to.value_row = s.heads * s.value_dim;
      }
      std::int64_t first = 0;
      for (std::int64_t block = 1; block <= blocks; ++block) {
        const std::int64_t last = candidates * block / blocks;
        if (blocks > 1 || l == p.from) load_gradients(a, g, w, p.first + first, last - first);
        backward_tile(a, g, w, tile, last - first, dquery + first * row, to, block == 1);
        first = last;
      }
      if (blocks == 0) {
        if (keys != nullptr) std::fill_n(keys, tile.n * s.heads * s.dim, In{});
        if (values != nullptr) std::fill_n(values, tile.n * s.heads * s.value_dim, In{});
        continue;
      }
      if (keys != nullptr && !direct_keys) write_rows(w.dkeys, keys, tile.n, s.heads, s.dim);
      if (values != nullptr && !direct_values) write_rows(w.dvalues, values, tile.n, s.heads, s.value_dim);
    }
  }

  static void scatter(const T* from, const std::int64_t* index, std::int64_t n, std::int64_t heads, std::int64_t width,
                      T* to) noexcept {
    for (std::int64_t l = 0; l < n; ++l) {
      for (std::int64_t h = 0; h < heads; ++h) {
        Base::add(to + (index[l] * heads + h) * width, from + (h * kTile + l) * width, width);
      }
    }
  }

  static void backward_listed(const Args<In>& a, const Gradients<In>& g, const Work<T>& w, const Piece& p,
                              T* dquery) noexcept {
    const Shape& s = a.shape;
    const std::int64_t rows = p.to - p.from;
    if (g.keys != nullptr) std::fill_n(w.chunk_keys, rows * s.heads * s.width(), T{0});
    if (g.values != nullptr) std::fill_n(w.chunk_values, rows * s.heads * s.value_width(), T{0});
    Tile tile;
    std::int64_t index[kTile];
    for (std::int64_t c = p.first; c < p.last; ++c) {
      const std::int64_t* list = a.listed + c * s.listed;
      std::int64_t next = 0;
      bool loaded = false;
      while (next < s.listed) {
        gather(a, p, list, next, tile, index);
        if (tile.n == 0) break;
        if (!loaded) load_gradients(a, g, w, c, 1);
        loaded = true;
        backward_tile(a, g, w, tile, 1, dquery + (c - p.first) * s.heads * s.width(), aside(a, w), true);
        if (g.keys != nullptr) scatter(w.dkeys, index, tile.n, s.heads, s.width(), w.chunk_keys);
        if (g.values != nullptr) scatter(w.dvalues, index, tile.n, s.heads, s.value_width(), w.chunk_values);
      }
    }
    const std::int64_t at = (g.begin[p.user] + p.from) * s.heads;
    for (std::int64_t i = 0; i < rows * s.heads; ++i) {
      if (g.keys != nullptr) narrow_row(w.chunk_keys + i * s.width(), g.keys + (at + i) * s.dim, s.dim, T{1});
      if (g.values != nullptr) {
        narrow_row(w.chunk_values + i * s.value_width(), g.values + (at + i) * s.value_dim, s.value_dim, T{1});
      }
    }
  }

  static void backward(const Args<In>& a, const Gradients<In>& g, const Work<T>& w, const Piece& p,
                       T* dquery) noexcept {
    if (g.query != nullptr) std::fill_n(dquery, (p.last - p.first) * a.shape.heads * a.shape.width(), T{0});
    if (a.shape.listed < 0) {
      backward_shared(a, g, w, p, dquery);
    } else {
      backward_listed(a, g, w, p, dquery);
    }
  }

  static void add_query(const Args<In>& a, In* dquery, const T* partial, std::int64_t parts, std::int64_t step,
                        std::int64_t candidate) noexcept {
    const Shape& s = a.shape;
    T* sum = const_cast<T*>(partial);  // the first part becomes the sum
    for (std::int64_t part = 1; part < parts; ++part) Base::add(sum, partial + part * step, s.heads * s.width());
    for (std::int64_t h = 0; h < s.heads; ++h) {
      narrow_row(sum + h * s.width(), dquery + (candidate * s.heads + h) * s.dim, s.dim, T{1});
    }
  }

  // --- select ---

  using R = Rank<T>;
  typedef R Ranks __attribute__((vector_size(sizeof(V))));

  static Ranks load_ranks(const R* p) noexcept {
    Ranks v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store_ranks(R* p, Ranks v) noexcept { std::memcpy(p, &v, sizeof v); }

  static Ranks rank(V y) noexcept {
    y = y == y ? y + V{} : splat(std::numeric_limits<T>::infinity());  // -0 becomes 0
    Ranks bits;
    std::memcpy(&bits, &y, sizeof bits);
    return bits ^ ((bits >> (8 * sizeof(R) - 1)) & std::numeric_limits<R>::max());
  }

  static std::int64_t count_from(const R* ranks, std::int64_t size, R least) noexcept {
    Ranks sum{};
    const Ranks bound = least - Ranks{};
    std::int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) sum -= load_ranks(ranks + i) >= bound;
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < kWidth; ++j) count += sum[j];
    for (; i < size; ++i) count += ranks[i] >= least;
    return count;
  }

  // Keeps the `kept` best of `size` > kept entries, in their order; of equals the last. `least` is a rank that at
  // least `kept` of them reach; it becomes the lowest that stays.
  static void cut(R* ranks, R* spots, std::int64_t size, std::int64_t kept, R& least) noexcept {
    std::int64_t low = least;
    std::int64_t high = *std::max_element(ranks, ranks + size);
    std::int64_t reach = size;  // how many reach `low`
    while (low < high) {
      // Above the middle, without overflow.
      const auto apart = static_cast<std::uint64_t>(high) - static_cast<std::uint64_t>(low);
      const auto middle = static_cast<std::int64_t>(static_cast<std::uint64_t>(low) + apart / 2 + (apart & 1));
      const std::int64_t count = count_from(ranks, size, static_cast<R>(middle));
      if (count < kept) {
        high = middle - 1;
        continue;
      }
      low = middle;
      reach = count;
      if (count == kept) break;
    }
    least = static_cast<R>(low);
    std::int64_t drop = reach - kept;  // the first of those at `least`
    std::int64_t to = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      const R value = ranks[i];
      const bool tie = value == least;
      const bool stays = value > least || (tie && drop <= 0);
      drop -= tie;
      ranks[to] = value;
      spots[to] = spots[i];
      to += stays;
    }
  }

  static bool goes_before(const Entry<T>& a, const Entry<T>& b) noexcept {
    return a.rank > b.rank || (a.rank == b.rank && a.position > b.position);
  }

  // Entries, which lie in the order of their rows, best first. `places` and the lists have room past `size`.
  static void sort(const R* ranks, const R* spots, std::int64_t size, std::int64_t from, R* places,
                   Entry<T>* best) noexcept {
    constexpr std::int64_t kFew = 512;
    if (size > kFew) {
      for (std::int64_t i = 0; i < size; ++i) best[i] = {ranks[i], from + spots[i]};
      std::sort(best, best + size, goes_before);
      return;
    }
    // How many go before each: those with a higher rank, and the later ones with an equal rank.
    for (std::int64_t i = 0; i < size; i += kWidth) {
      const Ranks mine = load_ranks(ranks + i);
      const Ranks row = load_ranks(spots + i);
      Ranks before{};
      for (std::int64_t j = 0; j < size; ++j) {
        const Ranks other = ranks[j] - Ranks{};
        const Ranks other_row = spots[j] - Ranks{};
        before -= (other > mine) | ((other == mine) & (other_row > row));
      }
      store_ranks(places + i, before);
    }
    for (std::int64_t i = 0; i < size; ++i) best[places[i]] = {ranks[i], from + spots[i]};
  }

  static void select(const Args<In>& a, const Work<T>& w, const Piece& p, Entry<T>* best) noexcept {
    const Shape& s = a.shape;
    const std::int64_t count = p.last - p.first;
    const std::int64_t width = s.heads * s.dim;
    const std::int64_t kept = s.kept;
    const std::int64_t room = Work<T>::room(kept);
    const V scale = splat(static_cast<T>(a.scale));
    std::int64_t size[kBlock];
    R least[kBlock];  // what a row must reach
    for (std::int64_t c = 0; c < count; ++c) {
      least[c] = std::numeric_limits<R>::min();
      size[c] = 0;
    }
    load_turned(a.query, 1, width, p.first, count, T{1}, w.query);
    const std::int64_t begin = s.begin[p.user];
    const In* rows[kTile];
    alignas(64) R ranks[kTile];
    for (std::int64_t from = p.from; from < p.to; from += kTile) {
      const std::int64_t n = std::min(kTile, p.to - from);
      for (std::int64_t l = 0; l < n; ++l) rows[l] = a.keys[begin + from + l];
      Pace pace;
      pace.keys = ahead(rows[0] + n * a.keys.stride, n, a.keys.stride, width);
      const std::int64_t lines = pace.keys.lines() / 2 + 1;
      turn<kTile>(rows, n, 0, width, w.turned);
      multiply_block({w.query, count, width, w.turned, kTile, padded(n), w.scores, kTile, false, nullptr, &pace,
                      lines});
      pace.over(lines, count);
      for (std::int64_t c = 0; c < count; ++c) {
        pace.step();
        const T* scores = w.scores + c * kTile;
        const Ranks bound = least[c] - Ranks{};
        std::uint64_t good = 0;
        for (std::int64_t i = 0; i < n; i += kWidth) {
          const Ranks here = rank(load(scores + i) * scale);
          store_ranks(ranks + i, here);
          good |= static_cast<std::uint64_t>(Simd::reach(here, bound)) << i;
        }
        const std::uint64_t all = n < kTile ? (std::uint64_t{1} << n) - 1 : ~std::uint64_t{0};
        good &= all;
        R* to = w.ranks + c * room + size[c];
        R* spots = w.spots + c * room + size[c];
        const std::int64_t first = from - p.from;
        if (good == all) {
          size[c] += n;
          for (std::int64_t l = 0; l < n; ++l) {
            to[l] = ranks[l];
            spots[l] = static_cast<R>(first + l);
          }
        } else {
          size[c] += __builtin_popcountll(good);
          for (; good != 0; good &= good - 1) {
            const std::int64_t l = __builtin_ctzll(good);
            *to++ = ranks[l];
            *spots++ = static_cast<R>(first + l);
          }
        }
        if (size[c] > room - kTile) {
          cut(w.ranks + c * room, w.spots + c * room, size[c], kept, least[c]);
          size[c] = kept;
        }
      }
    }
    for (std::int64_t c = 0; c < count; ++c) {
      R* list = w.ranks + c * room;
      R* spots = w.spots + c * room;
      if (size[c] > kept) cut(list, spots, size[c], kept, least[c]);
      const std::int64_t found = std::min(kept, size[c]);
      sort(list, spots, found, p.from, w.places, best + c * kept);
      std::fill_n(best + c * kept + found, kept - found, Entry<T>{std::numeric_limits<R>::min(), -1});
    }
  }

  // Merges list `part` at best + part * step, each sorted, into the first, one after another.
  static void merge_lists(Entry<T>* best, std::int64_t parts, std::int64_t step, std::int64_t kept) noexcept {
    const auto found = [&](const Entry<T>* list) {
      std::int64_t size = kept;
      while (size > 0 && list[size - 1].position < 0) --size;
      return size;
    };
    for (std::int64_t part = 1; part < parts; ++part) {
      Entry<T>* other = best + part * step;
      const std::int64_t mine = found(best);
      const std::int64_t theirs = found(other);
      // How many of mine stay: the kept best of both are `stay` of mine and kept - stay of the other list.
      std::int64_t stay = 0;
      std::int64_t come = 0;
      while (stay + come < kept && (stay < mine || come < theirs)) {
        if (come == theirs || (stay < mine && goes_before(best[stay], other[come]))) {
          ++stay;
        } else {
          ++come;
        }
      }
      // From the back, so that nothing is overwritten before it is read.
      for (std::int64_t to = stay + come - 1; come > 0; --to) {
        best[to] = stay > 0 && goes_before(other[come - 1], best[stay - 1]) ? best[--stay] : other[--come];
      }
    }
  }

  static constexpr Form<In> kForm{attend, merge, backward, add_query, select, merge_lists};
};

}  // namespace recfast::target_attention
