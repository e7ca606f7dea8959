#include "simhash/simhash.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")

#include "common/simd_avx512.h"
#include "simhash/simhash_kernel.h"

namespace recfast::simhash {
namespace {

struct Form : Avx512 {
  static void store_signs(V sums, std::uint8_t* signs) noexcept {
    const std::uint16_t bits = _mm512_cmp_ps_mask(sums, _mm512_setzero_ps(), _CMP_GT_OQ);
    std::memcpy(signs, &bits, sizeof bits);
  }
};

}  // namespace

void signs_avx512(const Block<float>& block) noexcept { Kernel<Form>::signs(block); }

}  // namespace recfast::simhash

#pragma GCC pop_options
#endif
