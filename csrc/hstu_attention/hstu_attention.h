// hstu_attention: pointwise SiLU attention over jagged sequences, with biases of position and of time, and gradients.
//
//   z[i, j] = alpha q_i . k_j + position[j - i + N - 1] + time[bucket(t_{i+1} - t_j)]     t of the last row: its own
//   out_i   = sum_j mask(i, j) silu(z[i, j]) / N  v_j                                      N = max_length, a constant
//
// bucket(x) = how many of the given thresholds lie at or below |x| (the difference taken exactly, in 64 bits unsigned).
// All heads of a pair share its bucket. What the mask lets a row see is one interval of columns and the row itself:
//   id(x)      = max(x - c + 1, 0) behind a prefix of c > 0 rows, else x; at most m = rows - targets - c + (c > 0)
//   mask(i, j) = i == j  or  d > 0 and d <= window, d = id(i) - id(j) (causal) or |id(i) - id(j)| (full)
//                or id(i) == 0 and id(j) < m, where there is a prefix
//
// Shapes       q, k [rows, H, Dq], v, out [rows, H, Dv]: rows and heads may lie apart, the values of a head lie side by
//              side; sequences are jagged or padded; position [2 N - 1], one or one a head; time [buckets + 1]
// Dtypes       float32, float64, or bfloat16 rows with everything else float32
// Accumulator  float32 (float64 for float64); every sum runs in one fixed order: tiles of kTile rows by kTile rows,
//              then the order of rows within. AVX2 and AVX-512 give the same bits (FMA); the scalar form rounds
//              products and sums apart. Nothing depends on the number of threads or on the rest of the batch, save the
//              gradients of the biases, which sum over the batch, cut by its lengths alone, the parts added in float64.
// Memory       linear in rows: no tile outlives its turn, backward makes it again
// Limits       sizes below 2^63; with a position bias, sequences of at most N rows; all must have been checked
// Sources      Zhai et al., "Actions Speak Louder than Words", ICML 2024 (arXiv 2402.17152), and its published program
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/arena.h"
#include "common/heads.h"

namespace recfast::hstu_attention {

struct Shape {
  std::int64_t heads = 0;
  std::int64_t dim = 0;        // Dq
  std::int64_t value_dim = 0;  // Dv
  std::int64_t max_length = 1;
  std::int64_t buckets = -1;        // -1: no time bias
  std::int64_t borders = 0;         // thresholds there are: at most buckets + 1
  std::int64_t position_heads = 0;  // 0: no position bias; 1: one for all heads; else heads

  [[nodiscard]] std::int64_t positions() const noexcept { return 2 * max_length - 1; }
  // Heads that a task takes together: all where they share the buckets of a pair.
  [[nodiscard]] std::int64_t group() const noexcept { return buckets >= 0 ? heads : 1; }
};

struct Mask {
  bool causal = true;
  std::int64_t window = -1;                     // -1: none
  const std::int64_t* targets = nullptr;        // [B], each in [0, rows of the sequence]
  const std::int64_t* contextual = nullptr;     // [B], cut to the rows before the targets
};

// `Value` is what rows are made of (std::uint16_t: bfloat16), T what is computed with.
template <class T, class Value = T>
struct Args {
  Sequences sequences;
  Shape shape;
  Mask mask;
  T alpha;
  Heads<const Value> q;
  Heads<const Value> k;
  Heads<const Value> v;
  Heads<const std::int64_t> times;  // [rows]
  const std::int64_t* thresholds;  // [borders] of uint64, from 0 on and never falling: where buckets begin
  const T* position;               // [position_heads, 2 N - 1]
  const T* time;                   // [buckets + 1]
  Heads<Value> out;                // not touched by backward
  T* scratch;                      // forward_scratch or backward_scratch values
  std::int64_t* tasks;             // [2, sequences + 1]
};

// A null address skips that gradient and its work.
template <class T, class Value = T>
struct Gradients {
  Heads<const Value> out;
  Heads<Value> q;  // all of a row side by side
  Heads<Value> k;
  Heads<Value> v;
  T* position;
  T* time;

