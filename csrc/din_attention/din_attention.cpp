#include "din_attention/din_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/simd_portable.h"
#include "common/vectors.h"
#include "din_attention/din_attention_kernel.h"

namespace recfast::din_attention {
namespace {

template <class E>
Form<E> form_scalar() noexcept {
  using K = Kernel<Portable<Arithmetic<E>>, E>;
  return {.pairs = false, .forward = K::forward, .moments = K::moments, .backward = K::backward,
          .pack_pairs = K::pack_pairs};
}

template <class E>
Form<E> pick_form() noexcept {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<E, double>) {
    const Isa level = active_isa();
    if constexpr (std::is_same_v<E, BFloat16>) {
      if (level >= Isa::kAvx512 && has_bf16()) return form_bf16();
    }
    if (level >= Isa::kAvx512) return form_avx512<E>();
    if (level >= Isa::kAvx2) return form_avx2<E>();
  }
#endif
  return form_scalar<E>();
}

template <class E>
std::int64_t first_candidate(const Args<E>& args, std::int64_t user) noexcept {
  return args.candidates == nullptr ? user : args.candidates[user];
}

template <class E>
std::int64_t user_of(const Args<E>& args, std::int64_t candidate) noexcept {
  if (args.candidates == nullptr) return candidate;
  return std::upper_bound(args.candidates, args.candidates + args.shape.users + 1, candidate) - args.candidates - 1;
}

// body(user, first, last) for the candidates [first, last), user by user.
template <class E, class Body>
void for_each_user(const Args<E>& args, std::int64_t first, std::int64_t last, const Body& body) noexcept {
  if (first >= last) return;
  for (std::int64_t user = user_of(args, first); first < last; ++user) {
    const std::int64_t end = std::min(first_candidate(args, user + 1), last);
    if (end > first) body(user, first, end);
    first = end;
  }
}

// A row of a matrix, widened with zeros.
template <class T>
void copy_row(const T* from, T* to, std::int64_t width) noexcept {
  std::copy_n(from, width, to);
  std::fill_n(to + width, padded(width) - width, T{0});
}

template <class E, class T = Arithmetic<E>>
void pack(const Args<E>& args, const Packed<T>& packed, const Form<E>& form, bool backward) noexcept {
  const Shape& s = args.shape;
  const std::int64_t width1 = padded(s.hidden1);
  const std::int64_t width2 = padded(s.hidden2);
  const std::int64_t turned = padded(s.dim);
  const std::int64_t block = s.dim * s.hidden1;
  for (std::int64_t i = 0; i < s.dim; ++i) {
    const T* wq = args.weights.w1 + i * s.hidden1;
    const T* wk = wq + block;
    const T* wd = wk + block;
    const T* wp = wd + block;
    copy_row(wp, packed.product + i * width1, s.hidden1);
    T* keys = packed.keys + i * width1;
    T* query = packed.query + i * width1;
    for (std::int64_t j = 0; j < s.hidden1; ++j) keys[j] = wk[j] - wd[j];
    for (std::int64_t j = 0; j < s.hidden1; ++j) query[j] = wq[j] + wd[j];
    std::fill(keys + s.hidden1, keys + width1, T{0});
    std::fill(query + s.hidden1, query + width1, T{0});
  }
  copy_row(args.weights.b1, packed.b1, s.hidden1);
  copy_row(args.weights.w3, packed.w3, s.head());
  if (s.hidden2 > 0) {
    for (std::int64_t i = 0; i < s.hidden1; ++i) {
      copy_row(args.weights.w2 + i * s.hidden2, packed.w2 + i * width2, s.hidden2);
    }
    copy_row(args.weights.b2, packed.b2, s.hidden2);
    if (form.pairs) form.pack_pairs(s, packed);
  }
  if (!backward) return;
  for (std::int64_t j = 0; j < s.hidden1; ++j) {
    for (std::int64_t i = 0; i < turned; ++i) {
      const bool inside = i < s.dim;
      packed.keys_turned[j * turned + i] = inside ? packed.keys[i * width1 + j] : T{0};
      packed.product_turned[j * turned + i] = inside ? packed.product[i * width1 + j] : T{0};
    }
  }
  for (std::int64_t j = 0; j < s.hidden2; ++j) {
    for (std::int64_t i = 0; i < width1; ++i) {
      packed.w2_turned[j * width1 + i] = i < s.hidden1 ? packed.w2[i * width2 + j] : T{0};
    }
  }
}

// --- Dice ---

// The layer whose channels start at `at` in `statistics` [2, channels] and in the weights.
template <class E, class T = Arithmetic<E>>
void set_dice(const Args<E>& args, const DiceLayer<T>& dice, const T* statistics, std::int64_t at,
              std::int64_t width) noexcept {
  const std::int64_t channels = args.shape.channels();
  for (T* row : {dice.scale, dice.offset, dice.alpha, dice.mean, dice.inverse, dice.mean_dt, dice.mean_dtx}) {
    std::fill_n(row, padded(width), T{0});
  }
  for (std::int64_t j = 0; j < width; ++j) {
    const std::int64_t channel = at + j;
    const T mean = statistics[channel];
    const auto inverse = static_cast<T>(1.0 / std::sqrt(static_cast<double>(statistics[channels + channel]) + args.eps));
    dice.mean[j] = mean;
    dice.inverse[j] = inverse;
    dice.alpha[j] = args.weights.dice[channel];
    dice.scale[j] = args.weights.dice[channels + channel] * inverse;
    dice.offset[j] = args.weights.dice[2 * channels + channel] - mean * dice.scale[j];
  }
}

template <class E>
std::int64_t count_pairs(const Args<E>& args) noexcept {
  std::int64_t pairs = 0;
  for (std::int64_t user = 0; user < args.shape.users; ++user) {
    pairs += (args.end[user] - args.begin[user]) * (first_candidate(args, user + 1) - first_candidate(args, user));
  }
  return pairs;
}

template <class E>
bool of_batch(const Args<E>& args, std::int64_t pairs) noexcept {
  return args.activation == Activation::kDice && args.training && pairs >= 2;
}

// Two rows of `width` doubles, in scratch of another type.
template <class T>
Moments take_moments(Arena<T>& arena, std::int64_t width) noexcept {
  constexpr auto kTimes = static_cast<std::int64_t>(sizeof(double) / sizeof(T));
  T* mean = arena.take(padded(width) * kTimes);
  T* squares = arena.take(padded(width) * kTimes);
  return {.count = 0, .mean = reinterpret_cast<double*>(mean), .squares = reinterpret_cast<double*>(squares)};
}

template <class T>
std::int64_t moments_size(const Shape& s) noexcept {
  Arena<T> counted(nullptr);
  static_cast<void>(take_moments(counted, std::max(s.hidden1, s.hidden2)));
  return counted.used();
}

// Statistics of one layer over all pairs, to args.batch_statistics. Parts are joined in their order.
template <class E, class T = Arithmetic<E>>
void find_statistics(const Args<E>& args, const Packed<T>& packed, const Form<E>& form, const Parts& parts, T* work,
                     std::int64_t work_size, T* sums, Layer layer) noexcept {
  const Shape& s = args.shape;
  const std::int64_t width = layer == Layer::kFirst ? s.hidden1 : s.hidden2;
  const std::int64_t size = moments_size<T>(s);
  std::array<std::int64_t, kMaxParts> counts{};
  parallel_for_each(parts.count, [&](std::int64_t part, int thread) {
    Arena<T> own(work + thread * work_size);
    const Work<T> mine(own, s, false, 0, false);
    Arena<T> place(sums + part * size);
    Moments moments = take_moments(place, width);
    std::fill_n(moments.mean, padded(width), 0.0);
    std::fill_n(moments.squares, padded(width), 0.0);
    const auto at = static_cast<std::size_t>(part);
    for_each_user(args, parts.border[at], parts.border[at + 1],
                  [&](std::int64_t user, std::int64_t first, std::int64_t last) {
                    for (std::int64_t c = first; c < last; ++c) {
                      form.moments(args, packed, mine, moments, user, c, layer);
                    }
                  });
    counts[at] = moments.count;
  });
  Arena<T> place(sums);
  const Moments all = take_moments(place, width);
  auto old = static_cast<double>(counts[0]);
  for (std::int64_t part = 1; part < parts.count; ++part) {
    Arena<T> other(sums + part * size);
    const Moments more = take_moments(other, width);
    const auto fresh = static_cast<double>(counts[static_cast<std::size_t>(part)]);
    if (fresh == 0.0) continue;
    const double share = fresh / (old + fresh);
    for (std::int64_t j = 0; j < width; ++j) {
      const double step = more.mean[j] - all.mean[j];
      all.mean[j] += step * share;
      all.squares[j] += more.squares[j] + step * step * old * share;
    }
    old += fresh;
  }
  const std::int64_t at = layer == Layer::kFirst ? 0 : s.hidden1;
  for (std::int64_t j = 0; j < width; ++j) {
    args.batch_statistics[at + j] = static_cast<T>(all.mean[j]);
    args.batch_statistics[s.channels() + at + j] = static_cast<T>(all.squares[j] / old);
  }
}

// --- forward ---

template <class E, class T = Arithmetic<E>>
std::int64_t forward_work_size(const Args<E>& args) noexcept {
  Arena<T> counted(nullptr);
  static_cast<void>(Work<T>(counted, args.shape, false, 0, false));
  return counted.used();
}

// --- backward ---

// The gradients of a history whose candidates lie in more than one part: each part has its own.
struct Split {
  std::int64_t user;
  std::int64_t part;
  std::int64_t offset;
};

template <class E>
struct Plan {
  using T = Arithmetic<E>;
  Parts parts;
  bool direct;        // gradients of a history are gathered where they are returned
  std::int64_t rows;  // else in that many rows of a thread's own
  std::int64_t partial_size;
  std::int64_t work_size;
  std::int64_t private_size = 0;
  std::int64_t split_count = 0;
  std::array<Split, 2 * kMaxParts> splits{};

