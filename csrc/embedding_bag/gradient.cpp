#include "embedding_bag/gradient.h"

#include <algorithm>

#include "common/parallel.h"

namespace recfast::embedding_bag {
namespace {

constexpr std::int64_t kGrain = 1024;

}  // namespace

template <class T>
void spread_bags(const std::int64_t* offsets, std::int64_t bags, const T* weights, bool mean, std::int32_t* bag_of,
                 T* coefficient) noexcept {
  parallel_for(bags, kGrain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t bag = first; bag < last; ++bag) {
      const auto length = static_cast<T>(offsets[bag + 1] - offsets[bag]);
      for (std::int64_t i = offsets[bag]; i < offsets[bag + 1]; ++i) {
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

template <class Value, class Index>
void weight_gradient(const Args<Value, Index>& args, const Real<Value>* grad, Real<Value>* out) noexcept {
  using T = Real<Value>;
  const auto rows = static_cast<std::uint64_t>(args.table.rows);
  const std::int64_t width = args.table.width;
  const Index* ids = args.indices.data();
  parallel_for(args.bags, kGrain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t bag = first; bag < last; ++bag) {
      const T* g = grad + bag * width;
      const std::int64_t begin = args.begin(bag);
      const std::int64_t end = args.begin(bag + 1);
      for (std::int64_t i = begin; i < end; ++i) {
        const auto id = static_cast<std::uint64_t>(static_cast<std::int64_t>(ids[i]));
        T sum{0};
        if (id < rows) {
          const Value* row = args.table[static_cast<std::int64_t>(id)];
          for (std::int64_t d = 0; d < width; ++d) sum += static_cast<T>(row[d]) * g[d];
          if constexpr (std::is_same_v<Value, std::int8_t>) sum *= args.step[id];
        }
        out[i] = args.mean ? sum / static_cast<T>(end - begin) : sum;
      }
    }
  });
}

template void spread_bags(const std::int64_t*, std::int64_t, const float*, bool, std::int32_t*, float*) noexcept;
template void spread_bags(const std::int64_t*, std::int64_t, const double*, bool, std::int32_t*, double*) noexcept;
template void table_gradient(const PositionGradient<float>&, const std::uint64_t*, const std::int64_t*, std::int64_t,
                             float*) noexcept;
template void table_gradient(const PositionGradient<double>&, const std::uint64_t*, const std::int64_t*, std::int64_t,
                             double*) noexcept;
template void weight_gradient(const Args<float, std::int32_t>&, const float*, float*) noexcept;
template void weight_gradient(const Args<float, std::int64_t>&, const float*, float*) noexcept;
template void weight_gradient(const Args<double, std::int32_t>&, const double*, double*) noexcept;
template void weight_gradient(const Args<double, std::int64_t>&, const double*, double*) noexcept;
template void weight_gradient(const Args<std::int8_t, std::int32_t>&, const float*, float*) noexcept;
template void weight_gradient(const Args<std::int8_t, std::int64_t>&, const float*, float*) noexcept;

}  // namespace recfast::embedding_bag
