#include "din_attention/din_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")

#include "common/simd_avx512.h"
#include "common/vectors.h"
#include "din_attention/din_attention_kernel.h"

namespace recfast::din_attention {

template <class E>
Form<E> form_avx512() noexcept {
  using K = Kernel<Avx512, E>;
  return {.pairs = false, .forward = K::forward, .moments = K::moments, .backward = K::backward,
          .pack_pairs = K::pack_pairs};
}

template Form<float> form_avx512<float>() noexcept;
template Form<BFloat16> form_avx512<BFloat16>() noexcept;

}  // namespace recfast::din_attention

#pragma GCC pop_options
#endif
