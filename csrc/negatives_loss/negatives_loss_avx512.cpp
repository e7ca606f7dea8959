#include "negatives_loss/negatives_loss.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
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

#include "common/tiles.h"
#include "negatives_loss/negatives_loss_kernel.h"

namespace recfast::negatives_loss {
namespace {

struct Avx512Bits : Avx512 {
  template <class Mask>
  static std::uint32_t bits(Mask mask) noexcept {
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
  }
};

}  // namespace

template <class S>
Form<S> form_avx512() noexcept {
  return form_of<Avx512Bits, S>();
}

template Form<float> form_avx512<float>() noexcept;
template Form<std::uint16_t> form_avx512<std::uint16_t>() noexcept;

}  // namespace recfast::negatives_loss

#pragma GCC pop_options
#endif
