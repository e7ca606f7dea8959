#include "bindings/bindings.h"

#include <algorithm>

#include "code_rows/code_rows.h"

namespace recfast::bindings {
namespace {

template <class Id>
py::tuple code_rows(Address indptr, Address item_ids, Address scores, Address rows, Address weights,
                                   Address row_bias, int mask_kind, Address mask, std::int64_t mask_stride, Address sums, Address touched,
                                   Address cursors, Address heaps, std::int64_t threads, Address out_scores,
                                   Address out_ids, std::int64_t queries, std::int64_t width, std::int64_t n_rows,
                                   std::int64_t n_items, std::int64_t k, bool all) {
  using namespace recfast::code_rows;
  const Args<Id> args{.indptr = at<const std::int64_t>(indptr),
                      .item_ids = at<const Id>(item_ids),
                      .scores = at<const float>(scores),
                      .rows = at<const std::int64_t>(rows),
                      .weights = at<const float>(weights),
                      .row_bias = at<const float>(row_bias),
                      .masks = {.kind = static_cast<MaskKind>(mask_kind),
                                .data = at<const std::uint8_t>(mask),
                                .stride = mask_stride},
                      .sums = span_at<float>(sums, threads * kTile),
                      .touched = span_at<std::uint64_t>(touched, threads * kTile / 64),
                      .cursors = span_at<std::int64_t>(cursors, threads * width),
                      .heaps = span_at<recfast::Scored>(heaps, threads * std::min(k, n_items)),
                      .out_scores = at<float>(out_scores),
                      .out_ids = at<std::int64_t>(out_ids),
                      .queries = queries,
                      .width = width,
                      .n_rows = n_rows,
                      .n_items = n_items,
                      .k = k};
  Faults faults{};
  {
    py::gil_scoped_release unlocked;
    faults = check(args, all);
    if (std::max({faults.rows, faults.weights, faults.outside, faults.unsorted, faults.scores}) < 0) run(args);
  }
  return py::make_tuple(faults.rows, faults.weights, faults.outside, faults.unsorted, faults.scores);
}

}  // namespace

void bind_code_rows(py::module_& m) {
  m.attr("CODE_ROWS_TILE") = recfast::code_rows::kTile;
  m.def("code_rows_int32", &code_rows<std::int32_t>);
  m.def("code_rows_int64", &code_rows<std::int64_t>);
}

}  // namespace recfast::bindings
