// The kernels themselves, for any vector of T: `Simd` gives T and V, and for the last, partly filled vector of a row
// load_part(p, n), store_part(p, v, n) with zeros beyond n. A form includes this inside its target region; the standard
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

  // bfloat16 is the upper half of a float32.
  using Half = typename Vector<std::uint16_t, sizeof(V) / 2>::Type;
  using Word = typename Vector<std::uint32_t, sizeof(V)>::Type;
  static V load(const std::uint16_t* p) noexcept {
    Half half;
    std::memcpy(&half, p, sizeof half);
    const Word word = __builtin_convertvector(half, Word) << 16;
    V v;
    std::memcpy(&v, &word, sizeof v);
    return v;
  }
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
    for (std::int64_t row = begin; row < begin + length; ++row) {
      for (std::int64_t j = first; j < last; ++j) {
        if (codes[row][j] >> bits != 0) return row * tables + j;
      }
    }
    return -1;
  }

  static std::int64_t build(const TableArgs<Stored, T>& args, std::int64_t user, std::int64_t first,
                            std::int64_t last) noexcept {
    const Shape& s = args.shape;
    const std::int64_t size = s.table_size();
    const std::int64_t width = s.width;
    const std::int64_t at = user * s.user_size();
    T* table = args.table + at;
    if (args.start == nullptr) {
      std::fill(table + first * size, table + last * size, T{0});
    } else {
      std::copy(args.start + at + first * size, args.start + at + last * size, table + first * size);
    }
    const std::int64_t begin = args.events.code_begin[user];
    const std::int64_t length = args.events.prefix[user + 1] - args.events.prefix[user];
    const std::int64_t value_begin = args.events.value_begin[user];
    const auto mask = static_cast<std::uint8_t>(s.buckets() - 1);
    std::uint8_t seen = 0;
    const auto add = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
      for (std::int64_t l = 0; l < length; ++l) {
        const std::uint8_t* codes = args.events.codes[begin + l];
        const Stored* value = args.values[value_begin + l] + column;
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
    return wrong_code(args.events.codes, s.tables, s.bits, begin, length, first, last);
  }

  static void build_backward(const TableGradient<Stored, T>& args, std::int64_t user, std::int64_t first,
                             std::int64_t last) noexcept {
    const Shape& s = args.shape;
    const std::int64_t size = s.table_size();
    const T* dtable = args.dtable + user * s.user_size();
    const auto gather = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
      for (std::int64_t l = first; l < last; ++l) {
        const std::uint8_t* codes = args.events.codes[args.events.code_begin[user] + l];
        V sum[N]{};
        const T* bucket = dtable + column;
        for (std::int64_t j = 0; j < s.tables; ++j, bucket += size) {
          const T* row = bucket + codes[j] * s.width;
          for (int i = 0; i < N; ++i) sum[i] += get<N, Whole>(row, i, tail);
        }
        Stored* out = args.dvalues[args.events.value_begin[user] + l] + column;
        for (int i = 0; i < N; ++i) put<N, Whole>(out, i, sum[i], tail);
      }
    };
    chunks(s.width, gather);
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
  static T inverse_norm(const Stored* row, std::int64_t width) noexcept {
    const T norm = std::sqrt(dot(row, row, width));
    return norm > static_cast<T>(kEpsilon) ? T{1} / norm : T{0};
  }

  static std::int64_t look(const Lookup<Stored, T>& args, std::int64_t user, std::int64_t first, std::int64_t last,
                           T* scales) noexcept {
    const Shape& s = args.shape;
    const std::int64_t size = s.table_size();
    const std::int64_t buckets = s.buckets();
    const Stored* table = args.table + user * s.user_size();
    const T share = T{1} / static_cast<T>(s.tables);
    // With more candidates than buckets, each bucket's norm is computed once.
    const bool shared = args.normalize && last - first > buckets;
    T* own = scales + s.tables * buckets;
    if (shared) {
      for (std::int64_t row = 0; row < s.tables * buckets; ++row) {
        scales[row] = inverse_norm(table + row * s.width, s.width);
      }
    }
    std::fill_n(own, s.tables, T{1});
    for (std::int64_t c = first; c < last; ++c) {
      const std::uint8_t* codes = args.codes[c];
      for (std::int64_t j = 0; j < s.tables; ++j) {
        if (codes[j] >= buckets) return c * s.tables + j;
        if (!args.normalize) continue;
        own[j] = shared ? scales[j * buckets + codes[j]]
                        : inverse_norm(table + j * size + codes[j] * s.width, s.width);
      }
      const auto mean = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
        V sum[N]{};
        const Stored* bucket = table + column;
        for (std::int64_t j = 0; j < s.tables; ++j, bucket += size) {
          const Stored* row = bucket + codes[j] * s.width;
          const V scale = splat(own[j]);
          for (int i = 0; i < N; ++i) sum[i] += scale * get<N, Whole>(row, i, tail);
        }
        Stored* out = args.out + c * s.width + column;
        for (int i = 0; i < N; ++i) put<N, Whole>(out, i, sum[i] * splat(share), tail);
      };
      chunks(s.width, mean);
    }
    return -1;
  }

  static void look_backward(const LookupGradient<Stored, T>& args, std::int64_t user, std::int64_t first,
                            std::int64_t last) noexcept {
    const Shape& s = args.shape;
    const std::int64_t size = s.table_size();
    const Stored* table = args.table + user * s.user_size();
    T* dtable = args.dtable + user * s.user_size();
    std::fill(dtable + first * size, dtable + last * size, T{0});
    const T share = T{1} / static_cast<T>(s.tables);
    const std::int64_t begin = args.candidates == nullptr ? user : args.candidates[user];
    const std::int64_t end = args.candidates == nullptr ? user + 1 : args.candidates[user + 1];
    for (std::int64_t c = begin; c < end; ++c) {
      const T* grad = args.grad[c];
      for (std::int64_t j = first; j < last; ++j) {
        const std::int64_t at = j * size + args.codes[c][j] * s.width;
        T a = share;
        T b{0};
        if (args.normalize) {
          const T inverse = inverse_norm(table + at, s.width);
          if (!(inverse > T{0})) continue;
          a = share * inverse;
          b = a * inverse * (inverse * dot(grad, table + at, s.width));
        }
        const auto add = [&]<int N, bool Whole>(std::int64_t column, std::int64_t tail) {
          T* to = dtable + at + column;
          for (int i = 0; i < N; ++i) {
            V d = splat(a) * get<N, Whole>(grad + column, i, tail);
            if (args.normalize) d -= splat(b) * get<N, Whole>(table + at + column, i, tail);
            put<N, Whole>(to, i, get<N, Whole>(to, i, tail) + d, tail);
          }
        };
        chunks(s.width, add);
      }
    }
  }

  static Forms<Stored, T> forms() noexcept { return {build, build_backward, look, look_backward}; }
};

}  // namespace
}  // namespace recfast::sdim_attention
