// The kernels themselves, for any vector of T: `Simd` gives T and V; widen(p), a vector of bfloat16 (upper halves of
// float32); load_part(p, n), store_part(p, v, n) for the last, partly filled vector of a row, zeros beyond n;
// equal16(a, b), one bit for each of 16 equal bytes. A form includes this inside its target region; the standard
// headers and sdim_attention.h must have been included before, outside it.
#pragma once

namespace recfast::sdim_attention {
namespace {

// As types of their own, or the compiler takes a template's vector of integers for a plain integer.
template <class Integer, std::size_t Bytes>
struct Vector {
  typedef Integer Type __attribute__((vector_size(Bytes)));
};

template <class Simd, class Stored>
struct Kernel {
  using T = typename Simd::T;
  using V = typename Simd::V;
  static constexpr std::int64_t kWidth = static_cast<std::int64_t>(sizeof(V) / sizeof(T));
  static constexpr std::int64_t kParts = kLanes / kWidth;
  // Vectors of a row that stay in registers together.
  static constexpr int kChunk = 4;

  static V splat(T x) noexcept { return x - V{}; }
  static V load(const T* p) noexcept {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, V v) noexcept { std::memcpy(p, &v, sizeof v); }

  using Half = typename Vector<std::uint16_t, sizeof(V) / 2>::Type;
  using Word = typename Vector<std::uint32_t, sizeof(V)>::Type;
  static V load(const std::uint16_t* p) noexcept { return Simd::widen(p); }
  // To nearest, ties to even; NaN stays NaN.
  static void store(std::uint16_t* p, V v) noexcept {
    Word word;
    std::memcpy(&word, &v, sizeof word);
    const Word rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const Word kept = (word >> 16) | 0x40;
    const Half half = __builtin_convertvector((word & 0x7fffffff) > 0x7f800000 ? kept : rounded, Half);
    std::memcpy(p, &half, sizeof half);
  }
  static V load_part(const T* p, std::int64_t n) noexcept { return Simd::load_part(p, n); }
  static void store_part(T* p, V v, std::int64_t n) noexcept { Simd::store_part(p, v, n); }
  // Parts are copied as bytes: GCC 12.2 gets a loop over them wrong where three vectors lie side by side.
  static V load_part(const std::uint16_t* p, std::int64_t n) noexcept {
    std::uint16_t part[kWidth]{};
    std::memcpy(part, p, static_cast<std::size_t>(n) * sizeof *p);
    return load(part);
  }
  static void store_part(std::uint16_t* p, V v, std::int64_t n) noexcept {
    std::uint16_t part[kWidth];
    store(part, v);
    std::memcpy(p, part, static_cast<std::size_t>(n) * sizeof *p);
  }

  // Vector i of a chunk of N whose last holds `tail` values (Whole: all are full).
  template <int N, bool Whole, class S>
  static V get(const S* p, int i, std::int64_t tail) noexcept {
    if (Whole || i + 1 < N) return load(p + i * kWidth);
    return load_part(p + i * kWidth, tail);
  }
  template <int N, bool Whole, class S>
  static void put(S* p, int i, V v, std::int64_t tail) noexcept {
    if (Whole || i + 1 < N) {
      store(p + i * kWidth, v);
    } else {
      store_part(p + i * kWidth, v, tail);
    }
  }

  // body<N, Whole>(column, tail) for each chunk of a row of `width` values.
  template <class Body>
  static void chunks(std::int64_t width, const Body& body) noexcept {
    std::int64_t column = 0;
    for (; column + kChunk * kWidth <= width; column += kChunk * kWidth) {
      body.template operator()<kChunk, true>(column, kWidth);
    }
    const std::int64_t rest = width - column;
    if (rest == 0) return;
    const std::int64_t vectors = (rest + kWidth - 1) / kWidth;
    const std::int64_t tail = rest - (vectors - 1) * kWidth;
    rest_of<kChunk>(vectors, tail, column, body);
  }
  template <int N, class Body>
  static void rest_of(std::int64_t vectors, std::int64_t tail, std::int64_t column, const Body& body) noexcept {
    if constexpr (N > 1) {
      if (vectors < N) return rest_of<N - 1>(vectors, tail, column, body);
    }
    if (tail == kWidth) {
      body.template operator()<N, true>(column, tail);
    } else {
      body.template operator()<N, false>(column, tail);
    }
  }

