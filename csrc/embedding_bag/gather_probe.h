// The limit that an embedding bag is measured against: touch every cache line of each row, in the order of the ids,
// and do nothing else. A probe with a poor hint is no limit, so the benchmark tries both hints and several distances.
#pragma once

#include <cstdint>

#include "common/span.h"

namespace recfast::embedding_bag {

// Reads one word of each line of the rows table[ids[i]] (row_bytes wide, stride = row_bytes), `ahead` rows prefetched
// into L1 (`near`) or L2. For rows of 4 to 260 bytes at multiples of 4. Ids are not checked. Returns the OR of the
// words, so that nothing is optimised away.
[[nodiscard]] std::uint32_t gather_probe(const std::uint8_t* table, std::int64_t row_bytes,
                                         Span<const std::int64_t> ids, std::int64_t ahead, bool near) noexcept;

}  // namespace recfast::embedding_bag
