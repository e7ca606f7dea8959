#include "bindings/bindings.h"

#include "din_attention/din_attention.h"

namespace recfast::bindings {
namespace {

recfast::din_attention::Shape din_shape(const Named& named) {
  return {.users = named.number("users"),
          .dim = named.number("dim"),
          .value_dim = named.number("value_dim"),
          .hidden1 = named.number("hidden1"),
          .hidden2 = named.number("hidden2"),
          .longest = named.number("longest")};
}

template <class T>
recfast::din_attention::Args<T> din_args(const Named& named) {
  using namespace recfast::din_attention;
  const Shape shape = din_shape(named);
  const std::int64_t candidates = named.number("candidate_rows");
  return {.shape = shape,
          .activation = static_cast<Activation>(named.number("activation")),
          .mode = static_cast<Mode>(named.number("mode")),
          .query = {named.pointer<const T>("query"), candidates, shape.dim, named.number("query_stride")},
          .keys = {named.pointer<const T>("keys"), 0, shape.dim, named.number("keys_stride")},
          .values = {named.pointer<const T>("values"), 0, shape.value_dim, named.number("values_stride")},
          .begin = named.pointer<const std::int64_t>("begin"),
          .end = named.pointer<const std::int64_t>("end"),
          .candidates = named.pointer<const std::int64_t>("candidates"),
          .weights = {named.pointer<const T>("w1"), named.pointer<const T>("b1"), named.pointer<const T>("w2"),
                      named.pointer<const T>("b2"), named.pointer<const T>("w3"), named.pointer<const T>("b3"),
                      named.pointer<const T>("slope")},
          .out = {named.pointer<T>("out"), candidates, shape.value_dim, shape.value_dim},
          .lse = named.pointer<T>("lse"),
          .scratch = named.pointer<T>("scratch")};
}

template <class T>
void din_forward(const py::kwargs& arguments) {
  const auto args = din_args<T>(Named(arguments));
  py::gil_scoped_release unlocked;
  recfast::din_attention::forward(args);
}

template <class T>
void din_backward(const py::kwargs& arguments) {
  const Named named(arguments);
  const auto args = din_args<T>(named);
  const recfast::Rows<T> keys{named.pointer<T>("dkeys"), 0, args.shape.dim, args.shape.dim};
  const recfast::din_attention::Gradients<T> gradients{
      .grad = {named.pointer<const T>("grad"), args.query.rows, args.shape.value_dim, args.shape.value_dim},
      .query = {named.pointer<T>("dquery"), args.query.rows, args.shape.dim, args.shape.dim},
      .keys = keys,
      .values = {named.pointer<T>("dvalues"), 0, args.shape.value_dim, args.shape.value_dim},
      .weights = {named.pointer<T>("dw1"), named.pointer<T>("db1"), named.pointer<T>("dw2"), named.pointer<T>("db2"),
                  named.pointer<T>("dw3"), named.pointer<T>("db3"), named.pointer<T>("dslope")}};
  py::gil_scoped_release unlocked;
  recfast::din_attention::backward(args, gradients);
}

}  // namespace

void bind_din_attention(py::module_& m) {
  m.def("din_attention_forward_float32", &din_forward<float>);
  m.def("din_attention_forward_float64", &din_forward<double>);
  m.def("din_attention_backward_float32", &din_backward<float>);
  m.def("din_attention_backward_float64", &din_backward<double>);
  m.def("din_attention_scratch", [](bool backward, const py::kwargs& arguments) {
    return recfast::din_attention::scratch_size(din_shape(Named(arguments)), backward);
  });
}

}  // namespace recfast::bindings
