#include "bindings/bindings.h"

#include <algorithm>

#include "code_search/code_search.h"

namespace recfast::bindings {
namespace {

template <class Code>
py::tuple code_search(Address codes, Address table, Address bias, Address ids, Address live, Address mask,
                                     std::int64_t mask_stride, Address heaps, std::int64_t n_heaps, Address scores,
                                     Address found, std::int64_t queries, std::int64_t items, std::int64_t books,
                                     std::int64_t entries, std::int64_t k, bool all) {
  using namespace recfast::code_search;
  const Args<Code> args{.table = at<const float>(table),
                        .codes = at<const Code>(codes),
                        .bias = at<const float>(bias),
                        .ids = at<const std::int64_t>(ids),
                        .live = at<const std::uint8_t>(live),
                        .mask = at<const std::uint8_t>(mask),
                        .mask_stride = mask_stride,
                        .heaps = span_at<recfast::Scored>(heaps, n_heaps * std::min(k, items)),
                        .scores = at<float>(scores),
                        .found = at<std::int64_t>(found),
                        .queries = queries,
                        .items = items,
                        .books = books,
                        .entries = entries,
                        .k = k};
  Faults faults{};
  {
    py::gil_scoped_release unlocked;
    faults = check(args, all);
    if (std::max({faults.table, faults.codes, faults.bias}) < 0) run(args);
  }
  return py::make_tuple(faults.table, faults.codes, faults.bias);
}

}  // namespace

void bind_code_search(py::module_& m) {
  m.def("code_search_heaps",
        [](std::int64_t queries, std::int64_t items) { return recfast::code_search::plan(queries, items).heaps; });
  m.def("code_search_uint8", &code_search<std::uint8_t>);
  m.def("code_search_uint16", &code_search<std::uint16_t>);
}

}  // namespace recfast::bindings
