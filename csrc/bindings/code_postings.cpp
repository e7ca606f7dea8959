#include "bindings/bindings.h"

#include <algorithm>

#include "code_postings/code_postings.h"

namespace recfast::bindings {
namespace {

namespace kernel = recfast::code_postings;

template <class Code>
void build(Address planes, std::int64_t items, std::int64_t books, std::int64_t entries, Address indptr,
           Address positions, Address starts) {
  py::gil_scoped_release unlocked;
  kernel::build(at<const Code>(planes), items, books, entries, at<std::int64_t>(indptr), at<std::int32_t>(positions),
                at<std::int64_t>(starts));
}

template <class Code>
void count(Address planes, std::int64_t items, std::int64_t books, std::int64_t entries, Address counts) {
  py::gil_scoped_release unlocked;
  kernel::count(at<const Code>(planes), items, books, entries, at<std::int64_t>(counts));
}

template <class Code>
void run(const py::kwargs& given) {
  const Named named(given);
  const auto number = [&](const char* name) { return named.number(name); };
  const std::int64_t threads = number("threads");
  const std::int64_t tile = number("tile");
  kernel::Args<Code> args{};
  args.planes = named.pointer<const Code>("planes");
  args.indptr = named.pointer<const std::int64_t>("indptr");
  args.positions = named.pointer<const std::int32_t>("positions");
  args.order = named.pointer<const std::int32_t>("order");
  args.slots = named.pointer<const std::int32_t>("slots");
  args.bias = named.pointer<const float>("bias");
  args.ids = named.pointer<const std::int64_t>("ids");
  args.live = named.pointer<const std::uint64_t>("live");
  args.mask = named.pointer<const std::uint64_t>("mask");
  args.mask_stride = number("mask_stride");
  args.codes = named.pointer<const std::int64_t>("codes");
  args.values = named.pointer<const float>("values");
  args.offsets = named.pointer<const std::int64_t>("offsets");
  args.scores = named.pointer<float>("scores");
  args.found = named.pointer<std::int64_t>("found");
  args.queries = number("queries");
  args.items = number("items");
  args.books = number("books");
  args.entries = number("entries");
  args.longest = number("longest");
  args.k = number("k");
  const std::int64_t words = (args.books * args.entries + 63) / 64;
  // One piece of zeros, cut in three.
  const Address zeros = static_cast<Address>(number("zeros"));
  args.sums = span_at<float>(zeros, threads * tile);
  args.touched = span_at<std::uint64_t>(zeros + 4 * threads * tile, threads * tile / 64);
  args.named = span_at<std::uint64_t>(zeros + 4 * threads * tile + threads * tile / 8, threads * words);
  args.cursors = span_at<std::int64_t>(static_cast<Address>(number("cursors")), threads * args.longest);
  args.heaps =
      span_at<recfast::Scored>(static_cast<Address>(number("heaps")), threads * std::min(args.k, args.items));
  py::gil_scoped_release unlocked;
  kernel::run(args);
}

}  // namespace

void bind_code_postings(py::module_& m) {
  m.attr("code_postings_tile") = kernel::kTile;
  m.def("code_postings_count_uint8", &count<std::uint8_t>);
  m.def("code_postings_count_uint16", &count<std::uint16_t>);
  m.def("code_postings_build_uint8", &build<std::uint8_t>);
  m.def("code_postings_build_uint16", &build<std::uint16_t>);
  // (outside, unsorted, values), as in Faults
  m.def("code_postings_check", [](Address codes, Address values, std::int64_t total, Address offsets,
                                  std::int64_t queries, std::int64_t limit) {
    const kernel::Faults faults =
        kernel::check(span_at<const std::int64_t>(codes, total), span_at<const float>(values, total),
                      span_at<const std::int64_t>(offsets, queries + 1), limit);
    return py::make_tuple(faults.outside, faults.unsorted, faults.values);
  });
  m.def("code_postings_uint8", &run<std::uint8_t>);
  m.def("code_postings_uint16", &run<std::uint16_t>);
}

}  // namespace recfast::bindings
