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
#pragma GCC target("avx2,fma")

#include "common/simd_avx2.h"
#include "common/vectors.h"
#include "din_attention/din_attention_kernel.h"

namespace recfast::din_attention {

template <class E>
Form<E> form_avx2() noexcept {
  using K = Kernel<Avx2, E>;
  return {.pairs = false, .forward = K::forward, .moments = K::moments, .backward = K::backward,
          .pack_pairs = K::pack_pairs};
}

template Form<float> form_avx2<float>() noexcept;
template Form<BFloat16> form_avx2<BFloat16>() noexcept;

}  // namespace recfast::din_attention

#pragma GCC pop_options
#endif
