#include "target_attention/target_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/simd_portable.h"
#include "common/vectors.h"
#include "target_attention/target_attention_kernel.h"

namespace recfast::target_attention {
namespace {

template <class Value>
struct Scalar : Portable<Value> {
  using T = Value;
  using V = typename Portable<Value>::V;
  static constexpr int kWidth = static_cast<int>(sizeof(V) / sizeof(T));
  static constexpr int tile_rows(int columns) { return Portable<Value>::rows(columns); }
  static V max(V a, V b) noexcept { return a > b ? a : b; }
  static T highest(V x) noexcept {
    T top = x[0];
    for (int i = 1; i < kWidth; ++i) top = x[i] > top ? x[i] : top;
    return top;
  }
  template <class Ranks>
  static unsigned reach(Ranks a, Ranks b) noexcept {
    unsigned bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= static_cast<unsigned>(a[i] >= b[i]) << i;
    return bits;
  }
  static void transpose(V (&x)[kWidth]) noexcept {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < i; ++j) {
        const T swapped = x[i][j];
        x[i][j] = x[j][i];
        x[j][i] = swapped;
      }
    }
  }
  static V load_part(const T* p, std::int64_t count) noexcept {
    T part[kWidth]{};
    std::copy_n(p, std::min<std::int64_t>(count, kWidth), part);
    V v;
    std::memcpy(&v, part, sizeof v);
    return v;
  }
  static V load_wide(const BFloat16* p) noexcept { return load_wide_part(p, kWidth); }
  static V load_wide_part(const BFloat16* p, std::int64_t count) noexcept {
    V v{};
    for (int i = 0; i < kWidth && i < count; ++i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(p[i].bits) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      v[i] = value;
    }
    return v;
  }
};

template <class In>
constexpr Form<In> kScalar = Kernel<Scalar<Wide<In>>, In>::kForm;

template <class In>
const Form<In>& form() noexcept {
  if constexpr (std::is_same_v<In, double>) {
    return kScalar<double>;
  } else {
#if defined(__x86_64__)
    switch (active_isa()) {
      case Isa::kAvx512:
        if constexpr (std::is_same_v<In, float>) return kAvx512Float;
        else return kAvx512BFloat16;
      case Isa::kAvx2:
        if constexpr (std::is_same_v<In, float>) return kAvx2Float;
        else return kAvx2BFloat16;
      case Isa::kScalar:
        break;
    }
#endif
    return kScalar<In>;
  }
}

// Candidates in one piece where rows are listed: no rows are shared, so a piece need only be worth dealing out.
constexpr std::int64_t kListedBlock = 8;

// The pieces of a call, user by user.
class Plan {
 public:
  Plan(const Shape& shape, Pass pass) noexcept : shape_(shape), pass_(pass) {}

  // The same with tables [users + 1] of the first piece and the first partial row of each user.
  Plan(const Shape& shape, Pass pass, std::int64_t* table) noexcept : Plan(shape, pass) {
    pieces_ = table;
    partials_ = table + shape.users + 1;
    pieces_[0] = partials_[0] = 0;
    for (std::int64_t user = 0; user < shape.users; ++user) {
      pieces_[user + 1] = pieces_[user] + chunks(user) * blocks(user);
      partials_[user + 1] = partials_[user] + partial_rows(user);
    }
  }

  [[nodiscard]] std::int64_t candidates(std::int64_t user) const noexcept {
    return shape_.first_candidate(user + 1) - shape_.first_candidate(user);
  }
  [[nodiscard]] std::int64_t chunks(std::int64_t user) const noexcept {
    if (pass_ == Pass::kForward && shape_.listed >= 0) return 1;
    return std::max<std::int64_t>((shape_.length(user) + chunk() - 1) / chunk(), 1);
  }
  [[nodiscard]] std::int64_t partial_rows(std::int64_t user) const noexcept {
    const std::int64_t parts = chunks(user);
    return pass_ == Pass::kBackward || parts > 1 ? parts * candidates(user) : 0;
  }
  [[nodiscard]] std::int64_t user_of(std::int64_t candidate) const noexcept {
    if (shape_.candidates == nullptr) return candidate;
    return std::upper_bound(shape_.candidates, shape_.candidates + shape_.users + 1, candidate) - shape_.candidates - 1;
  }
  [[nodiscard]] std::int64_t size() const noexcept { return pieces_[shape_.users]; }
  [[nodiscard]] std::int64_t first_partial(std::int64_t user) const noexcept { return partials_[user]; }

  // `partial` becomes the row of the piece's first candidate, -1 for none.
  [[nodiscard]] Piece piece(std::int64_t index, std::int64_t& partial) const noexcept {
    const std::int64_t user = std::upper_bound(pieces_, pieces_ + shape_.users + 1, index) - pieces_ - 1;
    const std::int64_t within = index - pieces_[user];
    const std::int64_t count = blocks(user);
    const std::int64_t part = within / count;
    const std::int64_t block = within % count;
    const std::int64_t all = candidates(user);
    const std::int64_t start = shape_.first_candidate(user);
    Piece p;
    p.user = user;
    p.first = start + all * block / count;
    p.last = start + all * (block + 1) / count;
    const bool whole = pass_ == Pass::kForward && shape_.listed >= 0;
    p.from = whole ? 0 : part * chunk();
    p.to = whole ? shape_.length(user) : std::min(shape_.length(user), p.from + chunk());
    partial = partial_rows(user) == 0 ? -1 : partials_[user] + part * all + (p.first - start);
    return p;
  }

