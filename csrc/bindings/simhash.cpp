#include "simhash/simhash.h"

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

template <class X, class T>
void simhash(const py::kwargs& arguments) {
  const Named named(arguments);
  const recfast::simhash::Args<X, T> args{.x = named.pointer<const X>("x"),
                                          .outer = named.number("outer"),
                                          .outer_stride = named.number("outer_stride"),
                                          .inner = named.number("inner"),
                                          .inner_stride = named.number("inner_stride"),
                                          .lengths = named.pointer<const std::int64_t>("lengths"),
                                          .dim = named.number("dim"),
                                          .projections = named.pointer<const T>("projections"),
                                          .tables = named.number("tables"),
                                          .bits = named.number("bits"),
                                          .small = named.pointer<std::uint8_t>("codes"),
                                          .large = named.pointer<std::int64_t>("codes"),
                                          .scratch = named.pointer<T>("scratch")};
  py::gil_scoped_release unlocked;
  recfast::simhash::run(args);
}

}  // namespace

void bind_simhash(py::module_& m) {
  m.def("simhash_float32", &simhash<float, float>);
  m.def("simhash_bfloat16", &simhash<std::uint16_t, float>);
  m.def("simhash_float64", &simhash<double, double>);
  m.def("simhash_scratch", &recfast::simhash::scratch_size);
}

}  // namespace recfast::bindings
