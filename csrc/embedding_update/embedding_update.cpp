#include "embedding_update/embedding_update.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/random.h"

namespace recfast::embedding_update {
namespace {

// Rows a thread takes at a time: hot rows make the work uneven.
constexpr std::int64_t kChunk = 128;

constexpr int kUnit = 4;

inline void draw_unit(std::uint64_t seed, std::uint32_t step_count, std::uint32_t table_id, std::uint32_t row,
                      std::uint32_t block, float* u) noexcept {
  std::uint32_t words[4];
  Philox{seed}(step_count, table_id, row, block, words);
  for (int i = 0; i < 4; ++i) u[i] = uniform01(words[i]);
}

#include "embedding_update/embedding_update_rows.h"

}  // namespace

std::int64_t first_not_finite(const float* values, std::int64_t size) noexcept {
  constexpr std::uint32_t kInfinity = 0x7F800000u;
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(values[i]) & 0x7FFFFFFFu);
  }
  if (largest < kInfinity) return -1;
  std::int64_t i = 0;
  while ((std::bit_cast<std::uint32_t>(values[i]) & 0x7FFFFFFFu) < kInfinity) ++i;
  return i;
}

template <class Value>
std::int64_t rows_scalar(const Args<Value>& args, std::int64_t first, std::int64_t last, float* g, float* w) noexcept {
  return rows(args, first, last, g, w);
}

template <class Value>
std::int64_t run(const Args<Value>& args) noexcept {
  const auto form = IsaTable<decltype(rows_scalar<Value>)>{
      .scalar = rows_scalar<Value>,
#if defined(__x86_64__)
      .avx2 = rows_avx2<Value>,
      .avx512 = rows_avx512<Value>,
#endif
  }.pick();
  const std::int64_t full = padded(args.table.width);
  std::atomic<std::int64_t> clipped{0};
  std::fill(args.scratch, args.scratch + 2 * full * max_threads(), 0.0f);
  parallel_for_each((args.runs + kChunk - 1) / kChunk, [&](std::int64_t chunk, int thread) {
    float* const g = args.scratch + 2 * full * thread;
    clipped += form(args, chunk * kChunk, std::min(args.runs, (chunk + 1) * kChunk), g, g + full);
  });
  return clipped;
}

template std::int64_t run(const Args<float>&) noexcept;
template std::int64_t run(const Args<std::int8_t>&) noexcept;

}  // namespace recfast::embedding_update
