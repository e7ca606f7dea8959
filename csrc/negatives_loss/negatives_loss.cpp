#include "negatives_loss/negatives_loss.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/group_ids.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/simd_portable.h"
#include "common/vectors.h"

#include "common/tiles.h"
#include "negatives_loss/negatives_loss_kernel.h"

namespace recfast::negatives_loss {
namespace {

template <class S>
Form<S> pick_form() noexcept {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<S, double>) {
    if (active_isa() >= Isa::kAvx512) return form_avx512<S>();
    if (active_isa() >= Isa::kAvx2) return form_avx2<S>();
  }
#endif
  return form_of<Portable<Arithmetic<S>>, S>();
}

// Blocks that a tile of columns is read for once.
constexpr std::int64_t kBlocksATime = 16;
// Groups, columns or rows of a private list below which a thread is not worth waking.
constexpr std::int64_t kGrain = 256;
constexpr std::int64_t kPrivateGrain = 4;

template <class S>
std::int64_t work_size(const Args<S>& args, bool backward) noexcept {
  Arena<Arithmetic<S>> counted(nullptr);
  static_cast<void>(Work<Arithmetic<S>>(counted, args, backward));
  return counted.used();
}

template <class S>
std::int64_t scratch_size(const Args<S>& args, bool backward) noexcept {
  Arena<Arithmetic<S>> counted(nullptr);
  static_cast<void>(Prepared<Arithmetic<S>>(counted, args, backward));
  return counted.used() + max_threads() * work_size(args, backward);
}

// The scratch of a call, and what every thread has of it.
template <class S>
class Call {
 public:
  using T = Arithmetic<S>;

  Call(const Args<S>& args, bool backward) noexcept
      : args_(args), backward_(backward), arena_(args.scratch), prepared(arena_, args, backward),
        size_(work_size(args, backward)), work_(arena_.take(max_threads() * size_)) {}

  [[nodiscard]] Work<T> work(int thread) const noexcept {
    Arena<T> own(work_ + thread * size_);
    return Work<T>(own, args_, backward_);
  }

  // f(first, last, work) over pieces of [0, size).
  template <class F>
  void pieces(std::int64_t size, std::int64_t grain, const F& f) const noexcept {
    const std::int64_t threads = max_threads();
    const std::int64_t count = threads == 1 ? 1 : std::min((size + grain - 1) / grain, 8 * threads);
    parallel_for_each(size == 0 ? 0 : count, [&](std::int64_t piece, int thread) {
      f(size * piece / count, size * (piece + 1) / count, work(thread));
    });
  }

  void prepare(const Form<S>& form, bool columns) const noexcept {
    parallel_for_each(Blocks(args_.rows()).count, [&](std::int64_t block, int thread) {
      form.prepare_queries(args_, prepared, work(thread), block);
    });
    if (!columns) return;
    pieces(args_.columns, kGrain, [&](std::int64_t first, std::int64_t last, const Work<T>& mine) {
      form.prepare_columns(args_, prepared, mine, first, last);
    });
  }

 private:
  const Args<S>& args_;
  bool backward_;
  Arena<T> arena_;

 public:
  Prepared<T> prepared;

 private:
  std::int64_t size_;
  T* work_;
};

// f(entry, id) for every entry in ascending order.
template <class S, class F>
void for_each_entry(const Args<S>& args, const F& f) noexcept {
  std::int64_t columns = 0;
  if (args.form == Columns::kShared) {
    columns = args.columns;
    for (std::int64_t j = 0; j < columns; ++j) f(j, args.negatives[j]);
  } else if (args.form == Columns::kPrivate) {
    columns = args.rows() * args.columns;
    if (args.loss == Loss::kContrastive) {
      const std::int64_t row = words(args.columns);
      for (std::int64_t i = 0; i < args.rows(); ++i) {
        for (std::int64_t word = 0; word < row; ++word) {
          for (std::uint32_t bits = args.active[i * row + word]; bits != 0; bits &= bits - 1) {
            const std::int64_t at = i * args.columns + word * kLanes + std::countr_zero(bits);
            f(at, args.negatives[at]);
          }
        }
      }
    } else {
      for (std::int64_t at = 0; at < columns; ++at) f(at, args.negatives[at]);
    }
  }
  for (std::int64_t i = 0; i < args.rows(); ++i) f(columns + i, args.positives[i]);
}

// Whether a histogram over the table's rows costs less than sorting.
constexpr bool counted(std::int64_t entries, std::int64_t table_rows) noexcept { return table_rows <= 8 * entries; }

}  // namespace

template <class S>
std::int64_t entries(const Args<S>& args) noexcept {
  std::int64_t count = args.rows();
  if (args.form == Columns::kShared) {
    count += args.columns;
  } else if (args.form == Columns::kPrivate && args.loss == Loss::kContrastive) {
    const std::int64_t size = args.rows() * words(args.columns);
    for (std::int64_t i = 0; i < size; ++i) count += std::popcount(args.active[i]);
  } else if (args.form == Columns::kPrivate) {
    count += args.rows() * args.columns;
  }
  return count;
}

