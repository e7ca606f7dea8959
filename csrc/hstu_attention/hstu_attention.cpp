#include "hstu_attention/hstu_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/simd_portable.h"
#include "common/vectors.h"

#include "common/tiles.h"
#include "hstu_attention/hstu_attention_kernel.h"

namespace recfast::hstu_attention {
namespace {

constexpr IsaTable<decltype(forward_avx2)> kForward{
    .scalar = forward_scalar<float, float>,
#if defined(__x86_64__)
    .avx2 = forward_avx2,
    .avx512 = forward_avx512,
#endif
};

constexpr IsaTable<decltype(forward_bf16_avx2)> kForwardBf16{
    .scalar = forward_scalar<float, std::uint16_t>,
#if defined(__x86_64__)
    .avx2 = forward_bf16_avx2,
    .avx512 = forward_bf16_avx512,
#endif
};

constexpr IsaTable<decltype(backward_avx2)> kBackward{
    .scalar = backward_scalar<float, float>,
#if defined(__x86_64__)
    .avx2 = backward_avx2,
    .avx512 = backward_avx512,
#endif
};

constexpr IsaTable<decltype(backward_bf16_avx2)> kBackwardBf16{
    .scalar = backward_scalar<float, std::uint16_t>,
#if defined(__x86_64__)
    .avx2 = backward_bf16_avx2,
    .avx512 = backward_bf16_avx512,
#endif
};

// The position tables, zeros behind them; in forward each turned round.
template <class T>
void copy_position(const Shape& s, const T* from, bool turned, T* to) noexcept {
  for (std::int64_t h = 0; h < s.position_heads; ++h) {
    const T* row = from + h * s.positions();
    T* copy = to + h * position_stride(s);
    if (turned) {
      std::reverse_copy(row, row + s.positions(), copy);
    } else {
      std::copy_n(row, s.positions(), copy);
    }
    std::fill_n(copy + s.positions(), position_stride(s) - s.positions(), T{0});
  }
}

// Which sequence holds entry `index`, where sequence b holds [sums[b], sums[b + 1]).
std::int64_t sequence_of(const std::int64_t* sums, std::int64_t sequences, std::int64_t index) noexcept {
  return std::upper_bound(sums, sums + sequences + 1, index) - sums - 1;
}

template <class T, class Value, class Form>
void run_forward(const Args<T, Value>& args, Form form) noexcept {
  const Shape& s = args.shape;
  const std::int64_t groups = s.heads / s.group();
  args.tasks[0] = 0;
  for (std::int64_t b = 0; b < args.sequences.count; ++b) {
    args.tasks[b + 1] = args.tasks[b] + groups * tiles_of(args.sequences.length(b));
  }
  const std::int64_t count = args.tasks[args.sequences.count];
  if (count == 0) return;

  Arena<T> arena(args.scratch);
  T* position = arena.take(position_size(s));
  copy_position(s, args.position, true, position);
  const Buckets buckets(args.thresholds, s.borders);
  const Prepared<T> prepared{position, s.buckets >= 0 ? &buckets : nullptr};
  Arena<T> counted(nullptr);
  static_cast<void>(ForwardWork<T>(counted, s));
  T* work = arena.take(0);  // the rest of the scratch
  parallel_for_each(count, [&](std::int64_t index, int thread) {
    // From the last on: where the mask is causal, the last queries of a sequence have the most to do.
    const std::int64_t task = count - 1 - index;
    const std::int64_t b = sequence_of(args.tasks, args.sequences.count, task);
    const std::int64_t within = task - args.tasks[b];
    const std::int64_t row = within / groups * kTile;
    Arena<T> own(work + thread * counted.used());
    form(args, prepared, ForwardWork<T>(own, s),
         {b, within % groups * s.group(), row, std::min(kTile, args.sequences.length(b) - row)});
  });
}

// Copies of a sequence's dq: one a chunk, but the first may be the answer itself.
std::int64_t copies_of(std::int64_t rows, bool copied) noexcept { return chunks_of(rows) - (copied ? 0 : 1); }

template <class T, class Value>
void add_copies(const Args<T, Value>& args, const Gradients<T, Value>& gradients, const std::int64_t* sums,
                const T* copies) noexcept {
  constexpr bool kCopied = !std::is_same_v<T, Value>;
  const Shape& s = args.shape;
  const std::int64_t width = s.heads * s.dim;
  constexpr std::int64_t kGrain = 256;
  for (std::int64_t b = 0; b < args.sequences.count; ++b) {
    const std::int64_t length = args.sequences.length(b);
    const std::int64_t count = copies_of(length, kCopied);
    if (count == 0) continue;
    const T* first = copies + sums[b] * width;
    parallel_for(length, kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        Value* to = args.sequences.at(gradients.q, b, 0, row);
        for (std::int64_t i = 0; i < width; i += kLanes) {
          const std::int64_t lanes = std::min(kLanes, width - i);
          T sum[kLanes]{};
          if constexpr (!kCopied) std::copy_n(to + i, lanes, sum);
          for (std::int64_t copy = 0; copy < count; ++copy) {
            const T* more = first + (copy * length + row) * width + i;
            for (std::int64_t lane = 0; lane < lanes; ++lane) sum[lane] += more[lane];
          }
          Tiles<Portable<T>>::write_rows(sum, kLanes, 1, lanes, T{1}, to + i, 0);
        }
      }
    });
  }
}

