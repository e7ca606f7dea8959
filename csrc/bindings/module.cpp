// recfast._C: the kernels for the CPU.
#include "bindings/bindings.h"

#include <dlfcn.h>
#include <omp.h>

#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "common/offsets.h"
#include "common/parallel.h"
#include "common/random.h"

namespace recfast::bindings {
namespace {

recfast::Isa isa_by_name(const std::string& name) {
  for (std::size_t level = 0; level < recfast::kIsaNames.size(); ++level) {
    if (recfast::kIsaNames[level] == name) return static_cast<recfast::Isa>(level);
  }
  throw std::invalid_argument("set_isa: level must be one of scalar, avx2, avx512, got " + name);
}

std::string isa_name(recfast::Isa level) { return std::string(recfast::kIsaNames[static_cast<std::size_t>(level)]); }

// The file of the OpenMP runtime that this module was bound to. torch's own must be the same one, or
// torch.set_num_threads would not reach these kernels.
std::string openmp_library() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) == 0 || info.dli_fname == nullptr) return "";
  return info.dli_fname;
}

void bind_runtime(py::module_& m) {
  m.attr("__version__") = RECFAST_VERSION;
  m.def("isa", [] { return isa_name(recfast::active_isa()); });
  m.def("detected_isa", [] { return isa_name(recfast::detected_isa()); });
  m.def("has_vbmi", &recfast::has_vbmi);
  m.def("has_bf16", &recfast::has_bf16);
  m.def("has_vpopcnt", &recfast::has_vpopcnt);
  m.def("set_isa", [](const std::string& name) { recfast::set_isa(isa_by_name(name)); });
  m.def("max_threads", &recfast::max_threads);
  m.def("set_threads", [](int threads) { omp_set_num_threads(threads); });
  m.def("openmp_library", &openmp_library);
  // (the first wrong position or -1, the longest list)
  m.def("check_offsets", [](Address offsets, std::int64_t size, std::int64_t total) {
    std::int64_t longest = 0;
    const std::int64_t wrong = check_offsets(span_at<const std::int64_t>(offsets, size), total, longest);
    return py::make_tuple(wrong, longest);
  });
  // The generator itself, so that a test can hold it against the published answers.
  m.def("philox4x32", [](std::uint64_t seed, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3) {
    std::uint32_t words[4];
    recfast::Philox{seed}(c0, c1, c2, c3, words);
    return py::make_tuple(words[0], words[1], words[2], words[3]);
  });
}

}  // namespace
}  // namespace recfast::bindings

PYBIND11_MODULE(_C, m) {
  m.doc() = "recfast kernels for the CPU; no torch symbol is needed to load them";
  using namespace recfast::bindings;
  bind_runtime(m);
  bind_category_top_k(m);
  bind_code_postings(m);
  bind_code_rows(m);
  bind_code_search(m);
  bind_code_trie(m);
  bind_din_attention(m);
  bind_dpp_greedy(m);
  bind_dpp_log_det(m);
  bind_dpp_greedy_kernel(m);
  bind_embedding_bag(m);
  bind_embedding_update(m);
  bind_example_axpy(m);
  bind_greedy(m);
  bind_hamming_top_k(m);
  bind_hstu_attention(m);
  bind_id_map(m);
  bind_initial_rows(m);
  bind_kdpp_sample(m);
  bind_packed_rows(m);
  bind_negatives_loss(m);
  bind_sdim_attention(m);
  bind_sequence_attention(m);
  bind_simhash(m);
  bind_target_attention(m);
}