  // The flat position of the first code of rows [begin, begin + length), tables [first, last), that is too large.
  static std::int64_t wrong_code(const Rows<const std::uint8_t>& codes, std::int64_t tables, std::int64_t bits,
                                 std::int64_t begin, std::int64_t length, std::int64_t first,
                                 std::int64_t last) noexcept {
    if (bits == 8) return -1;
    std::uint8_t seen = 0;
    if (codes.stride == last - first) {  // one run of bytes
      const std::uint8_t* byte = codes[begin];
      for (std::int64_t i = 0; i < length * codes.stride; ++i) seen |= byte[i];
      if (seen >> bits == 0) return -1;
    }
    for (std::int64_t row = begin; row < begin + length; ++row) {
      for (std::int64_t j = first; j < last; ++j) {
        if (codes[row][j] >> bits != 0) return row * tables + j;
      }
    }
    return -1;
  }

  // Adds the events of `user` to tables [first, last) of `table`, which begin as `start`, or as zeros.
  static std::int64_t fill(const Shape& s, const Events& events, const Rows<const Stored>& values, std::int64_t user,
                           const T* start, T* table, std::int64_t first, std::int64_t last) noexcept {
    const std::int64_t size = s.table_size();
    const std::int64_t width = s.width;
    if (start == nullptr) {
      std::fill(table + first * size, table + last * size, T{0});
    } else {
      std::copy(start + first * size, start + last * size, table + first * size);
    }
    const std::int64_t begin = events.code_begin[user];
    const std::int64_t length = events.length(user);
    const std::int64_t value_begin = events.value_begin[user];
    const auto mask = static_cast<std::uint8_t>(s.buckets() - 1);
    std::uint8_t seen = 0;
    const auto add = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
      for (std::int64_t l = 0; l < length; ++l) {
        const std::uint8_t* codes = events.codes[begin + l];
        const Stored* value = values[value_begin + l] + column;
        V v[N];
        for (int i = 0; i < N; ++i) v[i] = get<N, Whole>(value, i, tail);
        T* bucket = table + first * size + column;
        for (std::int64_t j = first; j < last; ++j, bucket += size) {
          const std::uint8_t code = codes[j];
          seen |= code;
          T* row = bucket + (code & mask) * width;
          for (int i = 0; i < N; ++i) put<N, Whole>(row, i, get<N, Whole>(row, i, tail) + v[i], tail);
        }
      }
    };
    chunks(width, add);
    if (width > 0 && (seen & static_cast<std::uint8_t>(~mask)) == 0) return -1;
    return wrong_code(events.codes, s.tables, s.bits, begin, length, first, last);
  }

  static std::int64_t build(const TableArgs<Stored, T>& args, std::int64_t user, std::int64_t first,
                            std::int64_t last) noexcept {
    const std::int64_t at = user * args.shape.user_size();
    return fill(args.shape, args.events, args.values, user, args.start == nullptr ? nullptr : args.start + at,
                args.table + at, first, last);
  }

  // dvalues of events [first, last) of `user`, from the gradient of its table.
  static void gather(const Shape& s, const Events& events, const Rows<Stored>& dvalues, std::int64_t user,
                     const T* dtable, std::int64_t first, std::int64_t last) noexcept {
    const std::int64_t size = s.table_size();
    const auto mask = static_cast<std::uint8_t>(s.buckets() - 1);
    const auto sum_up = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
      for (std::int64_t l = first; l < last; ++l) {
        const std::uint8_t* codes = events.codes[events.code_begin[user] + l];
        V sum[N]{};
        const T* bucket = dtable + column;
        for (std::int64_t j = 0; j < s.tables; ++j, bucket += size) {
          const T* row = bucket + (codes[j] & mask) * s.width;
          for (int i = 0; i < N; ++i) sum[i] += get<N, Whole>(row, i, tail);
        }
        Stored* out = dvalues[events.value_begin[user] + l] + column;
        for (int i = 0; i < N; ++i) put<N, Whole>(out, i, sum[i], tail);
      }
    };
    chunks(s.width, sum_up);
  }

