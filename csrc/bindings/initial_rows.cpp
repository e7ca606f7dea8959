#include "bindings/bindings.h"

#include "initial_rows/initial_rows.h"

namespace recfast::bindings {

void bind_initial_rows(py::module_& m) {
  m.def("initial_rows", [](Address ids, std::int64_t total, std::int64_t width, double deviation, std::uint64_t seed,
                           bool uniform, Address out) {
    using namespace recfast::initial_rows;
    py::gil_scoped_release unlocked;
    run({.ids = span_at<const std::int64_t>(ids, total),
         .width = width,
         .kind = uniform ? Kind::kUniform : Kind::kNormal,
         .scale = static_cast<float>(deviation / (uniform ? kUniformDeviation : kNormalDeviation)),
         .seed = seed,
         .out = at<float>(out)});
  });
}

}  // namespace recfast::bindings
