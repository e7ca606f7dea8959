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
#pragma GCC target("avx2,fma")

#include "common/simd_avx2.h"
#include "common/vectors.h"

#include "common/tiles.h"
#include "negatives_loss/negatives_loss_kernel.h"

namespace recfast::negatives_loss {
namespace {

struct Avx2Bits : Avx2 {
  template <class Mask>
  static std::uint32_t bits(Mask mask) noexcept {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
  }
};

}  // namespace

template <class S>
Form<S> form_avx2() noexcept {
  return form_of<Avx2Bits, S>();
}

template Form<float> form_avx2<float>() noexcept;
template Form<std::uint16_t> form_avx2<std::uint16_t>() noexcept;

}  // namespace recfast::negatives_loss

#pragma GCC pop_options
#endif
