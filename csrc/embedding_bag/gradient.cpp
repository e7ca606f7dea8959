#include "embedding_bag/gradient.h"

#include <algorithm>

#include "common/isa.h"
#include "common/parallel.h"

namespace recfast::embedding_bag {
namespace {

constexpr std::int64_t kGrain = 1024;

}  // namespace

void resolve_rows(const Lookups& lookups, std::int64_t* rows, FirstError& error) noexcept {
  parallel_for(lookups.bags, kGrain, [&](std::int64_t first, std::int64_t last) {
    std::int64_t feature = 0;
    for (std::int64_t bag = first; bag < last; ++bag) {
      feature = lookups.feature_of(bag, feature);
      for (std::int64_t i = lookups.begin(bag); i < lookups.begin(bag + 1); ++i) {
        const std::int64_t row = lookups.row(lookups.id(i), feature);
        if (row == Lookups::kOutside) error.report(i);
        rows[i] = row < 0 ? lookups.rows : row;
      }
    }
  });
}

template <class T>
void spread_bags(const std::int64_t* offsets, std::int64_t bags, const T* weights, bool mean, std::int32_t* bag_of,
                 T* coefficient, const std::int64_t* rows, std::int64_t missing) noexcept {
  parallel_for(bags, kGrain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t bag = first; bag < last; ++bag) {
      const std::int64_t begin = offsets[bag];
      const std::int64_t end = offsets[bag + 1];
      std::int64_t count = end - begin;
      if (mean && rows != nullptr) count -= std::count(rows + begin, rows + end, missing);
      const auto length = static_cast<T>(std::max<std::int64_t>(count, 1));
      for (std::int64_t i = begin; i < end; ++i) {
        bag_of[i] = static_cast<std::int32_t>(bag);
        if (coefficient == nullptr) continue;
        const T weight = weights == nullptr ? T{1} : weights[i];
        coefficient[i] = mean ? weight / length : weight;
      }
    }
  });
}

template <class T>
void table_gradient(const PositionGradient<T>& gradient, const std::uint64_t* sorted, const std::int64_t* starts,
                    std::int64_t runs, T* out) noexcept {
  parallel_for(runs, kGrain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t run = first; run < last; ++run) {
      const std::uint64_t* begin = sorted + starts[run];
      sum_run(gradient, begin, sorted + starts[run + 1], out + group_row(*begin) * gradient.width);
    }
  });
}

template <class T>
void max_gradient(const T* grad, const std::int32_t* argmax, const std::int64_t* rows, std::int64_t bags,
                  std::int64_t width, T* out) noexcept {
  // Threads share columns out, not bags: two bags may point at one row.
  constexpr std::int64_t kColumns = 16;
  parallel_for((width + kColumns - 1) / kColumns, std::max<std::int64_t>(1, (1 << 16) / std::max<std::int64_t>(bags, 1)),
               [&](std::int64_t first, std::int64_t last) {
                 const std::int64_t end = std::min(last * kColumns, width);
                 for (std::int64_t bag = 0; bag < bags; ++bag) {
                   for (std::int64_t d = first * kColumns; d < end; ++d) {
                     const std::int32_t position = argmax[bag * width + d];
                     if (position >= 0) out[rows[position] * width + d] += grad[bag * width + d];
                   }
                 }
               });
}

void weight_gradient(const Args& args, const void* grad, void* out) noexcept {
  WeightForm* form = &weights_scalar;
#if defined(__x86_64__)
  if (args.table.format != Format::kFloat64) {
    constexpr IsaTable<WeightForm> kForms{
        .scalar = &weights_scalar, .avx2 = &weights_avx2, .avx512 = &weights_avx512};
    form = kForms.pick();
  }
#endif
  parallel_for(args.lookups.bags, kGrain,
               [&](std::int64_t first, std::int64_t last) { form(args, grad, out, first, last); });
}

template void spread_bags(const std::int64_t*, std::int64_t, const float*, bool, std::int32_t*, float*,
                          const std::int64_t*, std::int64_t) noexcept;
template void spread_bags(const std::int64_t*, std::int64_t, const double*, bool, std::int32_t*, double*,
                          const std::int64_t*, std::int64_t) noexcept;
template void table_gradient(const PositionGradient<float>&, const std::uint64_t*, const std::int64_t*, std::int64_t,
                             float*) noexcept;
template void table_gradient(const PositionGradient<double>&, const std::uint64_t*, const std::int64_t*, std::int64_t,
                             double*) noexcept;
template void max_gradient(const float*, const std::int32_t*, const std::int64_t*, std::int64_t, std::int64_t,
                           float*) noexcept;
template void max_gradient(const double*, const std::int32_t*, const std::int64_t*, std::int64_t, std::int64_t,
                           double*) noexcept;

}  // namespace recfast::embedding_bag
