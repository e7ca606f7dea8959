#include "simhash/simhash.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "common/simd_avx2.h"
#include "simhash/simhash_kernel.h"

namespace recfast::simhash {
namespace {

struct Form : Avx2 {
  static void store_signs(V sums, std::uint8_t* signs) noexcept {
    *signs = static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_cmp_ps(sums, _mm256_setzero_ps(), _CMP_GT_OQ)));
  }
};

}  // namespace

void signs_avx2(const Block<float>& block) noexcept { Kernel<Form>::signs(block); }

}  // namespace recfast::simhash

#pragma GCC pop_options
#endif
