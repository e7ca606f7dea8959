#include "bindings/bindings.h"

#include "code_rows/packed_rows.h"

namespace recfast::bindings {
namespace {

using namespace recfast::code_rows;

Packed packed_of(const py::tuple& fields) {
  Fields in(fields);
  Packed packed;
  packed.indptr = in.next<const std::int64_t*>();
  packed.scores = in.next<const float*>();
  packed.group_ptr = in.next<std::int64_t*>();
  packed.present = in.next<std::uint64_t*>();
  packed.starts = in.next<Start*>();
  packed.levels = in.next<std::uint8_t*>();
  packed.groups = in.next<void*>();
  packed.locals = in.next<void*>();
  packed.upper = in.next<float*>();
  packed.lowest = in.next<float*>();
  packed.n_rows = in.next<std::int64_t>();
  packed.n_items = in.next<std::int64_t>();
  packed.level_count = in.next<std::int64_t>();
  packed.shift = in.next<int>();
  return packed;
}

template <class Id>
void count_packed_groups(const py::tuple& fields, Address item_ids) {
  const Packed packed = packed_of(fields);
  py::gil_scoped_release unlocked;
  count_groups(packed, at<const Id>(item_ids));
}

template <class Id>
void fill_packed(const py::tuple& fields, Address item_ids, Address maxima, std::int64_t longest) {
  const Packed packed = packed_of(fields);
  py::gil_scoped_release unlocked;
  fill(packed, at<const Id>(item_ids), at<float>(maxima), longest);
}

// (the first row, the first weight) out of their limits, or -1; then nothing has been written.
py::tuple search_packed(const py::tuple& fields, const py::tuple& query_fields) {
  const Packed packed = packed_of(fields);
  Fields in(query_fields);
  Query query;
  query.rows = in.next<const std::int64_t*>();
  query.weights = in.next<const float*>();
  query.row_bias = in.next<const float*>();
  query.masks.kind = in.next<MaskKind>();
  query.masks.data = in.next<const std::uint8_t*>();
  query.masks.stride = in.next<std::int64_t>();
  query.scratch = at<std::byte>((in.next<Address>() + 63) / 64 * 64);
  query.out_scores = in.next<float*>();
  query.out_ids = in.next<std::int64_t*>();
  query.queries = in.next<std::int64_t>();
  query.width = in.next<std::int64_t>();
  query.k = in.next<std::int64_t>();
  QueryFaults faults{};
  {
    py::gil_scoped_release unlocked;
    faults = check(packed, query);
    if (faults.rows < 0 && faults.weights < 0) run(packed, query);
  }
  return py::make_tuple(faults.rows, faults.weights);
}

}  // namespace

void bind_packed_rows(py::module_& m) {
  m.attr("PACKED_ROWS_NARROW") = kNarrow;
  m.attr("PACKED_ROWS_BYTE_LOCALS") = kByteLocals;
  m.attr("PACKED_ROWS_WIDEST") = kWidest;
  m.attr("PACKED_ROWS_GROUPS") = kGroups;
  m.attr("PACKED_ROWS_LEVELS") = kMostLevels;
  m.attr("PACKED_ROWS_PADDING") = kLevelPadding;
  m.def("packed_rows_count_int32", &count_packed_groups<std::int32_t>);
  m.def("packed_rows_count_int64", &count_packed_groups<std::int64_t>);
  m.def("packed_rows_fill_int32", &fill_packed<std::int32_t>);
  m.def("packed_rows_fill_int64", &fill_packed<std::int64_t>);
  // The lowest row that is not as it was packed, or -1.
  m.def("packed_rows_verify", [](const py::tuple& fields) {
    const Packed packed = packed_of(fields);
    py::gil_scoped_release unlocked;
    return verify(packed);
  });
  m.def("packed_rows_unpack", [](const py::tuple& fields, Address item_ids) {
    const Packed packed = packed_of(fields);
    py::gil_scoped_release unlocked;
    unpack(packed, at<std::int32_t>(item_ids));
  });
  // Bytes a thread, to which 64 must be added once for alignment.
  m.def("packed_rows_scratch", [](const py::tuple& fields, std::int64_t width, std::int64_t k) {
    return scratch_bytes(packed_of(fields), width, k);
  });
  m.def("packed_rows_search", &search_packed);
}

}  // namespace recfast::bindings
