#include "bindings/bindings.h"

#include "code_trie/code_trie.h"

namespace recfast::bindings {
namespace {

// The first wrong state, score, code and logit, or -1.
template <class Code, class Logit>
py::tuple trie_step(const py::tuple& fields) {
  using namespace recfast::code_trie;
  Fields in(fields);
  Args<Code, Logit> args;
  args.first_child = in.next<const std::int32_t*>();
  args.codes = in.next<const Code*>();
  args.states = in.next<const std::int64_t*>();
  args.logits = in.next<const Logit*>();
  args.scores = in.next<const float*>();
  args.scratch = at<std::byte>((in.next<Address>() + 63) / 64 * 64);
  args.out_states = in.next<std::int64_t*>();
  args.out_codes = in.next<std::int64_t*>();
  args.out_scores = in.next<float*>();
  args.out_parents = in.next<std::int64_t*>();
  args.inner = in.next<std::int64_t>();
  args.batch = in.next<std::int64_t>();
  args.beams = in.next<std::int64_t>();
  args.n_codes = in.next<std::int64_t>();
  args.width = in.next<std::int64_t>();
  args.renormalise = in.next<bool>();
  Faults faults{};
  {
    py::gil_scoped_release unlocked;
    faults = run(args);
  }
  return py::make_tuple(faults.states, faults.scores, faults.codes, faults.logits);
}

}  // namespace

void bind_code_trie(py::module_& m) {
  m.def("code_trie_step_uint8_float32", &trie_step<std::uint8_t, float>);
  m.def("code_trie_step_uint8_bfloat16", &trie_step<std::uint8_t, std::uint16_t>);
  m.def("code_trie_step_uint16_float32", &trie_step<std::uint16_t, float>);
  m.def("code_trie_step_uint16_bfloat16", &trie_step<std::uint16_t, std::uint16_t>);
  // Bytes, to which 64 must be added for alignment.
  m.def("code_trie_scratch", &recfast::code_trie::scratch_bytes);
}

}  // namespace recfast::bindings
