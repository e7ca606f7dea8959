#include "category_top_k/category_top_k.h"

#include "bindings/bindings.h"

namespace recfast::bindings {
namespace {

template <class Category>
void category_top_k(const py::kwargs& arguments) {
  const Named named(arguments);
  const recfast::category_top_k::Args<Category> args{.query = named.pointer<const Category>("query"),
                                                     .query_stride = named.number("query_stride"),
                                                     .keys = named.pointer<const Category>("keys"),
                                                     .keys_stride = named.number("keys_stride"),
                                                     .begin = named.pointer<const std::int64_t>("begin"),
                                                     .end = named.pointer<const std::int64_t>("end"),
                                                     .candidates = named.pointer<const std::int64_t>("candidates"),
                                                     .out = named.pointer<std::int64_t>("out"),
                                                     .users = named.number("users"),
                                                     .rows = named.number("rows"),
                                                     .k = named.number("k")};
  py::gil_scoped_release unlocked;
  recfast::category_top_k::run(args);
}

}  // namespace

void bind_category_top_k(py::module_& m) {
  m.def("category_top_k_int32", &category_top_k<std::int32_t>);
  m.def("category_top_k_int64", &category_top_k<std::int64_t>);
}

}  // namespace recfast::bindings
