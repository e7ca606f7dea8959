// The kernel itself, for any vector type (see common/tiles.h). A form includes both inside its target region; the
// standard headers and sequence_attention.h must have been included before, outside it.
#pragma once

namespace recfast::sequence_attention {

template <class Simd, class S>
struct Kernel : Tiles<Simd> {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Base = Tiles<Simd>;
  static constexpr std::int64_t kWidth = Base::kWidth;
  using Base::decay;
  using Base::larger;
  using Base::load;
  using Base::multiply_block;
  using Base::read_rows;
  using Base::splat;
  using Base::store;
  using Base::turn;
  using Base::write_rows;

  static constexpr T kLowest = std::numeric_limits<T>::lowest();

  // What a block of queries meets in a block of keys. Groups are of kLanes queries; queries and keys both start at
  // multiples of kLanes, so a causal mask cuts single scores in square tiles on the diagonal only.
  struct Meeting {
    std::int64_t query;   // the first of the block
    std::int64_t groups;  // of queries
    std::int64_t key;
    std::int64_t keys;
    bool causal;

    // The first query group that sees any of the keys from `key + row` on.
    [[nodiscard]] std::int64_t first_group(std::int64_t row) const noexcept {
      return causal ? std::max<std::int64_t>(0, (key + row - query) / kLanes) : 0;
    }
    // How many of the keys any query of a group sees.
    [[nodiscard]] std::int64_t seen(std::int64_t group) const noexcept {
      if (!causal) return keys;
      return std::clamp<std::int64_t>(query + (group + 1) * kLanes - key, 0, keys);
    }
    // The row of the group's tile on the diagonal: of `kLanes` rows from there on, row r is hidden from lanes < r.
    [[nodiscard]] std::int64_t diagonal(std::int64_t group) const noexcept { return query + group * kLanes - key; }
    // Keys before this row are seen by all groups.
    [[nodiscard]] std::int64_t plain_rows() const noexcept { return seen(0); }
  };

  // c [keys, queries] = a [keys, width] bt [width, queries], but for tiles that the mask hides wholly.
  static void score(const Meeting& m, const T* a, std::int64_t width, const T* bt, T* c) noexcept {
    typename Base::Block p{.a = a, .a_row = width, .a_step = 1, .rows = m.plain_rows(), .depth = width,
                           .b = bt, .b_row = kQueries, .columns = m.groups * kLanes,
                           .c = c, .c_row = kQueries, .add = false};
    multiply_block(p);
    for (std::int64_t row = m.plain_rows(); row < m.keys; row += kLanes) {
      const std::int64_t skipped = m.first_group(row) * kLanes;
      p.a = a + row * width;
      p.rows = std::min(kLanes, m.keys - row);
      p.b = bt + skipped;
      p.columns = m.groups * kLanes - skipped;
      p.c = c + row * kQueries + skipped;
      multiply_block(p);
    }
  }

  // ct [width, queries] += a^T [width, keys] b [keys, queries].
  static void gather(const Meeting& m, const T* a, std::int64_t width, const T* b, T* ct) noexcept {
    std::int64_t group = 0;
    while (group < m.groups) {
      const std::int64_t depth = m.seen(group);
      std::int64_t next = group + 1;
      while (next < m.groups && m.seen(next) == depth) ++next;
      if (depth > 0) {
        multiply_block({.a = a, .a_row = 1, .a_step = width, .rows = width, .depth = depth,
                        .b = b + group * kLanes, .b_row = kQueries, .columns = (next - group) * kLanes,
                        .c = ct + group * kLanes, .c_row = kQueries, .add = true});
      }
      group = next;
    }
  }

