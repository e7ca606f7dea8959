// category_top_k: of each user's history, the latest k rows whose category is the candidate's (SIM's hard search).
//
//   out[c] = the largest k positions l (counted from the start of the history) with key[l] = query[c], latest first;
//            -1 beyond
//
// Shapes       query [Nc], keys [T]; user b: rows begin[b] <= l < end[b], candidates[b] <= c < candidates[b + 1]
//              (null: c = b); out [Nc, k]; values may lie apart
// Dtypes       Category int32 or int64; out int64
// Method       one sweep from the end that stops when k were found. Integers only: the answer is the same on every
//              instruction set and thread count
// Limits       begin, end and candidates must have been checked
// Source       Pi et al., "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through
//              Rate Prediction" (SIM), CIKM 2020, arXiv 2006.05639
#pragma once

#include <cstdint>

namespace recfast::category_top_k {

template <class Category>
struct Args {
  const Category* query = nullptr;
  std::int64_t query_stride = 1;
  const Category* keys = nullptr;
  std::int64_t keys_stride = 1;
  const std::int64_t* begin = nullptr;
  const std::int64_t* end = nullptr;
  const std::int64_t* candidates = nullptr;
  std::int64_t* out = nullptr;
  std::int64_t users = 0;
  std::int64_t rows = 0;  // Nc
  std::int64_t k = 0;
};

void run(const Args<std::int32_t>& args) noexcept;
void run(const Args<std::int64_t>& args) noexcept;

// --- what the forms share ---

// One bit for each of keys[0:kGroup] that is `category`.
inline constexpr std::int64_t kGroup = 32;
template <class Category>
using Equal = std::uint32_t(const Category* keys, Category category) noexcept;

std::uint32_t equal_avx2(const std::int32_t* keys, std::int32_t category) noexcept;
std::uint32_t equal_avx2(const std::int64_t* keys, std::int64_t category) noexcept;
std::uint32_t equal_avx512(const std::int32_t* keys, std::int32_t category) noexcept;
std::uint32_t equal_avx512(const std::int64_t* keys, std::int64_t category) noexcept;

}  // namespace recfast::category_top_k
