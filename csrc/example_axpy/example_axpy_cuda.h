// The CUDA entry of example_axpy; the contract is example_axpy.h's, pointers are of the device.
#pragma once

#include <cstdint>

namespace recfast::example_axpy {

// Launches on `stream` (a cudaStream_t) and returns a cudaError_t. Never synchronises.
template <class T>
int run_cuda(const T* x, const T* y, T* out, std::int64_t size, T alpha, void* stream);

}  // namespace recfast::example_axpy
