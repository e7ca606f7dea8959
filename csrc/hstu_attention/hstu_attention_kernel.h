// The kernel itself, for any vector type (see common/tiles.h). A form includes both inside its target region; the
// standard headers and hstu_attention.h must have been included before, outside it.
#pragma once

namespace recfast::hstu_attention {

template <class Simd, class Value>
struct Kernel : Tiles<Simd> {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Base = Tiles<Simd>;
  using Product = typename Base::Product;
  using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Integer Integers __attribute__((vector_size(sizeof(V))));
  static constexpr std::int64_t kWidth = Base::kWidth;
  static constexpr bool kCopied = !std::is_same_v<T, Value>;
  using Base::load;
  using Base::logistic;
  using Base::multiply;
  using Base::read_rows;
  using Base::splat;
  using Base::store;
  using Base::widened;
  using Base::write_rows;

  static Integers load_integers(const Integer* p) noexcept {
    Integers v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Integers splat_integer(std::int64_t x) noexcept { return static_cast<Integer>(x) - Integers{}; }

  // to[i, r] = from[r, i], in rows of `columns` values, 0 beyond `rows`. Four by four where that is what a vector of 16
  // bytes holds.
  static void turn_rows(const Value* from, std::int64_t stride, std::int64_t rows, std::int64_t width,
                        std::int64_t columns, T* to) noexcept {
    std::int64_t whole = 0;
    if constexpr (sizeof(T) == 4) {
      typedef T Four __attribute__((vector_size(16)));
      typedef std::int32_t Order __attribute__((vector_size(16)));
      whole = width / 4 * 4;
      const std::int64_t blocks = rows / 4 * 4;
      for (std::int64_t i = 0; i < whole; i += 4) {
        T* at = to + i * columns;
        for (std::int64_t r = 0; r < blocks; r += 4) {
          Four in[4];
          for (int j = 0; j < 4; ++j) {
            const Value* p = from + (r + j) * stride + i;
            if constexpr (kCopied) {
              in[j] = Four{widened(p[0]), widened(p[1]), widened(p[2]), widened(p[3])};
            } else {
              std::memcpy(&in[j], p, sizeof in[j]);
            }
          }
          const Four low01 = __builtin_shuffle(in[0], in[1], Order{0, 4, 1, 5});
          const Four high01 = __builtin_shuffle(in[0], in[1], Order{2, 6, 3, 7});
          const Four low23 = __builtin_shuffle(in[2], in[3], Order{0, 4, 1, 5});
          const Four high23 = __builtin_shuffle(in[2], in[3], Order{2, 6, 3, 7});
          const Four out[4] = {__builtin_shuffle(low01, low23, Order{0, 1, 4, 5}),
                               __builtin_shuffle(low01, low23, Order{2, 3, 6, 7}),
                               __builtin_shuffle(high01, high23, Order{0, 1, 4, 5}),
                               __builtin_shuffle(high01, high23, Order{2, 3, 6, 7})};
          for (int j = 0; j < 4; ++j) std::memcpy(at + j * columns + r, &out[j], sizeof out[j]);
        }
        for (int j = 0; j < 4; ++j) {
          for (std::int64_t r = blocks; r < rows; ++r) at[j * columns + r] = widened(from[r * stride + i + j]);
          std::fill(at + j * columns + rows, at + (j + 1) * columns, T{0});
        }
      }
    }
    for (std::int64_t i = whole; i < width; ++i) {
      T* row = to + i * columns;
      for (std::int64_t r = 0; r < rows; ++r) row[r] = widened(from[r * stride + i]);
      std::fill(row + rows, row + columns, T{0});
    }
  }

  // Of a key its own time, of a query that of the row after it.
  static std::int64_t time_of(const Args<T, Value>& args, std::int64_t sequence, std::int64_t row,
                              bool query) noexcept {
    const std::int64_t last = args.sequences.length(sequence) - 1;
    return *args.sequences.at(args.times, sequence, 0, query ? std::min(row + 1, last) : row);
  }

  // The lanes' times, and the same counted from the least where they lie close enough together for 32 bits.
  struct LaneTimes {
    std::int64_t times[kTile];
    Integer near[kTile];
    std::int64_t low;
    std::int64_t high;
    bool close;

    LaneTimes() = default;
    LaneTimes(const Args<T, Value>& args, const Task& task, std::int64_t first, std::int64_t count, bool queries,
              std::int64_t lanes) noexcept {
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        times[lane] = time_of(args, task.sequence, first + std::min(lane, count - 1), queries);
      }
      low = *std::min_element(times, times + lanes);
      high = *std::max_element(times, times + lanes);
      close = Buckets::apart(high, low) < kNear;
      for (std::int64_t lane = 0; close && lane < lanes; ++lane) near[lane] = static_cast<Integer>(times[lane] - low);
    }
  };
  static constexpr std::uint64_t kNear = std::uint64_t{1} << 31;

