#include "hstu_attention/hstu_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")

#include "common/simd_avx512.h"
#include "common/vectors.h"

#include "common/tiles.h"
#include "hstu_attention/hstu_attention_kernel.h"

namespace recfast::hstu_attention {

void forward_avx512(const Args<float>& args, const Prepared<float>& prepared, const ForwardWork<float>& work,
                const Task& task) noexcept {
  Kernel<Avx512, float>::forward(args, prepared, work, task);
}

void forward_bf16_avx512(const Args<float, std::uint16_t>& args, const Prepared<float>& prepared,
                     const ForwardWork<float>& work, const Task& task) noexcept {
  Kernel<Avx512, std::uint16_t>::forward(args, prepared, work, task);
}

void backward_avx512(const Args<float>& args, const Gradients<float>& gradients, const Prepared<float>& prepared,
                 const BackwardWork<float>& work, const Task& task, float* dq, float* position) noexcept {
  Kernel<Avx512, float>::backward(args, gradients, prepared, work, task, dq, position);
}

void backward_bf16_avx512(const Args<float, std::uint16_t>& args, const Gradients<float, std::uint16_t>& gradients,
                      const Prepared<float>& prepared, const BackwardWork<float>& work, const Task& task, float* dq,
                      float* position) noexcept {
  Kernel<Avx512, std::uint16_t>::backward(args, gradients, prepared, work, task, dq, position);
}

}  // namespace recfast::hstu_attention

#pragma GCC pop_options
#endif
