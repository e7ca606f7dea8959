#include "embedding_bag/gather_probe.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.h"

namespace recfast::embedding_bag {
namespace {

std::uint32_t word_at(const std::uint8_t* address) noexcept {
  std::uint32_t word;
  std::memcpy(&word, address, sizeof word);
  return word;
}

// kLines: 64-byte pieces before the last four bytes, which are touched apart.
template <int kLocality, int kLines>
std::uint32_t probe(const std::uint8_t* table, std::int64_t row_bytes, const std::int64_t* ids, std::int64_t count,
                    std::int64_t ahead) noexcept {
  std::uint32_t seen = 0;
  const std::int64_t last = row_bytes - 4;
  const auto touch = [&](std::int64_t i) {
    const std::uint8_t* row = table + ids[i] * row_bytes;
    for (int k = 0; k < kLines; ++k) seen |= word_at(row + 64 * k);
    seen |= word_at(row + last);
  };
  const std::int64_t most = std::max<std::int64_t>(count - ahead, 0);
  for (std::int64_t i = 0; i < most; ++i) {
    const std::uint8_t* next = table + ids[i + ahead] * row_bytes;
    for (int k = 0; k < kLines; ++k) __builtin_prefetch(next + 64 * k, 0, kLocality);
    __builtin_prefetch(next + last + 3, 0, kLocality);
    touch(i);
  }
  for (std::int64_t i = most; i < count; ++i) touch(i);
  return seen;
}

template <int kLocality>
auto pick(std::int64_t row_bytes) noexcept {
  switch ((row_bytes - 4) / 64) {
    case 0: return &probe<kLocality, 1>;
    case 1: return row_bytes <= 68 ? &probe<kLocality, 1> : &probe<kLocality, 2>;
    case 2: return &probe<kLocality, 3>;
    default: return &probe<kLocality, 4>;
  }
}

}  // namespace

std::uint32_t gather_probe(const std::uint8_t* table, std::int64_t row_bytes, Span<const std::int64_t> ids,
                           std::int64_t ahead, bool near) noexcept {
  std::atomic<std::uint32_t> seen{0};
  const auto form = near ? pick<3>(row_bytes) : pick<2>(row_bytes);
  parallel_for(static_cast<std::int64_t>(ids.size()), 4096, [&](std::int64_t first, std::int64_t last) {
    seen |= form(table, row_bytes, ids.data() + first, last - first, ahead);
  });
  return seen;
}

}  // namespace recfast::embedding_bag
