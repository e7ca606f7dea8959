#include "bindings/bindings.h"

#include <string>

#include "din_attention/din_attention.h"

namespace recfast::bindings {
namespace {

using namespace recfast::din_attention;

// In the order of _Call.fields in ops/din_attention.py, scratch apart.
template <class E>
Args<E> din_args(const py::tuple& fields, Address scratch) {
  using T = Arithmetic<E>;
  Fields in(fields);
  Args<E> args{.shape = {.users = in.next<std::int64_t>(),
                         .dim = in.next<std::int64_t>(),
                         .value_dim = in.next<std::int64_t>(),
                         .hidden1 = in.next<std::int64_t>(),
                         .hidden2 = in.next<std::int64_t>()},
               .activation = in.next<Activation>(),
               .mode = in.next<Mode>(),
               .training = in.next<bool>(),
               .eps = in.next<double>(),
               .query = {.data = in.next<const E*>(), .rows = in.next<std::int64_t>(), .width = 0,
                         .stride = in.next<std::int64_t>()},
               .keys = {.data = in.next<const E*>(), .rows = 0, .width = 0, .stride = in.next<std::int64_t>()},
               .values = {.data = in.next<const E*>(), .rows = 0, .width = 0, .stride = in.next<std::int64_t>()},
               .own_values = in.next<bool>(),
               .begin = in.next<const std::int64_t*>(),
               .end = in.next<const std::int64_t*>(),
               .candidates = in.next<const std::int64_t*>(),
               .weights = {.w1 = in.next<const T*>(), .b1 = in.next<const T*>(), .w2 = in.next<const T*>(),
                           .b2 = in.next<const T*>(), .w3 = in.next<const T*>(), .b3 = in.next<const T*>(),
                           .slope = in.next<const T*>(), .dice = in.next<const T*>()},
               .statistics = in.next<const T*>(),
               .batch_statistics = nullptr,
               .out = {},
               .lse = nullptr,
               .scratch = at<T>(scratch)};
  const Shape& s = args.shape;
  args.out = {.data = in.next<E*>(), .rows = args.query.rows, .width = s.value_dim, .stride = s.value_dim};
  args.lse = in.next<T*>();
  args.batch_statistics = in.next<T*>();
  args.query.width = args.keys.width = s.dim;
  args.values.width = s.value_dim;
  return args;
}

// That of the answer, then what is wanted; 0 is an address that nothing is written to.
template <class E>
Gradients<E> din_gradients(const py::tuple& fields, const Args<E>& args) {
  using T = Arithmetic<E>;
  const Shape& s = args.shape;
  Fields in(fields);
  return {.grad = {.data = in.next<const E*>(), .rows = args.query.rows, .width = s.value_dim, .stride = s.value_dim},
          .query = {.data = in.next<E*>(), .rows = args.query.rows, .width = s.dim, .stride = s.dim},
          .keys = {.data = in.next<E*>(), .rows = 0, .width = s.dim, .stride = s.dim},
          .values = {.data = in.next<E*>(), .rows = 0, .width = s.value_dim, .stride = s.value_dim},
          .weights = {.w1 = in.next<T*>(), .b1 = in.next<T*>(), .w2 = in.next<T*>(), .b2 = in.next<T*>(),
                      .w3 = in.next<T*>(), .b3 = in.next<T*>(), .slope = in.next<T*>(), .dice = in.next<T*>()}};
}

template <class E>
void bind_rows_of(py::module_& m, const std::string& name) {
  m.def(("din_attention_forward_scratch_" + name).c_str(),
        [](const py::tuple& fields) { return forward_scratch(din_args<E>(fields, 0)); });
  m.def(("din_attention_backward_scratch_" + name).c_str(), [](const py::tuple& fields, const py::tuple& gradients) {
    const auto args = din_args<E>(fields, 0);
    return backward_scratch(args, din_gradients<E>(gradients, args));
  });
  m.def(("din_attention_forward_" + name).c_str(), [](const py::tuple& fields, Address scratch) {
    const auto args = din_args<E>(fields, scratch);
    py::gil_scoped_release unlocked;
    forward(args);
  });
  m.def(("din_attention_backward_" + name).c_str(),
        [](const py::tuple& fields, const py::tuple& wanted, Address scratch) {
          const auto args = din_args<E>(fields, scratch);
          const auto gradients = din_gradients<E>(wanted, args);
          py::gil_scoped_release unlocked;
          backward(args, gradients);
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
