#include "sequence_attention/sequence_attention.h"

#include <string>

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

recfast::sequence_attention::Shape sequence_shape(const Named& named) {
  return {.users = named.number("users"),
          .heads = named.number("heads"),
          .dim = named.number("dim"),
          .value_dim = named.number("value_dim"),
          .longest = named.number("longest")};
}

// `name` and its strides `name`_batch, _row and _head.
template <class S>
recfast::sequence_attention::Heads<S> sequence_heads(const Named& named, const std::string& name) {
  return {named.pointer<S>(name.c_str()), named.number((name + "_batch").c_str()),
          named.number((name + "_row").c_str()), named.number((name + "_head").c_str())};
}

template <class S, class T>
recfast::sequence_attention::Args<S, T> sequence_args(const Named& named) {
  return {.shape = sequence_shape(named),
          .causal = named.number("causal") != 0,
          .scale = static_cast<T>(named.real("scale")),
          .dropout = {.seed = static_cast<std::uint64_t>(named.number("seed")),
                      .threshold = static_cast<std::uint32_t>(named.number("threshold")),
                      .kept = named.real("kept")},
          .q = sequence_heads<const S>(named, "q"),
          .k = sequence_heads<const S>(named, "k"),
          .v = sequence_heads<const S>(named, "v"),
          .offsets = named.pointer<const std::int64_t>("offsets"),
          .lengths = named.pointer<const std::int64_t>("lengths"),
          .out = sequence_heads<S>(named, "out"),
          .highest = sequence_heads<T>(named, "highest"),
          .inverse = sequence_heads<T>(named, "inverse"),
          .sums = named.pointer<std::int64_t>("sums"),
          .scratch = named.pointer<T>("scratch")};
}

template <class S, class T>
void sequence_forward(const py::kwargs& arguments) {
  const auto args = sequence_args<S, T>(Named(arguments));
  py::gil_scoped_release unlocked;
  recfast::sequence_attention::forward(args);
}

template <class S, class T>
void sequence_backward(const py::kwargs& arguments) {
  const Named named(arguments);
  const auto args = sequence_args<S, T>(named);
  const recfast::sequence_attention::Gradients<S> gradients{.out = sequence_heads<const S>(named, "dout"),
                                                            .q = sequence_heads<S>(named, "dq"),
                                                            .k = sequence_heads<S>(named, "dk"),
                                                            .v = sequence_heads<S>(named, "dv")};
  py::gil_scoped_release unlocked;
  recfast::sequence_attention::backward(args, gradients);
}

}  // namespace

void bind_sequence_attention(py::module_& m) {
  m.def("sequence_attention_forward_float32", &sequence_forward<float, float>);
  m.def("sequence_attention_forward_bfloat16", &sequence_forward<std::uint16_t, float>);
  m.def("sequence_attention_forward_float64", &sequence_forward<double, double>);
  m.def("sequence_attention_backward_float32", &sequence_backward<float, float>);
  m.def("sequence_attention_backward_bfloat16", &sequence_backward<std::uint16_t, float>);
  m.def("sequence_attention_backward_float64", &sequence_backward<double, double>);
  m.def("sequence_attention_scratch", [](bool backward, const py::kwargs& arguments) {
    return recfast::sequence_attention::scratch_size(sequence_shape(Named(arguments)), backward);
  });
}

}  // namespace recfast::bindings
