// The bodies of normalise_<isa> and select_<isa>, included once per instruction set inside its target region, after
// common/best_list.h and a `Compare` with reaching(values, theta) -> bits of 16 floats that are at least theta, with
// fma(x, a, b), which makes x[i] = x[i] * a[i] + b[i] rounded once, and with keep (see BestList). Vectors of 16 floats
// everywhere: where registers are shorter the compiler takes them apart, and
// the bits are the same.

namespace {

constexpr std::int64_t kVector = 16;
constexpr std::int64_t kFew = 32;  // children up to which they are visited one by one
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));

#define RECFAST_INLINED_HERE __attribute__((always_inline)) inline

RECFAST_INLINED_HERE float widen(float x) noexcept { return x; }
RECFAST_INLINED_HERE float widen(std::uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

RECFAST_INLINED_HERE void load(const float* from, Floats* to) noexcept { std::memcpy(to, from, sizeof *to); }
RECFAST_INLINED_HERE void load(const std::uint16_t* from, Floats* to) noexcept {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  std::memcpy(to, &words, sizeof words);
}

// exp of numbers up to 0; below -87 that of -87.
RECFAST_INLINED_HERE void exponential(Floats* x) noexcept {
  const Floats low = -87.0f - Floats{};
  Floats v = *x;
  v = v < low ? low : v;
#define RECFAST_ALL(value) ((value) - Floats{})
  const Floats magic = RECFAST_ALL(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats n = v;
  Compare::fma(&n, RECFAST_ALL(1.44269504088896341f), magic);
  n -= magic;
  Floats r = n;
  Compare::fma(&r, RECFAST_ALL(-0.693359375f), v);
  Floats rest = n;
  Compare::fma(&rest, RECFAST_ALL(2.12194440e-4f), r);
  r = rest;
  Floats y = RECFAST_ALL(1.9875691500e-4f);
  Compare::fma(&y, r, RECFAST_ALL(1.3981999507e-3f));
  Compare::fma(&y, r, RECFAST_ALL(8.3334519073e-3f));
  Compare::fma(&y, r, RECFAST_ALL(4.1665795894e-2f));
  Compare::fma(&y, r, RECFAST_ALL(1.6666665459e-1f));
  Compare::fma(&y, r, RECFAST_ALL(5.0000001201e-1f));
  Compare::fma(&y, r * r, r);
  y += 1.0f;
#undef RECFAST_ALL
  Ints bits;
  std::memcpy(&bits, &y, sizeof bits);
  bits += __builtin_convertvector(n, Ints) << 23;
  std::memcpy(x, &bits, sizeof bits);
}

// The vectors of logits[0 : count], the last one filled up with -inf.
template <class Logit, class Visit>
RECFAST_INLINED_HERE void each_vector(const Logit* logits, std::int64_t count, const Visit& visit) noexcept {
  Floats x;
  std::int64_t i = 0;
  for (; i + kVector <= count; i += kVector) {
    load(logits + i, &x);
    visit(&x, i);
  }
  if (i < count) {
    float rest[kVector];
    for (std::int64_t lane = 0; lane < kVector; ++lane) {
      rest[lane] = i + lane < count ? widen(logits[i + lane]) : -kInfinity;
    }
    load(rest, &x);
    visit(&x, i);
  }
}

// Lane 0 of `x` becomes `join` of all lanes, halves after halves, without a way through memory.
template <int Half = 8, class Vector, class Join>
RECFAST_INLINED_HERE void fold(Vector* x, const Join& join) noexcept {
  const Vector upper = __builtin_shufflevector(
      *x, *x, Half, (Half + 1) % 16, (Half + 2) % 16, (Half + 3) % 16, (Half + 4) % 16, (Half + 5) % 16,
      (Half + 6) % 16, (Half + 7) % 16, (Half + 8) % 16, (Half + 9) % 16, (Half + 10) % 16, (Half + 11) % 16,
      (Half + 12) % 16, (Half + 13) % 16, (Half + 14) % 16, (Half + 15) % 16);
  join(x, upper);
  if constexpr (Half > 1) fold<Half / 2>(x, join);
}

template <class Logit>
RECFAST_INLINED_HERE Normaliser normalise(const Logit* logits, std::int64_t count) noexcept {
  Floats most = -kInfinity - Floats{};
  Ints wrong{};
  each_vector(logits, count, [&](const Floats* x, std::int64_t) __attribute__((always_inline)) {
    wrong |= *x != *x;
    most = *x > most ? *x : most;
  });
  fold(&most, [](Floats* x, const Floats& upper) __attribute__((always_inline)) { *x = upper > *x ? upper : *x; });
  fold(&wrong, [](Ints* x, const Ints& upper) __attribute__((always_inline)) { *x |= upper; });
  const float largest = most[0];
  if (wrong[0] != 0 || largest == kInfinity) return {.z = 0.0f, .good = false};
  // No code is possible: with this z no sum is above -inf.
  if (largest == -kInfinity) return {.z = kInfinity, .good = true};
  Floats sums{};
  each_vector(logits, count, [&](const Floats* x, std::int64_t) __attribute__((always_inline)) {
    Floats e = *x - largest;
    exponential(&e);
    sums += e;
  });
  fold(&sums, [](Floats* x, const Floats& upper) __attribute__((always_inline)) { *x += upper; });
  return {.z = static_cast<float>(static_cast<double>(largest) + std::log(static_cast<double>(sums[0]))),
          .good = true};
}

struct Chosen {
  static std::int64_t keep(BestList<Chosen>& best, std::int32_t least, std::int32_t last) noexcept {
    return Compare::keep(best, least, last);
  }
};

template <class Code, class Logit>
RECFAST_INLINED_HERE void select(const Args<Code, Logit>& args, std::int64_t row, const float* z,
                                 std::byte* scratch) noexcept {
  const std::int64_t beams = args.beams;
  const std::int64_t width = args.width;
  const std::int64_t n_codes = args.n_codes;
  const std::int64_t capacity = best_capacity(width);
  auto* room = reinterpret_cast<std::uint64_t*>(scratch);  // NOLINT: scratch has no type
  auto* of_scores = reinterpret_cast<float*>(room + width);
  auto* of_ids = reinterpret_cast<std::int32_t*>(of_scores + capacity + kVector);
  BestList<Chosen> best{
      .scores = of_scores, .ids = of_ids, .keys = of_ids + capacity + kVector, .k = width, .capacity = capacity};
  const std::int64_t* states = args.states + row * beams;
  const float* scores = args.scores + row * beams;

  for (std::int64_t w = 0; w < beams && width > 0; ++w) {
    const float score = scores[w];
    if (states[w] < 0 || score == -kInfinity || z[w] == kInfinity) continue;
    const Logit* logits = args.logits + (row * beams + w) * n_codes;
    const std::int64_t begin = args.first_child[states[w]];
    const std::int64_t count = args.first_child[states[w] + 1] - begin;
    const Code* codes = args.codes + begin;
    // An id orders as (w, code) does, and tells the child.
    const std::int64_t first_id = w * n_codes;
    if (count <= kFew && count < n_codes) {
      for (std::int64_t child = 0; child < count; ++child) {
        best.offer(score + (widen(logits[codes[child]]) - z[w]), static_cast<std::int32_t>(first_id + child));
      }
      continue;
    }
    // Which of all codes reach the threshold, and of those, which continue the prefix.
    each_vector(logits, n_codes, [&](const Floats* x, std::int64_t first) __attribute__((always_inline)) {
      const Floats sum = score + (*x - z[w]);
      float values[kVector];
      std::memcpy(values, &sum, sizeof values);
      for (std::uint32_t bits = Compare::reaching(values, best.theta); bits != 0; bits &= bits - 1) {
        const int lane = std::countr_zero(bits);
        std::int64_t child = first + lane;
        if (count < n_codes) {
          const auto code = static_cast<Code>(first + lane);
          child = std::lower_bound(codes, codes + count, code) - codes;
          if (child == count || codes[child] != code) continue;
        } else if (child >= count) {
          continue;
        }
        best.offer(values[lane], static_cast<std::int32_t>(first_id + child));
      }
    });
  }

  best.cut();
  for (std::int64_t i = 0; i < best.count; ++i) room[i] = sort_key(best.scores[i], best.ids[i]);
  std::sort(room, room + best.count);
  for (std::int64_t i = 0; i < width; ++i) {
    const std::int64_t at = row * width + i;
    args.out_states[at] = -1;
    args.out_codes[at] = 0;
    args.out_scores[at] = -kInfinity;
    args.out_parents[at] = 0;
    if (i >= best.count) continue;
    std::int64_t id = 0;
    decode(room[i], args.out_scores[at], id);
    const std::int64_t parent = id / n_codes;
    const std::int64_t node = args.first_child[states[parent]] + id % n_codes;
    args.out_parents[at] = parent;
    args.out_states[at] = node;
    args.out_codes[at] = args.codes[node];
  }
}

#undef RECFAST_INLINED_HERE

}  // namespace

#define RECFAST_JOINED(a, b) a##b
#define RECFAST_FORM(name, isa) RECFAST_JOINED(name, isa)

Normaliser RECFAST_FORM(normalise_, RECFAST_ISA)(const float* x, std::int64_t count) noexcept {
  return normalise(x, count);
}
Normaliser RECFAST_FORM(normalise_, RECFAST_ISA)(const std::uint16_t* x, std::int64_t count) noexcept {
  return normalise(x, count);
}
void RECFAST_FORM(select_, RECFAST_ISA)(const Args<std::uint8_t, float>& args, std::int64_t row, const float* z,
                                        std::byte* scratch) noexcept {
  select(args, row, z, scratch);
}
void RECFAST_FORM(select_, RECFAST_ISA)(const Args<std::uint8_t, std::uint16_t>& args, std::int64_t row,
                                        const float* z, std::byte* scratch) noexcept {
  select(args, row, z, scratch);
}
void RECFAST_FORM(select_, RECFAST_ISA)(const Args<std::uint16_t, float>& args, std::int64_t row, const float* z,
                                        std::byte* scratch) noexcept {
  select(args, row, z, scratch);
}
void RECFAST_FORM(select_, RECFAST_ISA)(const Args<std::uint16_t, std::uint16_t>& args, std::int64_t row,
                                        const float* z, std::byte* scratch) noexcept {
  select(args, row, z, scratch);
}

#undef RECFAST_FORM
#undef RECFAST_JOINED
