#include "sequence_attention/sequence_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/random.h"
#include "common/simd_portable.h"
#include "common/vectors.h"

#include "common/tiles.h"
#include "sequence_attention/sequence_attention_kernel.h"

namespace recfast::sequence_attention {
namespace {

template <class S, class T>
void forward_scalar(const Args<S, T>& args, const Work<T>& work, const Part& part) noexcept {
  Kernel<Portable<T>, S>::forward(args, work, part);
}

template <class S, class T>
void backward_scalar(const Args<S, T>& args, const Gradients<S>& gradients, const Work<T>& work,
                     const Part& part) noexcept {
  Kernel<Portable<T>, S>::backward(args, gradients, work, part);
}

template <class S>
constexpr IsaTable<Forward<S, float>> kForward{
    .scalar = forward_scalar<S, float>,
#if defined(__x86_64__)
    .avx2 = forward_avx2,
    .avx512 = forward_avx512,
#endif
};

template <class S>
constexpr IsaTable<Backward<S, float>> kBackward{
    .scalar = backward_scalar<S, float>,
#if defined(__x86_64__)
    .avx2 = backward_avx2,
    .avx512 = backward_avx512,
#endif
};

// Keys in a part of a head that backward cuts.
constexpr std::int64_t kPartKeys = 4 * kKeys;
// Pieces of work a thread, so that none waits long at the end.
constexpr std::int64_t kPieces = 8;
// Scores below which a piece is not worth a turn of its own.
constexpr std::int64_t kLeastScores = 1 << 14;

// Scores that query block `block` computes; a few more for what a block costs however short.
template <class S, class T>
std::int64_t block_weight(const Args<S, T>& args, std::int64_t user, std::int64_t block) noexcept {
  const std::int64_t length = args.users.length(user);
  const std::int64_t begin = first_query(length, block);
  const std::int64_t end = first_query(length, block + 1);
  return padded(end - begin) * ((args.causal ? end : length) + kLanes);
}

// Calls run(user, head, first, last, thread) for runs of units of a head: `count(user)` units a head have
// `weight(user, unit)` each. They are dealt in consecutive pieces of about equal weight, heads and users mixed.
// `sums` [users + 1] is scratch.
template <class S, class T, class Count, class Weight, class Run>
void deal(const Args<S, T>& args, const Count& count, const Weight& weight, const Run& run) noexcept {
  const Shape& s = args.shape;
  std::int64_t* sums = args.sums;
  sums[0] = 0;
  for (std::int64_t user = 0; user < args.users.count; ++user) {
    const std::int64_t units = count(user);
    std::int64_t sum = 0;
    for (std::int64_t unit = 0; unit < units; ++unit) sum += weight(user, unit);
    sums[user + 1] = sums[user] + sum * s.heads;
  }
  const std::int64_t total = sums[args.users.count];
  const std::int64_t threads = max_threads();
  const std::int64_t pieces = threads == 1 ? 1 : std::clamp<std::int64_t>(total / kLeastScores, 1, threads * kPieces);
  parallel_for_each(pieces, [&](std::int64_t piece, int thread) {
    // This piece has the units that begin in [first, last), counted in weight.
    const std::int64_t first = total / pieces * piece + total % pieces * piece / pieces;
    const std::int64_t last = total / pieces * (piece + 1) + total % pieces * (piece + 1) / pieces;
    std::int64_t user = std::upper_bound(sums, sums + args.users.count + 1, first) - sums - 1;
    for (; user < args.users.count && sums[user] < last; ++user) {
      const std::int64_t units = count(user);
      std::int64_t at = sums[user];
      for (std::int64_t head = 0; head < s.heads; ++head) {
        std::int64_t begin = units;
        std::int64_t end = units;
        for (std::int64_t unit = 0; unit < units; ++unit) {
          if (at >= first && begin == units) begin = unit;
          if (at >= last && end == units) end = unit;
          at += weight(user, unit);
        }
        if (begin < end) run(user, head, begin, end, thread);
      }
    }
  });
}

template <class S, class T>
Work<T> work_of(const Args<S, T>& args, bool backward, int thread) noexcept {
  Arena<T> counted(nullptr);
  static_cast<void>(Work<T>(counted, args.shape, backward));
  Arena<T> own(args.scratch + thread * counted.used());
  return Work<T>(own, args.shape, backward);
}

template <class S, class T, class Form>
void run_forward(const Args<S, T>& args, Form form) noexcept {
  deal(
      args, [&](std::int64_t user) { return query_blocks(args.users.length(user)); },
      [&](std::int64_t user, std::int64_t block) { return block_weight(args, user, block); },
      [&](std::int64_t user, std::int64_t head, std::int64_t first, std::int64_t last, int thread) {
        form(args, work_of(args, false, thread), Part{user, head, first, last, 0, args.users.length(user)});
      });
}

// A head is one unit, and each block of scores is computed once for all three gradients. Where one head is more than a
// thread's share, it is cut: dq by blocks of queries, then dk and dv by parts of the keys. That computes the scores
// twice and changes no sum.
template <class S, class T, class Form>
void run_backward(const Args<S, T>& args, const Gradients<S>& gradients, Form form) noexcept {
  const auto head_weight = [&](std::int64_t user) {
    const std::int64_t blocks = query_blocks(args.users.length(user));
    std::int64_t sum = 0;
    for (std::int64_t block = 0; block < blocks; ++block) sum += block_weight(args, user, block);
    return sum;
  };
  const std::int64_t threads = max_threads();
  std::int64_t share = std::numeric_limits<std::int64_t>::max();
  if (threads > 1) {
    std::int64_t total = 0;
    for (std::int64_t user = 0; user < args.users.count; ++user) total += head_weight(user) * args.shape.heads;
    share = total / threads;
  }
  const auto cut = [&](std::int64_t user) {
    return threads > 1 && args.users.length(user) > kPartKeys && head_weight(user) > share;
  };
  Gradients<S> into_queries = gradients;
  into_queries.k.data = nullptr;
  into_queries.v.data = nullptr;
  Gradients<S> into_keys = gradients;
  into_keys.q.data = nullptr;
  const bool any_keys = gradients.k.data != nullptr || gradients.v.data != nullptr;

  deal(
      args,
      [&](std::int64_t user) -> std::int64_t {
        if (cut(user)) return gradients.q.data == nullptr ? 0 : query_blocks(args.users.length(user));
        return args.users.length(user) > 0 ? 1 : 0;
      },
      [&](std::int64_t user, std::int64_t unit) {
        return cut(user) ? block_weight(args, user, unit) : head_weight(user);
      },
      [&](std::int64_t user, std::int64_t head, std::int64_t first, std::int64_t last, int thread) {
        const std::int64_t length = args.users.length(user);
        const Work<T> work = work_of(args, true, thread);
        if (cut(user)) {
          form(args, into_queries, work, Part{user, head, first, last, 0, length});
        } else {
          form(args, gradients, work, Part{user, head, 0, query_blocks(length), 0, length});
        }
      });
  if (threads == 1 || !any_keys) return;
  deal(
      args,
      [&](std::int64_t user) -> std::int64_t {
        return cut(user) ? (args.users.length(user) + kPartKeys - 1) / kPartKeys : 0;
      },
      [&](std::int64_t user, std::int64_t part) {
        const std::int64_t length = args.users.length(user);
        const std::int64_t first = part * kPartKeys;
        return std::min(kPartKeys, length - first) * (args.causal ? length - first : length);
      },
      [&](std::int64_t user, std::int64_t head, std::int64_t first, std::int64_t last, int thread) {
        const std::int64_t length = args.users.length(user);
        form(args, into_keys, work_of(args, true, thread),
             Part{user, head, 0, query_blocks(length), first * kPartKeys, std::min(last * kPartKeys, length)});
      });
}

}  // namespace

std::int64_t scratch_size(const Shape& shape, bool backward) noexcept {
  Arena<float> counted(nullptr);
  static_cast<void>(Work<float>(counted, shape, backward));
  return max_threads() * counted.used();
}

void forward(const Args<float, float>& args) noexcept { run_forward(args, kForward<float>.pick()); }
void forward(const Args<std::uint16_t, float>& args) noexcept { run_forward(args, kForward<std::uint16_t>.pick()); }
void forward(const Args<double, double>& args) noexcept { run_forward(args, forward_scalar<double, double>); }

void backward(const Args<float, float>& args, const Gradients<float>& gradients) noexcept {
  run_backward(args, gradients, kBackward<float>.pick());
}
void backward(const Args<std::uint16_t, float>& args, const Gradients<std::uint16_t>& gradients) noexcept {
  run_backward(args, gradients, kBackward<std::uint16_t>.pick());
}
void backward(const Args<double, double>& args, const Gradients<double>& gradients) noexcept {
  run_backward(args, gradients, backward_scalar<double, double>);
}

}  // namespace recfast::sequence_attention
