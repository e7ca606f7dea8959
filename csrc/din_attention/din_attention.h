// din_attention: the activation unit of DIN over jagged histories that a user's candidates share.
//
//   s[c, l] = MLP([q_c, k_l, q_c - k_l, q_c * k_l])      one or two hidden layers, then one number
//   out[c]  = sum_l p[c, l] v_l                          p = s | sigmoid(s) | softmax_l(s); an empty history gives 0
//
// The candidate is folded into the first layer, with W1 = [Wq; Wk; Wd; Wp] (each [D, H1]):
//   z1 = k_l We + be,   We = (Wk - Wd) + diag(q_c) Wp,   be = q_c (Wq + Wd) + b1
// so that layer 1 is a plain product of the shared keys, and nothing of size candidates x history x width exists.
// A history of at most kSplitRows rows (kSplitRowsInPairs where pairs of bfloat16 are multiplied) costs less unfolded:
// z1 = be + k_l (Wk - Wd) + (q_c * k_l) Wp, in float32 or float64, summed in that order.
//
// Dice         y = z (p + alpha (1 - p)), p = sigmoid(gain (z - mean) / sqrt(variance + eps) + shift), a channel each.
//              In training, mean and (biased) variance are those of z over all pairs of a candidate and a position of
//              the call: the histories are gone through once for the statistics of each layer and once for the answer,
//              backward once for each layer's two sums and once for the gradients; z is computed anew each time. So in
//              training, and there alone, an answer depends on the rest of the batch. With fewer than two pairs the
//              statistics that were given are used.
//
// Shapes       query [Nc, D], keys [T, D], values [T, Dv], out [Nc, Dv]; rows may be strided, columns may not
//              user b: positions begin[b] <= l < end[b], rows candidates[b] <= c < candidates[b + 1] (null: c = b)
// Dtypes       float32, float64 or bfloat16 for query, keys, values, out and their gradients; weights float32 with
//              bfloat16, else the same type; positions int64
// Accumulator  the weights' type; every sum runs in one fixed order, so the answer depends neither on the number of
//              threads nor (but for Dice in training) on the rest of the batch. AVX2 and AVX-512 give the same bits
//              (FMA); the scalar form rounds products and sums apart. Sums over the batch (weight gradients, statistics)
//              and the gradients of a history that many candidates share are cut in a way that depends on the data alone.
// bfloat16     Where the processor has AVX-512 BF16, the two layers multiply pairs of bfloat16 and add in float32: We
//              (folded in float32), W2 and the first layer's activations are rounded to bfloat16 once, each by at most
//              2^-8 of itself, and numbers below 2^-126 count as 0; all else, and all of backward but for computing the
//              layers again, is float32 over the widened inputs. The other forms widen and round only what they return.
// Limits       hidden widths at most kMaxHidden; counts and positions below 2^63, also candidates x positions; begin, end
//              and candidates must have been checked (check_offsets)
// Sources      Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018 (arXiv 1706.06978)
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/arena.h"
#include "common/span.h"

namespace recfast::din_attention {

enum class Activation : std::int64_t { kPrelu = 0, kRelu = 1, kSigmoid = 2, kSilu = 3, kDice = 4 };
enum class Mode : std::int64_t { kSum = 0, kSigmoid = 1, kSoftmax = 2 };

inline constexpr std::int64_t kMaxHidden = 256;

struct BFloat16 {
  std::uint16_t bits;
};

// What one computes in over rows of E.
template <class E>
using Arithmetic = std::conditional_t<std::is_same_v<E, double>, double, float>;

struct Shape {
  std::int64_t users = 0;
  std::int64_t dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t hidden1 = 0;
  std::int64_t hidden2 = 0;  // 0: one hidden layer

