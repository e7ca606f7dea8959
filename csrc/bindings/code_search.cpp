#include "bindings/bindings.h"

#include <algorithm>

#include "code_search/code_search.h"
#include "code_search/packed.h"

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

template <class Code>
recfast::code_search::Items<Code> items_of(const py::tuple& values) {
  Fields fields(values);
  recfast::code_search::Items<Code> items;
  items.planes = fields.next<const Code*>();
  items.slots = fields.next<const std::int32_t*>();
  items.bias = fields.next<const float*>();
  items.levels = fields.next<const std::uint8_t*>();
  items.edges = fields.next<const float*>();
  items.ids = fields.next<const std::int64_t*>();
  items.live = fields.next<const std::uint64_t*>();
  items.held = fields.next<const std::uint64_t*>();
  items.lanes = fields.next<std::int64_t>();
  items.size = fields.next<std::int64_t>();
  items.books = fields.next<std::int64_t>();
  items.entries = fields.next<std::int64_t>();
  return items;
}

recfast::code_search::Request request_of(const py::tuple& values) {
  Fields fields(values);
  recfast::code_search::Request request;
  request.table = fields.next<const float*>();
  request.entries = fields.next<const std::int64_t*>();
  request.values = fields.next<const float*>();
  request.offsets = fields.next<const std::int64_t*>();
  request.mask = fields.next<const std::uint64_t*>();
  request.mask_stride = fields.next<std::int64_t>();
  request.mask_by_position = fields.next<bool>();
  request.queries = fields.next<std::int64_t>();
  request.k = fields.next<std::int64_t>();
  request.plan = fields.next<recfast::code_search::Plan>();
  return request;
}

template <class Code>
std::int64_t packed_scratch(const py::tuple& items, const py::tuple& request) {
  return recfast::code_search::scratch_size(items_of<Code>(items), request_of(request));
}

// The first fault of the table, as (kind, position): kind 0 is none, and then the search is done; kinds above are those
// of SparseFault, and a dense table has kValue alone.
template <class Code>
py::tuple packed_search(const py::tuple& items_fields, const py::tuple& request_fields, std::int64_t named,
                        Address scratch, Address scores, Address found) {
  using namespace recfast::code_search;
  const Items<Code> items = items_of<Code>(items_fields);
  Request request = request_of(request_fields);
  request.scratch = at<std::byte>(scratch);
  request.scores = at<float>(scores);
  request.found = at<std::int64_t>(found);
  SparseFault fault;
  {
    py::gil_scoped_release unlocked;
    if (request.offsets != nullptr) {
      fault = check_sparse(request, named, items.books * items.entries);
    } else {
      Args<Code> args;
      args.table = request.table;
      args.queries = request.queries;
      args.books = items.books;
      args.entries = items.entries;
      fault.position = check(args, false).table;
      if (fault.position >= 0) fault.kind = SparseFault::Kind::kValue;
    }
    if (fault.kind == SparseFault::Kind::kNone) search(items, request);
  }
  return py::make_tuple(static_cast<int>(fault.kind), fault.position);
}

template <class Code>
void pack_planes(Address codes, Address slots, std::int64_t items, std::int64_t books, Address planes) {
  py::gil_scoped_release unlocked;
  recfast::code_search::pack_planes(at<const Code>(codes), at<const std::int32_t>(slots), items, books,
                                    at<Code>(planes));
}

}  // namespace

void bind_code_search(py::module_& m) {
  m.def("code_search_heaps",
        [](std::int64_t queries, std::int64_t items) { return recfast::code_search::cut_for(queries, items).heaps; });
  m.def("code_search_uint8", &code_search<std::uint8_t>);
  m.def("code_search_uint16", &code_search<std::uint16_t>);
  m.def("code_search_packed_scratch_uint8", &packed_scratch<std::uint8_t>);
  m.def("code_search_packed_scratch_uint16", &packed_scratch<std::uint16_t>);
  m.def("code_search_packed_uint8", &packed_search<std::uint8_t>);
  m.def("code_search_packed_uint16", &packed_search<std::uint16_t>);
  m.def("code_search_pack_planes_uint8", &pack_planes<std::uint8_t>);
  m.def("code_search_pack_planes_uint16", &pack_planes<std::uint16_t>);
  m.def("code_search_pack_mask", [](Address mask, std::int64_t rows, std::int64_t items, Address out) {
    py::gil_scoped_release unlocked;
    recfast::code_search::pack_mask(at<const std::uint8_t>(mask), rows, items, at<std::uint64_t>(out));
  });
  m.def("code_search_count_bits", [](Address words, std::int64_t count) {
    return recfast::code_search::count_bits(at<const std::uint64_t>(words), count);
  });
  m.def("code_search_order_mask", [](Address mask, std::int64_t rows, std::int64_t items, Address slots,
                                     Address positions, Address out) {
    py::gil_scoped_release unlocked;
    recfast::code_search::order_mask(at<const std::uint64_t>(mask), rows, items, at<const std::int32_t>(slots),
                                     at<const std::int32_t>(positions), at<std::uint64_t>(out));
  });
}

}  // namespace recfast::bindings
