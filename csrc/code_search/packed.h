// code_search over packed items: the scores, the order and the limits of code_search.h, from blocks of 64 items.
//
// Layout       planes [P, M, 64]: plane m of block p holds code m of positions 64 p .. 64 p + 63; a position is where
//              an item lies, a slot is its row before packing; slots [N]: the slot at a position (null: the same
//              number)
// Bound        An item whose rounded sum F reaches theta, the k-th best so far, has deficits d_m = max_c T[m, c] -
//              T[m, c_m] (the bias is one more codebook, of 256 levels, each at least the biases it stands for) with
//                 sum d_m <= R = D + e,  D = sum max_m - theta,  e = g / (1 - g) (A + |D|),
//                 A = sum |max_m|,  g = n u / (1 - n u)
//              n = M + 1 additions, u = 2^-24: |F - S| <= g sum |t_m| of any order of n additions, sum |t_m| <= A +
//              sum d_m, sum d_m = sum max_m - S. Deficits are rounded down to 8 bits in steps of R / 254 and added
//              with saturation; an item goes on where the sum is at most the limit, which falls as theta rises. What
//              goes on is summed in float32 and compared exactly, so that the bound decides the time and never the
//              answer. No bound where A or D reaches 1e38, that is where a sum could overflow.
// Block-max    Bitmaps say which groups (256 items) hold a code: the sum over the codebooks of the smallest deficit
//              that a group holds bounds all its items. A cache line speaks of a code and 512 groups, so that only
//              lines of the codes that score best are read: a group without one of these has at least the deficit of
//              the best code left out. With K > 256, 2^s neighbouring codes share a bit and the larger entry.
// Method       theta from a sample first; then groups best bound first, more of them each time, as long as bounds
//              tell them apart, or all of them as they lie (one superblock, 4096 items, in 16 first, so that theta
//              rises soon wherever the good items are). A scan notes where something may be good enough; that is
//              scored, then compared, many at a time. What is good enough goes to a buffer that is cut to the k best
//              whenever it is full.
// Threads      A query belongs to a thread; with fewer queries than threads, superblocks or groups are dealt out and
//              theta is shared: only items strictly below it are dropped, so the answer cannot depend on who was first.
// Forms        AVX-512 with VBMI: 256 deficits in four registers, two permutations a codebook and 64 items, and sums
//              of two byte codes by gathers. AVX2: 16 deficits a register and a tree of blends. Scalar, and two byte
//              codes on AVX2: everything is scored
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/span.h"

namespace recfast::code_search {

inline constexpr std::int64_t kItems = 64;                          // of a block: one bit each of a word
inline constexpr std::int64_t kGroup = 4;                           // blocks that are bounded and scanned together
inline constexpr std::int64_t kSuper = 16 * kGroup;                 // blocks of a superblock
inline constexpr std::int64_t kLevels = 256;                        // of a byte
inline constexpr std::int64_t kWord = 64;                           // groups of a word of a bitmap

template <class Code>
struct Items {
  const Code* planes = nullptr;
  const std::int32_t* slots = nullptr;
  const float* bias = nullptr;           // by position, or null
  const std::uint8_t* levels = nullptr;  // by position, with a bias: its level
  const float* edges = nullptr;          // [256]: at least every bias of the level
  const std::int64_t* ids = nullptr;     // by slot, or null
  const std::uint64_t* live = nullptr;   // a bit a position, or null
  // Which groups hold a code, or null: [ceil(P / (256 lanes)), M or M + 1, 256, lanes]; levels have the last row.
  const std::uint64_t* held = nullptr;
  std::int64_t lanes = 0;  // words that lie together: 1, 2, 4 or 8
  std::int64_t size = 0;
  std::int64_t books = 0;
  std::int64_t entries = 0;
};

enum class Plan : int { kScan = 0, kBlockMax = 1, kScalar = 2 };

struct Request {
  const float* table = nullptr;             // [Q, M, K]; or, with offsets, a sparse one:
  const std::int64_t* entries = nullptr;    // [nnz] m * K + c
  const float* values = nullptr;            // [nnz]; what is not named is 0
  const std::int64_t* offsets = nullptr;    // [Q + 1]; null: dense
  const std::uint64_t* mask = nullptr;      // a bit a slot, or null
  std::int64_t mask_stride = 0;             // words from one query's mask to the next; 0 where all share one
  bool mask_by_position = false;            // a bit a position instead
  std::int64_t queries = 0;
  std::int64_t k = 0;
  Plan plan = Plan::kScan;
  std::byte* scratch = nullptr;             // scratch_size bytes, at a cache line
  float* scores = nullptr;
  std::int64_t* found = nullptr;
};

// Bytes that a call needs with the present number of threads.
template <class Code>
[[nodiscard]] std::int64_t scratch_size(const Items<Code>& items, const Request& request) noexcept;

// The first fault of a sparse table: what is wrong, and the flat position. Offsets are looked at first.
struct SparseFault {
  enum class Kind : int { kNone = 0, kOffset, kEntry, kOrder, kValue } kind = Kind::kNone;
  std::int64_t position = -1;
};
[[nodiscard]] SparseFault check_sparse(const Request& request, std::int64_t count, std::int64_t table_size) noexcept;

// Threaded. Tables and codes must have been checked.
template <class Code>
void search(const Items<Code>& items, const Request& request) noexcept;

// One byte an item, 0 or 1, to one bit: row r to words out + r * ceil(items / 64). Threaded.
void pack_mask(const std::uint8_t* mask, std::int64_t rows, std::int64_t items, std::uint64_t* out) noexcept;
// How many bits are set.
[[nodiscard]] std::int64_t count_bits(const std::uint64_t* words, std::int64_t count) noexcept;
// Bits by slot to bits by position: out[i] = mask[slots[i]]; positions is the inverse of slots.
void order_mask(const std::uint64_t* mask, std::int64_t rows, std::int64_t items, const std::int32_t* slots,
                const std::int32_t* positions, std::uint64_t* out) noexcept;
// Rows of codes [items, books] to planes; slots as above, or null. Threaded.
template <class Code>
void pack_planes(const Code* codes, const std::int32_t* slots, std::int64_t items, std::int64_t books,
                 Code* planes) noexcept;

// --- what the forms share ---

// Blocks in which to look for items that may reach theta.
template <class Code>
struct Sight {
  const Code* planes;
  const std::uint8_t* levels;   // or null
  const std::uint8_t* lut;      // [books + 1, 256] deficits; the last row is of the levels
  const std::int32_t* list;     // places of a stretch count in this list of blocks; null: they are blocks
  const std::uint64_t* allowed;  // with a list: the items of each of its blocks that may be found
  std::int64_t books;
  std::int64_t entries;
  int limit;
  const float* table;           // [books, entries]
  const float* bias;            // or null
  std::int64_t size;            // items
  float theta;