  // c [keys, wide] += a [keys, queries] b [queries, wide].
  static void spread(const Meeting& m, const T* a, const T* b, std::int64_t wide, std::int64_t queries,
                     T* c) noexcept {
    std::int64_t row = 0;
    while (row < m.keys) {
      const std::int64_t skipped = m.first_group(row) * kLanes;
      const std::int64_t rows = row < m.plain_rows() ? m.plain_rows() : std::min(kLanes, m.keys - row);
      multiply_block({.a = a + row * kQueries + skipped, .a_row = kQueries, .a_step = 1, .rows = rows,
                      .depth = queries - skipped, .b = b + skipped * wide, .b_row = wide, .columns = wide,
                      .c = c + row * wide, .c_row = wide, .add = true});
      row += rows;
    }
  }

  // Puts `x` where the causal mask hides a score of this group.
  static void hide(const Meeting& m, std::int64_t group, T* scores, T x) noexcept {
    if (!m.causal) return;
    const std::int64_t diagonal = m.diagonal(group);
    const std::int64_t last = std::min(m.keys, diagonal + kLanes);
    for (std::int64_t row = std::max<std::int64_t>(0, diagonal); row < last; ++row) {
      std::fill_n(scores + row * kQueries + group * kLanes, row - diagonal, x);
    }
  }