  // body(user, candidate) for the candidates of users that have partial rows.
  template <class Body>
  void each_partial(std::int64_t rows, const Body& body) const {
    constexpr std::int64_t kGrain = 64;
    parallel_for(rows, kGrain, [&](std::int64_t first, std::int64_t last) {
      std::int64_t user = user_of(first);
      for (std::int64_t candidate = first; candidate < last; ++candidate) {
        while (shape_.first_candidate(user + 1) <= candidate) ++user;
        if (partial_rows(user) > 0) body(user, candidate);
      }
    });
  }

 private:
  [[nodiscard]] std::int64_t chunk() const noexcept { return pass_ == Pass::kSelect ? kSelectChunk : kChunk; }
  [[nodiscard]] std::int64_t blocks(std::int64_t user) const noexcept {
    if (pass_ == Pass::kBackward) return 1;
    const std::int64_t size = shape_.listed >= 0 ? kListedBlock : kBlock;
    return (candidates(user) + size - 1) / size;
  }

  const Shape& shape_;
  Pass pass_;
  std::int64_t* pieces_ = nullptr;
  std::int64_t* partials_ = nullptr;
};

// Values of Wide<In> in one partial row.
std::int64_t partial_width(const Shape& s, Pass pass, std::int64_t wide) noexcept {
  if (pass == Pass::kForward) return s.heads * (s.value_width() + kLanes);
  if (pass == Pass::kBackward) return s.heads * s.width();
  return s.kept * (wide == sizeof(float) ? sizeof(Entry<float>) : sizeof(Entry<double>)) / wide;
}

template <class T>
std::int64_t work_size(const Shape& shape, Pass pass) noexcept {
  Arena<T> counted(nullptr);
  static_cast<void>(Work<T>(counted, shape, pass));
  return counted.used();
}

}  // namespace

Sizes sizes(const Shape& shape, Pass pass, std::int64_t wide) noexcept {
  if (pass == Pass::kSearch) {
    Sizes both = sizes(shape, Pass::kSelect, wide);
    both.scratch += max_threads() * (wide == sizeof(float) ? work_size<float>(shape, Pass::kForward)
                                                           : work_size<double>(shape, Pass::kForward));
    return both;
  }
  const Plan plan(shape, pass);
  std::int64_t rows = 0;
  for (std::int64_t user = 0; user < shape.users; ++user) rows += plan.partial_rows(user);
  const std::int64_t work = wide == sizeof(float) ? work_size<float>(shape, pass) : work_size<double>(shape, pass);
  // A list that needs no merging goes through a block of its thread's own.
  if (pass == Pass::kSelect) rows += max_threads() * kBlock;
  return {.scratch = max_threads() * work + rows * partial_width(shape, pass, wide), .table = 2 * (shape.users + 1)};
}

std::int64_t check_listed(const Shape& shape, const std::int64_t* listed) noexcept {
  for (std::int64_t user = 0; user < shape.users; ++user) {
    const std::int64_t length = shape.length(user);
    const std::int64_t last = shape.first_candidate(user + 1) * shape.listed;
    for (std::int64_t i = shape.first_candidate(user) * shape.listed; i < last; ++i) {
      if (listed[i] < -1 || listed[i] >= length) return i;
    }
  }
  return -1;
}

template <class In>
void forward(const Args<In>& args) noexcept {
  using T = Wide<In>;
  const Shape& s = args.shape;
  const Form<In>& kernel = form<In>();
  const Plan plan(s, Pass::kForward, args.table);
  const std::int64_t work = work_size<T>(s, Pass::kForward);
  const std::int64_t row = partial_width(s, Pass::kForward, sizeof(T));
  T* partials = args.scratch + max_threads() * work;
  parallel_for_each(plan.size(), [&](std::int64_t index, int thread) {
    Arena<T> own(args.scratch + thread * work);
    std::int64_t partial = -1;
    const Piece piece = plan.piece(index, partial);
    kernel.attend(args, Work<T>(own, s, Pass::kForward), piece, partial < 0 ? nullptr : partials + partial * row);
  });
  if (plan.first_partial(s.users) == 0) return;
  plan.each_partial(args.query.rows, [&](std::int64_t user, std::int64_t candidate) {
    const std::int64_t at = plan.first_partial(user) + candidate - s.first_candidate(user);
    kernel.merge(args, partials + at * row, plan.chunks(user), plan.candidates(user) * row, candidate);
  });
}

