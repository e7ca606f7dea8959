#include "embedding_bag/quantize.h"

#if defined(__x86_64__)
#include <cstring>

#include "common/random.h"

#pragma GCC push_options
#pragma GCC target("avx2,f16c")

namespace recfast::embedding_bag {
namespace {

#include "embedding_bag/quantize_rows.h"

}  // namespace

std::int64_t quantize_avx2(const QuantizeArgs& args, std::int64_t first, std::int64_t last,
                           std::int64_t& not_finite) noexcept {
  return pick_form(args)(args, first, last, not_finite);
}

}  // namespace recfast::embedding_bag

#pragma GCC pop_options
#endif