  // bias = the table's entry of each lane's bucket, that of `less` + |from - near|, where all lie in [range.first,
  // range.last): one comparison for each border between them, exact in integers. J vectors of lanes.
  template <int J>
  static void near_row(const Args<T, Value>& args, const Buckets& buckets, const Integer* near, std::int64_t from,
                       std::uint64_t less, Interval range, T* bias, std::int32_t* index) noexcept {
    Integers apart[J];
    V value[J];
    Integers bucket[J];
    for (int j = 0; j < J; ++j) {
      const Integers difference = splat_integer(from) - load_integers(near + j * kWidth);
      apart[j] = difference < Integers{} ? -difference : difference;
      value[j] = splat(args.time[range.first]);
      bucket[j] = splat_integer(range.first);
    }
    for (std::int64_t b = range.first + 1; b < range.last; ++b) {
      const Integers border = splat_integer(static_cast<std::int64_t>(buckets.border(b) - less));
      const V entry = splat(args.time[b]);
      for (int j = 0; j < J; ++j) {
        const Integers beyond = apart[j] >= border;
        value[j] = beyond ? entry : value[j];
        bucket[j] -= beyond;
      }
    }
    for (int j = 0; j < J; ++j) {
      store(bias + j * kWidth, value[j]);
      if (index == nullptr) continue;
      if constexpr (sizeof(Integer) == sizeof *index) {
        std::memcpy(index + j * kWidth, &bucket[j], sizeof bucket[j]);
      } else {
        for (std::int64_t lane = 0; lane < kWidth; ++lane) {
          index[j * kWidth + lane] = static_cast<std::int32_t>(bucket[j][lane]);
        }
      }
    }
  }

  // bias[lane] = time bias between a row's time and each lane's; with `index`, its bucket as well. Returns what the
  // buckets lie in.
  static Interval time_row(const Args<T, Value>& args, const Buckets& buckets, const LaneTimes& lanes,
                           std::int64_t time, std::int64_t size, T* bias, std::int32_t* index) noexcept {
    if (lanes.close) {
      // |time - lane| = less + |from - near|, so that 32 bits do wherever the lanes lie.
      const bool after = time >= lanes.high;
      const bool before = time <= lanes.low;
      const std::uint64_t less = after    ? Buckets::apart(time, lanes.high)
                                 : before ? Buckets::apart(time, lanes.low)
                                          : 0;
      const std::int64_t from = after ? lanes.high - lanes.low : before ? 0 : time - lanes.low;
      const std::uint64_t most = std::max(Buckets::apart(time, lanes.low), Buckets::apart(time, lanes.high));
      const Interval range{buckets.of(less), buckets.of(most) + 1};
      constexpr int kMost = 4;
      for (std::int64_t i = 0; i < size;) {
        const bool most_fit = i + kMost * kWidth <= size;
        const auto form = most_fit ? near_row<kMost> : near_row<1>;
        form(args, buckets, lanes.near + i, from, less, range, bias + i, index == nullptr ? index : index + i);
        i += (most_fit ? kMost : 1) * kWidth;
      }
      return range;
    }
    for (std::int64_t lane = 0; lane < size; ++lane) {
      const std::int64_t bucket = buckets.of(Buckets::apart(time, lanes.times[lane]));
      bias[lane] = args.time[bucket];
      if (index != nullptr) index[lane] = static_cast<std::int32_t>(bucket);
    }
    return {0, args.shape.buckets + 1};
  }

