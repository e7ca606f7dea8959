#include "negatives_loss/negatives_loss.h"

#include <string>

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

using namespace recfast::negatives_loss;

// In the order of _Call.fields in ops/negatives_loss.py, scratch apart.
template <class S>
Args<S> loss_args(const py::tuple& fields, Address scratch) {
  using T = Arithmetic<S>;
  Fields in(fields);
  Args<S> args{.loss = in.next<Loss>(),
               .form = in.next<Columns>(),
               .columns = in.next<std::int64_t>(),
               .first = in.next<std::int64_t>(),
               .tile = in.next<std::int64_t>(),
               .queries = {.data = in.next<const S*>(), .rows = in.next<std::int64_t>(),
                           .width = in.next<std::int64_t>(), .stride = in.next<std::int64_t>()},
               .table = {.data = in.next<const S*>(), .rows = in.next<std::int64_t>(), .width = 0,
                         .stride = in.next<std::int64_t>()},
               .positives = in.next<const std::int64_t*>(),
               .negatives = in.next<const std::int64_t*>(),
               .bias = in.next<const T*>(),
               .log_expected = in.next<const T*>(),
               .excluded = in.next<const std::int64_t*>(),
               .exclude_offsets = in.next<const std::int64_t*>(),
               .normalize_queries = in.next<bool>(),
               .normalize_table = in.next<bool>(),
               .skip_positive = in.next<bool>(),
               .clamp = in.next<bool>(),
               .scale = static_cast<T>(in.next<double>()),
               .margin = static_cast<T>(in.next<double>()),
               .weight = static_cast<T>(in.next<double>()),
               .positive_weight = static_cast<T>(in.next<double>()),
               .losses = in.next<T*>(),
               .statistic = in.next<T*>(),
               .direction = in.next<T*>(),
               .active = in.next<std::uint16_t*>(),
               .scratch = at<T>(scratch)};
  args.table.width = args.queries.width;
  return args;
}

Groups groups_at(Address order, Address starts, Address ids, std::int64_t runs) {
  return {.order = at<std::uint32_t>(order), .starts = at<std::uint32_t>(starts), .ids = at<std::int64_t>(ids),
          .runs = runs};
}

template <class S>
void bind_rows_of(py::module_& m, const std::string& name) {
  using T = Arithmetic<S>;
  const auto called = [&name](const char* what) { return "negatives_loss_" + std::string(what) + "_" + name; };
  m.def(called("forward_scratch").c_str(),
        [](const py::tuple& fields) { return forward_scratch(loss_args<S>(fields, 0)); });
  m.def(called("backward_scratch").c_str(),
        [](const py::tuple& fields) { return backward_scratch(loss_args<S>(fields, 0)); });
  m.def(called("entries").c_str(), [](const py::tuple& fields) { return entries(loss_args<S>(fields, 0)); });
  m.def(called("forward").c_str(), [](const py::tuple& fields, Address scratch) {
    const auto args = loss_args<S>(fields, scratch);
    py::gil_scoped_release unlocked;
    forward(args);
  });
  m.def(called("group").c_str(), [](const py::tuple& fields, std::int64_t count, Address order, Address starts,
                                    Address ids, Address scratch) {
    const auto args = loss_args<S>(fields, 0);
    py::gil_scoped_release unlocked;
    return group(args, count, groups_at(order, starts, ids, 0), at<std::uint64_t>(scratch));
  });
  m.def(called("backward").c_str(), [](const py::tuple& fields, const py::tuple& wanted, Address scratch) {
    const auto args = loss_args<S>(fields, scratch);
    Fields in(wanted);
    const Gradients<S> gradients{.losses = in.next<const T*>(),
                                 .table = in.next<S*>(),
                                 .sparse = in.next<bool>(),
                                 .bias = in.next<T*>(),
                                 .groups = {.order = in.next<std::uint32_t*>(), .starts = in.next<std::uint32_t*>(),
                                            .ids = in.next<std::int64_t*>(), .runs = in.next<std::int64_t>()}};
    py::gil_scoped_release unlocked;
    backward(args, gradients);
  });
}

}  // namespace

void bind_negatives_loss(py::module_& m) {
  bind_rows_of<float>(m, "float32");
  bind_rows_of<double>(m, "float64");
  bind_rows_of<std::uint16_t>(m, "bfloat16");
  // 64-bit words that grouping so many contributions takes.
  m.def("negatives_loss_group_scratch", &group_scratch);
}

}  // namespace recfast::bindings
