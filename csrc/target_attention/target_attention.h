// target_attention: dot-product attention of each candidate over its user's history, which the candidates share.
//
//   s[c, h, l] = scale * q[c, h] . k[l, h]
//   out[c, h]  = sum_l p[c, h, l] v[l, h]     p = softmax_l(s) | max(s, 0) | s sigmoid(s) | s; an empty history gives 0
//
// over all rows of the history, or over a list of them for each candidate. Backward computes the scores again:
//   dp = g . v_l,   dv_l += p g,   ds = p (dp - g . out) | [s > 0] dp | sigmoid(s) (1 + s (1 - sigmoid(s))) dp | dp
//   dq += scale ds k_l,   dk_l += scale ds q
//
// `select` finds the k rows of the highest sum_h s[c, h, l], highest first, ties to the later row.
//
// How          64 rows of keys (of one head) are turned so that lanes are rows; the scores of a block of candidates are
//              then a small matrix product, and so is the sum of values: rows of memory are read once for up to
//              kBlock candidates. The softmax runs along with the tiles (Milakov & Gimelshein, arXiv 1805.02867; Dao
//              et al., arXiv 2205.14135).
// Shapes       query [Nc, H Dq], keys [T, H Dq], values [T, H Dv], out [Nc, H Dv]; rows may be strided, columns not
//              user b: positions begin[b] <= l < end[b], rows candidates[b] <= c < candidates[b + 1] (null: c = b)
//              listed [Nc, K]: rows counted from begin[b], -1 for none; a row listed twice counts twice
// Dtypes       float32 or bfloat16 (sums in float32), float64
// Sums         Every sum runs in one fixed order: products over the width in order; softmax over tiles of kTile rows
//              and, past kChunk rows, over chunks that are merged in order. A candidate's answer depends neither on the
//              threads nor on other candidates or users. AVX2 and AVX-512 give the same bits (FMA); the scalar
//              form rounds products and sums apart. Error of a score: (Dq + 3) eps |scale| sum |q k|; of a weight
//              of the softmax, relative: 2 max_l |error of s| + (L / 16 + 24 + 4 max |s|) eps.
// Limits       sizes below 2^63; begin, end, candidates and listed must have been checked (check_offsets, check_listed)
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/arena.h"
#include "common/span.h"

namespace recfast::target_attention {

struct BFloat16 {
  std::uint16_t bits;
};

// What sums are kept in.
template <class In>
using Wide = std::conditional_t<std::is_same_v<In, double>, double, float>;

enum class Score : std::int64_t { kSoftmax = 0, kRelu = 1, kSilu = 2, kNone = 3 };

// Rows of the history that go through the products together.
inline constexpr std::int64_t kTile = 64;
// Rows after which a softmax starts afresh, to be merged: what threads share a long history by. A multiple of kTile.
inline constexpr std::int64_t kChunk = 1024;
// Candidates that share one reading of the keys. A multiple of kLanes, at most kTile.
inline constexpr std::int64_t kBlock = 48;
// Rows after which `select` starts a list afresh. The lists are exact, so this changes no answer. Below 2^31.
inline constexpr std::int64_t kSelectChunk = 16384;

struct Shape {
  std::int64_t users = 0;
  std::int64_t heads = 0;
  std::int64_t dim = 0;        // Dq
  std::int64_t value_dim = 0;  // Dv
  std::int64_t listed = -1;    // K; -1: all rows count
  std::int64_t kept = 0;       // k of `select`
  const std::int64_t* begin = nullptr;
  const std::int64_t* end = nullptr;
  const std::int64_t* candidates = nullptr;