  // bias[r, :] of rows [row, row + rows) and the lanes from `lane` on. `turned`: rows are keys, lanes are queries.
  // `index`, `ranges` (null in forward): the bucket of each, and what those of each row lie in.
  static void bias_tile(const Args<T, Value>& args, const Prepared<T>& prepared, const Task& task,
                        const LaneTimes* lanes, bool turned, std::int64_t row, std::int64_t rows, std::int64_t lane,
                        std::int64_t size, T* bias, std::int32_t* index, Interval* ranges) noexcept {
    const Shape& s = args.shape;
    const bool position = s.position_heads == 1;
    for (std::int64_t r = 0; r < rows; ++r) {
      T* to = bias + r * size;
      const T* place = position ? prepared.position + (lane - (row + r) + s.max_length - 1) : nullptr;
      if (lanes != nullptr) {
        const std::int64_t time = time_of(args, task.sequence, row + r, !turned);
        const Interval range =
            time_row(args, *prepared.buckets, *lanes, time, size, to, index == nullptr ? index : index + r * size);
        if (ranges != nullptr) ranges[r] = range;
        if (position) {
          for (std::int64_t i = 0; i < size; i += kWidth) store(to + i, load(to + i) + load(place + i));
        }
      } else if (position) {
        for (std::int64_t i = 0; i < size; i += kWidth) store(to + i, load(place + i));
      } else {
        for (std::int64_t i = 0; i < size; i += kWidth) store(to + i, V{});
      }
    }
  }

  // Where row r's share of its head's own position bias begins; null where there is none.
  static const T* own_position(const Shape& s, const Prepared<T>& prepared, std::int64_t head, std::int64_t row,
                               std::int64_t lane) noexcept {
    if (s.position_heads <= 1) return nullptr;
    return prepared.position + head * position_stride(s) + (lane - row + s.max_length - 1);
  }

  template <bool kOwn>
  static V biased(T alpha, V product, const T* bias, const T* place) noexcept {
    const V z = Simd::fma(splat(alpha), product, load(bias));
    if constexpr (kOwn) return z + load(place);
    return z;
  }

  // scores = silu(z) in place, 0 where lane l does not see row r. Cuts of lanes: [3, kTile].
  template <bool kMasked, bool kOwn>
  static void weigh(T alpha, std::int64_t rows, std::int64_t size, const T* bias, const T* place, T* scores,
                    const Integer* cuts) noexcept {
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* own = kOwn ? place - r : place;
      for (std::int64_t i = 0; i < size; i += kWidth) {
        const std::int64_t at = r * size + i;
        const V z = biased<kOwn>(alpha, load(scores + at), bias + at, kOwn ? own + i : own);
        V a = z * logistic(z);
        if constexpr (kMasked) {
          const Integers row = splat_integer(r);
          const Integers seen = ((row >= load_integers(cuts + i)) & (row < load_integers(cuts + kTile + i))) |
                                (row == load_integers(cuts + 2 * kTile + i));
          a = seen ? a : V{};
        }
        store(scores + at, a);
      }
    }
  }

