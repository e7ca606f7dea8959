#include "bindings/bindings.h"

#include <string>

#include "din_attention/din_attention.h"

namespace recfast::bindings {
namespace {

using namespace recfast::din_attention;

template <class E>
Args<E> din_args(const py::kwargs& arguments) {
  using T = Arithmetic<E>;
  const Named named(arguments);
  const Shape shape{.users = named.number("users"),
                    .dim = named.number("dim"),
                    .value_dim = named.number("value_dim"),
                    .hidden1 = named.number("hidden1"),
                    .hidden2 = named.number("hidden2")};
  const std::int64_t candidates = named.number("candidate_rows");
  return {.shape = shape,
          .activation = static_cast<Activation>(named.number("activation")),
          .mode = static_cast<Mode>(named.number("mode")),
          .training = named.number("training") != 0,
          .eps = arguments["eps"].cast<double>(),
          .query = {named.pointer<const E>("query"), candidates, shape.dim, named.number("query_stride")},
          .keys = {named.pointer<const E>("keys"), 0, shape.dim, named.number("keys_stride")},
          .values = {named.pointer<const E>("values"), 0, shape.value_dim, named.number("values_stride")},
          .own_values = named.number("own_values") != 0,
          .begin = named.pointer<const std::int64_t>("begin"),
          .end = named.pointer<const std::int64_t>("end"),
          .candidates = named.pointer<const std::int64_t>("candidates"),
          .weights = {named.pointer<const T>("w1"), named.pointer<const T>("b1"), named.pointer<const T>("w2"),
                      named.pointer<const T>("b2"), named.pointer<const T>("w3"), named.pointer<const T>("b3"),
                      named.pointer<const T>("slope"), named.pointer<const T>("dice")},
          .statistics = named.pointer<const T>("statistics"),
          .batch_statistics = named.pointer<T>("batch_statistics"),
          .out = {named.pointer<E>("out"), candidates, shape.value_dim, shape.value_dim},
          .lse = named.pointer<T>("lse"),
          .scratch = named.pointer<T>("scratch")};
}

template <class E>
Gradients<E> din_gradients(const Named& named, const Args<E>& args) {
  using T = Arithmetic<E>;
  return {.grad = {named.pointer<const E>("grad"), args.query.rows, args.shape.value_dim, args.shape.value_dim},
          .query = {named.pointer<E>("dquery"), args.query.rows, args.shape.dim, args.shape.dim},
          .keys = {named.pointer<E>("dkeys"), 0, args.shape.dim, args.shape.dim},
          .values = {named.pointer<E>("dvalues"), 0, args.shape.value_dim, args.shape.value_dim},
          .weights = {named.pointer<T>("dw1"), named.pointer<T>("db1"), named.pointer<T>("dw2"), named.pointer<T>("db2"),
                      named.pointer<T>("dw3"), named.pointer<T>("db3"), named.pointer<T>("dslope"),
                      named.pointer<T>("ddice")}};
}

template <class E>
void din_forward(const py::kwargs& arguments) {
  const auto args = din_args<E>(arguments);
  py::gil_scoped_release unlocked;
  forward(args);
}

template <class E>
void din_backward(const py::kwargs& arguments) {
  const auto args = din_args<E>(arguments);
  const auto gradients = din_gradients<E>(Named(arguments), args);
  py::gil_scoped_release unlocked;
  backward(args, gradients);
}

template <class E>
void bind_rows_of(py::module_& m, const std::string& name) {
  m.def(("din_attention_forward_" + name).c_str(), &din_forward<E>);
  m.def(("din_attention_backward_" + name).c_str(), &din_backward<E>);
  m.def(("din_attention_forward_scratch_" + name).c_str(),
        [](const py::kwargs& arguments) { return forward_scratch(din_args<E>(arguments)); });
  m.def(("din_attention_backward_scratch_" + name).c_str(), [](const py::kwargs& arguments) {
    const auto args = din_args<E>(arguments);
    return backward_scratch(args, din_gradients<E>(Named(arguments), args));
  });
}

}  // namespace

void bind_din_attention(py::module_& m) {
  bind_rows_of<float>(m, "float32");
  bind_rows_of<double>(m, "float64");
  bind_rows_of<BFloat16>(m, "bfloat16");
  // How backward cuts the candidates of a batch: (pairs, borders).
  m.def("din_attention_cut", [](std::int64_t users, Address begin, Address end, Address candidates,
                                std::int64_t partial, std::int64_t block) {
    const Parts parts = cut(users, at<const std::int64_t>(begin), at<const std::int64_t>(end),
                            at<const std::int64_t>(candidates), partial, block);
    py::list borders;
    for (std::int64_t i = 0; i <= parts.count; ++i) borders.append(parts.border[static_cast<std::size_t>(i)]);
    return py::make_tuple(parts.pairs, borders);
  });
}

}  // namespace recfast::bindings
