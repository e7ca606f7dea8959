#include "bindings/bindings.h"

#include <cstddef>

#include "dpp_greedy/dpp_greedy.h"

namespace recfast::bindings {
namespace {

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

}  // namespace

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

}  // namespace recfast::bindings
