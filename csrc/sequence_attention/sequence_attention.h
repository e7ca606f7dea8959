// sequence_attention: softmax attention of each event of a jagged sequence to the others, or to those before it.
//
//   s[i, j] = scale q_i . k_j          causal: j <= i only
//   out_i   = sum_j p[i, j] v_j,       p = softmax_j(s)
//   with dropout, p[i, j] is 0 with probability `rate` and else p / (1 - rate)
//
// Shapes       q, k [rows, H, D], v [rows, H, Dv], out [rows, H, Dv]; rows and heads may lie apart, the values of
//              a head lie side by side. Users' rows are jagged or padded.
// Dtypes       float32, bfloat16 (std::uint16_t here; arithmetic and statistics in float32) or float64
// Accumulator  float32 (float64 for float64). Scores and sums run in the order of the width, the keys, the queries, one
//              chain each, so the answer depends on nothing but the user's own rows: not on the rest of the batch, the
//              threads, or the layout. AVX2 and AVX-512 give the same bits (FMA); the scalar form rounds products and
//              sums apart. With E the largest error of a score, at most (D + 2) eps sum_d |scale q_id k_jd|, n keys and
//              scores that span R, a weight is off by a factor of at most 2 E + (3 n + 3 R + 16) eps; one below
//              exp(-87) of the largest counts as exp(-87) of it (float32). Backward takes dout_i . out_i from the
//              answer as stored, so that for bfloat16 its rounding is in the gradients of q and k.
// Memory       linear in the length: a block of scores at a time. Backward computes the scores again.
// Limits       sizes below 2^63; lengths and users below 2^32 with dropout; offsets and lengths must have been checked
// Sources      Vaswani et al., NeurIPS 2017; Dao et al., "FlashAttention", NeurIPS 2022 (arXiv 2205.14135); Kang and
//              McAuley, "Self-attentive sequential recommendation", ICDM 2018; Sun et al., "BERT4Rec", CIKM 2019
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/arena.h"
#include "common/heads.h"

namespace recfast::sequence_attention {

struct Shape {
  std::int64_t heads = 0;
  std::int64_t dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t longest = 0;  // at least every length
};

// Drops the weight of (user, head, query, key) where the draw of Philox{seed} for c0 = user, c1 = head, c2 = query,
// c3 = key / 8, column key (see common/random.h), shifted right by 8, is below `threshold`.
struct Dropout {
  std::uint64_t seed = 0;
  std::uint32_t threshold = 0;  // 0: no dropout
  double kept = 1.0;            // factor of the weights that stay
};

template <class S, class T>
struct Args {
  Sequences users;
  Shape shape;
  bool causal;
  T scale;
  Dropout dropout;
  Heads<const S> q;
  Heads<const S> k;
  Heads<const S> v;
  Heads<S> out;        // read by backward
  Heads<T> highest;    // [rows, H] max_j s
  Heads<T> inverse;    // [rows, H] 1 / sum_j exp(s - max s)
  std::int64_t* sums;  // scratch [users + 1]
  T* scratch;          // scratch_size(...) values
};

// A null `data` skips that gradient and its work.
template <class S>
struct Gradients {
  Heads<const S> out;
  Heads<S> q;
  Heads<S> k;
  Heads<S> v;
};

// How many values of scratch a call needs with the present number of threads.
[[nodiscard]] std::int64_t scratch_size(const Shape& shape, bool backward) noexcept;

void forward(const Args<float, float>& args) noexcept;
void forward(const Args<std::uint16_t, float>& args) noexcept;
void forward(const Args<double, double>& args) noexcept;
void backward(const Args<float, float>& args, const Gradients<float>& gradients) noexcept;
void backward(const Args<std::uint16_t, float>& args, const Gradients<std::uint16_t>& gradients) noexcept;
void backward(const Args<double, double>& args, const Gradients<double>& gradients) noexcept;

// --- what the forms share ---

// A block of scores: at most this many queries, in groups of kLanes, and keys. Their products, the turned queries and
// the turned output fill the first-level cache at width 64.
inline constexpr std::int64_t kQueries = 64;
inline constexpr std::int64_t kKeys = 64;
// Keys that share a block of random words.
inline constexpr std::int64_t kDrawn = 8;

// Query blocks of a sequence: as many groups of kLanes queries in each as in any other, or one more.
[[nodiscard]] constexpr std::int64_t query_blocks(std::int64_t length) noexcept {
  return (length + kQueries - 1) / kQueries;
}
[[nodiscard]] constexpr std::int64_t first_query(std::int64_t length, std::int64_t block) noexcept {
  const std::int64_t groups = (length + kLanes - 1) / kLanes;
  return std::min(length, groups * block / query_blocks(length) * kLanes);
}

// One thread's working memory. "t": turned, 64 queries side by side.
template <class T>
struct Work {
  T* keys;      // [longest, D], copied so that strides and storage do not matter further in
  T* values;    // [longest, Dv]
  T* q;         // [64, Dp] the block's queries times scale
  T* qt;        // [Dp, 64]
  T* scores;    // [64 keys, 64]
  T* out;       // [64, Dvp]
  T* outt;      // [Dvp, 64]
  T* highest;   // [64]
  T* inverse;   // [64]; the sum while forward runs
  T* kept;      // [8, 16] factors of dropout
  T* dout;      // [64, Dvp] (backward, like the rest)
  T* doutt;     // [Dvp, 64]
  T* dscores;   // [64 keys, 64]
  T* delta;     // [64]
  T* dq;        // [64, Dp]
  T* dqt;       // [Dp, 64]
  T* dkeys;     // [longest, Dp]
  T* dvalues;   // [longest, Dvp]

