// What the bindings share. Each csrc/bindings/<op>.cpp makes one op known to Python; module.cpp puts them together. They are
// the only files that know pybind11 (bindings_cuda.cpp is their twin for the GPU).
// Tensors arrive as addresses and sizes; dtypes, shapes and contiguity have been checked in Python by then.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

namespace recfast::bindings {

namespace py = pybind11;

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: an address is what Python has
}

template <class T>
std::span<T> span_at(Address address, std::int64_t size) {
  return {at<T>(address), static_cast<std::size_t>(size)};
}

// Arguments by name, for ops with too many to count: a missing one raises KeyError.
class Named {
 public:
  explicit Named(const py::kwargs& arguments) : arguments_(arguments) {}

  [[nodiscard]] std::int64_t number(const char* name) const { return arguments_[name].cast<std::int64_t>(); }

  [[nodiscard]] double real(const char* name) const { return arguments_[name].cast<double>(); }

  // A tensor's address; 0 gives the null pointer.
  template <class T>
  [[nodiscard]] T* pointer(const char* name) const {
    return at<T>(arguments_[name].cast<Address>());
  }

 private:
  const py::kwargs& arguments_;
};

// Arguments in a tuple, in the order of the fields they fill: a third of what names cost a call.
class Fields {
 public:
  explicit Fields(const py::tuple& values) : values_(values) {}

  template <class T>
  [[nodiscard]] T next() {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(values_[at_++].cast<Address>());  // NOLINT: an address is what Python has
    } else if constexpr (std::is_enum_v<T>) {
      return static_cast<T>(values_[at_++].cast<int>());
    } else {
      return values_[at_++].cast<T>();
    }
  }

 private:
  const py::tuple& values_;
  std::size_t at_ = 0;
};

void bind_category_top_k(py::module_& m);
void bind_code_postings(py::module_& m);
void bind_code_rows(py::module_& m);
void bind_code_search(py::module_& m);
void bind_code_trie(py::module_& m);
void bind_din_attention(py::module_& m);
void bind_dpp_greedy(py::module_& m);
void bind_dpp_log_det(py::module_& m);
void bind_dpp_greedy_kernel(py::module_& m);
void bind_embedding_bag(py::module_& m);
void bind_embedding_update(py::module_& m);
void bind_example_axpy(py::module_& m);
void bind_greedy(py::module_& m);
void bind_hamming_top_k(py::module_& m);
void bind_hstu_attention(py::module_& m);
void bind_id_map(py::module_& m);
void bind_initial_rows(py::module_& m);
void bind_kdpp_sample(py::module_& m);
void bind_packed_rows(py::module_& m);
void bind_negatives_loss(py::module_& m);
void bind_sdim_attention(py::module_& m);
void bind_sequence_attention(py::module_& m);
void bind_simhash(py::module_& m);
void bind_target_attention(py::module_& m);

}  // namespace recfast::bindings
