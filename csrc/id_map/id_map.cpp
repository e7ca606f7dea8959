#include "id_map/id_map.h"

#include <algorithm>

#include "common/parallel.h"

namespace recfast::id_map {
namespace {

constexpr std::int64_t kAhead = 32;  // ids whose slots are on their way from memory; a power of two

// Calls body(i, home of ids[i]) for each i in [first, last), the slots of the ids to come being fetched.
template <bool kWrite, class M, class Body>
void for_each_home(const M map, const std::int64_t* ids, std::int64_t first, std::int64_t last,
                   const Body& body) noexcept {
  std::uint64_t homes[kAhead];
  const auto fetch = [&](std::int64_t i) {
    const std::uint64_t home = map.home(ids[i]);
    homes[i & (kAhead - 1)] = home;
    __builtin_prefetch(&map.slots[home], kWrite ? 1 : 0, 3);
    if constexpr (kWrite) __builtin_prefetch(&map.seen[home], 1, 3);
  };
  for (std::int64_t i = first; i < std::min(first + kAhead, last); ++i) fetch(i);
  for (std::int64_t i = first; i < last; ++i) {
    const std::uint64_t home = homes[i & (kAhead - 1)];
    if (i + kAhead < last) fetch(i + kAhead);
    if (!body(i, home)) return;
  }
}

// The slot of `id`, or the free one where the search for it ends.
template <class S, class T>
[[nodiscard]] std::uint64_t probe(const Map<S, T>& map, std::int64_t id, std::uint64_t slot) noexcept {
  const std::uint64_t mask = map.mask();
  // About a third of the ids stand one slot on: as a sum that is no branch to guess wrong.
  slot = (slot + static_cast<std::uint64_t>(map.slots[slot].taken() & (map.slots[slot].id != id))) & mask;
  while (map.slots[slot].taken() && map.slots[slot].id != id) slot = (slot + 1) & mask;
  return slot;
}

}  // namespace

void find(const FindArgs& args) noexcept {
  parallel_for(static_cast<std::int64_t>(args.ids.size()), 4096, [&](std::int64_t first, std::int64_t last) {
    // Copies: what is written through `out` could, for all the compiler knows, be the sizes in `args`.
    const auto map = args.map;
    const std::int64_t* const ids = args.ids.data();
    std::int64_t* const out = args.out;
    const bool slot_numbers = args.slot_numbers;
    for_each_home<false>(map, ids, first, last, [=](std::int64_t i, std::uint64_t home) {
      const std::uint64_t at = probe(map, ids[i], home);
      const Slot& slot = map.slots[at];
      if (slot_numbers) {
        out[i] = slot.taken() ? static_cast<std::int64_t>(at) : -1;
      } else {
        out[i] = std::max<std::int64_t>(slot.row(), -1);
      }
      return true;
    });
  });
}

Observed observe(const ObserveArgs& args) noexcept {
  const auto total = static_cast<std::int64_t>(args.ids.size());
  Observed result{total, args.size, args.free, args.next_row, 0, false};
  for_each_home<true>(args.map, args.ids.data(), args.first, total, [&](std::int64_t i, std::uint64_t home) {
    const std::int64_t id = args.ids[static_cast<std::size_t>(i)];
    const std::uint64_t at = probe(args.map, id, home);
    Slot& slot = args.map.slots[at];
    const bool known = slot.taken();
    if (!known) {
      if (result.size >= args.limit) {
        result.reached = i;
        return false;
      }
      slot = {id, 1, 0};
      ++result.size;
    }
    if (slot.count != std::numeric_limits<std::int32_t>::max()) ++slot.count;
    args.map.seen[at] = args.now;
    if (slot.row() < 0 && slot.count >= args.min_count) {
      std::int64_t row = -1;
      if (result.free > 0) {
        row = args.free_rows[--result.free];
      } else if (result.next_row < args.max_rows) {
        row = result.next_row++;
      }
      if (row >= 0) {
        slot.state = static_cast<std::int32_t>(row + 2);
        args.admitted[result.admitted++] = i;
        result.late |= known;
      }
    }
    args.out[i] = std::max<std::int64_t>(slot.row(), -1);
    return true;
  });
  return result;
}

Rebuilt rebuild(const RebuildArgs& args) noexcept {
  Rebuilt result{0, 0};
  for (std::size_t i = 0; i < args.from.slots.size(); ++i) {
    const Slot& slot = args.from.slots[i];
    if (!slot.taken()) continue;
    if (args.from.seen[i] < args.before) {
      if (slot.row() >= 0) args.freed[result.freed++] = slot.row();
      continue;
    }
    const std::uint64_t at = probe(args.to, slot.id, args.to.home(slot.id));
    args.to.slots[at] = slot;
    args.to.seen[at] = args.from.seen[i];
    ++result.kept;
  }
  return result;
}

}  // namespace recfast::id_map
