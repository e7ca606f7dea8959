#include "embedding_update/update_probe.h"

#include <algorithm>

#include "common/parallel.h"

namespace recfast::embedding_update {
namespace {

// Inlined by force: a function of prefetches alone has no effect in GCC's eyes, and its calls go.
__attribute__((always_inline)) inline void ask(const std::uint8_t* line, std::int64_t bytes) noexcept {
  for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
  __builtin_prefetch(line + bytes - 1, 0, 2);
}

// Volatile, or the compiler would see that nothing changes.
inline void touch(volatile std::uint8_t* line, std::int64_t bytes) noexcept {
  for (std::int64_t at = 0; at < bytes; at += 64) line[at] = line[at];
  line[bytes - 1] = line[bytes - 1];
}

}  // namespace

void update_probe(std::uint8_t* table, std::int64_t row_bytes, std::uint8_t* state, std::int64_t state_bytes,
                  Span<const std::int64_t> rows, std::int64_t ahead) noexcept {
  parallel_for(static_cast<std::int64_t>(rows.size()), 4096, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t next = rows[static_cast<std::size_t>(std::min(i + ahead, last - 1))];
      ask(table + next * row_bytes, row_bytes);
      if (state_bytes > 0) ask(state + next * state_bytes, state_bytes);
      const std::int64_t row = rows[static_cast<std::size_t>(i)];
      touch(table + row * row_bytes, row_bytes);
      if (state_bytes > 0) touch(state + row * state_bytes, state_bytes);
    }
  });
}

}  // namespace recfast::embedding_update