  // Width of the layer that w3 reads.
  [[nodiscard]] std::int64_t head() const noexcept { return hidden2 > 0 ? hidden2 : hidden1; }
  [[nodiscard]] std::int64_t channels() const noexcept { return hidden1 + hidden2; }
};

// Row-major and contiguous: w1 [4D, H1], b1 [H1], w2 [H1, H2], b2 [H2], w3 [head], b3 [1], slope [1 or 2], and for Dice
// dice [3, H1 + H2]: alpha, gain, shift.
template <class T>
struct Weights {
  T* w1;
  T* b1;
  T* w2;
  T* b2;
  T* w3;
  T* b3;
  T* slope;
  T* dice;
};

template <class E>
struct Args {
  using T = Arithmetic<E>;
  Shape shape;
  Activation activation;
  Mode mode;
  bool training;       // only Dice heeds it
  double eps;          // Dice's
  Rows<const E> query;
  Rows<const E> keys;
  Rows<const E> values;
  bool own_values;     // the values are not the keys
  const std::int64_t* begin;
  const std::int64_t* end;
  const std::int64_t* candidates;
  Weights<const T> weights;
  const T* statistics;  // [2, H1 + H2] mean and variance for Dice outside training; null without Dice
  T* batch_statistics;  // the same of this call: written by forward and read by backward in training
  Rows<E> out;          // read by backward in softmax mode
  T* lse;               // [Nc] log of the softmax's denominator; only touched in softmax mode
  T* scratch;           // scratch_size(...) values
};

// A null pointer stands for a gradient that nobody wants, and what only it needs is not computed.
template <class E>
struct Gradients {
  using T = Arithmetic<E>;
  Rows<const E> grad;  // [Nc, Dv]
  Rows<E> query;
  Rows<E> keys;    // rows outside every [begin, end) are left alone
  Rows<E> values;  // the same memory as keys when the values are the keys
  Weights<T> weights;

  // Whether anything up to the score wants a gradient, or anything before the last product.
  [[nodiscard]] bool scores() const noexcept {
    return layers() || weights.w3 != nullptr || weights.b3 != nullptr;
  }
  [[nodiscard]] bool layers() const noexcept { return into_first() || weights.w2 != nullptr || weights.b2 != nullptr; }
  [[nodiscard]] bool into_first() const noexcept {
    return folded() || keys.data != nullptr || weights.slope != nullptr || weights.dice != nullptr;
  }
  [[nodiscard]] bool folded() const noexcept {
    return query.data != nullptr || weights.w1 != nullptr || weights.b1 != nullptr;
  }
};

// How many values of scratch a call needs with the present number of threads.
template <class E>
[[nodiscard]] std::int64_t forward_scratch(const Args<E>& args) noexcept;
template <class E>
[[nodiscard]] std::int64_t backward_scratch(const Args<E>& args, const Gradients<E>& gradients) noexcept;

template <class E>
void forward(const Args<E>& args) noexcept;
template <class E>
void backward(const Args<E>& args, const Gradients<E>& gradients) noexcept;

// --- the cut of sums over the batch ---

inline constexpr std::int64_t kMaxParts = 64;

// Part i holds the candidates border[i] <= c < border[i + 1], so that parts have about equal numbers of pairs. Within a
// user, borders are a multiple of `block` candidates from the first.
struct Parts {
  std::int64_t count = 0;
  std::int64_t pairs = 0;
  std::array<std::int64_t, kMaxParts + 1> border{};
};

// `partial` values are held for each part: parts are few enough that these stay below 16 bytes a pair (or eight in all).
[[nodiscard]] Parts cut(std::int64_t users, const std::int64_t* begin, const std::int64_t* end,
                        const std::int64_t* candidates, std::int64_t partial, std::int64_t block) noexcept;

// --- what the forms share ---

// History rows that go through the layers together: whole tiles of 5 and of 8 rows.
inline constexpr std::int64_t kTileRows = 40;
// The longest history that is not folded.
inline constexpr std::int64_t kSplitRows = 4;
inline constexpr std::int64_t kSplitRowsInPairs = 2;

// Dice of one layer, padded with zeros: t = scale z + offset, y = z (alpha + (1 - alpha) sigmoid(t)).
template <class T>
struct DiceLayer {
  T* scale;    // gain / sqrt(variance + eps)
  T* offset;   // shift - mean scale
  T* alpha;
  T* mean;
  T* inverse;  // 1 / sqrt(variance + eps)
  T* mean_dt;   // mean over the pairs of dL/dt; 0 outside training, like the next
  T* mean_dtx;  // mean of dL/dt (z - mean) inverse

