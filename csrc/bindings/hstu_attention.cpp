#include "bindings/heads.h"

#include "hstu_attention/hstu_attention.h"

namespace recfast::bindings {
namespace {

namespace hstu = recfast::hstu_attention;

hstu::Shape hstu_shape(const Named& named) {
  return {.heads = named.number("heads"),
          .dim = named.number("dim"),
          .value_dim = named.number("value_dim"),
          .max_length = named.number("max_length"),
          .buckets = named.number("buckets"),
          .borders = named.number("borders"),
          .position_heads = named.number("position_heads")};
}

template <class T, class Value>
hstu::Args<T, Value> hstu_args(const Named& named) {
  return {.sequences = sequences_of(named),
          .shape = hstu_shape(named),
          .mask = {.causal = named.number("causal") != 0,
                   .window = named.number("window"),
                   .targets = named.pointer<const std::int64_t>("num_targets"),
                   .contextual = named.pointer<const std::int64_t>("contextual")},
          .alpha = static_cast<T>(named.real("alpha")),
          .q = heads_of<const Value>(named, "q"),
          .k = heads_of<const Value>(named, "k"),
          .v = heads_of<const Value>(named, "v"),
          .times = heads_of<const std::int64_t>(named, "timestamps"),
          .thresholds = named.pointer<const std::int64_t>("thresholds"),
          .position = named.pointer<const T>("position_bias"),
          .time = named.pointer<const T>("time_bias"),
          .out = heads_of<Value>(named, "out"),
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
  const hstu::Gradients<T, Value> gradients{.out = heads_of<const Value>(named, "grad"),
                                            .q = heads_of<Value>(named, "dq"),
                                            .k = heads_of<Value>(named, "dk"),
                                            .v = heads_of<Value>(named, "dv"),
                                            .position = named.pointer<T>("dposition"),
                                            .time = named.pointer<T>("dtime")};
  py::gil_scoped_release unlocked;
  hstu::backward(args, gradients);
}

}  // namespace

void bind_hstu_attention(py::module_& m) {
  m.def("hstu_attention_forward_float32", &hstu_forward<float, float>);
  m.def("hstu_attention_forward_bfloat16", &hstu_forward<float, std::uint16_t>);
  m.def("hstu_attention_forward_float64", &hstu_forward<double, double>);
  m.def("hstu_attention_backward_float32", &hstu_backward<float, float>);
  m.def("hstu_attention_backward_bfloat16", &hstu_backward<float, std::uint16_t>);
  m.def("hstu_attention_backward_float64", &hstu_backward<double, double>);
  m.def("hstu_attention_forward_scratch",
        [](const py::kwargs& arguments) { return hstu::forward_scratch(hstu_shape(Named(arguments))); });
  m.def("hstu_attention_backward_scratch", [](bool copied, const py::kwargs& arguments) {
    const Named named(arguments);
    return hstu::backward_scratch(hstu_shape(named), sequences_of(named), copied);
  });
}

}  // namespace recfast::bindings
