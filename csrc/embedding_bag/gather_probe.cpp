#include "embedding_bag/gather_probe.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.h"

namespace recfast::embedding_bag {
namespace {

template <int kLocality>
std::uint32_t probe(const std::uint8_t* table, std::int64_t row_bytes, const std::int64_t* ids, std::int64_t count,
                    std::int64_t ahead) noexcept {
  std::uint32_t seen = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint8_t* next = table + ids[std::min(i + ahead, count - 1)] * row_bytes;
    for (std::int64_t at = 0; at < row_bytes - 1; at += 64) __builtin_prefetch(next + at, 0, kLocality);
    __builtin_prefetch(next + row_bytes - 1, 0, kLocality);
    const std::uint8_t* row = table + ids[i] * row_bytes;
    std::uint32_t word;
    for (std::int64_t at = 0; at + 4 <= row_bytes; at += 64) {
      std::memcpy(&word, row + at, sizeof word);
      seen |= word;
    }
    std::memcpy(&word, row + row_bytes - 4, sizeof word);
    seen |= word;
  }
  return seen;
}

}  // namespace

std::uint32_t gather_probe(const std::uint8_t* table, std::int64_t row_bytes, Span<const std::int64_t> ids,
                           std::int64_t ahead, bool near) noexcept {
  std::atomic<std::uint32_t> seen{0};
  parallel_for(static_cast<std::int64_t>(ids.size()), 4096, [&](std::int64_t first, std::int64_t last) {
    const auto form = near ? &probe<3> : &probe<2>;
    seen |= form(table, row_bytes, ids.data() + first, last - first, ahead);
  });
  return seen;
}

}  // namespace recfast::embedding_bag
