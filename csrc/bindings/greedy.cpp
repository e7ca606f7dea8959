#include "bindings/bindings.h"

#include <cstddef>

#include "mmr_greedy/mmr_greedy.h"
#include "msd_greedy/msd_greedy.h"
#include "ssd_greedy/ssd_greedy.h"
#include "xquad_greedy/xquad_greedy.h"

namespace recfast::bindings {
namespace {

using recfast::greedy::Args;

Args args_of(const py::tuple& values) {
  Fields fields(values);
  Args args;
  args.users = fields.next<std::int64_t>();
  args.items = fields.next<std::int64_t>();
  args.width = fields.next<std::int64_t>();
  args.picks = fields.next<std::int64_t>();
  args.shown_width = fields.next<std::int64_t>();
  args.window = fields.next<std::int64_t>();
  args.exact = fields.next<bool>();
  args.format = fields.next<Format>();
  args.user_stride = fields.next<std::int64_t>();
  args.features = fields.next<const std::byte*>();
  args.relevance = fields.next<const double*>();
  args.diversity = fields.next<const double*>();
  args.candidates = fields.next<const std::int64_t*>();
  args.lengths = fields.next<const std::int64_t*>();
  args.mask = fields.next<const bool*>();
  args.shown = fields.next<const std::int64_t*>();
  args.indices = fields.next<std::int64_t*>();
  args.count = fields.next<std::int64_t*>();
  args.gains = fields.next<double*>();
  return args;
}

recfast::mmr_greedy::Options mmr(const py::tuple& values) { return {.clip = Fields(values).next<bool>()}; }

recfast::msd_greedy::Options msd(const py::tuple& values) { return {.mean = Fields(values).next<bool>()}; }

recfast::ssd_greedy::Options ssd(const py::tuple& values) {
  Fields fields(values);
  recfast::ssd_greedy::Options options;
  options.gamma = fields.next<double>();
  options.paper = fields.next<bool>();
  options.volume = fields.next<bool>();
  return options;
}

recfast::xquad_greedy::Options xquad(const py::tuple& values) {
  return {.preferences = Fields(values).next<const double*>()};
}

// <name>_scratch(args, options): bytes a thread, to which 64 must be added once for alignment.
// <name>(args, options, scratch): the first wrong item, shown item and relevance, or -1 each.
template <auto scratch_bytes, auto run, auto options_of>
void bind(py::module_& m, const char* name, const char* scratch_name) {
  m.def(scratch_name, [](const py::tuple& args, const py::tuple& options) {
    return scratch_bytes(args_of(args), options_of(options));
  });
  m.def(name, [](const py::tuple& values, const py::tuple& options_values, Address scratch) {
    Args args = args_of(values);
    args.scratch = at<std::byte>((scratch + 63) / 64 * 64);
    const auto options = options_of(options_values);
    recfast::greedy::Outcome outcome;
    {
      py::gil_scoped_release unlocked;
      outcome = run(args, options);
    }
    return py::make_tuple(outcome.item, outcome.shown, outcome.relevance);
  });
}

}  // namespace

void bind_greedy(py::module_& m) {
  using namespace recfast;
  bind<&mmr_greedy::scratch_bytes, &mmr_greedy::run, &mmr>(m, "mmr_greedy", "mmr_greedy_scratch");
  bind<&msd_greedy::scratch_bytes, &msd_greedy::run, &msd>(m, "msd_greedy", "msd_greedy_scratch");
  bind<&ssd_greedy::scratch_bytes, &ssd_greedy::run, &ssd>(m, "ssd_greedy", "ssd_greedy_scratch");
  bind<&xquad_greedy::scratch_bytes, &xquad_greedy::run, &xquad>(m, "xquad_greedy", "xquad_greedy_scratch");
}

}  // namespace recfast::bindings
