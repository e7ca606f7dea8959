#include "sequence_attention/sequence_attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/random.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "common/simd_avx2.h"
#include "common/vectors.h"

#include "common/tiles.h"
#include "sequence_attention/sequence_attention_kernel.h"

namespace recfast::sequence_attention {

void forward_avx2(const Args<float, float>& args, const Work<float>& work, const Part& part) noexcept {
  Kernel<Avx2, float>::forward(args, work, part);
}

void forward_avx2(const Args<std::uint16_t, float>& args, const Work<float>& work, const Part& part) noexcept {
  Kernel<Avx2, std::uint16_t>::forward(args, work, part);
}

void backward_avx2(const Args<float, float>& args, const Gradients<float>& gradients, const Work<float>& work,
                   const Part& part) noexcept {
  Kernel<Avx2, float>::backward(args, gradients, work, part);
}

void backward_avx2(const Args<std::uint16_t, float>& args, const Gradients<std::uint16_t>& gradients,
                   const Work<float>& work, const Part& part) noexcept {
  Kernel<Avx2, std::uint16_t>::backward(args, gradients, work, part);
}

}  // namespace recfast::sequence_attention

#pragma GCC pop_options
#endif