  Plan(const Args<E>& args, const Gradients<E>& gradients) noexcept {
    const Shape& s = args.shape;
    const bool history = gradients.keys.data != nullptr || gradients.values.data != nullptr;
    const std::int64_t row = padded(s.dim) + (args.own_values ? padded(s.value_dim) : 0);
    Arena<T> partial(nullptr);
    static_cast<void>(Partial<T>(partial, s, args.activation == Activation::kDice));
    partial_size = partial.used();
    // A part's own gradients of a history stay below 16 bytes a pair.
    constexpr std::int64_t kBytes = 16;
    const std::int64_t block = history ? (row * static_cast<std::int64_t>(sizeof(T)) + kBytes - 1) / kBytes : 1;
    parts = cut(s.users, args.begin, args.end, args.candidates, partial_size, block);
    direct = std::is_same_v<E, T> && s.dim % kLanes == 0 && (!args.own_values || s.value_dim % kLanes == 0);
    rows = 0;
    if (history && !direct) {
      rows = kTileRows;
      for (std::int64_t user = 0; user < s.users; ++user) {
        const bool shared = first_candidate(args, user + 1) - first_candidate(args, user) > 1;
        if (shared) rows = std::max(rows, args.end[user] - args.begin[user]);
      }
    }
    Arena<T> work(nullptr);
    static_cast<void>(Work<T>(work, s, true, rows, args.own_values));
    work_size = work.used();
    if (!history) return;
    for (std::int64_t part = 0; part < parts.count; ++part) {
      const auto at = static_cast<std::size_t>(part);
      const std::int64_t first = parts.border[at];
      const std::int64_t last = parts.border[at + 1];
      if (first >= last) continue;
      const std::int64_t first_user = user_of(args, first);
      const std::int64_t last_user = user_of(args, last - 1);
      const auto add = [&](std::int64_t user) noexcept {
        splits[static_cast<std::size_t>(split_count++)] = {user, part, private_size};
        private_size += (args.end[user] - args.begin[user]) * row;
      };
      if (first_candidate(args, first_user) < first || first_candidate(args, first_user + 1) > last) add(first_user);
      if (last_user != first_user && first_candidate(args, last_user + 1) > last) add(last_user);
    }
  }

