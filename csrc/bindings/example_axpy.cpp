#include "bindings/bindings.h"

#include "example_axpy/example_axpy.h"

namespace recfast::bindings {
namespace {

template <class T>
void axpy(Address x, Address y, Address out, std::int64_t size, T alpha) {
  using namespace recfast::example_axpy;
  py::gil_scoped_release unlocked;
  run(Args<T>{.x = span_at<const T>(x, size), .y = span_at<const T>(y, size), .out = span_at<T>(out, size), .alpha = alpha});
}

}  // namespace

void bind_example_axpy(py::module_& m) {
  m.def("example_axpy_float32", &axpy<float>);
  m.def("example_axpy_float64", &axpy<double>);
}

}  // namespace recfast::bindings