  [[nodiscard]] std::int64_t length(std::int64_t user) const noexcept { return end[user] - begin[user]; }
  [[nodiscard]] std::int64_t first_candidate(std::int64_t user) const noexcept {
    return candidates == nullptr ? user : candidates[user];
  }
  [[nodiscard]] std::int64_t width() const noexcept { return padded(dim); }
  [[nodiscard]] std::int64_t value_width() const noexcept { return padded(value_dim); }
};

template <class In>
struct Args {
  Shape shape;
  Score score;
  double scale;
  Rows<const In> query;
  Rows<const In> keys;
  Rows<const In> values;
  const std::int64_t* listed;  // [Nc, K] if shape.listed >= 0
  Rows<In> out;                // read by backward
  Wide<In>* statistics;        // [Nc, H, 2], softmax only: the highest score times log2(e), 1 / sum 2^(... - highest)
  Wide<In>* scratch;
  std::int64_t* table;  // sizes(...).table numbers
};

template <class In>
struct Gradients {
  Rows<const In> grad;  // [Nc, H Dv]
  In* query;            // contiguous, like the next two; null where it is not wanted
  In* keys;             // rows outside every [begin, end) are left alone
  In* values;
};

// kSearch: select, and forward over what it found.
enum class Pass : std::int64_t { kForward = 0, kBackward = 1, kSelect = 2, kSearch = 3 };

struct Sizes {
  std::int64_t scratch = 0;  // values of Wide<In>
  std::int64_t table = 0;    // int64
};

// What a call needs with the present number of threads. `wide` is sizeof(Wide<In>).
[[nodiscard]] Sizes sizes(const Shape& shape, Pass pass, std::int64_t wide) noexcept;

// The first flat position of `listed` outside [-1, length of its candidate's history); -1 if none.
[[nodiscard]] std::int64_t check_listed(const Shape& shape, const std::int64_t* listed) noexcept;

template <class In>
void forward(const Args<In>& args) noexcept;
template <class In>
void backward(const Args<In>& args, const Gradients<In>& gradients) noexcept;
// Writes positions [Nc, kept], -1 where the history is shorter. Reads query and keys only.
template <class In>
void select(const Args<In>& args, std::int64_t* positions) noexcept;
// The same, and forward over those rows, while they are still at hand.
template <class In>
void search(const Args<In>& args, std::int64_t* positions) noexcept;

// --- what the forms share ---

// A piece of work: candidates [first, last) of one user against rows [from, to) of its history.
struct Piece {
  std::int64_t user = 0;
  std::int64_t first = 0;  // counted from the first of all candidates
  std::int64_t last = 0;
  std::int64_t from = 0;  // counted from begin[user]
  std::int64_t to = 0;
};

// A score as a whole number of the same order; NaN ranks like infinity.
template <class T>
using Rank = std::conditional_t<std::is_same_v<T, double>, std::int64_t, std::int32_t>;

// A row as `select` ranks it.
template <class T>
struct Entry {
  Rank<T> rank;
  std::int64_t position;
};

// One thread's working memory. A block's arrays are [H, kBlock, ...].
template <class T>
struct Work {
  T* query;          // [H, Dq, kBlock], or [H Dq, kBlock] for select
  T* turned;         // keys [Dq, kTile], or [H Dq, kTile] for select
  T* scores;         // [kBlock, kTile]
  T* factor;         // [kBlock] what a block's sums shrink by with a new tile
  T* rows;           // keys or values of a tile, widened [kTile, Dp]
  T* highest;        // [H, kBlock]
  T* sum;            // [H, kBlock, Dvp] (forward, like the next)
  T* weight;         // [H, kBlock, kLanes]
  T* turned_values;  // [Dv, kTile] (backward, like the rest)
  T* dscores;        // [kBlock, kTile]
  T* query_rows;     // [H, kBlock, Dqp]
  T* grad;           // [H, kBlock, Dvp]
  T* turned_grad;    // [H, Dv, kBlock]
  T* delta;          // [H, kBlock]
  T* inverse;        // [H, kBlock]
  T* dkeys;          // [H, kTile, Dqp]
  T* dvalues;        // [H, kTile, Dvp]
  T* chunk_keys;     // [kChunk, H Dqp] where rows are listed
  T* chunk_values;   // [kChunk, H Dvp]
  Rank<T>* ranks;    // [kBlock, room(kept)] (select, like the rest)
  Rank<T>* spots;    // [kBlock, room(kept)] rows, counted from the first of the piece
  Rank<T>* places;   // [room(kept)]

