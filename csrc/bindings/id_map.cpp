#include "bindings/bindings.h"

#include "id_map/id_map.h"

namespace recfast::bindings {
namespace {

template <class S, class T>
recfast::id_map::Map<S, T> id_map(Address slots, Address seen, std::int64_t size) {
  return {.slots = span_at<S>(slots, size), .seen = span_at<T>(seen, seen == 0 ? 0 : size)};
}

}  // namespace

void bind_id_map(py::module_& m) {
  using namespace recfast::id_map;
  m.attr("ID_MAP_MAX_ROWS") = kMaxRows;
  m.def("id_map_find",
        [](Address slots, std::int64_t size, Address ids, std::int64_t total, bool slot_numbers, Address out) {
          py::gil_scoped_release unlocked;
          find({.map = id_map<const Slot, const std::int32_t>(slots, 0, size),
                .ids = span_at<const std::int64_t>(ids, total),
                .slot_numbers = slot_numbers,
                .out = at<std::int64_t>(out)});
        });
  // Returns (reached, slots taken, free rows left, next row, admitted, late).
  m.def("id_map_observe",
        [](Address slots, Address seen, std::int64_t size, Address ids, std::int64_t total, std::int64_t first,
           std::int32_t now, std::int64_t min_count, std::int64_t taken, std::int64_t limit, Address free_rows,
           std::int64_t free, std::int64_t next_row, std::int64_t max_rows, Address out, Address admitted) {
          Observed done{};
          {
            py::gil_scoped_release unlocked;
            done = observe({.map = id_map<Slot, std::int32_t>(slots, seen, size),
                            .ids = span_at<const std::int64_t>(ids, total),
                            .first = first,
                            .now = now,
                            .min_count = min_count,
                            .size = taken,
                            .limit = limit,
                            .free_rows = at<const std::int64_t>(free_rows),
                            .free = free,
                            .next_row = next_row,
                            .max_rows = max_rows,
                            .out = at<std::int64_t>(out),
                            .admitted = at<std::int64_t>(admitted)});
          }
          return py::make_tuple(done.reached, done.size, done.free, done.next_row, done.admitted, done.late);
        });
  // Returns (ids kept, rows freed).
  m.def("id_map_rebuild", [](Address slots, Address seen, std::int64_t size, Address new_slots, Address new_seen,
                             std::int64_t new_size, std::int32_t before, Address freed) {
    Rebuilt done{};
    {
      py::gil_scoped_release unlocked;
      done = rebuild({.from = id_map<const Slot, const std::int32_t>(slots, seen, size),
                      .to = id_map<Slot, std::int32_t>(new_slots, new_seen, new_size),
                      .before = before,
                      .freed = at<std::int64_t>(freed)});
    }
    return py::make_tuple(done.kept, done.freed);
  });
}

}  // namespace recfast::bindings
