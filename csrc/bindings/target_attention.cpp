#include "bindings/bindings.h"

#include "target_attention/target_attention.h"

namespace recfast::bindings {
namespace {

using recfast::target_attention::BFloat16;

recfast::target_attention::Shape target_shape(const Named& named) {
  return {.users = named.number("users"),
          .heads = named.number("heads"),
          .dim = named.number("dim"),
          .value_dim = named.number("value_dim"),
          .listed = named.number("listed_columns"),
          .kept = named.number("kept"),
          .begin = named.pointer<const std::int64_t>("begin"),
          .end = named.pointer<const std::int64_t>("end"),
          .candidates = named.pointer<const std::int64_t>("candidates")};
}

template <class In>
recfast::target_attention::Args<In> target_args(const Named& named) {
  using namespace recfast::target_attention;
  const Shape shape = target_shape(named);
  const std::int64_t candidates = named.number("candidate_rows");
  const std::int64_t width = shape.heads * shape.dim;
  const std::int64_t value_width = shape.heads * shape.value_dim;
  return {.shape = shape,
          .score = static_cast<Score>(named.number("score")),
          .scale = named.real("scale"),
          .query = {named.pointer<const In>("query"), candidates, width, named.number("query_stride")},
          .keys = {named.pointer<const In>("keys"), 0, width, named.number("keys_stride")},
          .values = {named.pointer<const In>("values"), 0, value_width, named.number("values_stride")},
          .listed = named.pointer<const std::int64_t>("listed"),
          .out = {named.pointer<In>("out"), candidates, value_width, value_width},
          .statistics = named.pointer<Wide<In>>("statistics"),
          .scratch = named.pointer<Wide<In>>("scratch"),
          .table = named.pointer<std::int64_t>("table")};
}

template <class In>
void target_forward(const py::kwargs& arguments) {
  const auto args = target_args<In>(Named(arguments));
  py::gil_scoped_release unlocked;
  recfast::target_attention::forward(args);
}

template <class In>
void target_backward(const py::kwargs& arguments) {
  const Named named(arguments);
  const auto args = target_args<In>(named);
  const std::int64_t width = args.shape.heads * args.shape.value_dim;
  const recfast::target_attention::Gradients<In> gradients{
      .grad = {named.pointer<const In>("grad"), args.query.rows, width, width},
      .query = named.pointer<In>("dquery"),
      .keys = named.pointer<In>("dkeys"),
      .values = named.pointer<In>("dvalues")};
  py::gil_scoped_release unlocked;
  recfast::target_attention::backward(args, gradients);
}

template <class In>
void target_search(const py::kwargs& arguments) {
  const Named named(arguments);
  const auto args = target_args<In>(named);
  auto* positions = named.pointer<std::int64_t>("positions");
  py::gil_scoped_release unlocked;
  recfast::target_attention::search(args, positions);
}

template <class In>
void target_select(const py::kwargs& arguments) {
  const Named named(arguments);
  const auto args = target_args<In>(named);
  auto* positions = named.pointer<std::int64_t>("positions");
  py::gil_scoped_release unlocked;
  recfast::target_attention::select(args, positions);
}

}  // namespace

void bind_target_attention(py::module_& m) {
  m.def("target_attention_forward_float32", &target_forward<float>);
  m.def("target_attention_forward_bfloat16", &target_forward<BFloat16>);
  m.def("target_attention_forward_float64", &target_forward<double>);
  m.def("target_attention_backward_float32", &target_backward<float>);
  m.def("target_attention_backward_bfloat16", &target_backward<BFloat16>);
  m.def("target_attention_backward_float64", &target_backward<double>);
  m.def("target_attention_select_float32", &target_select<float>);
  m.def("target_attention_select_bfloat16", &target_select<BFloat16>);
  m.def("target_attention_select_float64", &target_select<double>);
  m.def("target_attention_search_float32", &target_search<float>);
  m.def("target_attention_search_bfloat16", &target_search<BFloat16>);
  m.def("target_attention_search_float64", &target_search<double>);
  // pass: 0 forward, 1 backward, 2 select, 3 search. (values of scratch, numbers of the table)
  m.def("target_attention_sizes", [](std::int64_t pass, std::int64_t wide, const py::kwargs& arguments) {
    using namespace recfast::target_attention;
    const Sizes needed = sizes(target_shape(Named(arguments)), static_cast<Pass>(pass), wide);
    return py::make_tuple(needed.scratch, needed.table);
  });
  m.def("target_attention_check_listed", [](Address listed, const py::kwargs& arguments) {
    return recfast::target_attention::check_listed(target_shape(Named(arguments)), at<const std::int64_t>(listed));
  });
}

}  // namespace recfast::bindings
