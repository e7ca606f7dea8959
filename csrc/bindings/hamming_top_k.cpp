#include "hamming_top_k/hamming_top_k.h"

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

recfast::hamming_top_k::Shape hamming_shape(const Named& named) {
  return {.users = named.number("users"),
          .words = named.number("words"),
          .k = named.number("k"),
          .longest = named.number("longest")};
}

template <class Code>
void hamming_top_k(const py::kwargs& arguments) {
  const Named named(arguments);
  const recfast::hamming_top_k::Shape shape = hamming_shape(named);
  const recfast::hamming_top_k::Args<Code> args{
      .shape = shape,
      .query = {named.pointer<const Code>("query"), named.number("rows"), shape.words, named.number("query_stride")},
      .keys = {named.pointer<const Code>("keys"), 0, shape.words, named.number("keys_stride")},
      .begin = named.pointer<const std::int64_t>("begin"),
      .end = named.pointer<const std::int64_t>("end"),
      .candidates = named.pointer<const std::int64_t>("candidates"),
      .out = named.pointer<std::int64_t>("out"),
      .scratch = named.pointer<std::uint64_t>("scratch")};
  py::gil_scoped_release unlocked;
  recfast::hamming_top_k::run(args);
}

}  // namespace

void bind_hamming_top_k(py::module_& m) {
  m.def("hamming_top_k_int64", &hamming_top_k<std::uint64_t>);
  m.def("hamming_top_k_uint8", &hamming_top_k<std::uint8_t>);
  m.def("hamming_top_k_scratch", [](std::int64_t code_bytes, const py::kwargs& arguments) {
    return recfast::hamming_top_k::scratch_size(hamming_shape(Named(arguments)), code_bytes);
  });
}

}  // namespace recfast::bindings