  DiceLayer(Arena<T>& arena, std::int64_t width) noexcept
      : scale(arena.take(width)), offset(arena.take(width)), alpha(arena.take(width)), mean(arena.take(width)),
        inverse(arena.take(width)), mean_dt(arena.take(width)), mean_dtx(arena.take(width)) {}
};

// Weights in the form the kernels read, made once a call; padded columns hold zeros.
template <class T>
struct Packed {
  T* keys;            // Wk - Wd  [D, H1p]; the next one lies right behind it
  T* product;         // Wp       [D, H1p]
  T* query;           // Wq + Wd  [D, H1p]
  T* b1;              // [H1p]
  T* w2;              // [H1, H2p]
  T* b2;              // [H2p]
  T* w3;              // [padded head]
  T* w2_pairs;        // rows 2i and 2i + 1 as pairs of bfloat16 [H1p / 2, H2p], where asked for
  T* keys_turned;     // (Wk - Wd)^T [H1, Dp], for backward like the next two
  T* product_turned;  // Wp^T [H1, Dp]
  T* w2_turned;       // W2^T [H2, H1p]
  DiceLayer<T> dice1;
  DiceLayer<T> dice2;

  Packed(Arena<T>& arena, const Shape& s, bool backward, bool dice) noexcept
      : keys(arena.take(s.dim * padded(s.hidden1))),
        product(arena.take(s.dim * padded(s.hidden1))),
        query(arena.take(s.dim * padded(s.hidden1))),
        b1(arena.take(s.hidden1)),
        w2(arena.take(s.hidden1 * padded(s.hidden2))),
        b2(arena.take(s.hidden2)),
        w3(arena.take(s.head())),
        w2_pairs(arena.take(padded(s.hidden1) / 2 * padded(s.hidden2))),
        keys_turned(backward ? arena.take(s.hidden1 * padded(s.dim)) : nullptr),
        product_turned(backward ? arena.take(s.hidden1 * padded(s.dim)) : nullptr),
        w2_turned(backward ? arena.take(s.hidden2 * padded(s.hidden1)) : nullptr),
        dice1(arena, dice ? s.hidden1 : 0),
        dice2(arena, dice ? s.hidden2 : 0) {}
};

// One thread's working memory. Rows of D or Dv values are padded with zeros.
template <class T>
struct Work {
  T* folded;  // We [D, H1p], or [Dp / 2, H1p] pairs of bfloat16
  T* bias;    // be [H1p]
  T* query;   // [Dp]
  T* keys;    // [tile, Dp], widened
  T* values;  // [tile, Dvp], widened
  T* split;   // [kSplitRows, 2D]: k, q * k
  T* z1;      // [tile, H1p]
  T* h1;      // [tile, H1p]
  T* pairs;   // h1 in bfloat16 [tile, H1p / 2]
  T* z2;      // [tile, H2p]
  T* h2;      // [tile, H2p]
  T* lanes;   // [tile, kLanes] scores before their last sum
  T* scores;  // [tile], padded like the next two
  T* weights;
  T* dscores;
  T* out;            // [Dvp]
  T* folded_turned;  // We^T [H1, Dp] (backward, like the rest)
  T* dfolded;        // [D, H1p]
  T* dbias;          // [H1p]
  T* grad;           // [Dvp]
  T* dz1;            // [tile, H1p]
  T* dz2;            // [tile, H2p]
  T* dkeys;          // [shared rows, Dp]
  T* dvalues;        // [shared rows, Dvp]

  // `rows`: of the longest history whose gradients this thread may have to gather.
  Work(Arena<T>& arena, const Shape& s, bool backward, std::int64_t rows, bool own_values) noexcept
      : folded(arena.take(padded(s.dim) * padded(s.hidden1))),
        bias(arena.take(s.hidden1)),
        query(arena.take(s.dim)),
        keys(arena.take(kTileRows * padded(s.dim))),
        values(arena.take(kTileRows * padded(s.value_dim))),
        split(arena.take(kSplitRows * 2 * s.dim)),
        z1(arena.take(kTileRows * padded(s.hidden1))),
        h1(arena.take(kTileRows * padded(s.hidden1))),
        pairs(arena.take(kTileRows * padded(s.hidden1) / 2)),
        z2(arena.take(kTileRows * padded(s.hidden2))),
        h2(arena.take(kTileRows * padded(s.hidden2))),
        lanes(arena.take(kTileRows * kLanes)),
        scores(arena.take(kTileRows)),
        weights(arena.take(kTileRows)),
        dscores(arena.take(kTileRows)),
        out(arena.take(s.value_dim)),
        folded_turned(backward ? arena.take(s.hidden1 * padded(s.dim)) : nullptr),
        dfolded(backward ? arena.take(s.dim * padded(s.hidden1)) : nullptr),
        dbias(backward ? arena.take(s.hidden1) : nullptr),
        grad(backward ? arena.take(s.value_dim) : nullptr),
        dz1(backward ? arena.take(kTileRows * padded(s.hidden1)) : nullptr),
        dz2(backward ? arena.take(kTileRows * padded(s.hidden2)) : nullptr),
        dkeys(backward ? arena.take(rows * padded(s.dim)) : nullptr),
        dvalues(backward && own_values ? arena.take(rows * padded(s.value_dim)) : dkeys) {}
};

// Sums over the pairs for one layer's Dice, a channel each.
template <class T>
struct DiceSums {
  T* alpha;
  T* gain;   // dL/dgain
  T* shift;  // dL/dshift

