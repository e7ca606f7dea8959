// recfast._cuda: the kernels for the GPU. Loads without a driver; a launch without one raises.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "example_axpy/example_axpy_cuda.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: an address is what Python has
}

void check(const char* op, int status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA refused the launch: " +
                             cudaGetErrorString(static_cast<cudaError_t>(status)));
  }
}

template <class T>
void axpy(Address x, Address y, Address out, std::int64_t size, T alpha, Address stream) {
  check("example_axpy", recfast::example_axpy::run_cuda<T>(at<const T>(x), at<const T>(y), at<T>(out), size, alpha,
                                                           at<void>(stream)));
}

void bind_example_axpy(py::module_& m) {
  m.def("example_axpy_float32", &axpy<float>);
  m.def("example_axpy_float64", &axpy<double>);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "recfast kernels for NVIDIA GPUs; no torch symbol and no driver are needed to load them";
  m.def("runtime_version", [] {
    int version = 0;
    check("runtime_version", cudaRuntimeGetVersion(&version));
    return version;
  });
  bind_example_axpy(m);
}
