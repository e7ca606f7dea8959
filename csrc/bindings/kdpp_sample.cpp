#include "kdpp_sample/kdpp_sample.h"

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

template <class T>
py::tuple kdpp(const py::kwargs& arguments) {
  using namespace recfast::kdpp_sample;
  const Named named(arguments);
  const Args<T> args{.users = named.number("users"),
                     .items = named.number("items"),
                     .width = named.number("width"),
                     .picks = named.number("picks"),
                     .samples = named.number("samples"),
                     .gamma = named.real("gamma"),
                     .seed = static_cast<std::uint64_t>(named.number("seed")),
                     .features = named.pointer<const T>("features"),
                     .user_stride = named.number("user_stride"),
                     .quality = named.pointer<const double>("quality"),
                     .lengths = named.pointer<const std::int64_t>("lengths"),
                     .mask = named.pointer<const bool>("mask"),
                     .keys = named.pointer<const std::int64_t>("keys"),
                     .indices = named.pointer<std::int64_t>("indices"),
                     .count = named.pointer<std::int64_t>("count"),
                     .log_normaliser = named.pointer<double>("log_normaliser"),
                     .scratch = at<std::byte>((arguments["scratch"].cast<Address>() + 63) / 64 * 64)};
  Outcome outcome;
  {
    py::gil_scoped_release unlocked;
    outcome = run(args);
  }
  return py::make_tuple(outcome.wrong_feature, outcome.wrong_quality);
}

}  // namespace

void bind_kdpp_sample(py::module_& m) {
  m.def("kdpp_sample_float32", &kdpp<float>);
  m.def("kdpp_sample_float64", &kdpp<double>);
  // Bytes a thread, to which 64 must be added once for alignment.
  m.def("kdpp_sample_scratch", &recfast::kdpp_sample::scratch_bytes);
}

}  // namespace recfast::bindings
