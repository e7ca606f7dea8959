#include "sequence_attention/sequence_attention.h"

#include "bindings/heads.h"

namespace recfast::bindings {
namespace {

recfast::sequence_attention::Shape sequence_shape(const Named& named) {
  return {.heads = named.number("heads"),
          .dim = named.number("dim"),
          .value_dim = named.number("value_dim"),
          .longest = named.number("longest")};
}

template <class S, class T>
recfast::sequence_attention::Args<S, T> sequence_args(const Named& named) {
  return {.users = sequences_of(named),
          .shape = sequence_shape(named),
          .causal = named.number("causal") != 0,
          .scale = static_cast<T>(named.real("scale")),
          .dropout = {.seed = static_cast<std::uint64_t>(named.number("seed")),
                      .threshold = static_cast<std::uint32_t>(named.number("threshold")),
                      .kept = named.real("kept")},
          .q = heads_of<const S>(named, "q"),
          .k = heads_of<const S>(named, "k"),
          .v = heads_of<const S>(named, "v"),
          .out = heads_of<S>(named, "out"),
          .highest = heads_of<T>(named, "highest"),
          .inverse = heads_of<T>(named, "inverse"),
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
  const recfast::sequence_attention::Gradients<S> gradients{.out = heads_of<const S>(named, "dout"),
                                                            .q = heads_of<S>(named, "dq"),
                                                            .k = heads_of<S>(named, "dk"),
                                                            .v = heads_of<S>(named, "dv")};
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
