// The limit that an update is measured against: read and write every cache line of each row that occurs and of its
// state, in the order of the rows, and do nothing else.
#pragma once

#include <cstdint>

#include "common/span.h"

namespace recfast::embedding_update {

// Reads and writes back one byte of each line of table[rows[i]] (row_bytes wide, stride = row_bytes) and of
// state[rows[i]] (state_bytes, likewise; 0 for none), `ahead` rows prefetched into L2. Rows must be distinct; they are
// not checked.
void update_probe(std::uint8_t* table, std::int64_t row_bytes, std::uint8_t* state, std::int64_t state_bytes,
                  Span<const std::int64_t> rows, std::int64_t ahead) noexcept;

}  // namespace recfast::embedding_update