  Work(Arena<T>& arena, const Shape& s, bool backward) noexcept
      : keys(arena.take(s.longest * s.dim)),
        values(arena.take(s.longest * s.value_dim)),
        q(arena.take(kQueries * padded(s.dim))),
        qt(arena.take(kQueries * padded(s.dim))),
        scores(arena.take(kKeys * kQueries)),
        out(arena.take(kQueries * padded(s.value_dim))),
        outt(arena.take(kQueries * padded(s.value_dim))),
        highest(arena.take(kQueries)),
        inverse(arena.take(kQueries)),
        kept(arena.take(kDrawn * kLanes)),
        dout(backward ? arena.take(kQueries * padded(s.value_dim)) : nullptr),
        doutt(backward ? arena.take(kQueries * padded(s.value_dim)) : nullptr),
        dscores(backward ? arena.take(kKeys * kQueries) : nullptr),
        delta(backward ? arena.take(kQueries) : nullptr),
        dq(backward ? arena.take(kQueries * padded(s.dim)) : nullptr),
        dqt(backward ? arena.take(kQueries * padded(s.dim)) : nullptr),
        dkeys(backward ? arena.take(s.longest * padded(s.dim)) : nullptr),
        dvalues(backward ? arena.take(s.longest * padded(s.value_dim)) : nullptr) {}
};

// A piece of one head of one user: query blocks [first_block, last_block) against keys [first_key, last_key).
struct Part {
  std::int64_t user;
  std::int64_t head;
  std::int64_t first_block;
  std::int64_t last_block;
  std::int64_t first_key;
  std::int64_t last_key;
};

template <class S, class T>
using Forward = void(const Args<S, T>& args, const Work<T>& work, const Part& part) noexcept;
// Writes the gradients that are not null.
template <class S, class T>
using Backward = void(const Args<S, T>& args, const Gradients<S>& gradients, const Work<T>& work,
                      const Part& part) noexcept;

Forward<float, float> forward_avx2;
Forward<std::uint16_t, float> forward_avx2;
Forward<float, float> forward_avx512;
Forward<std::uint16_t, float> forward_avx512;
Backward<float, float> backward_avx2;
Backward<std::uint16_t, float> backward_avx2;
Backward<float, float> backward_avx512;
Backward<std::uint16_t, float> backward_avx512;

}  // namespace recfast::sequence_attention