  [[nodiscard]] const Split* find(std::int64_t part, std::int64_t user) const noexcept {
    for (std::int64_t i = 0; i < split_count; ++i) {
      const Split& split = splits[static_cast<std::size_t>(i)];
      if (split.part == part && split.user == user) return &split;
    }
    return nullptr;
  }
};

template <class T>
T sum_lanes(const T* lanes) noexcept {
  T sum{0};
  for (std::int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

template <class E>
E rounded(Arithmetic<E> x) noexcept {
  return Kernel<Portable<Arithmetic<E>>, E>::rounded(x);
}

template <class E>
void clear_rows(const Rows<E>& rows, std::int64_t begin, std::int64_t end) noexcept {
  if (rows.data == nullptr) return;
  for (std::int64_t l = begin; l < end; ++l) std::fill_n(rows[l], rows.width, E{});
}

// What the parts gathered for one history, added up in the order of the parts.
template <class E, class T = Arithmetic<E>>
void join(const Plan<E>& plan, const T* base, std::int64_t first, std::int64_t last, std::int64_t skip,
          const Rows<E>& to, std::int64_t begin, std::int64_t length) noexcept {
  if (to.data == nullptr) return;
  const std::int64_t width = padded(to.width);
  parallel_for(length, 64, [&](std::int64_t from, std::int64_t until) {
    for (std::int64_t l = from; l < until; ++l) {
      E* row = to[begin + l];
      for (std::int64_t i = 0; i < to.width; ++i) {
        T sum{0};
        for (std::int64_t part = first; part < last; ++part) {
          sum += base[plan.splits[static_cast<std::size_t>(part)].offset + skip * length + l * width + i];
        }
        row[i] = rounded<E>(sum);
      }
    }
  });
}

template <class E, class T = Arithmetic<E>>
void write_weights(const Args<E>& args, const Gradients<E>& gradients, const Partial<T>& sum) noexcept {
  const Shape& s = args.shape;
  const Weights<T>& out = gradients.weights;
  const std::int64_t width1 = padded(s.hidden1);
  const std::int64_t block = s.dim * s.hidden1;
  if (out.w1 != nullptr) {
    for (std::int64_t i = 0; i < s.dim; ++i) {
      T* dq = out.w1 + i * s.hidden1;
      for (std::int64_t j = 0; j < s.hidden1; ++j) {
        const T query = sum.query[i * width1 + j];
        const T keys = sum.keys[i * width1 + j];
        dq[j] = query;
        dq[j + block] = keys;
        dq[j + 2 * block] = query - keys;
        dq[j + 3 * block] = sum.product[i * width1 + j];
      }
    }
  }
  if (out.b1 != nullptr) std::copy_n(sum.b1, s.hidden1, out.b1);
  if (out.w3 != nullptr) std::copy_n(sum.w3, s.head(), out.w3);
  if (out.b3 != nullptr) out.b3[0] = sum.b3[0];
  if (out.w2 != nullptr) {
    for (std::int64_t i = 0; i < s.hidden1; ++i) {
      std::copy_n(sum.w2 + i * padded(s.hidden2), s.hidden2, out.w2 + i * s.hidden2);
    }
  }
  if (out.b2 != nullptr) std::copy_n(sum.b2, s.hidden2, out.b2);
  if (out.slope != nullptr) {
    out.slope[0] = sum_lanes(sum.slope1);
    if (s.hidden2 > 0) out.slope[1] = sum_lanes(sum.slope2);
  }
  if (out.dice != nullptr) {
    T* row = out.dice;
    for (const auto member : {&DiceSums<T>::alpha, &DiceSums<T>::gain, &DiceSums<T>::shift}) {
      std::copy_n(sum.dice1.*member, s.hidden1, row);
      if (s.hidden2 > 0) std::copy_n(sum.dice2.*member, s.hidden2, row + s.hidden1);
      row += s.channels();
    }
  }
}

}  // namespace

Parts cut(std::int64_t users, const std::int64_t* begin, const std::int64_t* end, const std::int64_t* candidates,
          std::int64_t partial, std::int64_t block) noexcept {
  // What a candidate costs besides its positions: folding it, and what that leads to in backward.
  constexpr std::int64_t kFold = 4;
  // Pairs below which a part is not worth its own sums, whatever these take.
  constexpr std::int64_t kPairsPerPart = 512;
  constexpr std::int64_t kFewParts = 8;
  const auto first = [&](std::int64_t user) noexcept { return candidates == nullptr ? user : candidates[user]; };
  const auto cost = [&](std::int64_t user) noexcept { return end[user] - begin[user] + kFold; };
  Parts parts;
  // In double, since with the fold added the costs may pass 2^63 where nothing else does.
  double total = 0;
  for (std::int64_t user = 0; user < users; ++user) {
    const std::int64_t own = first(user + 1) - first(user);
    parts.pairs += (end[user] - begin[user]) * own;
    total += static_cast<double>(cost(user)) * static_cast<double>(own);
  }
  const std::int64_t rows = first(users);
  const std::int64_t few = std::min(parts.pairs / kPairsPerPart, kFewParts);
  const std::int64_t many = parts.pairs / std::max<std::int64_t>((partial + 3) / 4, 1);
  parts.count = std::clamp<std::int64_t>(std::max(few, many), 1, kMaxParts);
  double seen = 0;
  std::int64_t part = 1;
  const auto wanted = [&]() noexcept {
    return total / static_cast<double>(parts.count) * static_cast<double>(part);
  };
  for (std::int64_t user = 0; user < users && part < parts.count; ++user) {
    const std::int64_t own = first(user + 1) - first(user);
    const auto each = static_cast<double>(cost(user));
    const double after = seen + each * static_cast<double>(own);
    while (part < parts.count && after >= wanted()) {
      const auto inside = static_cast<std::int64_t>((wanted() - seen) / each + 0.5);
      std::int64_t at = (inside + block / 2) / block * block;
      if (at > own || own - at < block) at = inside * 2 < own ? 0 : own;
      parts.border[static_cast<std::size_t>(part)] =
          std::max(parts.border[static_cast<std::size_t>(part - 1)], first(user) + at);
      ++part;
    }
    seen = after;
  }
  while (part <= parts.count) parts.border[static_cast<std::size_t>(part++)] = rows;
  return parts;
}

template <class E>
std::int64_t forward_scratch(const Args<E>& args) noexcept {
  using T = Arithmetic<E>;
  const bool dice = args.activation == Activation::kDice;
  Arena<T> shared(nullptr);
  static_cast<void>(Packed<T>(shared, args.shape, false, dice));
  std::int64_t size = shared.used() + max_threads() * forward_work_size(args);
  if (dice && args.training) size += kMaxParts * moments_size<T>(args.shape);
  return size;
}

template <class E>
void forward(const Args<E>& args) noexcept {
  using T = Arithmetic<E>;
  const Shape& s = args.shape;
  const Form<E> form = pick_form<E>();
  const bool dice = args.activation == Activation::kDice;
  Arena<T> arena(args.scratch);
  const Packed<T> packed(arena, s, false, dice);
  pack(args, packed, form, false);
  const std::int64_t work_size = forward_work_size(args);
  T* work = arena.take(max_threads() * work_size);
  if (dice) {
    const std::int64_t pairs = count_pairs(args);
    const T* statistics = of_batch(args, pairs) ? args.batch_statistics : args.statistics;
    if (of_batch(args, pairs)) {
      T* sums = arena.take(0);  // the rest of the scratch
      const Parts parts = cut(s.users, args.begin, args.end, args.candidates, moments_size<T>(s), 1);
      find_statistics(args, packed, form, parts, work, work_size, sums, Layer::kFirst);
      set_dice(args, packed.dice1, statistics, 0, s.hidden1);
      if (s.hidden2 > 0) find_statistics(args, packed, form, parts, work, work_size, sums, Layer::kSecond);
    } else if (args.training) {
      std::copy_n(args.statistics, 2 * s.channels(), args.batch_statistics);
    }
    set_dice(args, packed.dice1, statistics, 0, s.hidden1);
    if (s.hidden2 > 0) set_dice(args, packed.dice2, statistics, s.hidden1, s.hidden2);
  }
  parallel_for_each(args.query.rows, [&](std::int64_t candidate, int thread) {
    Arena<T> own(work + thread * work_size);
    form.forward(args, packed, Work<T>(own, s, false, 0, false), user_of(args, candidate), candidate);
  });
}

template <class E>
std::int64_t backward_scratch(const Args<E>& args, const Gradients<E>& gradients) noexcept {
  using T = Arithmetic<E>;
  const Plan<E> plan(args, gradients);
  Arena<T> shared(nullptr);
  static_cast<void>(Packed<T>(shared, args.shape, true, args.activation == Activation::kDice));
  return shared.used() + max_threads() * plan.work_size + plan.parts.count * plan.partial_size + plan.private_size;
}

template <class E>
void backward(const Args<E>& args, const Gradients<E>& gradients) noexcept {
  using T = Arithmetic<E>;
  const Shape& s = args.shape;
  const Form<E> form = pick_form<E>();
  const bool dice = args.activation == Activation::kDice;
  const Plan<E> plan(args, gradients);
  const Parts& parts = plan.parts;
  Arena<T> arena(args.scratch);
  const Packed<T> packed(arena, s, true, dice);
  pack(args, packed, form, true);
  T* work = arena.take(max_threads() * plan.work_size);
  T* partials = arena.take(parts.count * plan.partial_size);
  T* privates = arena.take(plan.private_size);
  Arena<T> summed(partials);
  const Partial<T> sum(summed, s, dice);

  // The first part becomes the sum, in the order of the parts.
  const auto run = [&](Reach reach) {
    parallel_for_each(parts.count, [&](std::int64_t part, int thread) {
      Arena<T> own(work + thread * plan.work_size);
      const Work<T> mine(own, s, true, plan.rows, args.own_values);
      T* base = partials + part * plan.partial_size;
      std::fill_n(base, plan.partial_size, T{0});
      Arena<T> own_partial(base);
      const Partial<T> partial(own_partial, s, dice);
      const auto at = static_cast<std::size_t>(part);
      for_each_user(args, parts.border[at], parts.border[at + 1],
                    [&](std::int64_t user, std::int64_t first, std::int64_t last) {
        const Split* split = plan.find(part, user);
        const std::int64_t begin = args.begin[user];
        const std::int64_t length = args.end[user] - begin;
        Segment<T> segment{user, first, last, mine.dkeys, mine.dvalues, last - first == 1};
        if (split != nullptr) {
          segment.dkeys = privates + split->offset;
          segment.dvalues = args.own_values ? segment.dkeys + length * padded(s.dim) : segment.dkeys;
          segment.passing = false;
        } else if (plan.direct) {
          if constexpr (std::is_same_v<E, T>) {
            segment.dkeys = gradients.keys.data == nullptr ? nullptr : gradients.keys[begin];
            segment.dvalues = gradients.values.data == nullptr ? nullptr : gradients.values[begin];
          }
          segment.passing = false;
        }
        form.backward(args, gradients, packed, mine, partial, segment, reach);
        if (reach != Reach::kAll || split != nullptr || plan.direct || segment.passing) return;
        using K = Kernel<Portable<T>, E>;
        if (gradients.keys.data != nullptr) K::hand_on(gradients.keys, segment.dkeys, begin, length);
        if (gradients.values.data != nullptr && (args.own_values || gradients.keys.data == nullptr)) {
          K::hand_on(gradients.values, segment.dvalues, begin, length);
        }
      });
    });
    constexpr std::int64_t kGrain = 4096;
    parallel_for(plan.partial_size, kGrain, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t part = 1; part < parts.count; ++part) {
        const T* other = partials + part * plan.partial_size;
        for (std::int64_t i = first; i < last; ++i) partials[i] += other[i];
      }
    });
  };