  static void forward(const Args<T, Value>& args, const Prepared<T>& prepared, const ForwardWork<T>& work,
                      const Task& task) noexcept {
    const Shape& s = args.shape;
    const std::int64_t length = args.sequences.length(task.sequence);
    const std::int64_t columns = padded(task.rows);
    const std::int64_t value_columns = padded(s.value_dim);
    const std::int64_t group = s.group();
    const Sight sight(args.mask, task.sequence, length);
    Interval seen[kTile];
    std::int64_t first = length;
    std::int64_t last = 0;
    for (std::int64_t i = 0; i < task.rows; ++i) {
      const std::int64_t row = task.row + i;
      seen[i] = sight.columns(row);
      first = std::min({first, row, seen[i].first});
      last = std::max({last, row + 1, seen[i].last});
    }
    for (std::int64_t h = 0; h < group; ++h) {
      turn_rows(args.sequences.at(args.q, task.sequence, task.head + h, task.row), args.q.row, task.rows, s.dim,
                columns, work.q + h * s.dim * kTile);
    }
    for (std::int64_t h = 0; h < group; ++h) {
      std::fill_n(work.out + h * kTile * value_columns, task.rows * value_columns, T{0});
    }
    const bool time = prepared.buckets != nullptr;
    LaneTimes times;
    if (time) times = LaneTimes(args, task, task.row, task.rows, true, columns);

    for (std::int64_t key = first / kTile * kTile; key < last; key += kTile) {
      const std::int64_t rows = std::min(kTile, length - key);
      Integer cuts[3 * kTile];
      bool any = false;
      bool all = true;
      for (std::int64_t i = 0; i < columns; ++i) {
        const bool inside = i < task.rows;
        const Cut cut(inside ? seen[i] : Interval{0, 0}, inside ? task.row + i : -1, key, rows);
        cuts[i] = static_cast<Integer>(cut.first);
        cuts[kTile + i] = static_cast<Integer>(cut.last);
        cuts[2 * kTile + i] = static_cast<Integer>(cut.self);
        any = any || cut.any();
        all = all && (!inside || cut.all(rows));
      }
      if (!any) continue;
      bias_tile(args, prepared, task, time ? &times : nullptr, true, key, rows, task.row, columns, work.bias, nullptr,
                nullptr);
      for (std::int64_t h = 0; h < group; ++h) {
        const std::int64_t head = task.head + h;
        const T* k = nullptr;
        std::int64_t k_stride = padded(s.dim);
        if constexpr (kCopied) {
          read_rows(args.sequences.at(args.k, task.sequence, head, key), args.k.row, rows, s.dim, T{1}, work.k,
                    k_stride, rows);
          k = work.k;
        } else {
          k = args.sequences.at(args.k, task.sequence, head, key);
          k_stride = args.k.row;
        }
        read_rows(args.sequences.at(args.v, task.sequence, head, key), args.v.row, rows, s.value_dim, T{1}, work.v,
                  value_columns, rows);
        multiply({.a = k, .a_row = k_stride, .a_step = 1, .rows = rows, .depth = s.dim,
                  .b = work.q + h * s.dim * kTile, .columns = columns, .start = nullptr, .start_row = 0,
                  .c = work.scores});
        const T* place = own_position(s, prepared, head, key, task.row);
        const auto form = place == nullptr ? (all ? weigh<false, false> : weigh<true, false>)
                                           : (all ? weigh<false, true> : weigh<true, true>);
        form(args.alpha, rows, columns, work.bias, place, work.scores, cuts);
        T* out = work.out + h * kTile * value_columns;
        multiply({.a = work.scores, .a_row = 1, .a_step = columns, .rows = task.rows, .depth = rows, .b = work.v,
                  .columns = value_columns, .start = out, .start_row = value_columns, .c = out});
      }
    }
    const T share = T{1} / static_cast<T>(s.max_length);
    for (std::int64_t h = 0; h < group; ++h) {
      write_rows(work.out + h * kTile * value_columns, value_columns, task.rows, s.value_dim, share,
                 args.sequences.at(args.out, task.sequence, task.head + h, task.row), args.out.row);
    }
  }