  // Factors of dropout for 8 keys and a group of queries, [8, 16].
  static void draw(const Args<S, T>& args, const Part& part, std::int64_t query, std::int64_t key, T* kept) noexcept {
    std::uint32_t c0[kLanes];
    std::uint32_t c1[kLanes];
    std::uint32_t c2[kLanes];
    std::uint32_t c3[kLanes];
    for (std::int64_t i = 0; i < kLanes; ++i) {
      c0[i] = static_cast<std::uint32_t>(part.user);
      c1[i] = static_cast<std::uint32_t>(part.head);
      c2[i] = static_cast<std::uint32_t>(query + i);
      c3[i] = static_cast<std::uint32_t>(key / kDrawn);
    }
    // Philox of common/random.h, 16 counters side by side.
    auto k0 = static_cast<std::uint32_t>(args.dropout.seed);
    auto k1 = static_cast<std::uint32_t>(args.dropout.seed >> 32);
    for (int round = 0; round < Philox::kRounds; ++round) {
      for (std::int64_t i = 0; i < kLanes; ++i) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0[i];
        const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2[i];
        c0[i] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c2[i] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c1[i] = static_cast<std::uint32_t>(p1);
        c3[i] = static_cast<std::uint32_t>(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const auto factor = static_cast<T>(args.dropout.kept);
    const std::uint32_t* const words[4] = {c0, c1, c2, c3};
    for (int word = 0; word < 4; ++word) {
      for (std::int64_t i = 0; i < kLanes; ++i) {
        const std::uint32_t even = words[word][i];
        const std::uint32_t odd = even << 16 | even >> 16;
        kept[2 * word * kLanes + i] = even >> 8 < args.dropout.threshold ? T{0} : factor;
        kept[(2 * word + 1) * kLanes + i] = odd >> 8 < args.dropout.threshold ? T{0} : factor;
      }
    }
  }

  // Scores of a group become weights exp(s - highest); `highest` [64] and `sum` [64] move on, and what was gathered
  // so far, ct [width, queries], is scaled to the new maximum.
  static void soften(std::int64_t group, std::int64_t keys, T* scores, T* highest, T* sum, T* ct, std::int64_t width,
                     bool first) noexcept {
    for (std::int64_t lane = group * kLanes; lane < (group + 1) * kLanes; lane += kWidth) {
      T* column = scores + lane;
      const V before = load(highest + lane);
      V top[4] = {before, before, before, before};
      std::int64_t row = 0;
      for (; row + 4 <= keys; row += 4) {
        for (int i = 0; i < 4; ++i) top[i] = larger(top[i], load(column + (row + i) * kQueries));
      }
      for (; row < keys; ++row) top[0] = larger(top[0], load(column + row * kQueries));
      const V after = larger(larger(top[0], top[1]), larger(top[2], top[3]));
      V total{};
      for (row = 0; row < keys; ++row) {
        const V weight = decay(load(column + row * kQueries) - after);
        store(column + row * kQueries, weight);
        total += weight;
      }
      if (!first) {
        const V shrink = decay(before - after);
        total = Simd::fma(load(sum + lane), shrink, total);
        T factors[kWidth];
        store(factors, shrink);
        bool moved = false;
        for (std::int64_t i = 0; i < kWidth; ++i) moved |= factors[i] != T{1};
        if (moved) {
          for (std::int64_t d = 0; d < width; ++d) {
            store(ct + d * kQueries + lane, load(ct + d * kQueries + lane) * shrink);
          }
        }
      }
      store(highest + lane, after);
      store(sum + lane, total);
    }
  }

  static void drop(const Args<S, T>& args, const Part& part, const Meeting& m, std::int64_t group, T* scores,
                   T* kept) noexcept {
    const std::int64_t keys = m.seen(group);
    for (std::int64_t first = 0; first < keys; first += kDrawn) {
      draw(args, part, m.query + group * kLanes, m.key + first, kept);
      const std::int64_t last = std::min(first + kDrawn, keys);
      for (std::int64_t row = first; row < last; ++row) {
        T* x = scores + row * kQueries + group * kLanes;
        for (std::int64_t lane = 0; lane < kLanes; lane += kWidth) {
          store(x + lane, load(x + lane) * load(kept + (row - first) * kLanes + lane));
        }
      }
    }
  }

  // Copies keys and values from row `held` up to `rows`; returns `rows`, or `held` where that is more.
  static std::int64_t hold(const Args<S, T>& args, const Work<T>& work, const Part& part, std::int64_t held,
                           std::int64_t rows) noexcept {
    if (rows <= held) return held;
    const Shape& s = args.shape;
    const S* k = args.users.at(args.k, part.user, part.head, held);
    const S* v = args.users.at(args.v, part.user, part.head, held);
    const std::int64_t more = rows - held;
    read_rows(k, args.k.row, more, s.dim, T{1}, work.keys + held * s.dim, s.dim, more);
    read_rows(v, args.v.row, more, s.value_dim, T{1}, work.values + held * s.value_dim, s.value_dim, more);
    return rows;
  }

  static void forward(const Args<S, T>& args, const Work<T>& work, const Part& part) noexcept {
    const Shape& s = args.shape;
    const std::int64_t length = args.users.length(part.user);
    const std::int64_t wide = padded(s.dim);
    const std::int64_t value_wide = padded(s.value_dim);
    std::int64_t held = 0;
    for (std::int64_t block = part.first_block; block < part.last_block; ++block) {
      const std::int64_t begin = first_query(length, block);
      const std::int64_t queries = first_query(length, block + 1) - begin;
      const std::int64_t lanes = padded(queries);
      const std::int64_t end = args.causal ? begin + queries : length;
      held = hold(args, work, part, held, end);
      read_rows(args.users.at(args.q, part.user, part.head, begin), args.q.row, queries, s.dim, args.scale,
                work.q, wide, lanes);
      turn(work.q, wide, lanes, wide, work.qt, kQueries);
      std::fill_n(work.highest, kQueries, kLowest);
      std::fill_n(work.outt, value_wide * kQueries, T{0});
      for (std::int64_t key = 0; key < end; key += kKeys) {
        const Meeting m{begin, lanes / kLanes, key, std::min(kKeys, end - key), args.causal};
        score(m, work.keys + key * s.dim, s.dim, work.qt, work.scores);
        for (std::int64_t group = 0; group < m.groups; ++group) {
          if (m.seen(group) == 0) continue;
          hide(m, group, work.scores, kLowest);
          soften(group, m.seen(group), work.scores, work.highest, work.inverse, work.outt, s.value_dim, key == 0);
          hide(m, group, work.scores, T{0});
          if (args.dropout.threshold > 0) drop(args, part, m, group, work.scores, work.kept);
        }
        gather(m, work.values + key * s.value_dim, s.value_dim, work.scores, work.outt);
      }
      for (std::int64_t lane = 0; lane < lanes; lane += kWidth) {
        const V inverse = splat(T{1}) / load(work.inverse + lane);
        store(work.inverse + lane, inverse);
        for (std::int64_t d = 0; d < s.value_dim; ++d) {
          T* x = work.outt + d * kQueries + lane;
          store(x, load(x) * inverse);
        }
      }
      turn(work.outt, kQueries, value_wide, lanes, work.out, value_wide);
      write_rows(work.out, value_wide, queries, s.value_dim, T{1},
                 args.users.at(args.out, part.user, part.head, begin), args.out.row);
      T* highest = args.users.at(args.highest, part.user, part.head, begin);
      T* inverse = args.users.at(args.inverse, part.user, part.head, begin);
      for (std::int64_t i = 0; i < queries; ++i) {
        highest[i * args.highest.row] = work.highest[i];
        inverse[i * args.inverse.row] = work.inverse[i];
      }
    }
  }

  // Scores and products of gradients and values become weights (for dv) and gradients of scores.
  static void differentiate(const Args<S, T>& args, const Part& part, const Meeting& m, std::int64_t group,
                            const Work<T>& work) noexcept {
    const std::int64_t keys = m.seen(group);
    const bool dropping = args.dropout.threshold > 0;
    constexpr std::int64_t kParts = kLanes / kWidth;
    V highest[kParts];
    V inverse[kParts];
    V delta[kParts];
    for (std::int64_t i = 0; i < kParts; ++i) {
      const std::int64_t lane = group * kLanes + i * kWidth;
      highest[i] = load(work.highest + lane);
      inverse[i] = load(work.inverse + lane);
      delta[i] = load(work.delta + lane);
    }
    for (std::int64_t first = 0; first < keys; first += kDrawn) {
      if (dropping) draw(args, part, m.query + group * kLanes, m.key + first, work.kept);
      const std::int64_t last = std::min(first + kDrawn, keys);
      for (std::int64_t row = first; row < last; ++row) {
        for (std::int64_t i = 0; i < kParts; ++i) {
          const std::int64_t at = row * kQueries + group * kLanes + i * kWidth;
          V weight = decay(load(work.scores + at) - highest[i]) * inverse[i];
          V change = load(work.dscores + at);
          if (dropping) {
            const V kept = load(work.kept + (row - first) * kLanes + i * kWidth);
            change = change * kept;
            store(work.scores + at, weight * kept);
          } else {
            store(work.scores + at, weight);
          }
          store(work.dscores + at, weight * (change - delta[i]));
        }
      }
    }
  }

  static void backward(const Args<S, T>& args, const Gradients<S>& gradients, const Work<T>& work,
                       const Part& part) noexcept {
    const Shape& s = args.shape;
    const std::int64_t length = args.users.length(part.user);
    const std::int64_t wide = padded(s.dim);
    const std::int64_t value_wide = padded(s.value_dim);
    const bool into_q = gradients.q.data != nullptr;
    const bool into_k = gradients.k.data != nullptr;
    const bool into_v = gradients.v.data != nullptr;
    const bool into_scores = into_q || into_k;
    const std::int64_t first_key = part.first_key;
    const std::int64_t keys = part.last_key - first_key;

    read_rows(args.users.at(args.k, part.user, part.head, first_key), args.k.row, keys, s.dim, T{1}, work.keys,
              s.dim, keys);
    if (into_scores) {
      read_rows(args.users.at(args.v, part.user, part.head, first_key), args.v.row, keys, s.value_dim, T{1},
                work.values, s.value_dim, keys);
    }
    if (into_k) std::fill_n(work.dkeys, keys * wide, T{0});
    if (into_v) std::fill_n(work.dvalues, keys * value_wide, T{0});

    for (std::int64_t block = part.first_block; block < part.last_block; ++block) {
      const std::int64_t begin = first_query(length, block);
      const std::int64_t queries = first_query(length, block + 1) - begin;
      const std::int64_t lanes = padded(queries);
      const std::int64_t end = std::min(part.last_key, args.causal ? begin + queries : length);
      if (end <= first_key) continue;
      read_rows(args.users.at(args.q, part.user, part.head, begin), args.q.row, queries, s.dim, args.scale,
                work.q, wide, lanes);
      turn(work.q, wide, lanes, wide, work.qt, kQueries);
      read_rows(args.users.at(gradients.out, part.user, part.head, begin), gradients.out.row, queries,
                s.value_dim, T{1}, work.dout, value_wide, lanes);
      if (into_scores) {
        turn(work.dout, value_wide, lanes, value_wide, work.doutt, kQueries);
        read_rows(args.users.at(args.out, part.user, part.head, begin), args.out.row, queries, s.value_dim,
                  T{1}, work.out, value_wide, lanes);
        turn(work.out, value_wide, lanes, value_wide, work.outt, kQueries);
        for (std::int64_t lane = 0; lane < lanes; lane += kWidth) {
          V sum{};
          for (std::int64_t d = 0; d < s.value_dim; ++d) {
            sum = Simd::fma(load(work.doutt + d * kQueries + lane), load(work.outt + d * kQueries + lane), sum);
          }
          store(work.delta + lane, sum);
        }
      } else {
        std::fill_n(work.delta, kQueries, T{0});
        std::fill_n(work.dscores, kKeys * kQueries, T{0});
      }
      const T* highest = args.users.at(args.highest, part.user, part.head, begin);
      const T* inverse = args.users.at(args.inverse, part.user, part.head, begin);
      for (std::int64_t i = 0; i < lanes; ++i) {
        work.highest[i] = i < queries ? highest[i * args.highest.row] : T{0};
        work.inverse[i] = i < queries ? inverse[i * args.inverse.row] : T{0};
      }
      if (into_q) std::fill_n(work.dqt, wide * kQueries, T{0});

      for (std::int64_t key = first_key; key < end; key += kKeys) {
        const Meeting m{begin, lanes / kLanes, key, std::min(kKeys, end - key), args.causal};
        const std::int64_t row = key - first_key;
        score(m, work.keys + row * s.dim, s.dim, work.qt, work.scores);
        if (into_scores) score(m, work.values + row * s.value_dim, s.value_dim, work.doutt, work.dscores);
        for (std::int64_t group = 0; group < m.groups; ++group) {
          hide(m, group, work.scores, kLowest);
          differentiate(args, part, m, group, work);
          hide(m, group, work.scores, T{0});
          hide(m, group, work.dscores, T{0});
        }
        if (into_v) spread(m, work.scores, work.dout, value_wide, queries, work.dvalues + row * value_wide);
        if (into_k) spread(m, work.dscores, work.q, wide, queries, work.dkeys + row * wide);
        if (into_q) gather(m, work.keys + row * s.dim, s.dim, work.dscores, work.dqt);
      }
      if (into_q) {
        turn(work.dqt, kQueries, wide, lanes, work.dq, wide);
        write_rows(work.dq, wide, queries, s.dim, args.scale,
                   args.users.at(gradients.q, part.user, part.head, begin), gradients.q.row);
      }
    }
    if (into_k) {
      write_rows(work.dkeys, wide, keys, s.dim, T{1},
                 args.users.at(gradients.k, part.user, part.head, first_key), gradients.k.row);
    }
    if (into_v) {
      write_rows(work.dvalues, value_wide, keys, s.value_dim, T{1},
                 args.users.at(gradients.v, part.user, part.head, first_key), gradients.v.row);
    }
  }
};

}  // namespace recfast::sequence_attention
