#include "dpp_greedy_kernel/dpp_greedy_kernel.h"

#include <cstddef>

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

using recfast::dpp_greedy_kernel::Args;

Args args_of(const py::tuple& fields) {
  Fields in(fields);
  // In the order of the struct; what a braced list evaluates comes from left to right.
  return Args{.users = in.next<std::int64_t>(),
              .items = in.next<std::int64_t>(),
              .picks = in.next<std::int64_t>(),
              .shown_width = in.next<std::int64_t>(),
              .window = in.next<std::int64_t>(),
              .gamma = in.next<double>(),
              .epsilon = in.next<double>(),
              .exhausted = in.next<recfast::dpp_greedy::Exhausted>(),
              .similarity = in.next<const std::byte*>(),
              .is_double = in.next<bool>(),
              .is_shared = in.next<bool>(),
              .relevance = in.next<const double*>(),
              .weight = in.next<const double*>(),
              .lengths = in.next<const std::int64_t*>(),
              .mask = in.next<const bool*>(),
              .shown = in.next<const std::int64_t*>(),
              .indices = in.next<std::int64_t*>(),
              .count = in.next<std::int64_t*>(),
              .gains = in.next<double*>(),
              .log_det = in.next<double*>()};
}

}  // namespace

void bind_dpp_greedy_kernel(py::module_& m) {
  // Bytes a thread, to which 64 must be added once for alignment.
  m.def("dpp_greedy_kernel_scratch",
        [](const py::tuple& fields) { return recfast::dpp_greedy_kernel::scratch_bytes(args_of(fields)); });
  m.def("dpp_greedy_kernel", [](const py::tuple& fields, Address scratch) {
    Args args = args_of(fields);
    args.scratch = at<std::byte>((scratch + 63) / 64 * 64);
    recfast::dpp_greedy_kernel::Outcome outcome;
    {
      py::gil_scoped_release unlocked;
      outcome = recfast::dpp_greedy_kernel::run(args);
    }
    return py::make_tuple(outcome.not_finite, outcome.negative, outcome.asymmetric, outcome.indefinite,
                          outcome.relevance);
  });
}

}  // namespace recfast::bindings
