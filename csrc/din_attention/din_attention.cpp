#include "din_attention/din_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/simd_portable.h"
#include "common/vectors.h"
#include "din_attention/din_attention_kernel.h"

namespace recfast::din_attention {
namespace {

// Parts of the users whose weight gradients are summed apart. Their number and borders depend on the data alone, so
// the sum has one order whatever the number of threads.
constexpr std::int64_t kMaxParts = 64;
// (candidate, position) pairs below which a part is not worth its own gradient.
constexpr std::int64_t kPairsPerPart = 512;

std::int64_t max_parts(const Shape& shape) noexcept { return std::clamp<std::int64_t>(shape.users, 1, kMaxParts); }

constexpr IsaTable<decltype(forward_avx2)> kForward{
    .scalar = forward_scalar<float>,
#if defined(__x86_64__)
    .avx2 = forward_avx2,
    .avx512 = forward_avx512,
#endif
};

constexpr IsaTable<decltype(backward_avx2)> kBackward{
    .scalar = backward_scalar<float>,
#if defined(__x86_64__)
    .avx2 = backward_avx2,
    .avx512 = backward_avx512,
#endif
};

// A row of a matrix, widened with zeros.
template <class T>
void copy_row(const T* from, T* to, std::int64_t width) noexcept {
  std::copy_n(from, width, to);
  std::fill_n(to + width, padded(width) - width, T{0});
}

template <class T>
void pack(const Args<T>& args, const Packed<T>& packed, bool backward) noexcept {
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
    for (std::int64_t j = 0; j < width1; ++j) {
      const bool inside = j < s.hidden1;
      packed.keys[i * width1 + j] = inside ? wk[j] - wd[j] : T{0};
      packed.query[i * width1 + j] = inside ? wq[j] + wd[j] : T{0};
    }
  }
  copy_row(args.weights.b1, packed.b1, s.hidden1);
  copy_row(args.weights.w3, packed.w3, s.head());
  if (s.hidden2 > 0) {
    for (std::int64_t i = 0; i < s.hidden1; ++i) {
      copy_row(args.weights.w2 + i * s.hidden2, packed.w2 + i * width2, s.hidden2);
    }
    copy_row(args.weights.b2, packed.b2, s.hidden2);
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

template <class T, class Form>
void run_forward(const Args<T>& args, Form form) noexcept {
  Arena<T> arena(args.scratch);
  const Packed<T> packed(arena, args.shape, false);
  pack(args, packed, false);
  T* work = args.scratch + arena.used();
  Arena<T> counted(nullptr);
  static_cast<void>(Work<T>(counted, args.shape, false));
  const std::int64_t work_size = counted.used();
  const std::int64_t users = args.shape.users;
  parallel_for_each(args.query.rows, [&](std::int64_t candidate, int thread) {
    std::int64_t user = candidate;
    if (args.candidates != nullptr) {
      user = std::upper_bound(args.candidates, args.candidates + users + 1, candidate) - args.candidates - 1;
    }
    Arena<T> own(work + thread * work_size);
    form(args, packed, Work<T>(own, args.shape, false), user, candidate);
  });
}

template <class T>
T sum_lanes(const T* lanes) noexcept {
  T sum{0};
  for (std::int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

template <class T, class Form>
void run_backward(const Args<T>& args, const Gradients<T>& gradients, Form form) noexcept {
  const Shape& s = args.shape;
  Arena<T> arena(args.scratch);
  const Packed<T> packed(arena, s, true);
  pack(args, packed, true);
  Arena<T> counted(nullptr);
  static_cast<void>(Work<T>(counted, s, true));
  const std::int64_t work_size = counted.used();
  T* work = arena.take(max_threads() * work_size);
  Arena<T> counted_partial(nullptr);
  static_cast<void>(Partial<T>(counted_partial, s));
  const std::int64_t partial_size = counted_partial.used();
  T* partials = arena.take(0);  // the rest of the scratch

  // Borders of the parts: consecutive users with about equal numbers of pairs.
  const auto pairs = [&](std::int64_t user) {
    const std::int64_t candidates = args.candidates == nullptr ? 1 : args.candidates[user + 1] - args.candidates[user];
    return (args.end[user] - args.begin[user]) * candidates;
  };
  std::int64_t total = 0;
  for (std::int64_t user = 0; user < s.users; ++user) total += pairs(user);
  const std::int64_t parts = std::clamp<std::int64_t>(total / kPairsPerPart, 1, max_parts(s));
  std::array<std::int64_t, kMaxParts + 1> border{};
  std::int64_t seen = 0;
  std::int64_t part = 1;
  for (std::int64_t user = 0; user < s.users && part < parts; ++user) {
    seen += pairs(user);
    while (part < parts && seen >= total / parts * part) border[static_cast<std::size_t>(part++)] = user + 1;
  }
  while (part <= parts) border[static_cast<std::size_t>(part++)] = s.users;

  parallel_for_each(parts, [&](std::int64_t index, int thread) {
    Arena<T> own(work + thread * work_size);
    const Work<T> mine(own, s, true);
    T* base = partials + index * partial_size;
    std::fill_n(base, partial_size, T{0});
    Arena<T> own_partial(base);
    const Partial<T> partial(own_partial, s);
    const auto at = static_cast<std::size_t>(index);
    for (std::int64_t user = border[at]; user < border[at + 1]; ++user) {
      form(args, gradients, packed, mine, partial, user);
    }
  });

  // The first part becomes the sum, in the order of the parts.
  constexpr std::int64_t kGrain = 4096;
  parallel_for(partial_size, kGrain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t index = 1; index < parts; ++index) {
      const T* other = partials + index * partial_size;
      for (std::int64_t i = first; i < last; ++i) partials[i] += other[i];
    }
  });
  Arena<T> summed(partials);
  const Partial<T> sum(summed, s);
  const Weights<T>& out = gradients.weights;
  const std::int64_t width1 = padded(s.hidden1);
  const std::int64_t block = s.dim * s.hidden1;
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
  std::copy_n(sum.b1, s.hidden1, out.b1);
  std::copy_n(sum.w3, s.head(), out.w3);
  out.b3[0] = sum.b3[0];
  out.slope[0] = sum_lanes(sum.slope1);
  if (s.hidden2 > 0) {
    for (std::int64_t i = 0; i < s.hidden1; ++i) {
      std::copy_n(sum.w2 + i * padded(s.hidden2), s.hidden2, out.w2 + i * s.hidden2);
    }
    std::copy_n(sum.b2, s.hidden2, out.b2);
    out.slope[1] = sum_lanes(sum.slope2);
  }
}

}  // namespace

template <class T>
void forward_scalar(const Args<T>& args, const Packed<T>& packed, const Work<T>& work, std::int64_t user,
                    std::int64_t candidate) noexcept {
  Kernel<Portable<T>>::forward(args, packed, work, user, candidate);
}

template <class T>
void backward_scalar(const Args<T>& args, const Gradients<T>& gradients, const Packed<T>& packed, const Work<T>& work,
                     const Partial<T>& partial, std::int64_t user) noexcept {
  Kernel<Portable<T>>::backward(args, gradients, packed, work, partial, user);
}

std::int64_t scratch_size(const Shape& shape, bool backward) noexcept {
  Arena<float> shared(nullptr);
  static_cast<void>(Packed<float>(shared, shape, backward));
  Arena<float> work(nullptr);
  static_cast<void>(Work<float>(work, shape, backward));
  Arena<float> partial(nullptr);
  if (backward) static_cast<void>(Partial<float>(partial, shape));
  return shared.used() + max_threads() * work.used() + max_parts(shape) * partial.used();
}

void forward(const Args<float>& args) noexcept { run_forward(args, kForward.pick()); }
void forward(const Args<double>& args) noexcept { run_forward(args, forward_scalar<double>); }

void backward(const Args<float>& args, const Gradients<float>& gradients) noexcept {
  run_backward(args, gradients, kBackward.pick());
}
void backward(const Args<double>& args, const Gradients<double>& gradients) noexcept {
  run_backward(args, gradients, backward_scalar<double>);
}

}  // namespace recfast::din_attention
