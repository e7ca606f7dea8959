#include "bindings/bindings.h"

#include <string>

#include "hstu_attention/hstu_attention.h"

namespace recfast::bindings {
namespace {

namespace hstu = recfast::hstu_attention;

hstu::Shape hstu_shape(const Named& named) {
  return {.sequences = named.number("sequences"),
          .heads = named.number("heads"),
          .dim = named.number("dim"),
          .value_dim = named.number("value_dim"),
          .max_length = named.number("max_length"),
          .buckets = named.number("buckets"),
          .borders = named.number("borders"),
          .position_heads = named.number("position_heads")};
}

// Rows of heads under `name`, with the distances of rows and of heads beside it.
template <class T>
hstu::Heads<T> hstu_heads(const Named& named, const std::string& name) {
  return {named.pointer<T>(name.c_str()), named.number((name + "_stride").c_str()),
          named.number((name + "_head_stride").c_str())};
}

template <class T, class Value>
hstu::Args<T, Value> hstu_args(const Named& named) {
  return {.shape = hstu_shape(named),
          .mask = {.causal = named.number("causal") != 0,
                   .window = named.number("window"),
                   .targets = named.pointer<const std::int64_t>("num_targets"),
                   .contextual = named.pointer<const std::int64_t>("contextual")},
          .alpha = static_cast<T>(named.real("alpha")),
          .q = hstu_heads<const Value>(named, "q"),
          .k = hstu_heads<const Value>(named, "k"),
          .v = hstu_heads<const Value>(named, "v"),
          .begin = named.pointer<const std::int64_t>("begin"),
          .end = named.pointer<const std::int64_t>("end"),
          .times = named.pointer<const std::int64_t>("timestamps"),
          .thresholds = named.pointer<const std::int64_t>("thresholds"),
          .position = named.pointer<const T>("position_bias"),
          .time = named.pointer<const T>("time_bias"),
          .out = hstu_heads<Value>(named, "out"),
          .scratch = named.pointer<T>("scratch"),
          .tasks = named.pointer<std::int64_t>("tasks")};
}

template <class T, class Value>
void hstu_forward(const py::kwargs& arguments) {
  const auto args = hstu_args<T, Value>(Named(arguments));
  py::gil_scoped_release unlocked;
  hstu::forward(args);
}

template <class T, class Value>
void hstu_backward(const py::kwargs& arguments) {
  const Named named(arguments);
  const auto args = hstu_args<T, Value>(named);
  const hstu::Gradients<T, Value> gradients{.wanted = {.q = named.number("want_q") != 0,
                                                       .k = named.number("want_k") != 0,
                                                       .v = named.number("want_v") != 0,
                                                       .position = named.number("want_position") != 0,
                                                       .time = named.number("want_time") != 0},
                                            .out = hstu_heads<const Value>(named, "grad"),
                                            .q = hstu_heads<Value>(named, "dq"),
                                            .k = hstu_heads<Value>(named, "dk"),
                                            .v = hstu_heads<Value>(named, "dv"),
                                            .position = named.pointer<T>("dposition"),
                                            .time = named.pointer<T>("dtime")};
  py::gil_scoped_release unlocked;
  hstu::backward(args, gradients);
}

}  // namespace

void bind_hstu_attention(py::module_& m) {
  m.def("hstu_attention_forward_float32", &hstu_forward<float, float>);
  m.def("hstu_attention_forward_bfloat16", &hstu_forward<float, hstu::Bfloat16>);
  m.def("hstu_attention_forward_float64", &hstu_forward<double, double>);
  m.def("hstu_attention_backward_float32", &hstu_backward<float, float>);
  m.def("hstu_attention_backward_bfloat16", &hstu_backward<float, hstu::Bfloat16>);
  m.def("hstu_attention_backward_float64", &hstu_backward<double, double>);
  m.def("hstu_attention_forward_scratch",
        [](const py::kwargs& arguments) { return hstu::forward_scratch(hstu_shape(Named(arguments))); });
  m.def("hstu_attention_backward_scratch", [](bool copied, const py::kwargs& arguments) {
    const Named named(arguments);
    return hstu::backward_scratch(hstu_shape(named), named.pointer<const std::int64_t>("begin"),
                                  named.pointer<const std::int64_t>("end"), copied);
  });
}

}  // namespace recfast::bindings
