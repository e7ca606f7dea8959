// The kernel itself, for any vector type (see common/vectors.h). A form includes both inside its target region; the
// standard headers and target_attention.h must have been included before, outside it. `Simd` gives on top:
//   tile_rows(J), transpose(V (&)[W]), load_part(p, count), load_wide(BFloat16*), load_wide_part(BFloat16*, count),
//   max(a, b), highest(V), not_below(V, V) (a bit for each lane that is not less).
#pragma once

namespace recfast::target_attention {

template <class Simd>
struct Dense : Vectors<Simd> {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Base = Vectors<Simd>;
  static constexpr std::int64_t kWidth = Base::kWidth;
  using Base::load;
  using Base::splat;
  using Base::store;

  // c[r, :] = start[r, :] + sum_k a[r, k] b[k, :], terms added in the order of k. Columns come in whole vectors.
  // start: zeros; c itself (add); c times factor[r] (factor).
  struct Multiply {
    const T* a;
    std::int64_t a_row;
    std::int64_t a_step;
    std::int64_t rows;
    std::int64_t depth;
    const T* b;
    std::int64_t b_row;
    std::int64_t columns;
    T* c;
    std::int64_t c_row;
    bool add;
    const T* factor;
  };

  template <int R, int J>
  static void tile(const Multiply& p, std::int64_t row, std::int64_t column) noexcept {
    V sum[R][J];
    T* c = p.c + row * p.c_row + column;
    const std::int64_t c_row = p.c_row;
    if (!p.add) {
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < J; ++j) sum[r][j] = V{};
      }
    } else {
      for (int r = 0; r < R; ++r) {
        const V factor = splat(p.factor == nullptr ? T{1} : p.factor[row + r]);
        for (int j = 0; j < J; ++j) sum[r][j] = load(c + r * c_row + j * kWidth) * factor;
      }
    }
    const T* a = p.a + row * p.a_row;
    const T* b = p.b + column;
    const std::int64_t a_row = p.a_row;
    const std::int64_t a_step = p.a_step;
    const std::int64_t b_row = p.b_row;
    for (std::int64_t k = p.depth; k > 0; --k) {
      V w[J];
      for (int j = 0; j < J; ++j) w[j] = load(b + j * kWidth);
      for (int r = 0; r < R; ++r) {
        const V x = splat(a[r * a_row]);
        for (int j = 0; j < J; ++j) sum[r][j] = Simd::fma(x, w[j], sum[r][j]);
      }
      a += a_step;
      b += b_row;
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < J; ++j) store(c + r * c_row + j * kWidth, sum[r][j]);
    }
  }

  template <int R, int J>
  static void rows_of(const Multiply& p, std::int64_t row, std::int64_t column, std::int64_t count) noexcept {
    if constexpr (R > 1) {
      if (count < R) return rows_of<R - 1, J>(p, row, column, count);
    }
    tile<R, J>(p, row, column);
  }

  template <int J>
  static void strip(const Multiply& p, std::int64_t column, std::int64_t vectors) noexcept {
    if constexpr (J > 1) {
      if (vectors < J) return strip<J - 1>(p, column, vectors);
    }
    // Tiles of about equal height: a low last one would wait for its own sums.
    constexpr int kRows = Simd::tile_rows(J);
    const std::int64_t tiles = (p.rows + kRows - 1) / kRows;
    std::int64_t row = 0;
    for (std::int64_t i = 1; i <= tiles; ++i) {
      const std::int64_t next = p.rows * i / tiles;
      rows_of<kRows, J>(p, row, column, next - row);
      row = next;
    }
  }

  static void multiply(const Multiply& p) noexcept {
    const std::int64_t vectors = p.columns / kWidth;
    const std::int64_t strips = (vectors + Simd::kMaxColumns - 1) / Simd::kMaxColumns;
    std::int64_t first = 0;
    for (std::int64_t i = 1; i <= strips; ++i) {
      const std::int64_t next = vectors * i / strips;
      strip<Simd::kMaxColumns>(p, first * kWidth, next - first);
      first = next;
    }
  }

  // 2^x for x <= 127; 0 below the smallest normal float. Relative error below 2 ulp.
  static V power_of_two(V x) noexcept {
    if constexpr (std::is_same_v<T, float>) {
      typedef std::int32_t Integers __attribute__((vector_size(sizeof(V))));
      const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
      const V shifted = x + magic;
      const V r = x - (shifted - magic);
      V y = splat(1.535336188319500e-4f);
      y = Simd::fma(y, r, splat(1.339887440266574e-3f));
      y = Simd::fma(y, r, splat(9.618437357674640e-3f));
      y = Simd::fma(y, r, splat(5.550332471162809e-2f));
      y = Simd::fma(y, r, splat(2.402264791363012e-1f));
      y = Simd::fma(y, r, splat(6.931472028550421e-1f));
      y = Simd::fma(y, r, splat(1.0f));
      Integers bits;
      Integers power;
      std::memcpy(&bits, &y, sizeof bits);
      std::memcpy(&power, &shifted, sizeof power);
      bits += power << 23;  // the low bits of `shifted` are the integer
      std::memcpy(&y, &bits, sizeof y);
      return x < splat(-126.0f) ? V{} : y;
    } else {
      for (std::int64_t i = 0; i < kWidth; ++i) x[i] = std::exp2(x[i]);
      return x;
    }
  }

  static T power_of_two_scalar(T x) noexcept { return power_of_two(splat(x))[0]; }
};

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
  using Base::multiply;
  using Base::power_of_two;
  using Base::power_of_two_scalar;
  using Base::splat;
  using Base::store;
  using Base::sum_lanes;

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
  static void widen_row(const In* from, T* to, std::int64_t width) noexcept {
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
    if constexpr (std::is_same_v<In, T>) {
      for (std::int64_t i = 0; i < width; ++i) to[i] = from[i] * factor;
    } else {
      for (std::int64_t i = 0; i < width; ++i) {
        const float value = from[i] * factor;
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        to[i].bits = static_cast<std::uint16_t>(value != value ? 0x7FC0u : rounded);
      }
    }
  }

  // turned [width, kTile]: turned[d, l] = rows[l][offset + d], zeros for the rest of the lanes of row n - 1.
  static void turn(const In* const* rows, std::int64_t n, std::int64_t offset, std::int64_t width,
                   T* turned) noexcept {
    const std::int64_t lanes = padded(n);
    for (std::int64_t l = 0; l < lanes; l += kWidth) {
      const std::int64_t valid = n - l;
      for (std::int64_t d = 0; d < width; d += kWidth) {
        const std::int64_t count = std::min(kWidth, width - d);
        V x[kWidth];
        if (valid >= kWidth && count == kWidth) {
#pragma GCC unroll 16
          for (std::int64_t i = 0; i < kWidth; ++i) x[i] = widen(rows[l + i] + offset + d);
        } else {
          for (std::int64_t i = 0; i < kWidth; ++i) x[i] = i < valid ? widen_part(rows[l + i] + offset + d, count) : V{};
        }
        Simd::transpose(x);
        T* to = turned + d * kTile + l;
        if (count == kWidth) {
#pragma GCC unroll 16
          for (std::int64_t i = 0; i < kWidth; ++i) store(to + i * kTile, x[i]);
        } else {
          for (std::int64_t i = 0; i < count; ++i) store(to + i * kTile, x[i]);
        }
      }
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
  };

  static void point(const Args<In>& a, std::int64_t first, std::int64_t n, Tile& tile) noexcept {
    tile.n = n;
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

  static constexpr T iota(std::int64_t i) noexcept { return static_cast<T>(i); }

  // y = scale * s over a tile, -inf past row n.
  static V scaled(const T* s, std::int64_t i, std::int64_t n, V scale) noexcept {
    alignas(64) static constexpr T kIota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    V y = load(s + i) * scale;
    if (i + kWidth > n) {
      const V lane = load(kIota) + splat(static_cast<T>(i));
      y = lane < splat(static_cast<T>(n)) ? y : splat(-std::numeric_limits<T>::infinity());
    }
    return y;
  }

  // The scores of one candidate and a tile become weights 2^(y - highest); what came before shrinks by the factor
  // that is returned.
  static T soften(T* s, std::int64_t n, T scale, T& highest, T* weight) noexcept {
    const std::int64_t lanes = padded(n);
    const V factor = splat(scale);
    V top = splat(highest);
    for (std::int64_t i = 0; i < lanes; i += kWidth) {
      const V y = scaled(s, i, n, factor);
      store(s + i, y);
      top = Simd::max(y, top);
    }
    const T before = highest;
    const T now = Simd::highest(top);
    V part[kParts];
    T shrink{1};
    if (now == before) {
      for (std::int64_t i = 0; i < kParts; ++i) part[i] = load(weight + i * kWidth);
    } else {
      shrink = power_of_two_scalar(before - now);
      for (std::int64_t i = 0; i < kParts; ++i) part[i] = load(weight + i * kWidth) * splat(shrink);
      highest = now;
    }
    const V reference = splat(now);
    for (std::int64_t i = 0; i < lanes; i += kLanes) {
      for (std::int64_t j = 0; j < kParts; ++j) {
        const V p = power_of_two(load(s + i + j * kWidth) - reference);
        store(s + i + j * kWidth, p);
        part[j] += p;
      }
    }
    for (std::int64_t i = 0; i < kParts; ++i) store(weight + i * kWidth, part[i]);
    return shrink;
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

  static T score_scale(const Args<In>& a) noexcept {
    constexpr double kLog2E = 1.4426950408889634;
    return static_cast<T>(a.score == Score::kSoftmax ? a.scale * kLog2E : a.scale);
  }

  static void load_block(const Args<In>& a, const Work<T>& w, std::int64_t first, std::int64_t count) noexcept {
    const Shape& s = a.shape;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      for (std::int64_t c = 0; c < count; ++c) {
        widen_row(a.query[first + c] + h * s.dim, w.query + (h * kBlock + c) * s.width(), s.dim);
      }
    }
  }

  static void add_tile(const Args<In>& a, const Work<T>& w, const Tile& tile, std::int64_t count, bool first) noexcept {
    const Shape& s = a.shape;
    const T scale = score_scale(a);
    const bool softmax = a.score == Score::kSoftmax;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      turn(tile.key, tile.n, h * s.dim, s.dim, w.turned);
      multiply({w.query + h * kBlock * s.width(), s.width(), 1, count, s.dim, w.turned, kTile, padded(tile.n), w.scores,
                kTile, false, nullptr});
      for (std::int64_t c = 0; c < count; ++c) {
        T* scores = w.scores + c * kTile;
        if (softmax) {
          const std::int64_t at = h * kBlock + c;
          w.factor[c] = soften(scores, tile.n, scale, w.highest[at], w.weight + at * kLanes);
        } else {
          weigh(a.score, scores, tile.n, scale);
        }
      }
      const Operand v = operand(tile.value, tile.n, h * s.value_dim, s.value_dim, tile.value_stride, w.rows);
      multiply({w.scores, kTile, 1, count, tile.n, v.data, v.row, s.value_width(),
                w.sum + h * kBlock * s.value_width(), s.value_width(), !first, softmax ? w.factor : nullptr});
    }
  }

  static void start_block(const Args<In>& a, const Work<T>& w, std::int64_t count) noexcept {
    const Shape& s = a.shape;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      std::fill_n(w.highest + h * kBlock, count, -std::numeric_limits<T>::infinity());
      std::fill_n(w.weight + h * kBlock * kLanes, count * kLanes, T{0});
    }
  }

  static void finish(const Args<In>& a, std::int64_t candidate, std::int64_t h, const T* sum, T highest,
                     T weight) noexcept {
    const Shape& s = a.shape;
    const bool softmax = a.score == Score::kSoftmax;
    In* out = a.out[candidate] + h * s.value_dim;
    narrow_row(sum, out, s.value_dim, softmax ? T{1} / weight : T{1});
    if (softmax) a.lse[candidate * s.heads + h] = highest + std::log2(weight);
  }

  static void finish_empty(const Args<In>& a, std::int64_t candidate) noexcept {
    const Shape& s = a.shape;
    std::fill_n(a.out[candidate], s.heads * s.value_dim, In{});
    if (a.score == Score::kSoftmax) std::fill_n(a.lse + candidate * s.heads, s.heads, T{0});
  }

  static void finish_block(const Args<In>& a, const Work<T>& w, std::int64_t first, std::int64_t count,
                           T* partial) noexcept {
    const Shape& s = a.shape;
    const std::int64_t step = s.heads * (s.value_width() + kLanes);
    for (std::int64_t c = 0; c < count; ++c) {
      for (std::int64_t h = 0; h < s.heads; ++h) {
        const std::int64_t at = h * kBlock + c;
        const T* sum = w.sum + at * s.value_width();
        T lanes[kLanes];
        std::copy_n(w.weight + at * kLanes, kLanes, lanes);
        const T weight = sum_lanes(lanes);
        if (partial == nullptr) {
          finish(a, first + c, h, sum, w.highest[at], weight);
        } else {
          T* to = partial + c * step + h * (s.value_width() + kLanes);
          std::copy_n(sum, s.value_width(), to);
          to[s.value_width()] = w.highest[at];
          to[s.value_width() + 1] = weight;
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
    if (a.listed == nullptr) {
      load_block(a, w, p.first, count);
      start_block(a, w, count);
      const std::int64_t begin = a.shape.begin[p.user];
      for (std::int64_t l = p.from; l < p.to; l += kTile) {
        point(a, begin + l, std::min(kTile, p.to - l), tile);
        add_tile(a, w, tile, count, l == p.from);
      }
      finish_block(a, w, p.first, count, partial);
      return;
    }
    std::int64_t index[kTile];
    for (std::int64_t c = p.first; c < p.last; ++c) {
      load_block(a, w, c, 1);
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
      finish(a, candidate, h, sum, highest, weight);
    }
  }

  // --- backward ---

  static void load_gradients(const Args<In>& a, const Gradients<In>& g, const Work<T>& w, std::int64_t first,
                             std::int64_t count) noexcept {
    const Shape& s = a.shape;
    const bool softmax = a.score == Score::kSoftmax;
    load_block(a, w, first, count);
    for (std::int64_t h = 0; h < s.heads; ++h) {
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t at = h * kBlock + c;
        T* grad = w.grad + at * s.value_width();
        widen_row(g.grad[first + c] + h * s.value_dim, grad, s.value_dim);
        if (!softmax) continue;
        widen_row(a.out[first + c] + h * s.value_dim, w.rows, s.value_dim);
        w.delta[at] = dot(grad, w.rows, s.value_width());
        w.lse[at] = a.lse[(first + c) * s.heads + h];
      }
    }
  }

  // s and dp become p and scale * ds.
  static void differentiate(const Args<In>& a, T* s, T* ds, std::int64_t n, T lse, T delta) noexcept {
    const V factor = splat(score_scale(a));
    const V scale = splat(static_cast<T>(a.scale));
    const V one = splat(T{1});
    const V reference = splat(lse);
    const V mean = splat(delta);
    for (std::int64_t i = 0; i < padded(n); i += kWidth) {
      const V y = load(s + i) * factor;
      V p = y;
      V d = load(ds + i);
      switch (a.score) {
        case Score::kSoftmax:
          p = power_of_two(y - reference);
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

  // dquery points to the block's first row and to head 0; rows lie H Dqp apart.
  static void backward_tile(const Args<In>& a, const Gradients<In>& g, const Work<T>& w, const Tile& tile,
                            std::int64_t count, T* dquery, bool first) noexcept {
    const Shape& s = a.shape;
    const std::int64_t width = s.width();
    const std::int64_t value_width = s.value_width();
    const bool scores_too = g.query != nullptr || g.keys != nullptr;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const T* query = w.query + h * kBlock * width;
      const T* grad = w.grad + h * kBlock * value_width;
      const std::int64_t lanes = padded(tile.n);
      turn(tile.key, tile.n, h * s.dim, s.dim, w.turned);
      multiply({query, width, 1, count, s.dim, w.turned, kTile, lanes, w.scores, kTile, false, nullptr});
      if (scores_too) {
        turn(tile.value, tile.n, h * s.value_dim, s.value_dim, w.turned_values);
        multiply({grad, value_width, 1, count, s.value_dim, w.turned_values, kTile, lanes, w.dscores, kTile, false,
                  nullptr});
      }
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t at = h * kBlock + c;
        const bool softmax = a.score == Score::kSoftmax;
        differentiate(a, w.scores + c * kTile, w.dscores + c * kTile, tile.n, softmax ? w.lse[at] : T{0},
                      softmax ? w.delta[at] : T{0});
      }
      if (g.values != nullptr) {
        multiply({w.scores, 1, kTile, tile.n, count, grad, value_width, value_width, w.dvalues + h * kTile * value_width,
                  value_width, !first, nullptr});
      }
      if (g.keys != nullptr) {
        multiply({w.dscores, 1, kTile, tile.n, count, query, width, width, w.dkeys + h * kTile * width, width, !first,
                  nullptr});
      }
      if (g.query != nullptr) {
        const Operand k = operand(tile.key, tile.n, h * s.dim, s.dim, tile.key_stride, w.rows);
        multiply({w.dscores, kTile, 1, count, tile.n, k.data, k.row, width, dquery + h * width, s.heads * width, true,
                  nullptr});
      }
    }
  }

  // Row l of head h lies at from + h * head + l * padded(width).
  static void write_rows(const T* from, std::int64_t head, In* to, std::int64_t n, std::int64_t heads, std::int64_t width,
                         std::int64_t row) noexcept {
    for (std::int64_t l = 0; l < n; ++l) {
      for (std::int64_t h = 0; h < heads; ++h) {
        narrow_row(from + h * head + l * row, to + (l * heads + h) * width, width, T{1});
      }
    }
  }

  static void backward_shared(const Args<In>& a, const Gradients<In>& g, const Work<T>& w, const Piece& p,
                              T* dquery) noexcept {
    const Shape& s = a.shape;
    const std::int64_t begin = s.begin[p.user];
    const std::int64_t row = s.heads * s.width();
    const std::int64_t candidates = p.last - p.first;
    const std::int64_t blocks = (candidates + kBlock - 1) / kBlock;
    Tile tile;
    for (std::int64_t l = p.from; l < p.to; l += kTile) {
      point(a, begin + l, std::min(kTile, p.to - l), tile);
      std::int64_t first = 0;
      for (std::int64_t block = 1; block <= blocks; ++block) {
        const std::int64_t last = candidates * block / blocks;
        if (blocks > 1 || l == p.from) load_gradients(a, g, w, p.first + first, last - first);
        backward_tile(a, g, w, tile, last - first, dquery + first * row, block == 1);
        first = last;
      }
      if (blocks == 0) {
        std::fill_n(w.dkeys, s.heads * kTile * s.width(), T{0});
        std::fill_n(w.dvalues, s.heads * kTile * s.value_width(), T{0});
      }
      const std::int64_t at = (begin + l) * s.heads;
      if (g.keys != nullptr) {
        write_rows(w.dkeys, kTile * s.width(), g.keys + at * s.dim, tile.n, s.heads, s.dim, s.width());
      }
      if (g.values != nullptr) {
        write_rows(w.dvalues, kTile * s.value_width(), g.values + at * s.value_dim, tile.n, s.heads, s.value_dim,
                   s.value_width());
      }
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
        backward_tile(a, g, w, tile, 1, dquery + (c - p.first) * s.heads * s.width(), true);
        if (g.keys != nullptr) scatter(w.dkeys, index, tile.n, s.heads, s.width(), w.chunk_keys);
        if (g.values != nullptr) scatter(w.dvalues, index, tile.n, s.heads, s.value_width(), w.chunk_values);
      }
    }
    const std::int64_t at = (s.begin[p.user] + p.from) * s.heads;
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
    if (a.listed == nullptr) {
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

  static bool goes_before(const Entry<T>& a, const Entry<T>& b) noexcept {
    return a.score > b.score || (a.score == b.score && a.position > b.position);
  }

  static void select(const Args<In>& a, const Work<T>& w, const Piece& p, Entry<T>* best) noexcept {
    const Shape& s = a.shape;
    const std::int64_t count = p.last - p.first;
    const std::int64_t width = s.heads * s.dim;
    const std::int64_t kept = s.kept;
    const std::int64_t room = Work<T>::entry_room(kept);
    const V scale = splat(static_cast<T>(a.scale));
    std::int64_t size[kBlock];
    for (std::int64_t c = 0; c < count; ++c) {
      widen_row(a.query[p.first + c], w.query + c * padded(width), width);
      w.factor[c] = -std::numeric_limits<T>::infinity();  // what an entry must not score below
      size[c] = 0;
    }
    const std::int64_t begin = s.begin[p.user];
    const In* rows[kTile];
    for (std::int64_t from = p.from; from < p.to; from += kTile) {
      const std::int64_t n = std::min(kTile, p.to - from);
      for (std::int64_t l = 0; l < n; ++l) rows[l] = a.keys[begin + from + l];
      turn(rows, n, 0, width, w.turned);
      multiply({w.query, padded(width), 1, count, width, w.turned, kTile, padded(n), w.scores, kTile, false, nullptr});
      for (std::int64_t c = 0; c < count; ++c) {
        Entry<T>* entries = w.entries + c * room;
        T* scores = w.scores + c * kTile;
        const V least = splat(w.factor[c]);
        std::uint64_t good = 0;
        for (std::int64_t i = 0; i < n; i += kWidth) {
          const V y = load(scores + i) * scale;
          store(scores + i, y);
          good |= static_cast<std::uint64_t>(Simd::not_below(y, least)) << i;
        }
        if (n < kTile) good &= (std::uint64_t{1} << n) - 1;
        for (; good != 0; good &= good - 1) {
          const std::int64_t l = __builtin_ctzll(good);
          // NaN ranks first, as in torch.topk; among them the later goes first.
          const T score = scores[l] == scores[l] ? scores[l] : std::numeric_limits<T>::infinity();
          entries[size[c]++] = {score, from + l};
        }
        if (size[c] > room - kTile) {
          std::nth_element(entries, entries + kept - 1, entries + size[c], goes_before);
          size[c] = kept;
          w.factor[c] = entries[kept - 1].score;
        }
      }
    }
    for (std::int64_t c = 0; c < count; ++c) {
      Entry<T>* entries = w.entries + c * room;
      const std::int64_t found = std::min(kept, size[c]);
      std::partial_sort(entries, entries + found, entries + size[c], goes_before);
      std::copy_n(entries, found, best + c * kept);
      std::fill_n(best + c * kept + found, kept - found, Entry<T>{-std::numeric_limits<T>::infinity(), -1});
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