  static void build_backward(const TableGradient<Stored, T>& args, std::int64_t user, std::int64_t first,
                             std::int64_t last) noexcept {
    gather(args.shape, args.events, args.dvalues, user, args.dtable + user * args.shape.user_size(), first, last);
  }

  // sum_i a_i b_i in kLanes partial sums; a may be b.
  template <class A, class B>
  static T dot(const A* a, const B* b, std::int64_t size) noexcept {
    V sum[kParts]{};
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      for (std::int64_t part = 0; part < kParts; ++part) {
        sum[part] += load(a + i + part * kWidth) * load(b + i + part * kWidth);
      }
    }
    for (std::int64_t part = 0; i < size; ++part, i += kWidth) {
      const std::int64_t n = std::min(kWidth, size - i);
      sum[part] += load_part(a + i, n) * load_part(b + i, n);
    }
    T lanes[kLanes];
    for (std::int64_t part = 0; part < kParts; ++part) store(lanes + part * kWidth, sum[part]);
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (std::int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }

  // 1 / |row|, or 0 where that is no number to divide by.
  template <class S>
  static T inverse_norm(const S* row, std::int64_t width) noexcept {
    const T norm = std::sqrt(dot(row, row, width));
    return norm > static_cast<T>(kEpsilon) ? T{1} / norm : T{0};
  }

  // The rows of one candidate, one a table: row(j) = base + j * size + codes[j] * width, codes null standing for zeros.
  template <class S>
  struct Found {
    S* base;
    std::int64_t size;
    const std::uint8_t* codes;
    std::int64_t width;

    [[nodiscard]] std::int64_t at(std::int64_t j) const noexcept {
      return j * size + (codes == nullptr ? 0 : codes[j] * width);
    }
  };

