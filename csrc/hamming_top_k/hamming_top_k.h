// hamming_top_k: of each user's history, the k rows whose codes differ from a candidate's in the fewest bits.
//
//   d(c, l) = sum_w popcount(query[c, w] xor key[l, w])
//   out[c]  = the k rows l (counted from the start of the history) that are smallest by (d, -l), in order; -1 beyond
//
// Shapes       query [Nc, W], keys [T, W]; user b: rows begin[b] <= l < end[b], candidates[b] <= c < candidates[b + 1]
//              (null: c = b); out [Nc, k]; rows may be strided
// Dtypes       Code uint64 or uint8; out int64
// Method       all distances of a candidate in 16 bits; the k-th smallest by counting how many are at most t, halving
//              the range of t; then one sweep from the end. Integers only: the answer is the same on every instruction
//              set and thread count
// Limits       fewer than 2^16 bits a code; begin, end and candidates must have been checked
// Source       Chen et al., "Efficient Long Sequential User Data Modeling for Click-Through Rate Prediction" (ETA),
//              arXiv 2108.04468
#pragma once

#include <cstdint>

#include "common/span.h"

namespace recfast::hamming_top_k {

struct Shape {
  std::int64_t users = 0;
  std::int64_t words = 0;    // of Code
  std::int64_t k = 0;
  std::int64_t longest = 0;  // at least every end[b] - begin[b]
};

template <class Code>
struct Args {
  Shape shape;
  Rows<const Code> query;
  Rows<const Code> keys;
  const std::int64_t* begin = nullptr;
  const std::int64_t* end = nullptr;
  const std::int64_t* candidates = nullptr;
  std::int64_t* out = nullptr;
  std::uint64_t* scratch = nullptr;  // scratch_size(shape, sizeof(Code)) values
};

// 64-bit words of scratch that a call needs with the present number of threads.
[[nodiscard]] std::int64_t scratch_size(const Shape& shape, std::int64_t code_bytes) noexcept;

void run(const Args<std::uint64_t>& args) noexcept;
void run(const Args<std::uint8_t>& args) noexcept;

// --- what the forms share ---

// Distances come in whole groups of this many; those beyond the history are kFar.
inline constexpr std::int64_t kGroup = 32;
inline constexpr std::uint16_t kFar = 0xffff;

// Codes of one user, one plane a word: word w of row l is planes[w * stride + l].
struct Planes {
  const std::uint64_t* planes;
  std::int64_t stride;
  std::int64_t words;
  std::int64_t length;
};

// distances[l] for l < length, kFar up to the next group.
using Distances = void(const Planes& keys, const std::uint64_t* query, std::uint16_t* distances) noexcept;
// How many of `groups` groups are at most `limit`.
using Count = std::int64_t(const std::uint16_t* distances, std::int64_t groups, std::uint16_t limit) noexcept;
// One bit for each distance of a group that is at most `limit`.
using Near = std::uint32_t(const std::uint16_t* group, std::uint16_t limit) noexcept;

struct Forms {
  Distances* distances;
  Count* count;
  Near* near;
};

[[nodiscard]] Forms forms_avx2() noexcept;
// Needs VPOPCNTDQ.
[[nodiscard]] Forms forms_avx512() noexcept;

}  // namespace recfast::hamming_top_k