template <class In>
void backward(const Args<In>& args, const Gradients<In>& gradients) noexcept {
  using T = Wide<In>;
  const Shape& s = args.shape;
  const Form<In>& kernel = form<In>();
  const Plan plan(s, Pass::kBackward, args.table);
  const std::int64_t work = work_size<T>(s, Pass::kBackward);
  const std::int64_t row = partial_width(s, Pass::kBackward, sizeof(T));
  T* partials = args.scratch + max_threads() * work;
  parallel_for_each(plan.size(), [&](std::int64_t index, int thread) {
    Arena<T> own(args.scratch + thread * work);
    std::int64_t partial = -1;
    const Piece piece = plan.piece(index, partial);
    T* dquery = partials + std::max<std::int64_t>(partial, 0) * row;
    kernel.backward(args, gradients, Work<T>(own, s, Pass::kBackward), piece, dquery);
  });
  if (gradients.query == nullptr) return;
  plan.each_partial(args.query.rows, [&](std::int64_t user, std::int64_t candidate) {
    const std::int64_t at = plan.first_partial(user) + candidate - s.first_candidate(user);
    const std::int64_t step = plan.candidates(user) * row;
    kernel.add_query(args, gradients.query, partials + at * row, plan.chunks(user), step, candidate);
  });
}

namespace {

// `attend`: null, or what forward is to do with the rows that were found.
template <class In>
void find(const Args<In>& args, std::int64_t* positions, const Args<In>* attend) noexcept {
  using T = Wide<In>;
  const Shape& s = args.shape;
  const Form<In>& kernel = form<In>();
  const Plan plan(s, Pass::kSelect, args.table);
  const std::int64_t work = work_size<T>(s, Pass::kSelect);
  const std::int64_t attend_work = attend == nullptr ? 0 : work_size<T>(s, Pass::kForward);
  const std::int64_t row = partial_width(s, Pass::kSelect, sizeof(T));
  T* attend_scratch = args.scratch + max_threads() * work;
  T* lists = attend_scratch + max_threads() * attend_work;  // a block of each thread's own, then those to be merged
  T* partials = lists + max_threads() * kBlock * row;
  const auto follow = [&](Piece piece, int thread) {
    if (attend == nullptr) return;
    piece.from = 0;
    piece.to = s.length(piece.user);
    Arena<T> own(attend_scratch + thread * attend_work);
    kernel.attend(*attend, Work<T>(own, s, Pass::kForward), piece, nullptr);
  };
  parallel_for_each(plan.size(), [&](std::int64_t index, int thread) {
    Arena<T> own(args.scratch + thread * work);
    std::int64_t partial = -1;
    const Piece piece = plan.piece(index, partial);
    auto* best = reinterpret_cast<Entry<T>*>(partial < 0 ? lists + thread * kBlock * row : partials + partial * row);
    kernel.select(args, Work<T>(own, s, Pass::kSelect), piece, best);
    if (partial >= 0) return;
    const std::int64_t size = (piece.last - piece.first) * s.kept;
    for (std::int64_t i = 0; i < size; ++i) positions[piece.first * s.kept + i] = best[i].position;
    follow(piece, thread);
  });
  if (plan.first_partial(s.users) == 0) return;
  parallel_for_each(args.query.rows, [&](std::int64_t candidate, int thread) {
    const std::int64_t user = plan.user_of(candidate);
    if (plan.partial_rows(user) == 0) return;
    const std::int64_t at = plan.first_partial(user) + candidate - s.first_candidate(user);
    auto* best = reinterpret_cast<Entry<T>*>(partials + at * row);
    kernel.merge_lists(best, plan.chunks(user), plan.candidates(user) * s.kept, s.kept);
    for (std::int64_t i = 0; i < s.kept; ++i) positions[candidate * s.kept + i] = best[i].position;
    follow({.user = user, .first = candidate, .last = candidate + 1}, thread);
  });
}

}  // namespace

template <class In>
void select(const Args<In>& args, std::int64_t* positions) noexcept {
  find<In>(args, positions, nullptr);
}

template <class In>
void search(const Args<In>& args, std::int64_t* positions) noexcept {
  Args<In> attend = args;
  attend.shape.listed = args.shape.kept;
  attend.listed = positions;
  find(args, positions, &attend);
}

template void forward(const Args<float>&) noexcept;
template void forward(const Args<double>&) noexcept;
template void forward(const Args<BFloat16>&) noexcept;
template void backward(const Args<float>&, const Gradients<float>&) noexcept;
template void backward(const Args<double>&, const Gradients<double>&) noexcept;
template void backward(const Args<BFloat16>&, const Gradients<BFloat16>&) noexcept;
template void select(const Args<float>&, std::int64_t*) noexcept;
template void search(const Args<float>&, std::int64_t*) noexcept;
template void select(const Args<double>&, std::int64_t*) noexcept;
template void search(const Args<double>&, std::int64_t*) noexcept;
template void select(const Args<BFloat16>&, std::int64_t*) noexcept;
template void search(const Args<BFloat16>&, std::int64_t*) noexcept;

}  // namespace recfast::target_attention