  if (dice) {
    const bool batch = of_batch(args, parts.pairs);
    const T* statistics = batch ? args.batch_statistics : args.statistics;
    set_dice(args, packed.dice1, statistics, 0, s.hidden1);
    if (s.hidden2 > 0) set_dice(args, packed.dice2, statistics, s.hidden1, s.hidden2);
    if (batch && gradients.layers()) {
      const auto share = [&](const DiceLayer<T>& layer, const DiceSums<T>& sums, std::int64_t width) {
        for (std::int64_t j = 0; j < width; ++j) {
          layer.mean_dt[j] = static_cast<T>(static_cast<double>(sums.shift[j]) / static_cast<double>(parts.pairs));
          layer.mean_dtx[j] = static_cast<T>(static_cast<double>(sums.gain[j]) / static_cast<double>(parts.pairs));
        }
      };
      run(Reach::kLast);
      share(s.hidden2 > 0 ? packed.dice2 : packed.dice1, s.hidden2 > 0 ? sum.dice2 : sum.dice1, s.head());
      if (s.hidden2 > 0 && gradients.into_first()) {
        run(Reach::kFirst);
        share(packed.dice1, sum.dice1, s.hidden1);
      }
    }
  }
  run(Reach::kAll);
  write_weights(args, gradients, sum);

