#include "embedding_bag/embedding_bag.h"

#include <algorithm>

#include "common/isa.h"
#include "common/parallel.h"

namespace recfast::embedding_bag {
namespace {

// Below this many lookups a second thread costs more than it brings.
constexpr std::int64_t kGrain = 4096;

template <class Value>
void prefetch_row(const Value* table, std::uint64_t row, std::int64_t stride, std::int64_t bytes) noexcept {
  // By integers: the id is not checked yet, and a pointer outside the table may not even be formed.
  const auto start = reinterpret_cast<std::uintptr_t>(table) + row * static_cast<std::uint64_t>(stride) * sizeof(Value);
  for (std::int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(start + static_cast<std::uint64_t>(at)), 0, 2);
  }
}

}  // namespace

std::int64_t first_bad_offset(const std::int64_t* offsets, std::int64_t bags, std::int64_t total) noexcept {
  if (offsets[0] != 0) return 0;
  for (std::int64_t bag = 0; bag < bags; ++bag) {
    if (offsets[bag + 1] < offsets[bag]) return bag + 1;
  }
  return offsets[bags] == total ? -1 : bags;
}

template <class Value, class Index>
void bags_scalar(const Args<Value, Index>& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  const std::int64_t width = args.table.width;
  const auto rows = static_cast<std::uint64_t>(args.table.rows);
  const std::int64_t bytes = width * static_cast<std::int64_t>(sizeof(Value));
  const std::int64_t stop = args.begin(last);
  const Index* ids = args.indices.data();
  for (std::int64_t bag = first; bag < last; ++bag) {
    Real<Value>* out = args.out + bag * width;
    std::fill(out, out + width, Real<Value>{0});
    const std::int64_t begin = args.begin(bag);
    const std::int64_t end = args.begin(bag + 1);
    for (std::int64_t i = begin; i < end; ++i) {
      if (i + kAhead < stop) {
        prefetch_row(args.table.data, static_cast<std::uint64_t>(ids[i + kAhead]), args.table.stride, bytes);
      }
      const auto id = static_cast<std::uint64_t>(static_cast<std::int64_t>(ids[i]));
      if (id >= rows) {
        error.report(i);
        continue;
      }
      const Value* row = args.table[static_cast<std::int64_t>(id)];
      if constexpr (std::is_same_v<Value, std::int8_t>) {
        const float scale = args.weights == nullptr ? args.step[id] : args.step[id] * args.weights[i];
        for (std::int64_t d = 0; d < width; ++d) out[d] += scale * static_cast<float>(row[d]);
      } else if (args.weights == nullptr) {
        for (std::int64_t d = 0; d < width; ++d) out[d] += row[d];
      } else {
        const Real<Value> weight = args.weights[i];
        for (std::int64_t d = 0; d < width; ++d) out[d] += weight * row[d];
      }
    }
    if (args.mean && end > begin) {
      const auto length = static_cast<Real<Value>>(end - begin);
      for (std::int64_t d = 0; d < width; ++d) out[d] /= length;
    }
  }
}

template <class Value, class Index>
Status run(const Args<Value, Index>& args) noexcept {
  const auto total = static_cast<std::int64_t>(args.indices.size());
  if (args.offsets != nullptr) {
    const std::int64_t wrong = first_bad_offset(args.offsets, args.bags, total);
    if (wrong >= 0) return {.bad_offset = wrong};
  }
  auto form = &bags_scalar<Value, Index>;
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<Value, double>) {  // double precision serves gradcheck, not speed
    constexpr IsaTable<std::remove_pointer_t<decltype(form)>> kForms{
        .scalar = &bags_scalar<Value, Index>, .avx2 = &bags_avx2<Value, Index>, .avx512 = &bags_avx512<Value, Index>};
    form = kForms.pick();
  }
#endif
  FirstError error;
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain * args.bags / std::max<std::int64_t>(total, 1));
  parallel_for(args.bags, grain, [&](std::int64_t first, std::int64_t last) { form(args, first, last, error); });
  return {.bad_index = error.position()};
}

template Status run(const Args<float, std::int32_t>&) noexcept;
template Status run(const Args<float, std::int64_t>&) noexcept;
template Status run(const Args<double, std::int32_t>&) noexcept;
template Status run(const Args<double, std::int64_t>&) noexcept;
template Status run(const Args<std::int8_t, std::int32_t>&) noexcept;
template Status run(const Args<std::int8_t, std::int64_t>&) noexcept;

}  // namespace recfast::embedding_bag
