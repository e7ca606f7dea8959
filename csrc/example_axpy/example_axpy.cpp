#include "example_axpy/example_axpy.h"

#include "common/isa.h"
#include "common/parallel.h"

namespace recfast::example_axpy {
namespace {

// Below this many values a second thread costs more than it brings.
constexpr std::int64_t kGrain = 32768;

constexpr IsaTable<decltype(axpy_scalar)> kForms{
    .scalar = axpy_scalar,
#if defined(__x86_64__)
    .avx2 = axpy_avx2,
    .avx512 = axpy_avx512,
#endif
};

}  // namespace

void axpy_scalar(const float* x, const float* y, float* out, std::int64_t size, float alpha) noexcept {
  for (std::int64_t i = 0; i < size; ++i) out[i] = alpha * x[i] + y[i];
}

void run(const Args<float>& args) noexcept {
  const auto form = kForms.pick();
  parallel_for(static_cast<std::int64_t>(args.out.size()), kGrain, [&](std::int64_t first, std::int64_t last) {
    form(args.x.data() + first, args.y.data() + first, args.out.data() + first, last - first, args.alpha);
  });
}

// Double precision serves gradcheck, not speed: one scalar form.
void run(const Args<double>& args) noexcept {
  parallel_for(static_cast<std::int64_t>(args.out.size()), kGrain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const auto at = static_cast<std::size_t>(i);
      args.out[at] = args.alpha * args.x[at] + args.y[at];
    }
  });
}

}  // namespace recfast::example_axpy