  // scores = silu(z) and dz = dscores * silu'(z), both 0 where row r does not see lane l.
  template <bool kMasked, bool kOwn>
  static void weigh_backward(T alpha, std::int64_t rows, std::int64_t size, const T* bias, const T* place, T* scores,
                             const T* dscores, T* dz, const Cut* cuts) noexcept {
    const V one = splat(T{1});
    Integer lane_of[kTile];
    if constexpr (kMasked) {
      for (std::int64_t i = 0; i < size; ++i) lane_of[i] = static_cast<Integer>(i);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* own = kOwn ? place - r : place;
      for (std::int64_t i = 0; i < size; i += kWidth) {
        const std::int64_t at = r * size + i;
        const V z = biased<kOwn>(alpha, load(scores + at), bias + at, kOwn ? own + i : own);
        const V y = logistic(z);
        V a = z * y;
        V d = load(dscores + at) * (y + a * (one - y));
        if constexpr (kMasked) {
          const Integers lane = load_integers(lane_of + i);
          const Integers seen = ((lane >= splat_integer(cuts[r].first)) & (lane < splat_integer(cuts[r].last))) |
                                (lane == splat_integer(cuts[r].self));
          a = seen ? a : V{};
          d = seen ? d : V{};
        }
        store(scores + at, a);
        store(dz + r * kSkewed + i, d);
      }
    }
  }

  // to[c - r] += dz[r, c]: what lies on one diagonal is one position apart. Four sums, so that none waits for the last.
  static void add_diagonals(const T* dz, std::int64_t rows, std::int64_t size, T* to) noexcept {
    for (std::int64_t d = 1 - rows; d < size; d += kLanes) {
      const std::int64_t first = std::max<std::int64_t>(0, 1 - kLanes - d);
      const std::int64_t last = std::min(rows, size - d);
      for (std::int64_t part = 0; part < kLanes; part += kWidth) {
        V sum[4]{};
        std::int64_t r = first;
        for (; r + 4 <= last; r += 4) {
          for (int j = 0; j < 4; ++j) sum[j] = sum[j] + load(dz + (r + j) * (kSkewed + 1) + d + part);
        }
        for (; r < last; ++r) sum[0] = sum[0] + load(dz + r * (kSkewed + 1) + d + part);
        store(to + d + part, load(to + d + part) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
      }
    }
  }

  // to[bucket[r, i], i % kLanes] += dz[r, i]: a table a lane, so that no two lanes meet. Rows of few buckets go bucket
  // by bucket, others entry by entry.
  static void add_buckets(const T* dz, const std::int32_t* buckets, const Interval* ranges, std::int64_t rows,
                          std::int64_t columns, T* to) noexcept {
    constexpr std::int64_t kFew = 16;
    constexpr std::int64_t kParts = kLanes / kWidth;
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* row = dz + r * kSkewed;
      const std::int32_t* bucket = buckets + r * columns;
      if (ranges[r].last - ranges[r].first > kFew) {
        for (std::int64_t i = 0; i < columns; ++i) to[bucket[i] * kLanes + i % kLanes] += row[i];
        continue;
      }
      for (std::int64_t b = ranges[r].first; b < ranges[r].last; ++b) {
        const Integers here = splat_integer(b);
        for (std::int64_t part = 0; part < kParts; ++part) {
          V sum{};
          for (std::int64_t i = part * kWidth; i < columns; i += kLanes) {
            sum = sum + (load_bucket(bucket + i) == here ? load(row + i) : V{});
          }
          T* lanes = to + b * kLanes + part * kWidth;
          store(lanes, load(lanes) + sum);
        }
      }
    }
  }

  static Integers load_bucket(const std::int32_t* p) noexcept {
    if constexpr (sizeof(T) == 4) {
      return load_integers(p);
    } else {
      Integers v{};
      for (std::int64_t lane = 0; lane < kWidth; ++lane) v[lane] = p[lane];
      return v;
    }
  }

