// packed_rows: the answer of code_rows from a layout that lets most of the named rows be passed over. Exact.
//
//   y(q, i) = ((0 + t(q, 0, i)) + t(q, 1, i)) + ...,   t(q, j, i) = w(q, j) S[r(q, j), i] + c[r(q, j)]
//                                                      over the rows that hold item i
//
// Layout       Ids are cut into groups of 2^shift, 64 groups a chunk. Of each row and chunk: one word that says which
//              groups hold something, and where the chunk's postings and groups begin. Of each such group: the level
//              (1 .. L) of its highest score among L bounds of the row, and its postings.
//              Narrow groups (shift 4): a record of 16 bits that say which items, and where in the chunk the scores
//              are. Wide groups: where in the chunk the postings begin, and of each posting its place in the group.
// Search       1. Of every group the sum over the rows of bounds on t, in 8 bits rounded up: one permute and one
//                 expand for 64 groups of a row. A row that does not hold the group bounds by 0, as does one whose
//                 terms are negative.
//              2. Groups of the highest sums are added up exactly until k items are found; their k-th score is theta.
//              3. So are all other groups whose bound reaches theta, which rises meanwhile.
//              Wide groups with places of a byte are added up row after row, all those of a chunk at once: a row has
//              one or two postings in a group, or none, and no jump should depend on which.
// Exactness    Rounded addition is monotone, so the rounded sum of the bounds is no less than the rounded sum of the
//              terms; the sum in 8 bits is no less than that by 1e-5 and more. A group is left out only where it is
//              below theta. What is added up is added in the order the query names its rows, product, bias and sum
//              rounded apart: the bits of a plain loop.
// Order        score descending, ties by lowest id; never depends on k, Q, threads, instruction set or layout
// Work         K_u words and at most 64 K_u bytes a chunk; 2^shift grows as rows get sparser, up to shift 16, so that
//              chunks are about a tenth of the postings of an average row and do not grow in number with N. Bounds do
//              not help where scores are negative throughout, or k is near what the rows hold; then all is added up.
// Left out     as in code_rows.h: masked items; sums of -inf or NaN.  Padding (-inf, -1)
// Limits       N < 2^31; all that `verify` checks
// Source       block-max pruning after Mallia, Suel, Tonellotto, "Faster Learned Sparse Retrieval with Block-Max
//              Pruning", SIGIR 2024; the op is SparCode's (code_rows.h), with c the merge sort serving of streaming
//              VQ, arXiv 2501.08695
#pragma once

#include <cstddef>
#include <cstdint>

#include "code_rows/item_mask.h"

namespace recfast::code_rows {

inline constexpr std::int64_t kGroups = 64;     // groups a chunk
inline constexpr int kNarrow = 4;               // log2 of the ids of a narrow group
inline constexpr int kByteLocals = 8;           // up to this shift a place in a group is one byte and offsets are two
inline constexpr int kWidest = 16;              // beyond: two and four
inline constexpr std::int64_t kMostLevels = 63;
inline constexpr std::int64_t kLevelPadding = 64;  // bytes that may be read after the last level

struct Start {
  std::int32_t posting;
  std::int32_t group;
};

struct Packed {
  const std::int64_t* indptr = nullptr;     // [R + 1]
  const float* scores = nullptr;            // [T]
  std::int64_t* group_ptr = nullptr;        // [R + 1]
  std::uint64_t* present = nullptr;         // [R, P]
  Start* starts = nullptr;                  // [R, P + 1], from the row's first posting and group
  std::uint8_t* levels = nullptr;           // [G + kLevelPadding]
  void* groups = nullptr;                   // [G + 1] uint32 records (narrow), uint16 or uint32 offsets (wide)
  void* locals = nullptr;                   // [T] uint8 or uint16 (wide), null (narrow)
  float* upper = nullptr;                   // [R, L] rising
  float* lowest = nullptr;                  // [R] the lowest score of a row
  std::int64_t n_rows = 0;
  std::int64_t n_items = 0;
  std::int64_t level_count = 0;             // L
  int shift = kNarrow;

  [[nodiscard]] std::int64_t chunk_items() const noexcept { return kGroups << shift; }
  [[nodiscard]] std::int64_t chunks() const noexcept { return (n_items + chunk_items() - 1) / chunk_items(); }
};

struct Query {
  const std::int64_t* rows = nullptr;
  const float* weights = nullptr;   // or null: all 1
  const float* row_bias = nullptr;  // [R], or null: all 0
  Masks masks;
  std::byte* scratch = nullptr;     // threads * scratch_bytes(...), 64-byte aligned
  float* out_scores = nullptr;
  std::int64_t* out_ids = nullptr;
  std::int64_t queries = 0;
  std::int64_t width = 0;           // Ku
  std::int64_t k = 0;
};

// Groups of every row, cumulated: fills group_ptr.
template <class Id>
void count_groups(const Packed& packed, const Id* item_ids) noexcept;

// Fills all but group_ptr. maxima: threads * 2 * longest floats, `longest` the groups of the row
// that has most.
template <class Id>
void fill(const Packed& packed, const Id* item_ids, float* maxima, std::int64_t longest) noexcept;

// The lowest row that is not as `fill` writes it, or -1. Afterwards a search stays within the arrays and is exact.
[[nodiscard]] std::int64_t verify(const Packed& packed) noexcept;

// The ids of all postings.
void unpack(const Packed& packed, std::int32_t* item_ids) noexcept;

[[nodiscard]] std::int64_t scratch_bytes(const Packed& packed, std::int64_t width, std::int64_t k) noexcept;

// Flat positions of the first row and the first weight out of their limits, or -1.
struct QueryFaults {
  std::int64_t rows;
  std::int64_t weights;
};

[[nodiscard]] QueryFaults check(const Packed& packed, const Query& query) noexcept;

// Threaded over queries. `check` must have passed.
void run(const Packed& packed, const Query& query) noexcept;

// One query by one thread, with the scratch of that thread. With AVX-512 and VBMI2.
void search_avx512(const Packed& packed, const Query& query, std::int64_t number, std::byte* scratch) noexcept;
[[nodiscard]] bool has_avx512_form() noexcept;

}  // namespace recfast::code_rows