  // Histories that no candidate has met, and those that several parts have.
  parallel_for(s.users, 64, [&](std::int64_t from, std::int64_t until) {
    for (std::int64_t user = from; user < until; ++user) {
      if (first_candidate(args, user) < first_candidate(args, user + 1)) continue;
      clear_rows(gradients.keys, args.begin[user], args.end[user]);
      clear_rows(gradients.values, args.begin[user], args.end[user]);
    }
  });
  for (std::int64_t i = 0; i < plan.split_count;) {
    const std::int64_t user = plan.splits[static_cast<std::size_t>(i)].user;
    std::int64_t last = i + 1;
    while (last < plan.split_count && plan.splits[static_cast<std::size_t>(last)].user == user) ++last;
    const std::int64_t begin = args.begin[user];
    const std::int64_t length = args.end[user] - begin;
    if (args.own_values) {
      join(plan, privates, i, last, 0, gradients.keys, begin, length);
      join(plan, privates, i, last, padded(s.dim), gradients.values, begin, length);
    } else {
      join(plan, privates, i, last, 0, gradients.keys.data == nullptr ? gradients.values : gradients.keys, begin, length);
    }
    i = last;
  }
}

template std::int64_t forward_scratch(const Args<float>&) noexcept;
template std::int64_t forward_scratch(const Args<double>&) noexcept;
template std::int64_t forward_scratch(const Args<BFloat16>&) noexcept;
template std::int64_t backward_scratch(const Args<float>&, const Gradients<float>&) noexcept;
template std::int64_t backward_scratch(const Args<double>&, const Gradients<double>&) noexcept;
template std::int64_t backward_scratch(const Args<BFloat16>&, const Gradients<BFloat16>&) noexcept;
template void forward(const Args<float>&) noexcept;
template void forward(const Args<double>&) noexcept;
template void forward(const Args<BFloat16>&) noexcept;
template void backward(const Args<float>&, const Gradients<float>&) noexcept;
template void backward(const Args<double>&, const Gradients<double>&) noexcept;
template void backward(const Args<BFloat16>&, const Gradients<BFloat16>&) noexcept;

}  // namespace recfast::din_attention