template <class T, class Value, class Form>
void run_backward(const Args<T, Value>& args, const Gradients<T, Value>& gradients, Form form) noexcept {
  constexpr bool kCopied = !std::is_same_v<T, Value>;
  const Shape& s = args.shape;
  const std::int64_t groups = s.heads / s.group();
  std::int64_t* const sums = args.tasks;                         // tasks before each sequence
  std::int64_t* const copied_rows = args.tasks + args.sequences.count + 1;  // rows of copies of dq before each sequence
  sums[0] = copied_rows[0] = 0;
  for (std::int64_t b = 0; b < args.sequences.count; ++b) {
    const std::int64_t length = args.sequences.length(b);
    sums[b + 1] = sums[b] + (length > 0 ? groups * chunks_of(length) : 0);
    copied_rows[b + 1] = copied_rows[b] + copies_of(length, kCopied) * length;
  }
  const std::int64_t count = sums[args.sequences.count];
  const bool biases = gradients.position != nullptr || gradients.time != nullptr;
  if (gradients.position != nullptr) std::fill_n(gradients.position, s.position_heads * s.positions(), T{0});
  if (gradients.time != nullptr) std::fill_n(gradients.time, s.buckets + 1, T{0});
  if (count == 0) return;

  Arena<T> arena(args.scratch);
  const BackwardShared<T> shared(arena, s, copied_rows[args.sequences.count]);
  copy_position(s, args.position, false, shared.position);
  const Buckets buckets(args.thresholds, s.borders);
  const Prepared<T> prepared{shared.position, s.buckets >= 0 ? &buckets : nullptr};
  const std::int64_t width = s.heads * s.dim;
  Arena<T> counted(nullptr);
  static_cast<void>(BackwardWork<T>(counted, s));
  T* work = arena.take(0);  // the rest of the scratch

  const auto task_of = [&](std::int64_t index) -> Task {
    const std::int64_t b = sequence_of(sums, args.sequences.count, index);
    const std::int64_t within = index - sums[b];
    const std::int64_t length = args.sequences.length(b);
    const std::int64_t chunk = within / groups;
    const std::int64_t first = chunk_begin(length, chunk, args.mask.causal);
    return {b, within % groups * s.group(), first, chunk_begin(length, chunk + 1, args.mask.causal) - first};
  };
  const auto run_task = [&](std::int64_t index, T* sum, const BackwardWork<T>& mine) {
    const Task task = task_of(index);
    const std::int64_t length = args.sequences.length(task.sequence);
    std::int64_t chunk = (index - sums[task.sequence]) / groups;
    T* dq = nullptr;
    if constexpr (!kCopied) {
      if (chunk == 0) dq = gradients.q.data != nullptr ? args.sequences.at(gradients.q, task.sequence, 0) : nullptr;
      --chunk;
    }
    if (chunk >= 0) dq = shared.copies + (copied_rows[task.sequence] + chunk * length) * width;
    form(args, gradients, prepared, mine, task, dq, sum);
  };

  if (!biases) {
    parallel_for_each(count, [&](std::int64_t index, int thread) {
      Arena<T> own(work + thread * counted.used());
      run_task(index, nullptr, BackwardWork<T>(own, s));
    });
  } else {
    // Borders of the parts: consecutive tasks with about equal numbers of pairs.
    const auto pairs = [&](std::int64_t index) {
      const Task task = task_of(index);
      const std::int64_t length = args.sequences.length(task.sequence);
      return task.rows * (args.mask.causal ? length - task.row - task.rows / 2 : length);
    };
    std::int64_t total = 0;
    for (std::int64_t index = 0; index < count; ++index) total += pairs(index);
    const std::int64_t parts = std::clamp<std::int64_t>(total / kPairsPerPart, 1, std::min(kMaxParts, count));
    std::array<std::int64_t, kMaxParts + 1> border{};
    std::int64_t seen = 0;
    std::int64_t part = 1;
    for (std::int64_t index = 0; index < count && part < parts; ++index) {
      seen += pairs(index);
      while (part < parts && seen >= total / parts * part) border[static_cast<std::size_t>(part++)] = index + 1;
    }
    while (part <= parts) border[static_cast<std::size_t>(part++)] = count;

    parallel_for_each(parts, [&](std::int64_t index, int thread) {
      Arena<T> own(work + thread * counted.used());
      const BackwardWork<T> mine(own, s);
      T* sum = shared.partials + index * partial_size(s);
      std::fill_n(sum, partial_size(s), T{0});
      std::fill_n(mine.time, (s.buckets + 1) * kLanes, T{0});
      const auto at = static_cast<std::size_t>(index);
      for (std::int64_t task = border[at]; task < border[at + 1]; ++task) run_task(task, sum, mine);
      T* time = sum + position_size(s);
      for (std::int64_t bucket = 0; bucket <= s.buckets; ++bucket) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) time[bucket] += mine.time[bucket * kLanes + lane];
      }
    });

    const auto add_parts = [&](std::int64_t from, std::int64_t size, T* to) {
      for (std::int64_t i = 0; i < size; ++i) {
        double sum = 0;
        for (std::int64_t index = 0; index < parts; ++index) {
          sum += static_cast<double>(shared.partials[index * partial_size(s) + from + i]);
        }
        to[i] = static_cast<T>(sum);
      }
    };
    for (std::int64_t h = 0; gradients.position != nullptr && h < s.position_heads; ++h) {
      add_parts(h * position_stride(s), s.positions(), gradients.position + h * s.positions());
    }
    if (gradients.time != nullptr) {
      add_parts(position_size(s), s.buckets + 1, gradients.time);
    }
  }
  if (gradients.q.data != nullptr) add_copies(args, gradients, copied_rows, shared.copies);
}

}  // namespace

