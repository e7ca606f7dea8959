#include "din_attention/din_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")

#include "din_attention/din_attention_kernel.h"

namespace recfast::din_attention {
namespace {

struct Avx512 {
  using T = float;
  using V = __m512;
  static constexpr int kMaxColumns = 6;
  // Tiles that fill the 32 registers, less one row of weights and one broadcast.
  static constexpr int rows(int columns) { return columns <= 3 ? 8 : columns == 4 ? 6 : columns == 5 ? 5 : 4; }
  static V fma(V a, V b, V c) noexcept { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

void forward_avx512(const Args<float>& args, const Packed<float>& packed, const Work<float>& work, std::int64_t user,
                    std::int64_t candidate) noexcept {
  Kernel<Avx512>::forward(args, packed, work, user, candidate);
}

void backward_avx512(const Args<float>& args, const Gradients<float>& gradients, const Packed<float>& packed,
                     const Work<float>& work, const Partial<float>& partial, std::int64_t user) noexcept {
  Kernel<Avx512>::backward(args, gradients, packed, work, partial, user);
}

}  // namespace recfast::din_attention

#pragma GCC pop_options
#endif