  static void backward(const Args<T, Value>& args, const Gradients<T, Value>& gradients, const Prepared<T>& prepared,
                       const BackwardWork<T>& work, const Task& task, T* dq, T* dposition) noexcept {
    const Shape& s = args.shape;
    const std::int64_t length = args.sequences.length(task.sequence);
    for (std::int64_t h = 0; gradients.q.data != nullptr && h < s.group(); ++h) {
      for (std::int64_t i = 0; i < length; ++i) std::fill_n(dq + (i * s.heads + task.head + h) * s.dim, s.dim, T{0});
    }
    std::fill_n(work.skew, kLanes, T{0});
    std::fill_n(work.skew_shared, kLanes, T{0});
    for (std::int64_t key = task.row; key < task.row + task.rows; key += kTile) {
      backward_keys(args, gradients, prepared, work, task, key, std::min(kTile, task.row + task.rows - key), dq,
                    dposition);
    }
  }

  // Keys [key, key + count): their dk and dv whole, and what they give to dq and to the biases.
  static void backward_keys(const Args<T, Value>& args, const Gradients<T, Value>& gradients,
                            const Prepared<T>& prepared, const BackwardWork<T>& work, const Task& task,
                            std::int64_t key, std::int64_t count, T* dq, T* dposition) noexcept {
    const Shape& s = args.shape;
    const bool into_q = gradients.q.data != nullptr;
    const bool into_k = gradients.k.data != nullptr;
    const bool into_v = gradients.v.data != nullptr;
    const bool into_position = gradients.position != nullptr;
    const bool into_time = gradients.time != nullptr;
    const std::int64_t length = args.sequences.length(task.sequence);
    const std::int64_t columns = padded(count);
    const std::int64_t dim = padded(s.dim);
    const std::int64_t value_dim = padded(s.value_dim);
    const std::int64_t group = s.group();
    const Sight sight(args.mask, task.sequence, length);
    for (std::int64_t h = 0; h < group; ++h) {
      const Value* k = args.sequences.at(args.k, task.sequence, task.head + h, key);
      const Value* v = args.sequences.at(args.v, task.sequence, task.head + h, key);
      read_rows(k, args.k.row, count, s.dim, T{1}, work.k + h * kTile * dim, dim, count);
      turn_rows(k, args.k.row, count, s.dim, columns, work.k_turned + h * s.dim * kTile);
      turn_rows(v, args.v.row, count, s.value_dim, columns, work.v_turned + h * s.value_dim * kTile);
    }
    for (std::int64_t h = 0; h < group; ++h) {
      std::fill_n(work.dk + h * kTile * dim, count * dim, T{0});
      std::fill_n(work.dv + h * kTile * value_dim, count * value_dim, T{0});
    }
    std::fill_n(work.dz, std::min(kTile, length) * kSkewed, T{0});
    // One tile for what heads share: their sum, or the only head's own.
    const bool summed = group > 1 && ((into_position && s.position_heads == 1) || into_time);
    T* shared = group > 1 ? work.dz_shared : work.dz;
    const bool time = prepared.buckets != nullptr;
    LaneTimes times;
    if (time) times = LaneTimes(args, task, key, count, false, columns);
    auto* buckets = reinterpret_cast<std::int32_t*>(work.buckets);  // NOLINT: scratch of another type
    const T share = T{1} / static_cast<T>(s.max_length);

    for (std::int64_t query = 0; query < length; query += kTile) {
      const std::int64_t rows = std::min(kTile, length - query);
      if (query >= sight.prefix) {
        // Past the prefix a causal row sees nothing after itself, and where a row's view begins never falls.
        if (args.mask.causal && query + rows <= key) continue;
        if (query >= key + count && sight.columns(query).first >= key + count) break;
      }
      Cut cuts[kTile];
      Interval ranges[kTile];
      bool any = false;
      bool all = columns == count;
      for (std::int64_t r = 0; r < rows; ++r) {
        cuts[r] = Cut(sight.columns(query + r), query + r, key, count);
        any = any || cuts[r].any();
        all = all && cuts[r].all(count);
      }
      if (!any) continue;
      bias_tile(args, prepared, task, time ? &times : nullptr, false, query, rows, key, columns, work.bias,
                into_time ? buckets : nullptr, into_time ? ranges : nullptr);
      if (summed) std::fill_n(shared, rows * kSkewed, T{0});
      for (std::int64_t h = 0; h < group; ++h) {
        const std::int64_t head = task.head + h;
        read_rows(args.sequences.at(args.q, task.sequence, head, query), args.q.row, rows, s.dim, T{1}, work.q, dim,
                  rows);
        read_rows(args.sequences.at(gradients.out, task.sequence, head, query), gradients.out.row, rows, s.value_dim,
                  share, work.grad, value_dim, rows);
        multiply({.a = work.q, .a_row = dim, .a_step = 1, .rows = rows, .depth = s.dim,
                  .b = work.k_turned + h * s.dim * kTile, .columns = columns, .start = nullptr, .start_row = 0,
                  .c = work.scores});
        if (gradients.of_scores()) {
          multiply({.a = work.grad, .a_row = value_dim, .a_step = 1, .rows = rows, .depth = s.value_dim,
                    .b = work.v_turned + h * s.value_dim * kTile, .columns = columns, .start = nullptr, .start_row = 0,
                    .c = work.dscores});
        }
        const T* place = own_position(s, prepared, head, query, key);
        const auto form = place == nullptr ? (all ? weigh_backward<false, false> : weigh_backward<true, false>)
                                           : (all ? weigh_backward<false, true> : weigh_backward<true, true>);
        form(args.alpha, rows, columns, work.bias, place, work.scores, work.dscores, work.dz, cuts);
        if (into_v) {
          T* dv = work.dv + h * kTile * value_dim;
          multiply({.a = work.scores, .a_row = 1, .a_step = columns, .rows = count, .depth = rows, .b = work.grad,
                    .columns = value_dim, .start = dv, .start_row = value_dim, .c = dv});
        }
        if (into_k) {
          T* dk = work.dk + h * kTile * dim;
          multiply({.a = work.dz, .a_row = 1, .a_step = kSkewed, .rows = count, .depth = rows, .b = work.q,
                    .columns = dim, .start = dk, .start_row = dim, .c = dk});
        }
        if (into_q) {
          multiply({.a = work.dz, .a_row = kSkewed, .a_step = 1, .rows = rows, .depth = count,
                    .b = work.k + h * kTile * dim, .columns = dim, .start = nullptr, .start_row = 0, .c = work.dq});
          for (std::int64_t r = 0; r < rows; ++r) {
            T* to = dq + ((query + r) * s.heads + head) * s.dim;
            for (std::int64_t i = 0; i < s.dim; ++i) to[i] += args.alpha * work.dq[r * dim + i];
          }
        }
        if (summed) {
          for (std::int64_t r = 0; r < rows; ++r) {
            Base::add(shared + r * kSkewed, work.dz + r * kSkewed, columns);
          }
        }
        if (into_position && s.position_heads > 1) {
          add_diagonals(work.dz, rows, columns,
                        dposition + head * position_stride(s) + (key - query + s.max_length - 1));
        }
      }
      if (into_position && s.position_heads == 1) {
        add_diagonals(shared, rows, columns, dposition + (key - query + s.max_length - 1));
      }
      if (into_time) add_buckets(shared, buckets, ranges, rows, columns, work.time);
    }
    for (std::int64_t h = 0; h < group; ++h) {
      const std::int64_t head = task.head + h;
      if (into_k) {
        write_rows(work.dk + h * kTile * dim, dim, count, s.dim, args.alpha,
                   args.sequences.at(gradients.k, task.sequence, head, key), gradients.k.row);
      }
      if (into_v) {
        write_rows(work.dv + h * kTile * value_dim, value_dim, count, s.value_dim, T{1},
                   args.sequences.at(gradients.v, task.sequence, head, key), gradients.v.row);
      }
    }
  }
};

}  // namespace recfast::hstu_attention