  [[nodiscard]] bool of_scores() const noexcept {
    return q.data != nullptr || k.data != nullptr || position != nullptr || time != nullptr;
  }
};

// How many values of scratch a call needs with the present number of threads. `copied`: rows are not of the type that
// is computed with.
[[nodiscard]] std::int64_t forward_scratch(const Shape& shape) noexcept;
[[nodiscard]] std::int64_t backward_scratch(const Shape& shape, const Sequences& sequences, bool copied) noexcept;

void forward(const Args<float>& args) noexcept;
void forward(const Args<float, std::uint16_t>& args) noexcept;
void forward(const Args<double>& args) noexcept;
void backward(const Args<float>& args, const Gradients<float>& gradients) noexcept;
void backward(const Args<float, std::uint16_t>& args, const Gradients<float, std::uint16_t>& gradients) noexcept;
void backward(const Args<double>& args, const Gradients<double>& gradients) noexcept;

// --- what the forms share ---

inline constexpr std::int64_t kTile = 64;
// Row stride of the tiles that are added along their diagonals: zeros follow each row.
inline constexpr std::int64_t kSkewed = kTile + kLanes;
// Zeros behind a position table, for the lanes beyond a tile's edge.
inline constexpr std::int64_t kBeyond = 2 * kTile;
// Parts of a sequence's keys that backward deals out apart, each with its own dq, and the rows each has at least. They
// depend on the sequence alone.
inline constexpr std::int64_t kMaxChunks = 4;
inline constexpr std::int64_t kRowsPerChunk = 1024;
// Parts of the tasks whose bias gradients are summed apart, and the pairs each has at least.
inline constexpr std::int64_t kMaxParts = 64;
inline constexpr std::int64_t kPairsPerPart = 1 << 15;

[[nodiscard]] inline std::int64_t tiles_of(std::int64_t rows) noexcept { return (rows + kTile - 1) / kTile; }

[[nodiscard]] inline std::int64_t chunks_of(std::int64_t rows) noexcept {
  return std::clamp<std::int64_t>(rows / kRowsPerChunk, 1, kMaxChunks);
}

// The key where chunk `chunk` begins: a border of tiles, the chunks about equal in pairs.
[[nodiscard]] inline std::int64_t chunk_begin(std::int64_t rows, std::int64_t chunk, bool causal) noexcept {
  const std::int64_t chunks = chunks_of(rows);
  if (chunk == 0) return 0;
  if (chunk == chunks) return rows;
  const double share = static_cast<double>(chunk) / static_cast<double>(chunks);
  const double at = causal ? 1.0 - std::sqrt(1.0 - share) : share;
  return static_cast<std::int64_t>(at * static_cast<double>(rows) / kTile) * kTile;
}

struct Interval {
  std::int64_t first;
  std::int64_t last;
};

// The mask of one sequence, in the published arithmetic of ids.
struct Sight {
  std::int64_t length;
  std::int64_t history;  // rows before the targets
  std::int64_t prefix;
  std::int64_t window;
  std::int64_t highest;  // id of every target
  bool causal;

  Sight(const Mask& mask, std::int64_t sequence, std::int64_t rows) noexcept
      : length(rows),
        history(rows - (mask.targets == nullptr ? 0 : mask.targets[sequence])),
        prefix(mask.contextual == nullptr ? 0 : std::min(mask.contextual[sequence], history)),
        window(mask.window),
        highest(history - prefix + (prefix > 0 ? 1 : 0)),
        causal(mask.causal) {}

  // The columns that row i sees besides itself (which it sees always).
  [[nodiscard]] Interval columns(std::int64_t row) const noexcept {
    if (row < prefix) return {0, !causal && (window < 0 || highest <= window) ? length : history};
    const std::int64_t shift = prefix > 0 ? prefix - 1 : 0;
    const std::int64_t id = std::min(row - shift, highest);
    // The first row whose id is id - window.
    const std::int64_t first = window < 0 || id <= window ? 0 : id - window + shift;
    if (row >= history) return {first, history};
    if (causal) return {first, row + 1};
    return {first, window < 0 || window >= highest - id ? length : id + window + shift + 1};
  }
};

// What the vectors of a tile need of the mask of one row (or lane): r is seen where first <= r < last or r == self.
struct Cut {
  std::int64_t first = 0;
  std::int64_t last = 0;
  std::int64_t self = -1;

  Cut() = default;
  Cut(Interval columns, std::int64_t row, std::int64_t begin, std::int64_t size) noexcept
      : first(std::clamp<std::int64_t>(columns.first - begin, 0, size)),
        last(std::clamp<std::int64_t>(columns.last - begin, 0, size)),
        self(row >= begin && row < begin + size ? row - begin : -1) {}

