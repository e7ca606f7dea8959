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
#include "dpp_greedy/dpp_greedy.h"
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

// What stays the same however the users are cut: one struct instead of a dozen numbers in a row.
struct DppShape {
  std::int64_t users, items, width, picks, shown_width, window;
  double gamma;
  int exhausted;
  bool exact;
};

template <class T>
py::tuple dpp(const DppShape& shape, Address features, std::int64_t user_stride, Address relevance, Address weight,
              Address lengths, Address mask, Address shown, Address indices, Address count, Address gains,
              Address log_det, Address scratch) {
  using namespace recfast::dpp_greedy;
  Outcome outcome;
  {
    py::gil_scoped_release unlocked;
    outcome = run(Args<T>{.users = shape.users,
                          .items = shape.items,
                          .width = shape.width,
                          .picks = shape.picks,
                          .shown_width = shape.shown_width,
                          .window = shape.window,
                          .gamma = shape.gamma,
                          .exhausted = static_cast<Exhausted>(shape.exhausted),
                          .exact = shape.exact,
                          .features = at<const T>(features),
                          .user_stride = user_stride,
                          .relevance = at<const double>(relevance),
                          .weight = at<const double>(weight),
                          .lengths = at<const std::int64_t>(lengths),
                          .mask = at<const bool>(mask),
                          .shown = at<const std::int64_t>(shown),
                          .indices = at<std::int64_t>(indices),
                          .count = at<std::int64_t>(count),
                          .gains = at<double>(gains),
                          .log_det = at<double>(log_det),
                          .scratch = at<std::byte>((scratch + 63) / 64 * 64)});
  }
  return py::make_tuple(outcome.wrong_feature, outcome.wrong_relevance);
}

void bind_dpp_greedy(py::module_& m) {
  py::class_<DppShape>(m, "DppShape")
      .def(py::init([](std::int64_t users, std::int64_t items, std::int64_t width, std::int64_t picks,
                       std::int64_t shown_width, std::int64_t window, double gamma, int exhausted, bool exact) {
        return DppShape{users, items, width, picks, shown_width, window, gamma, exhausted, exact};
      }));
  m.def("dpp_greedy_float32", &dpp<float>);
  m.def("dpp_greedy_float64", &dpp<double>);
  // Bytes a thread, to which 64 must be added once for alignment.
  m.def("dpp_greedy_scratch", &recfast::dpp_greedy::scratch_bytes);
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
  bind_dpp_greedy(m);
  bind_example_axpy(m);
}
