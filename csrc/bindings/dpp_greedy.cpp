#include "bindings/bindings.h"

#include <cstddef>

#include "dpp_greedy/dpp_greedy.h"

namespace recfast::bindings {
namespace {

using recfast::dpp_greedy::Args;
using recfast::dpp_greedy::Exhausted;

// What stays the same however the users are cut: one object instead of a dozen numbers in a row.
struct DppShape {
  Args args;
};

DppShape shape_of(std::int64_t users, std::int64_t items, std::int64_t width, std::int64_t picks,
                  std::int64_t shown_width, bool has_candidates, std::int64_t window, double gamma, double epsilon,
                  int exhausted, bool exact, int format, std::int64_t user_stride, bool relevance_is_double) {
  static constexpr std::int64_t kSome = 0;
  return {.args = {.users = users,
                   .items = items,
                   .width = width,
                   .picks = picks,
                   .shown_width = shown_width,
                   .window = window,
                   .gamma = gamma,
                   .epsilon = epsilon,
                   .exhausted = static_cast<Exhausted>(exhausted),
                   .exact = exact,
                   .format = static_cast<Format>(format),
                   .user_stride = user_stride,
                   // Replaced before anything is read; that there are some decides the size of the scratch memory.
                   .candidates = has_candidates ? &kSome : nullptr,
                   .relevance_is_double = relevance_is_double}};
}

py::tuple dpp(const DppShape& shape, Address features, Address candidates, Address relevance, Address weight,
              Address lengths, Address mask, Address shown, Address indices, Address count, Address gains,
              Address log_det, Address scratch) {
  recfast::dpp_greedy::Outcome outcome;
  {
    py::gil_scoped_release unlocked;
    Args args = shape.args;
    args.features = at<const std::byte>(features);
    args.candidates = at<const std::int64_t>(candidates);
    args.relevance = at<const void>(relevance);
    args.weight = at<const double>(weight);
    args.lengths = at<const std::int64_t>(lengths);
    args.mask = at<const bool>(mask);
    args.shown = at<const std::int64_t>(shown);
    args.indices = at<std::int64_t>(indices);
    args.count = at<std::int64_t>(count);
    args.gains = at<double>(gains);
    args.log_det = at<double>(log_det);
    args.scratch = at<std::byte>((scratch + 63) / 64 * 64);
    outcome = recfast::dpp_greedy::run(args);
  }
  return py::make_tuple(outcome.wrong_feature, outcome.wrong_shown, outcome.wrong_relevance);
}

}  // namespace

void bind_dpp_greedy(py::module_& m) {
  py::class_<DppShape>(m, "DppShape").def(py::init(&shape_of)).def(
      // Bytes a thread, to which 64 must be added once for alignment.
      "scratch", [](const DppShape& shape) { return recfast::dpp_greedy::scratch_bytes(shape.args); });
  m.def("dpp_greedy", &dpp);
}

}  // namespace recfast::bindings
