// A map from 64-bit ids to table rows that never lets two ids share a row: open addressing with linear probing.
//
//   home(id) = mix(id) >> (64 - log2 C), mix the finaliser of splitmix64 (a bijection, so equal low bits do no harm);
//   an id stands in the first slots from its home on that were free when it came, around the end of the array.
//
// Any id is allowed (0, -1, the smallest): whether a slot is taken is told by its `state`, not by its id. An id is
// counted from its first occurrence on, and gets a row at its `min_count`-th; until then its slot waits. Rows come from
// the free list, its end first, then from `next_row` up to `max_rows`; with none left an id goes on waiting.
//
// C (the number of slots) is a power of two, at least 2. At least one slot must stay free, or a search for an unknown
// id would not end; `limit` is the most slots that `observe` may take. Since a home is the upper bits of the mix, slots
// lie in the order of their homes, and `rebuild` reads and writes both arrays front to back.
//
// The mix has no secret key: a person who chooses ids can make them collide, which costs time, not correctness.
//
// Paper: Liu et al., "Monolith: Real Time Recommendation System With Collisionless Embedding Table", 2022
// (arXiv:2209.07663), which has cuckoo hashing, a probabilistic frequency filter, and expiry by time.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "common/span.h"

namespace recfast::id_map {

// What 16 bytes of zeros mean is a free slot.
struct Slot {
  std::int64_t id;
  std::int32_t state;  // 0: free, 1: waiting for a row, 2 + r: has row r
  std::int32_t count;  // occurrences, up to 2^31 - 1

  [[nodiscard]] bool taken() const noexcept { return state != 0; }
  [[nodiscard]] std::int64_t row() const noexcept { return std::int64_t{state} - 2; }  // negative: none
};
static_assert(sizeof(Slot) == 16);

inline constexpr std::int64_t kMaxRows = std::int64_t{std::numeric_limits<std::int32_t>::max()} - 2;

[[nodiscard]] constexpr std::uint64_t mix(std::int64_t id) noexcept {
  auto x = static_cast<std::uint64_t>(id);
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Slots and when each was last seen; `seen` may be empty where only ids are looked up.
template <class S, class T>
struct Map {
  Span<S> slots;  // C
  Span<T> seen;   // C

  [[nodiscard]] std::uint64_t mask() const noexcept { return slots.size() - 1; }
  [[nodiscard]] std::uint64_t home(std::int64_t id) const noexcept {
    return mix(id) >> (64 - std::countr_zero(slots.size()));
  }
};

// out[i] = the row of ids[i] (`row`), or the number of its slot; -1 where there is none. Reads only; the answer depends
// on no thread count.
struct FindArgs {
  Map<const Slot, const std::int32_t> map;
  Span<const std::int64_t> ids;
  bool slot_numbers = false;
  std::int64_t* out = nullptr;
};
void find(const FindArgs& args) noexcept;

struct ObserveArgs {
  Map<Slot, std::int32_t> map;
  Span<const std::int64_t> ids;
  std::int64_t first = 0;      // where to go on after the map has grown
  std::int32_t now = 0;        // what `seen` becomes
  std::int64_t min_count = 1;
  std::int64_t size = 0;       // slots taken
  std::int64_t limit = 0;      // and the most that may be: below C
  const std::int64_t* free_rows = nullptr;
  std::int64_t free = 0;
  std::int64_t next_row = 0;
  std::int64_t max_rows = 0;   // at most kMaxRows
  std::int64_t* out = nullptr;       // the row that ids[i] had after its own occurrence, or -1
  std::int64_t* admitted = nullptr;  // positions in `ids` at which an id got its row, ascending; room for ids.size()
};

struct Observed {
  std::int64_t reached;   // ids.size(), or the position of the id for which there was no slot
  std::int64_t size;      // as the arguments of these names, after the pass
  std::int64_t free;
  std::int64_t next_row;
  std::int64_t admitted;  // in this call
  bool late;              // whether an id got its row after an occurrence (maybe of this batch) that had none
};

// Counts ids[first..] in their order. One thread, since the order of arrival decides who gets which row.
[[nodiscard]] Observed observe(const ObserveArgs& args) noexcept;

struct RebuildArgs {
  Map<const Slot, const std::int32_t> from;
  Map<Slot, std::int32_t> to;    // slots all free, more of them than are kept
  std::int32_t before = 0;       // ids last seen before this are dropped
  std::int64_t* freed = nullptr;  // their rows; room for all rows in use
};

struct Rebuilt {
  std::int64_t kept;
  std::int64_t freed;
};

// Moves the ids to other arrays, of any size: growth, expiry and shrinking are the same.
[[nodiscard]] Rebuilt rebuild(const RebuildArgs& args) noexcept;

}  // namespace recfast::id_map
