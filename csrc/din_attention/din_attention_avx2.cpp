#include "din_attention/din_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "din_attention/din_attention_kernel.h"

namespace recfast::din_attention {
namespace {

struct Avx2 {
  using T = float;
  using V = __m256;
  static constexpr int kMaxColumns = 3;
  // Tiles that fill the 16 registers, less one row of weights and one broadcast.
  static constexpr int rows(int columns) { return columns == 1 ? 6 : columns == 2 ? 5 : 4; }
  static V fma(V a, V b, V c) noexcept { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

void forward_avx2(const Args<float>& args, const Packed<float>& packed, const Work<float>& work, std::int64_t user,
                    std::int64_t candidate) noexcept {
  Kernel<Avx2>::forward(args, packed, work, user, candidate);
}

void backward_avx2(const Args<float>& args, const Gradients<float>& gradients, const Packed<float>& packed,
                     const Work<float>& work, const Partial<float>& partial, std::int64_t user) noexcept {
  Kernel<Avx2>::backward(args, gradients, packed, work, partial, user);
}

}  // namespace recfast::din_attention

#pragma GCC pop_options
#endif