std::int64_t group_scratch(std::int64_t entries, std::int64_t table_rows) noexcept {
  return counted(entries, table_rows) ? (table_rows + 2) / 2 : 2 * entries;
}

template <class S>
std::int64_t group(const Args<S>& args, std::int64_t entries, const Groups& groups, std::uint64_t* scratch) noexcept {
  const std::int64_t table_rows = args.table.rows;
  std::int64_t runs = 0;
  if (counted(entries, table_rows)) {
    auto* heads = reinterpret_cast<std::uint32_t*>(scratch);
    std::fill_n(heads, table_rows + 1, 0u);
    for_each_entry(args, [&](std::int64_t, std::int64_t id) { ++heads[id]; });
    std::uint32_t sum = 0;
    for (std::int64_t id = 0; id < table_rows; ++id) {
      const std::uint32_t count = heads[id];
      heads[id] = sum;
      groups.starts[runs] = sum;
      groups.ids[runs] = id;
      runs += count != 0 ? 1 : 0;
      sum += count;
    }
    for_each_entry(args, [&](std::int64_t entry, std::int64_t id) {
      groups.order[heads[id]++] = static_cast<std::uint32_t>(entry);
    });
  } else {
    std::int64_t at = 0;
    for_each_entry(args, [&](std::int64_t entry, std::int64_t id) {
      scratch[at++] = static_cast<std::uint64_t>(id) << 32 | static_cast<std::uint64_t>(entry);
    });
    const std::uint64_t* sorted = sort_keys(scratch, entries, table_rows, scratch + entries);
    for (std::int64_t i = 0; i < entries; ++i) {
      groups.order[i] = static_cast<std::uint32_t>(group_position(sorted[i]));
      if (i > 0 && group_row(sorted[i]) == group_row(sorted[i - 1])) continue;
      groups.starts[runs] = static_cast<std::uint32_t>(i);
      groups.ids[runs++] = group_row(sorted[i]);
    }
  }
  groups.starts[runs] = static_cast<std::uint32_t>(entries);
  return runs;
}

template <class S>
std::int64_t forward_scratch(const Args<S>& args) noexcept {
  return scratch_size(args, false);
}

template <class S>
std::int64_t backward_scratch(const Args<S>& args) noexcept {
  return scratch_size(args, true);
}

template <class S>
void forward(const Args<S>& args) noexcept {
  using T = Arithmetic<S>;
  const Form<S> form = pick_form<S>();
  const Call<S> call(args, false);
  if (args.form == Columns::kPrivate) {
    call.prepare(form, false);
    call.pieces(args.rows(), kPrivateGrain, [&](std::int64_t first, std::int64_t last, const Work<T>& work) {
      form.forward_private(args, call.prepared, work, first, last);
    });
    return;
  }
  call.prepare(form, true);
  // How blocks are dealt out changes no sum: a lane has its row to itself.
  const Blocks blocks(args.rows());
  const std::int64_t share = (blocks.count + max_threads() - 1) / max_threads();
  const std::int64_t together = std::clamp<std::int64_t>(share, 1, kBlocksATime);
  parallel_for_each((blocks.count + together - 1) / together, [&](std::int64_t piece, int thread) {
    form.forward(args, call.prepared, call.work(thread), piece * together,
                 std::min((piece + 1) * together, blocks.count));
  });
}

template <class S>
void backward(const Args<S>& args, const Gradients<S>& gradients) noexcept {
  using T = Arithmetic<S>;
  const Form<S> form = pick_form<S>();
  const Call<S> call(args, true);
  const bool own_lists = args.form == Columns::kPrivate;
  call.prepare(form, !own_lists);
  form.begin_backward(args, gradients, call.prepared);
  if (own_lists) {
    call.pieces(gradients.groups.runs, kGrain, [&](std::int64_t first, std::int64_t last, const Work<T>& work) {
      form.backward_private(args, gradients, call.prepared, work, first, last);
    });
    return;
  }
  parallel_for_each((args.columns + args.tile - 1) / args.tile, [&](std::int64_t tile, int thread) {
    form.backward(args, gradients, call.prepared, call.work(thread), tile);
  });
  call.pieces(gradients.groups.runs, kGrain, [&](std::int64_t first, std::int64_t last, const Work<T>& work) {
    form.join(args, gradients, call.prepared, work, first, last);
  });
}

#define RECFAST_FOR(S)                                                                        \
  template std::int64_t entries(const Args<S>&) noexcept;                                     \
  template std::int64_t group(const Args<S>&, std::int64_t, const Groups&, std::uint64_t*) noexcept; \
  template std::int64_t forward_scratch(const Args<S>&) noexcept;                             \
  template std::int64_t backward_scratch(const Args<S>&) noexcept;                            \
  template void forward(const Args<S>&) noexcept;                                             \
  template void backward(const Args<S>&, const Gradients<S>&) noexcept;
RECFAST_FOR(float)
RECFAST_FOR(double)
RECFAST_FOR(std::uint16_t)
#undef RECFAST_FOR

}  // namespace recfast::negatives_loss
