#include "din_attention/din_attention.h"

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
#include "common/vectors.h"
#include "din_attention/din_attention_kernel.h"

namespace recfast::din_attention {

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
