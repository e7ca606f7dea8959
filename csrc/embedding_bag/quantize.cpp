#include "embedding_bag/quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/random.h"
#include "common/status.h"

namespace recfast::embedding_bag {
namespace {

#include "embedding_bag/quantize_rows.h"

}  // namespace

std::int64_t quantize_scalar(const QuantizeArgs& args, std::int64_t first, std::int64_t last,
                             std::int64_t& not_finite) noexcept {
  return pick_form(args)(args, first, last, not_finite);
}

QuantizeOutcome quantize(const QuantizeArgs& args) noexcept {
  QuantizeForm* form = &quantize_scalar;
#if defined(__x86_64__)
  constexpr IsaTable<QuantizeForm> kForms{
      .scalar = &quantize_scalar, .avx2 = &quantize_avx2, .avx512 = &quantize_avx512};
  form = kForms.pick();
#endif
  FirstError error;
  std::atomic<std::int64_t> saturated{0};
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 16) / std::max<std::int64_t>(args.width, 1));
  parallel_for(args.rows, grain, [&](std::int64_t first, std::int64_t last) {
    std::int64_t not_finite = -1;
    saturated += form(args, first, last, not_finite);
    if (not_finite >= 0) error.report(not_finite);
  });
  return {.not_finite = error.position(), .saturated = saturated};
}

}  // namespace recfast::embedding_bag
