// recfast._C: the kernels for the CPU. The only file that knows pybind11 (bindings_cuda.cpp is its twin for the GPU).
// Tensors arrive as addresses and sizes; dtypes, shapes and contiguity have been checked in Python by then.
#include <dlfcn.h>
#include <omp.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/random.h"
#include "example_axpy/example_axpy.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: an address is what Python has
}

template <class T>
std::span<T> span_at(Address address, std::int64_t size) {
  return {at<T>(address), static_cast<std::size_t>(size)};
}

recfast::Isa isa_by_name(const std::string& name) {
  for (std::size_t level = 0; level < recfast::kIsaNames.size(); ++level) {
    if (recfast::kIsaNames[level] == name) return static_cast<recfast::Isa>(level);
  }
  throw std::invalid_argument("set_isa: level must be one of scalar, avx2, avx512, got " + name);
}

std::string isa_name(recfast::Isa level) { return std::string(recfast::kIsaNames[static_cast<std::size_t>(level)]); }

// The file of the OpenMP runtime that this module was bound to. torch's own must be the same one, or
// torch.set_num_threads would not reach these kernels.
std::string openmp_library() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) == 0 || info.dli_fname == nullptr) return "";
  return info.dli_fname;
}

void bind_runtime(py::module_& m) {
  m.attr("__version__") = RECFAST_VERSION;
  m.def("isa", [] { return isa_name(recfast::active_isa()); });
  m.def("detected_isa", [] { return isa_name(recfast::detected_isa()); });
  m.def("has_vbmi", &recfast::has_vbmi);
  m.def("set_isa", [](const std::string& name) { recfast::set_isa(isa_by_name(name)); });
  m.def("max_threads", &recfast::max_threads);
  m.def("set_threads", [](int threads) { omp_set_num_threads(threads); });
  m.def("openmp_library", &openmp_library);
  // The generator itself, so that a test can hold it against the published answers.
  m.def("philox4x32", [](std::uint64_t seed, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3) {
    std::uint32_t words[4];
    recfast::Philox{seed}(c0, c1, c2, c3, words);
    return py::make_tuple(words[0], words[1], words[2], words[3]);
  });
}

template <class T>
void axpy(Address x, Address y, Address out, std::int64_t size, T alpha) {
  using namespace recfast::example_axpy;
  py::gil_scoped_release unlocked;
  run(Args<T>{.x = span_at<const T>(x, size), .y = span_at<const T>(y, size), .out = span_at<T>(out, size), .alpha = alpha});
}

void bind_example_axpy(py::module_& m) {
  m.def("example_axpy_float32", &axpy<float>);
  m.def("example_axpy_float64", &axpy<double>);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "recfast kernels for the CPU; no torch symbol is needed to load them";
  bind_runtime(m);
  bind_example_axpy(m);
}