  // out = 1/M sum_j scales[j] row(j)
  template <class S>
  static void mean(const Found<const S>& found, std::int64_t tables, const T* scales, S* out) noexcept {
    const T share = T{1} / static_cast<T>(tables);
    const auto add_up = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
      V sum[N]{};
      for (std::int64_t j = 0; j < tables; ++j) {
        const S* row = found.base + found.at(j) + column;
        const V scale = splat(scales[j]);
        for (int i = 0; i < N; ++i) sum[i] += scale * get<N, Whole>(row, i, tail);
      }
      for (int i = 0; i < N; ++i) put<N, Whole>(out + column, i, sum[i] * splat(share), tail);
    };
    chunks(found.width, add_up);
  }

  // Adds to dtable what the answer of one candidate owes to tables [first, last).
  template <class S>
  static void mean_backward(const Found<const S>& found, std::int64_t tables, bool normalize, const T* grad, T* dtable,
                            std::int64_t first, std::int64_t last) noexcept {
    const T share = T{1} / static_cast<T>(tables);
    for (std::int64_t j = first; j < last; ++j) {
      const std::int64_t at = found.at(j);
      const S* row = found.base + at;
      T a = share;
      T b{0};
      if (normalize) {
        const T inverse = inverse_norm(row, found.width);
        if (!(inverse > T{0})) continue;
        a = share * inverse;
        b = a * inverse * (inverse * dot(grad, row, found.width));
      }
      const auto add = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
        T* to = dtable + at + column;
        for (int i = 0; i < N; ++i) {
          V d = splat(a) * get<N, Whole>(grad + column, i, tail);
          if (normalize) d -= splat(b) * get<N, Whole>(row + column, i, tail);
          put<N, Whole>(to, i, get<N, Whole>(to, i, tail) + d, tail);
        }
      };
      chunks(found.width, add);
    }
  }

  // Candidates [first, last) against the table of their user.
  template <class S>
  static std::int64_t answer(const Shape& s, const S* table, const Rows<const std::uint8_t>& asked, bool normalize,
                             std::int64_t first, std::int64_t last, S* out, T* scales) noexcept {
    const std::int64_t size = s.table_size();
    const std::int64_t buckets = s.buckets();
    // With more candidates than buckets, each bucket's norm is computed once.
    const bool shared = normalize && last - first > buckets;
    T* own = scales + s.tables * buckets;
    if (shared) {
      for (std::int64_t row = 0; row < s.tables * buckets; ++row) {
        scales[row] = inverse_norm(table + row * s.width, s.width);
      }
    }
    std::fill_n(own, s.tables, T{1});
    for (std::int64_t c = first; c < last; ++c) {
      const std::uint8_t* codes = asked[c];
      for (std::int64_t j = 0; j < s.tables; ++j) {
        if (codes[j] >= buckets) return c * s.tables + j;
        if (!normalize) continue;
        own[j] = shared ? scales[j * buckets + codes[j]]
                        : inverse_norm(table + j * size + codes[j] * s.width, s.width);
      }
      mean<S>({table, size, codes, s.width}, s.tables, own, out + c * s.width);
    }
    return -1;
  }

  static std::int64_t look(const Lookup<Stored, T>& args, std::int64_t user, std::int64_t first, std::int64_t last,
                           T* scales) noexcept {
    return answer(args.shape, args.table + user * args.shape.user_size(), args.codes, args.normalize, first, last,
                  args.out, scales);
  }

  static void look_backward(const LookupGradient<Stored, T>& args, std::int64_t user, std::int64_t first,
                            std::int64_t last) noexcept {
    const Shape& s = args.shape;
    const std::int64_t size = s.table_size();
    const Stored* table = args.table + user * s.user_size();
    T* dtable = args.dtable + user * s.user_size();
    std::fill(dtable + first * size, dtable + last * size, T{0});
    const std::int64_t begin = args.candidates == nullptr ? user : args.candidates[user];
    const std::int64_t end = args.candidates == nullptr ? user + 1 : args.candidates[user + 1];
    for (std::int64_t c = begin; c < end; ++c) {
      mean_backward<Stored>({table, size, args.codes[c], s.width}, s.tables, args.normalize, args.grad[c], dtable,
                            first, last);
    }
  }

  // --- both at once, the table staying in scratch ---

  // One bit for each of tables [j, j + 16) in which an event and the candidate collide.
  static std::uint32_t collisions(const std::uint8_t* codes, const std::uint8_t* asked, std::int64_t j,
                                  std::int64_t tables) noexcept {
    if (tables - j >= 16) return Simd::equal16(codes + j, asked + j);
    std::uint8_t a[16]{};
    std::uint8_t b[16];
    std::memset(b, 1, sizeof b);
    const auto size = static_cast<std::size_t>(tables - j);
    std::memcpy(a, codes + j, size);
    std::memcpy(b, asked + j, size);
    return Simd::equal16(a, b);
  }

  // Of a single candidate's buckets only: rows [M, Dv].
  static void fill_one(const Shape& s, const Events& events, const Rows<const Stored>& values, std::int64_t user,
                       const std::uint8_t* asked, T* rows) noexcept {
    std::fill_n(rows, s.tables * s.width, T{0});
    const std::int64_t length = events.length(user);
    const auto add = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
      for (std::int64_t l = 0; l < length; ++l) {
        const std::uint8_t* codes = events.codes[events.code_begin[user] + l];
        const Stored* value = values[events.value_begin[user] + l] + column;
        V v[N];
        for (int i = 0; i < N; ++i) v[i] = get<N, Whole>(value, i, tail);
        for (std::int64_t j = 0; j < s.tables; j += 16) {
          for (std::uint32_t same = collisions(codes, asked, j, s.tables); same != 0; same &= same - 1) {
            T* row = rows + (j + std::countr_zero(same)) * s.width + column;
            for (int i = 0; i < N; ++i) put<N, Whole>(row, i, get<N, Whole>(row, i, tail) + v[i], tail);
          }
        }
      }
    };
    chunks(s.width, add);
  }

  static void gather_one(const Shape& s, const Events& events, const Rows<Stored>& dvalues,
                         const std::int64_t* dvalue_begin, std::int64_t user, const std::uint8_t* asked,
                         const T* drows) noexcept {
    const std::int64_t length = events.length(user);
    const auto sum_up = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
      for (std::int64_t l = 0; l < length; ++l) {
        const std::uint8_t* codes = events.codes[events.code_begin[user] + l];
        V sum[N]{};
        for (std::int64_t j = 0; j < s.tables; j += 16) {
          for (std::uint32_t same = collisions(codes, asked, j, s.tables); same != 0; same &= same - 1) {
            const T* row = drows + (j + std::countr_zero(same)) * s.width + column;
            for (int i = 0; i < N; ++i) sum[i] += get<N, Whole>(row, i, tail);
          }
        }
        Stored* out = dvalues[dvalue_begin[user] + l] + column;
        for (int i = 0; i < N; ++i) put<N, Whole>(out, i, sum[i], tail);
      }
    };
    chunks(s.width, sum_up);
  }

  static Faults direct(const Direct<Stored, T>& args, std::int64_t user, std::int64_t first, std::int64_t last,
                       T* scratch) noexcept {
    const Shape& s = args.shape;
    Faults faults;
    T* scales = scratch + s.user_size();
    if (last - first == 1) {
      const std::uint8_t* asked = args.query[first];
      faults.codes = wrong_code(args.events.codes, s.tables, s.bits, args.events.code_begin[user],
                                args.events.length(user), 0, s.tables);
      faults.query = wrong_code(args.query, s.tables, s.bits, first, 1, 0, s.tables);
      fill_one(s, args.events, args.values, user, asked, scratch);
      for (std::int64_t j = 0; j < s.tables; ++j) {
        scales[j] = args.normalize ? inverse_norm(scratch + j * s.width, s.width) : T{1};
      }
      mean<T>({scratch, s.width, nullptr, s.width}, s.tables, scales, args.out + first * s.width);
      return faults;
    }
    fill_all(args, user, scratch, &faults);
    faults.query = Kernel<Simd, T>::answer(s, static_cast<const T*>(scratch), args.query, args.normalize, first, last,
                                           args.out, scales);
    return faults;
  }

  // In passes, so that what is written stays in the cache.
  static void fill_all(const Direct<Stored, T>& args, std::int64_t user, T* table, Faults* faults) noexcept {
    const Shape& s = args.shape;
    for (std::int64_t cut = 0; cut < args.cuts; ++cut) {
      const std::int64_t wrong = fill(s, args.events, args.values, user, nullptr, table, s.tables * cut / args.cuts,
                                      s.tables * (cut + 1) / args.cuts);
      if (faults != nullptr && wrong >= 0 && (faults->codes < 0 || wrong < faults->codes)) faults->codes = wrong;
    }
  }

  static void direct_backward(const Direct<Stored, T>& args, std::int64_t user, std::int64_t first, std::int64_t last,
                              T* scratch) noexcept {
    const Shape& s = args.shape;
    if (first == last) {
      for (std::int64_t l = 0; l < args.events.length(user); ++l) {
        std::fill_n(args.dvalues[args.dvalue_begin[user] + l], s.width, Stored{});
      }
      return;
    }
    T* gradient = scratch + s.user_size();
    if (last - first == 1) {
      const std::uint8_t* asked = args.query[first];
      fill_one(s, args.events, args.values, user, asked, scratch);
      std::fill_n(gradient, s.tables * s.width, T{0});
      mean_backward<T>({scratch, s.width, nullptr, s.width}, s.tables, args.normalize, args.grad[first], gradient, 0,
                       s.tables);
      gather_one(s, args.events, args.dvalues, args.dvalue_begin, user, asked, gradient);
      return;
    }
    fill_all(args, user, scratch, nullptr);
    std::fill_n(gradient, s.user_size(), T{0});
    for (std::int64_t c = first; c < last; ++c) {
      mean_backward<T>({scratch, s.table_size(), args.query[c], s.width}, s.tables, args.normalize, args.grad[c],
                       gradient, 0, s.tables);
    }
    Events events = args.events;
    events.value_begin = args.dvalue_begin;
    gather(s, events, args.dvalues, user, gradient, 0, events.length(user));
  }

  static Forms<Stored, T> forms() noexcept {
    return {build, build_backward, look, look_backward, direct, direct_backward};
  }
};

}  // namespace
}  // namespace recfast::sdim_attention