template <class T, class Value>
void forward_scalar(const Args<T, Value>& args, const Prepared<T>& prepared, const ForwardWork<T>& work,
                    const Task& task) noexcept {
  Kernel<Portable<T>, Value>::forward(args, prepared, work, task);
}

template <class T, class Value>
void backward_scalar(const Args<T, Value>& args, const Gradients<T, Value>& gradients, const Prepared<T>& prepared,
                     const BackwardWork<T>& work, const Task& task, T* dq, T* position) noexcept {
  Kernel<Portable<T>, Value>::backward(args, gradients, prepared, work, task, dq, position);
}

std::int64_t forward_scratch(const Shape& shape) noexcept {
  Arena<float> shared(nullptr);
  static_cast<void>(shared.take(position_size(shape)));
  Arena<float> work(nullptr);
  static_cast<void>(ForwardWork<float>(work, shape));
  return shared.used() + max_threads() * work.used();
}

std::int64_t backward_scratch(const Shape& shape, const Sequences& sequences, bool copied) noexcept {
  std::int64_t rows = 0;
  for (std::int64_t b = 0; b < sequences.count; ++b) {
    rows += copies_of(sequences.length(b), copied) * sequences.length(b);
  }
  Arena<float> shared(nullptr);
  static_cast<void>(BackwardShared<float>(shared, shape, rows));
  Arena<float> work(nullptr);
  static_cast<void>(BackwardWork<float>(work, shape));
  return shared.used() + max_threads() * work.used();
}

void forward(const Args<float>& args) noexcept { run_forward(args, kForward.pick()); }
void forward(const Args<float, std::uint16_t>& args) noexcept { run_forward(args, kForwardBf16.pick()); }
void forward(const Args<double>& args) noexcept { run_forward(args, forward_scalar<double, double>); }

void backward(const Args<float>& args, const Gradients<float>& gradients) noexcept {
  run_backward(args, gradients, kBackward.pick());
}
void backward(const Args<float, std::uint16_t>& args, const Gradients<float, std::uint16_t>& gradients) noexcept {
  run_backward(args, gradients, kBackwardBf16.pick());
}
void backward(const Args<double>& args, const Gradients<double>& gradients) noexcept {
  run_backward(args, gradients, backward_scalar<double, double>);
}

}  // namespace recfast::hstu_attention