  [[nodiscard]] std::int64_t block(std::int64_t at) const noexcept { return list == nullptr ? at : list[at]; }
};

// kGroup blocks from place `at` of a stretch, with items that may reach theta: one bit each.
struct Hit {
  std::int64_t at;
  std::uint64_t masks[kGroup];
};
// So many are noted before they are looked into, with one limit for all: what is looked for rarely should not
// interrupt.
inline constexpr std::int64_t kHits = 16;

// Looks through places [first, last), kGroup at a time (fewer at the end), until there are kHits hits; how many there
// are. `next` becomes the place to go on from.
template <class Code>
using Seek = std::int64_t(const Sight<Code>& sight, std::int64_t first, std::int64_t last, Hit* hits,
                          std::int64_t* next) noexcept;
// out[c] = min(255, floor((top - values[c]) * inverse)) for c < count, 255 for the rest of 256.
using Deficits = void(const float* values, std::int64_t count, float top, float inverse, std::uint8_t* out) noexcept;
// The largest of count values.
using Top = float(const float* values, std::int64_t count) noexcept;
// out[g] = min(255, the sum over rows of the smaller of floors[row] and the smallest deficit of a code that group g
// holds), for 64 * lanes groups a span of `held`. Only codes whose deficit is below the floor are looked at.
using Bounds = void(const std::uint64_t* held, std::int64_t spans, std::int64_t rows, std::int64_t lanes,
                    const std::uint8_t* lut, const std::uint8_t* floors, std::uint8_t* out) noexcept;
// Which of 64 bytes are at most `most`: one bit each.
using Within = std::uint64_t(const std::uint8_t* values, int most) noexcept;
// How many of `those` (a bit each) of 64 bytes a word are at most `most`.
using Count = std::int64_t(const std::uint8_t* values, const std::uint64_t* those, std::int64_t words,
                           int most) noexcept;
// How many bits are set.
using CountBits = std::int64_t(const std::uint64_t* words, std::int64_t count) noexcept;

// How many of `count` keys are at least `key`.
using Reach = std::int64_t(const std::int32_t* keys, std::int64_t count, std::int32_t key) noexcept;

template <class Code>
struct Forms {
  Seek<Code>* seek;
  Deficits* deficits;
  Top* top;
  Bounds* bounds;
  Within* within;
  Count* count;
  CountBits* bits;
  Reach* reach;
};

// The seek that leaves everything to the exact sum.
template <class Code>
std::int64_t seek_none(const Sight<Code>& sight, std::int64_t first, std::int64_t last, Hit* hits,
                       std::int64_t* next) noexcept {
  std::int64_t count = 0;
  for (; first < last && count < kHits; first += kGroup) {
    Hit& hit = hits[count++];
    hit.at = first;
    for (std::int64_t i = 0; i < kGroup && first + i < last; ++i) {
      hit.masks[i] = sight.list == nullptr ? ~std::uint64_t{0} : sight.allowed[first + i];
    }
  }
  *next = first;
  return count;
}

using PackWords = void(const std::uint8_t* mask, std::int64_t words, std::uint64_t* out) noexcept;
PackWords pack_words_avx2;
PackWords pack_words_avx512;
CountBits count_bits_avx2;
CountBits count_bits_avx512;

[[nodiscard]] Forms<std::uint8_t> forms_avx2(std::uint8_t) noexcept;
[[nodiscard]] Forms<std::uint16_t> forms_avx2(std::uint16_t) noexcept;
// These need VBMI.
[[nodiscard]] Forms<std::uint8_t> forms_avx512(std::uint8_t) noexcept;
[[nodiscard]] Forms<std::uint16_t> forms_avx512(std::uint16_t) noexcept;

}  // namespace recfast::code_search