  [[nodiscard]] bool any() const noexcept { return first < last || self >= 0; }
  [[nodiscard]] bool all(std::int64_t size) const noexcept { return first == 0 && last == size; }
};

// Buckets by a table over the highest bits of |x|, then a step at most where thresholds lie apart.
struct Buckets {
  static constexpr int kBits = 3;
  const std::int64_t* thresholds = nullptr;
  std::int64_t highest = 0;
  std::uint16_t start[64 << kBits] = {};

  Buckets(const std::int64_t* borders, std::int64_t count) noexcept : thresholds(borders), highest(count - 1) {
    std::int64_t bucket = 0;
    for (std::size_t cell = 0; cell < (std::size_t{64} << kBits); ++cell) {
      const auto octave = static_cast<int>(cell >> kBits);
      const std::uint64_t part = cell & ((1U << kBits) - 1);
      const std::uint64_t lead = std::uint64_t{1} << octave;
      const std::uint64_t low = octave >= kBits ? lead + (part << (octave - kBits)) : lead + (part >> (kBits - octave));
      while (bucket < highest && low >= border(bucket + 1)) ++bucket;
      start[cell] = static_cast<std::uint16_t>(bucket);
    }
  }

  [[nodiscard]] std::uint64_t border(std::int64_t bucket) const noexcept {
    return static_cast<std::uint64_t>(thresholds[bucket]);
  }

  [[nodiscard]] static std::uint64_t apart(std::int64_t a, std::int64_t b) noexcept {
    const auto x = static_cast<std::uint64_t>(a);
    const auto y = static_cast<std::uint64_t>(b);
    return a > b ? x - y : y - x;
  }

  [[nodiscard]] std::int64_t of(std::uint64_t x) const noexcept {
    const int octave = 63 - std::countl_zero(x | 1);
    const std::uint64_t part = ((x << (63 - octave)) >> (63 - kBits)) & ((1U << kBits) - 1);
    std::int64_t bucket = start[(static_cast<std::size_t>(octave) << kBits) + part];
    if (x == 0) bucket = 0;
    while (bucket < highest && x >= border(bucket + 1)) ++bucket;
    return bucket;
  }
};

// Copies of the position tables in the order in which the vectors read them: forward has queries side by side, so its
// copy is turned round.
[[nodiscard]] inline std::int64_t position_stride(const Shape& s) noexcept {
  return s.position_heads == 0 ? 0 : padded(s.positions() + kBeyond);
}
[[nodiscard]] inline std::int64_t position_size(const Shape& s) noexcept {
  return s.position_heads * position_stride(s);
}
// Bias gradients of a part: the position tables, then the time table.
[[nodiscard]] inline std::int64_t partial_size(const Shape& s) noexcept {
  return position_size(s) + padded(s.buckets + 1);
}

// What all threads share in backward.
template <class T>
struct BackwardShared {
  T* position;
  T* copies;    // of dq, [copied rows, H, Dq]
  T* partials;  // [kMaxParts, partial_size]

  BackwardShared(Arena<T>& arena, const Shape& s, std::int64_t copied_rows) noexcept
      : position(arena.take(position_size(s))),
        copies(arena.take(copied_rows * s.heads * s.dim)),
        partials(arena.take(kMaxParts * partial_size(s))) {}
};

// One thread's working memory in forward. Queries lie side by side in vectors.
template <class T>
struct ForwardWork {
  T* q;       // [group, Dq, tile] turned
  T* k;       // [tile, Dq], where rows are copied
  T* v;       // [tile, Dvp]
  T* scores;  // [tile keys, tile queries]
  T* bias;    // [tile keys, tile queries], what the heads share
  T* out;     // [group, tile, Dvp]

  ForwardWork(Arena<T>& arena, const Shape& s) noexcept
      : q(arena.take(s.group() * s.dim * kTile)),
        k(arena.take(kTile * padded(s.dim))),
        v(arena.take(kTile * padded(s.value_dim))),
        scores(arena.take(kTile * kTile)),
        bias(arena.take(kTile * kTile)),
        out(arena.take(s.group() * kTile * padded(s.value_dim))) {}
};

// One thread's working memory in backward. Keys lie side by side in vectors.
template <class T>
struct BackwardWork {
  T* k;            // [group, tile, Dqp]
  T* k_turned;     // [group, Dq, tile]
  T* v_turned;     // [group, Dv, tile]
  T* dk;           // [group, tile, Dqp]
  T* dv;           // [group, tile, Dvp]
  T* q;            // [tile, Dqp]
  T* grad;         // [tile, Dvp], over N
  T* dq;           // [tile, Dqp]
  T* scores;       // [tile queries, tile keys]
  T* dscores;      // [tile queries, tile keys]
  T* bias;         // [tile queries, tile keys]
  T* skew;         // zeros that the first row of the next reaches back into
  T* dz;           // [tile queries, kSkewed]
  T* skew_shared;
  T* dz_shared;    // [tile queries, kSkewed], summed over heads
  T* buckets;      // [tile queries, tile keys] of int32
  T* time;         // [buckets + 1, kLanes]

