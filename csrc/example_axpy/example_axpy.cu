#include <cuda_runtime.h>

#include <algorithm>

#include "example_axpy/example_axpy_cuda.h"

namespace recfast::example_axpy {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 65536;

template <class T>
__global__ void axpy_kernel(const T* __restrict__ x, const T* __restrict__ y, T* __restrict__ out, std::int64_t size,
                            T alpha) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride) {
    // The _rn intrinsics keep nvcc from contracting into an FMA: the bits must equal the CPU's.
    if constexpr (sizeof(T) == 4) {
      out[i] = __fadd_rn(__fmul_rn(alpha, x[i]), y[i]);
    } else {
      out[i] = __dadd_rn(__dmul_rn(alpha, x[i]), y[i]);
    }
  }
}

}  // namespace

template <class T>
int run_cuda(const T* x, const T* y, T* out, std::int64_t size, T alpha, void* stream) {
  if (size == 0) return cudaSuccess;
  const std::int64_t blocks = std::min((size + kThreads - 1) / kThreads, kMaxBlocks);
  axpy_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, y, out, size, alpha);
  return cudaGetLastError();
}

template int run_cuda(const float*, const float*, float*, std::int64_t, float, void*);
template int run_cuda(const double*, const double*, double*, std::int64_t, double, void*);

}  // namespace recfast::example_axpy