  DiceSums(Arena<T>& arena, std::int64_t width) noexcept
      : alpha(arena.take(width)), gain(arena.take(width)), shift(arena.take(width)) {}
};

// The weight gradients of one part.
template <class T>
struct Partial {
  T* query;    // sum_c q_c (x) dbe        [D, H1p]
  T* keys;     // sum_c dWe                [D, H1p]
  T* product;  // sum_c diag(q_c) dWe      [D, H1p]
  T* b1;
  T* w2;     // [H1, H2p]
  T* b2;
  T* w3;
  T* b3;     // [1]
  T* slope1; // kLanes partial sums, like the next
  T* slope2;
  DiceSums<T> dice1;
  DiceSums<T> dice2;

  Partial(Arena<T>& arena, const Shape& s, bool dice) noexcept
      : query(arena.take(s.dim * padded(s.hidden1))),
        keys(arena.take(s.dim * padded(s.hidden1))),
        product(arena.take(s.dim * padded(s.hidden1))),
        b1(arena.take(s.hidden1)),
        w2(arena.take(s.hidden1 * padded(s.hidden2))),
        b2(arena.take(s.hidden2)),
        w3(arena.take(s.head())),
        b3(arena.take(1)),
        slope1(arena.take(kLanes)),
        slope2(arena.take(kLanes)),
        dice1(arena, dice ? s.hidden1 : 0),
        dice2(arena, dice ? s.hidden2 : 0) {}
};

// Mean and sum of squared deviations of each channel of one layer over `count` pairs, padded.
struct Moments {
  std::int64_t count;
  double* mean;
  double* squares;
};

// The first and last layer's pass over the pairs, for Dice in training.
enum class Layer { kFirst, kSecond };

// How far backward goes: to the sums of the last layer's Dice, of the first's, or all the way.
enum class Reach { kLast, kFirst, kAll };

// Candidates [first, last) of one user, and where the gradients of that user's history are gathered: rows of padded
// width, one for each position, or with `passing` one for each row of a tile, handed on when the tile is done.
template <class T>
struct Segment {
  std::int64_t user;
  std::int64_t first;
  std::int64_t last;
  T* dkeys;
  T* dvalues;
  bool passing;
};

// One form of the kernel: an instruction set and a type of rows. `pairs`: it reads Packed::w2_pairs.
template <class E>
struct Form {
  using T = Arithmetic<E>;
  bool pairs;
  void (*forward)(const Args<E>&, const Packed<T>&, const Work<T>&, std::int64_t user, std::int64_t candidate) noexcept;
  // Adds to `moments`.
  void (*moments)(const Args<E>&, const Packed<T>&, const Work<T>&, Moments&, std::int64_t user, std::int64_t candidate,
                  Layer layer) noexcept;
  // Adds to `partial`; the first candidate's gradients of the history are written, the others' added.
  void (*backward)(const Args<E>&, const Gradients<E>&, const Packed<T>&, const Work<T>&, const Partial<T>&,
                   const Segment<T>&, Reach reach) noexcept;
  // W2 as w2_pairs.
  void (*pack_pairs)(const Shape&, const Packed<T>&) noexcept;
};

template <class E>
[[nodiscard]] Form<E> form_avx2() noexcept;
template <class E>
[[nodiscard]] Form<E> form_avx512() noexcept;
[[nodiscard]] Form<BFloat16> form_bf16() noexcept;  // AVX-512 BF16

}  // namespace recfast::din_attention
