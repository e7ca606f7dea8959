#include "sdim_attention/sdim_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/row_format.h"
#include "common/simd_portable.h"
#include "common/status.h"
#include "sdim_attention/sdim_attention_kernel.h"

namespace recfast::sdim_attention {
namespace {

template <class Value>
struct Plain : Portable<Value> {
  using typename Portable<Value>::T;
  using typename Portable<Value>::V;
  static V widen(const std::uint16_t* p) noexcept {
    T wide[sizeof(V) / sizeof(T)];
    for (std::size_t i = 0; i < sizeof(V) / sizeof(T); ++i) wide[i] = bfloat16_to_float(p[i]);
    V v;
    std::memcpy(&v, wide, sizeof v);
    return v;
  }
  static std::uint32_t equal16(const std::uint8_t* a, const std::uint8_t* b) noexcept {
    std::uint32_t bits = 0;
    for (unsigned i = 0; i < 16; ++i) bits |= static_cast<std::uint32_t>(a[i] == b[i]) << i;
    return bits;
  }
  static V load_part(const T* p, std::int64_t n) noexcept {
    T part[sizeof(V) / sizeof(T)]{};
    std::memcpy(part, p, static_cast<std::size_t>(n) * sizeof *p);
    V v;
    std::memcpy(&v, part, sizeof v);
    return v;
  }
  static void store_part(T* p, V v, std::int64_t n) noexcept {
    T part[sizeof(V) / sizeof(T)];
    std::memcpy(part, &v, sizeof v);
    std::memcpy(p, part, static_cast<std::size_t>(n) * sizeof *p);
  }
};

template <class Stored, class T>
Forms<Stored, T> pick() noexcept {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) {
    if (active_isa() >= Isa::kAvx512) return forms_avx512(Stored{});
    if (active_isa() >= Isa::kAvx2) return forms_avx2(Stored{});
  }
#endif
  return Kernel<Plain<T>, Stored>::forms();
}

// Bytes of tables that one pass over a history fills: they should stay in the second level of the cache.
constexpr std::int64_t kPassBytes = 256 * 1024;

// How many passes a user's tables are cut into. No sum crosses a cut, so it may depend on the threads.
std::int64_t passes(const Shape& s, std::int64_t value_bytes, std::int64_t events, std::int64_t longest) noexcept {
  const std::int64_t bytes = s.user_size() * value_bytes;
  std::int64_t cut = (bytes + kPassBytes - 1) / kPassBytes;
  const std::int64_t threads = max_threads();
  // A user with a large share of the events would keep one thread busy while the others wait.
  if (threads > 1 && longest * threads * 4 > events) cut = std::max(cut, 2 * threads);
  return std::clamp<std::int64_t>(cut, 1, std::max<std::int64_t>(s.tables, 1));
}

// Candidates that a thread takes at once.
constexpr std::int64_t kCandidates = 256;
// Events likewise.
constexpr std::int64_t kEvents = 1024;

// The user that row `row` of `prefix` belongs to.
std::int64_t owner(const std::int64_t* prefix, std::int64_t users, std::int64_t row) noexcept {
  return std::upper_bound(prefix, prefix + users + 1, row) - prefix - 1;
}

}  // namespace

template <class Stored, class T>
std::int64_t build(const TableArgs<Stored, T>& args) noexcept {
  const Shape& s = args.shape;
  std::int64_t longest = 0;
  for (std::int64_t user = 0; user < s.users; ++user) {
    longest = std::max(longest, args.events.prefix[user + 1] - args.events.prefix[user]);
  }
  const std::int64_t cuts = passes(s, sizeof(T), args.events.prefix[s.users], longest);
  const auto form = pick<Stored, T>().build;
  FirstError fault;
  parallel_for_each(s.users * cuts, [&](std::int64_t unit, int) {
    const std::int64_t cut = unit % cuts;
    const std::int64_t wrong = form(args, unit / cuts, s.tables * cut / cuts, s.tables * (cut + 1) / cuts);
    if (wrong >= 0) fault.report(wrong);
  });
  return fault.position();
}

template <class Stored, class T>
void build_backward(const TableGradient<Stored, T>& args) noexcept {
  const Shape& s = args.shape;
  const std::int64_t* prefix = args.events.prefix;
  const std::int64_t total = prefix[s.users];
  const auto form = pick<Stored, T>().build_backward;
  parallel_for_each((total + kEvents - 1) / kEvents, [&](std::int64_t unit, int) {
    const std::int64_t end = std::min(total, (unit + 1) * kEvents);
    std::int64_t at = unit * kEvents;
    for (std::int64_t user = owner(prefix, s.users, at); at < end; ++user) {
      const std::int64_t stop = std::min(end, prefix[user + 1]);
      if (at < stop) form(args, user, at - prefix[user], stop - prefix[user]);
      at = stop;
    }
  });
}

std::int64_t lookup_scratch(const Shape& shape) noexcept {
  return max_threads() * padded(shape.tables * (shape.buckets() + 1));
}

