#include "sdim_attention/sdim_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")

#include "common/simd_avx512.h"
#include "sdim_attention/sdim_attention_kernel.h"

namespace recfast::sdim_attention {
namespace {

struct Form : Avx512 {
  static __mmask16 mask(std::int64_t n) noexcept { return static_cast<__mmask16>((1u << n) - 1); }
  static V load_part(const float* p, std::int64_t n) noexcept { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store_part(float* p, V v, std::int64_t n) noexcept { _mm512_mask_storeu_ps(p, mask(n), v); }
};

}  // namespace

Forms<float, float> forms_avx512(float) noexcept { return Kernel<Form, float>::forms(); }
Forms<std::uint16_t, float> forms_avx512(std::uint16_t) noexcept { return Kernel<Form, std::uint16_t>::forms(); }

}  // namespace recfast::sdim_attention

#pragma GCC pop_options
#endif