  // What a list of the best may grow to before it is cut back to `kept`; a multiple of kLanes.
  [[nodiscard]] static constexpr std::int64_t room(std::int64_t kept) noexcept { return padded(2 * kept) + 2 * kTile; }

  Work(Arena<T>& arena, const Shape& s, Pass pass) noexcept {
    const bool backward = pass == Pass::kBackward;
    const bool forward = pass == Pass::kForward;
    const bool select = pass == Pass::kSelect;
    const std::int64_t widest = std::max(s.width(), s.value_width());
    query = arena.take(s.heads * s.dim * kBlock);
    turned = arena.take((select ? s.heads * s.dim : s.dim) * kTile);
    scores = arena.take(kBlock * kTile);
    factor = arena.take(kBlock);
    rows = arena.take(select ? 0 : kTile * widest);
    sum = arena.take(forward ? s.heads * kBlock * s.value_width() : 0);
    highest = arena.take(select ? 0 : s.heads * kBlock);
    weight = arena.take(forward ? s.heads * kBlock * kLanes : 0);
    turned_values = arena.take(backward ? s.value_dim * kTile : 0);
    dscores = arena.take(backward ? kBlock * kTile : 0);
    query_rows = arena.take(backward ? s.heads * kBlock * s.width() : 0);
    turned_grad = arena.take(backward ? s.heads * kBlock * s.value_dim : 0);
    grad = arena.take(backward ? s.heads * kBlock * s.value_width() : 0);
    delta = arena.take(backward ? s.heads * kBlock : 0);
    inverse = arena.take(backward ? s.heads * kBlock : 0);
    dkeys = arena.take(backward ? s.heads * kTile * s.width() : 0);
    dvalues = arena.take(backward ? s.heads * kTile * s.value_width() : 0);
    const bool scattered = backward && s.listed >= 0;
    chunk_keys = arena.take(scattered ? kChunk * s.heads * s.width() : 0);
    chunk_values = arena.take(scattered ? kChunk * s.heads * s.value_width() : 0);
    ranks = reinterpret_cast<Rank<T>*>(arena.take(select ? kBlock * room(s.kept) : 0));
    spots = reinterpret_cast<Rank<T>*>(arena.take(select ? kBlock * room(s.kept) : 0));
    places = reinterpret_cast<Rank<T>*>(arena.take(select ? room(s.kept) : 0));
  }
};

// One form of the kernel: what an instruction set offers for one dtype.
template <class In>
struct Form {
  using T = Wide<In>;
  // One piece of forward. `partial` null: to out and statistics; else [candidates of the piece, H, Dvp + kLanes], to be
  // merged.
  void (*attend)(const Args<In>&, const Work<T>&, const Piece&, T* partial) noexcept;
  // Merges `parts` partials that lie `step` apart, for candidate `candidate`.
  void (*merge)(const Args<In>&, const T* partial, std::int64_t parts, std::int64_t step,
                std::int64_t candidate) noexcept;
  // One piece of backward, all candidates of the user: writes the gradients of its rows, and dquery [candidates, H,
  // Dqp].
  void (*backward)(const Args<In>&, const Gradients<In>&, const Work<T>&, const Piece&, T* dquery) noexcept;
  // Adds `parts` pieces of a query's gradient that lie `step` apart.
  void (*add_query)(const Args<In>&, In* dquery, const T* partial, std::int64_t parts, std::int64_t step,
                    std::int64_t candidate) noexcept;
  // One piece of select: `kept` entries a candidate, best first; position -1 past the last.
  void (*select)(const Args<In>&, const Work<T>&, const Piece&, Entry<T>* best) noexcept;
  // Merges `parts` such lists that lie `step` entries apart into the first.
  void (*merge_lists)(Entry<T>* best, std::int64_t parts, std::int64_t step, std::int64_t kept) noexcept;
};

extern const Form<float> kAvx2Float;
extern const Form<BFloat16> kAvx2BFloat16;
extern const Form<float> kAvx512Float;
extern const Form<BFloat16> kAvx512BFloat16;

}  // namespace recfast::target_attention