  BackwardWork(Arena<T>& arena, const Shape& s) noexcept
      : k(arena.take(s.group() * kTile * padded(s.dim))),
        k_turned(arena.take(s.group() * s.dim * kTile)),
        v_turned(arena.take(s.group() * s.value_dim * kTile)),
        dk(arena.take(s.group() * kTile * padded(s.dim))),
        dv(arena.take(s.group() * kTile * padded(s.value_dim))),
        q(arena.take(kTile * padded(s.dim))),
        grad(arena.take(kTile * padded(s.value_dim))),
        dq(arena.take(kTile * padded(s.dim))),
        scores(arena.take(kTile * kTile)),
        dscores(arena.take(kTile * kTile)),
        bias(arena.take(kTile * kTile)),
        skew(arena.take(kLanes)),
        dz(arena.take(kTile * kSkewed)),
        skew_shared(arena.take(kLanes)),
        dz_shared(arena.take(kTile * kSkewed)),
        buckets(arena.take(kTile * kTile)),
        time(arena.take((s.buckets + 1) * kLanes)) {}
};

// A task of forward: heads [head, head + group) of the queries [row, row + rows) of a sequence.
// A task of backward: the same heads and the keys [row, row + rows).
struct Task {
  std::int64_t sequence;
  std::int64_t head;
  std::int64_t row;
  std::int64_t rows;
};

// What a call has made before its tasks begin.
template <class T>
struct Prepared {
  const T* position;       // [position_heads, position_stride], turned round in forward
  const Buckets* buckets;  // null: no time bias
};

template <class T, class Value>
void forward_scalar(const Args<T, Value>& args, const Prepared<T>& prepared, const ForwardWork<T>& work,
                    const Task& task) noexcept;
void forward_avx2(const Args<float>& args, const Prepared<float>& prepared, const ForwardWork<float>& work,
                  const Task& task) noexcept;
void forward_avx512(const Args<float>& args, const Prepared<float>& prepared, const ForwardWork<float>& work,
                    const Task& task) noexcept;
void forward_bf16_avx2(const Args<float, std::uint16_t>& args, const Prepared<float>& prepared,
                       const ForwardWork<float>& work, const Task& task) noexcept;
void forward_bf16_avx512(const Args<float, std::uint16_t>& args, const Prepared<float>& prepared,
                         const ForwardWork<float>& work, const Task& task) noexcept;

// Adds to `dq` (rows of the sequence, [rows, H, Dq] side by side) and to `position` [position_heads, position_stride].
template <class T, class Value>
void backward_scalar(const Args<T, Value>& args, const Gradients<T, Value>& gradients, const Prepared<T>& prepared,
                     const BackwardWork<T>& work, const Task& task, T* dq, T* position) noexcept;
void backward_avx2(const Args<float>& args, const Gradients<float>& gradients, const Prepared<float>& prepared,
                   const BackwardWork<float>& work, const Task& task, float* dq, float* position) noexcept;
void backward_avx512(const Args<float>& args, const Gradients<float>& gradients, const Prepared<float>& prepared,
                     const BackwardWork<float>& work, const Task& task, float* dq, float* position) noexcept;
void backward_bf16_avx2(const Args<float, std::uint16_t>& args, const Gradients<float, std::uint16_t>& gradients,
                        const Prepared<float>& prepared, const BackwardWork<float>& work, const Task& task, float* dq,
                        float* position) noexcept;
void backward_bf16_avx512(const Args<float, std::uint16_t>& args, const Gradients<float, std::uint16_t>& gradients,
                          const Prepared<float>& prepared, const BackwardWork<float>& work, const Task& task, float* dq,
                          float* position) noexcept;

}  // namespace recfast::hstu_attention