template <class Stored, class T>
std::int64_t lookup(const Lookup<Stored, T>& args) noexcept {
  const Shape& s = args.shape;
  const std::int64_t total = args.codes.rows;
  const std::int64_t scratch = padded(s.tables * (s.buckets() + 1));
  const auto form = pick<Stored, T>().look;
  FirstError fault;
  parallel_for_each((total + kCandidates - 1) / kCandidates, [&](std::int64_t unit, int thread) {
    T* scales = args.scratch + thread * scratch;
    const std::int64_t end = std::min(total, (unit + 1) * kCandidates);
    std::int64_t at = unit * kCandidates;
    std::int64_t user = args.candidates == nullptr ? at : owner(args.candidates, s.users, at);
    for (; at < end; ++user) {
      const std::int64_t stop = std::min(end, args.candidates == nullptr ? at + 1 : args.candidates[user + 1]);
      const std::int64_t wrong = at < stop ? form(args, user, at, stop, scales) : -1;
      if (wrong >= 0) fault.report(wrong);
      at = stop;
    }
  });
  return fault.position();
}

template <class Stored, class T>
void lookup_backward(const LookupGradient<Stored, T>& args) noexcept {
  const Shape& s = args.shape;
  std::int64_t most = 1;
  if (args.candidates != nullptr) {
    for (std::int64_t user = 0; user < s.users; ++user) {
      most = std::max(most, args.candidates[user + 1] - args.candidates[user]);
    }
  }
  const std::int64_t cuts = passes(s, sizeof(T), args.codes.rows, most);
  const auto form = pick<Stored, T>().look_backward;
  parallel_for_each(s.users * cuts, [&](std::int64_t unit, int) {
    const std::int64_t cut = unit % cuts;
    form(args, unit / cuts, s.tables * cut / cuts, s.tables * (cut + 1) / cuts);
  });
}

std::int64_t direct_scratch(const Shape& shape) noexcept {
  return max_threads() * padded(2 * shape.user_size() + shape.tables * (shape.buckets() + 1));
}

namespace {

// body(args with its cuts, user, first candidate, last candidate, the thread's scratch) for each user.
template <class Stored, class T, class Body>
void each_user(Direct<Stored, T> args, const Body& body) noexcept {
  const Shape& s = args.shape;
  args.cuts = passes(s, sizeof(T), 1, 0);
  const std::int64_t scratch = padded(2 * s.user_size() + s.tables * (s.buckets() + 1));
  parallel_for_each(s.users, [&](std::int64_t user, int thread) {
    const std::int64_t first = args.candidates == nullptr ? user : args.candidates[user];
    const std::int64_t last = args.candidates == nullptr ? user + 1 : args.candidates[user + 1];
    body(args, user, first, last, args.scratch + thread * scratch);
  });
}

}  // namespace

template <class Stored, class T>
Faults direct(const Direct<Stored, T>& args) noexcept {
  const auto form = pick<Stored, T>().direct;
  FirstError codes;
  FirstError query;
  each_user(args, [&](const auto& cut, std::int64_t user, std::int64_t first, std::int64_t last, T* scratch) {
    if (first == last) return;
    const Faults faults = form(cut, user, first, last, scratch);
    if (faults.codes >= 0) codes.report(faults.codes);
    if (faults.query >= 0) query.report(faults.query);
  });
  return {.codes = codes.position(), .query = query.position()};
}

template <class Stored, class T>
void direct_backward(const Direct<Stored, T>& args) noexcept {
  each_user(args, pick<Stored, T>().direct_backward);
}

template Faults direct(const Direct<float, float>&) noexcept;
template Faults direct(const Direct<std::uint16_t, float>&) noexcept;
template Faults direct(const Direct<double, double>&) noexcept;
template void direct_backward(const Direct<float, float>&) noexcept;
template void direct_backward(const Direct<std::uint16_t, float>&) noexcept;
template void direct_backward(const Direct<double, double>&) noexcept;
template std::int64_t build(const TableArgs<float, float>&) noexcept;
template std::int64_t build(const TableArgs<std::uint16_t, float>&) noexcept;
template std::int64_t build(const TableArgs<double, double>&) noexcept;
template void build_backward(const TableGradient<float, float>&) noexcept;
template void build_backward(const TableGradient<std::uint16_t, float>&) noexcept;
template void build_backward(const TableGradient<double, double>&) noexcept;
template std::int64_t lookup(const Lookup<float, float>&) noexcept;
template std::int64_t lookup(const Lookup<std::uint16_t, float>&) noexcept;
template std::int64_t lookup(const Lookup<double, double>&) noexcept;
template void lookup_backward(const LookupGradient<float, float>&) noexcept;
template void lookup_backward(const LookupGradient<std::uint16_t, float>&) noexcept;
template void lookup_backward(const LookupGradient<double, double>&) noexcept;

}  // namespace recfast::sdim_attention
