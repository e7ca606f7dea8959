// din_attention: the activation unit of DIN over jagged histories that a user's candidates share.
//
//   s[c, l] = MLP([q_c, k_l, q_c - k_l, q_c * k_l])      one or two hidden layers, then one number
//   out[c]  = sum_l p[c, l] v_l                          p = s | sigmoid(s) | softmax_l(s); an empty history gives 0
//
// The candidate is folded into the first layer, with W1 = [Wq; Wk; Wd; Wp] (each [D, H1]):
//   z1 = k_l We + be,   We = (Wk - Wd) + diag(q_c) Wp,   be = q_c (Wq + Wd) + b1
// so that layer 1 is a plain product of the shared keys, and nothing of size candidates x history x width exists.
//
// Shapes       query [Nc, D], keys [T, D], values [T, Dv], out [Nc, Dv]; rows may be strided, columns may not
//              user b: positions begin[b] <= l < end[b], rows candidates[b] <= c < candidates[b + 1] (null: c = b)
// Dtypes       float32 or float64 for all; positions int64
// Accumulator  that type; every sum runs in one fixed order, so the answer depends neither on the number of threads
//              nor on the rest of the batch. AVX2 and AVX-512 give the same bits (FMA); the scalar form rounds products
//              and sums apart. Weight gradients are summed over a cut of the users that depends on the data alone.
// Limits       sizes below 2^63; begin, end and candidates must have been checked (check_offsets)
// Sources      Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018 (arXiv 1706.06978)
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/arena.h"
#include "common/span.h"

namespace recfast::din_attention {

enum class Activation : std::int64_t { kPrelu = 0, kRelu = 1, kSigmoid = 2, kSilu = 3 };
enum class Mode : std::int64_t { kSum = 0, kSigmoid = 1, kSoftmax = 2 };

struct Shape {
  std::int64_t users = 0;
  std::int64_t dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t hidden1 = 0;
  std::int64_t hidden2 = 0;  // 0: one hidden layer
  std::int64_t longest = 0;  // at least every end[b] - begin[b]

  // Width of the layer that w3 reads.
  [[nodiscard]] std::int64_t head() const noexcept { return hidden2 > 0 ? hidden2 : hidden1; }
};

// Row-major and contiguous: w1 [4D, H1], b1 [H1], w2 [H1, H2], b2 [H2], w3 [head], b3 [1], slope [1 or 2].
template <class T>
struct Weights {
  T* w1;
  T* b1;
  T* w2;
  T* b2;
  T* w3;
  T* b3;
  T* slope;
};

template <class T>
struct Args {
  Shape shape;
  Activation activation;
  Mode mode;
  Rows<const T> query;
  Rows<const T> keys;
  Rows<const T> values;
  const std::int64_t* begin;
  const std::int64_t* end;
  const std::int64_t* candidates;
  Weights<const T> weights;
  Rows<T> out;  // read by backward in softmax mode
  T* lse;       // [Nc] log of the softmax's denominator; only touched in softmax mode
  T* scratch;   // scratch_size(shape, ...) values
};

template <class T>
struct Gradients {
  Rows<const T> grad;  // [Nc, Dv]
  Rows<T> query;
  Rows<T> keys;    // rows outside every [begin, end) are left alone
  Rows<T> values;  // the same memory as keys when the values are the keys
  Weights<T> weights;
};

// How many values of scratch a call needs with the present number of threads.
[[nodiscard]] std::int64_t scratch_size(const Shape& shape, bool backward) noexcept;

void forward(const Args<float>& args) noexcept;
void forward(const Args<double>& args) noexcept;
void backward(const Args<float>& args, const Gradients<float>& gradients) noexcept;
void backward(const Args<double>& args, const Gradients<double>& gradients) noexcept;

// --- what the forms share ---

// History rows that go through the layers together.
inline constexpr std::int64_t kTileRows = 20;

// Weights in the form the kernels read, made once a call; padded columns hold zeros.
template <class T>
struct Packed {
  T* keys;           // Wk - Wd  [D, H1p]
  T* query;          // Wq + Wd  [D, H1p]
  T* product;        // Wp       [D, H1p]
  T* b1;             // [H1p]
  T* w2;             // [H1, H2p]
  T* b2;             // [H2p]
  T* w3;             // [padded head]
  T* keys_turned;    // (Wk - Wd)^T [H1, Dp], for backward like the next two
  T* product_turned;  // Wp^T [H1, Dp]
  T* w2_turned;       // W2^T [H2, H1p]

  Packed(Arena<T>& arena, const Shape& s, bool backward) noexcept
      : keys(arena.take(s.dim * padded(s.hidden1))),
        query(arena.take(s.dim * padded(s.hidden1))),
        product(arena.take(s.dim * padded(s.hidden1))),
        b1(arena.take(s.hidden1)),
        w2(arena.take(s.hidden1 * padded(s.hidden2))),
        b2(arena.take(s.hidden2)),
        w3(arena.take(s.head())),
        keys_turned(backward ? arena.take(s.hidden1 * padded(s.dim)) : nullptr),
        product_turned(backward ? arena.take(s.hidden1 * padded(s.dim)) : nullptr),
        w2_turned(backward ? arena.take(s.hidden2 * padded(s.hidden1)) : nullptr) {}
};

// One thread's working memory.
template <class T>
struct Work {
  T* folded;         // We [D, H1p]
  T* bias;           // be [H1p]
  T* z1;             // [tile, H1p]
  T* h1;             // [tile, H1p]
  T* z2;             // [tile, H2p]
  T* h2;             // [tile, H2p]
  T* scores;         // [longest] (forward)
  T* folded_turned;  // We^T [H1, Dp] (backward, like the rest)
  T* dfolded;        // [D, H1p]
  T* dbias;          // [H1p]
  T* dz1;            // [tile, H1p]
  T* dz2;            // [tile, H2p]
  T* dkeys;          // [tile, Dp]

  Work(Arena<T>& arena, const Shape& s, bool backward) noexcept
      : folded(arena.take(s.dim * padded(s.hidden1))),
        bias(arena.take(s.hidden1)),
        z1(arena.take(kTileRows * padded(s.hidden1))),
        h1(arena.take(kTileRows * padded(s.hidden1))),
        z2(arena.take(kTileRows * padded(s.hidden2))),
        h2(arena.take(kTileRows * padded(s.hidden2))),
        scores(arena.take(backward ? kTileRows : std::max(s.longest, kTileRows))),
        folded_turned(backward ? arena.take(s.hidden1 * padded(s.dim)) : nullptr),
        dfolded(backward ? arena.take(s.dim * padded(s.hidden1)) : nullptr),
        dbias(backward ? arena.take(s.hidden1) : nullptr),
        dz1(backward ? arena.take(kTileRows * padded(s.hidden1)) : nullptr),
        dz2(backward ? arena.take(kTileRows * padded(s.hidden2)) : nullptr),
        dkeys(backward ? arena.take(kTileRows * padded(s.dim)) : nullptr) {}
};

// The weight gradients of one part of the users.
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

  Partial(Arena<T>& arena, const Shape& s) noexcept
      : query(arena.take(s.dim * padded(s.hidden1))),
        keys(arena.take(s.dim * padded(s.hidden1))),
        product(arena.take(s.dim * padded(s.hidden1))),
        b1(arena.take(s.hidden1)),
        w2(arena.take(s.hidden1 * padded(s.hidden2))),
        b2(arena.take(s.hidden2)),
        w3(arena.take(s.head())),
        b3(arena.take(1)),
        slope1(arena.take(kLanes)),
        slope2(arena.take(kLanes)) {}
};

template <class T>
void forward_scalar(const Args<T>& args, const Packed<T>& packed, const Work<T>& work, std::int64_t user,
                    std::int64_t candidate) noexcept;
void forward_avx2(const Args<float>& args, const Packed<float>& packed, const Work<float>& work, std::int64_t user,
                  std::int64_t candidate) noexcept;
void forward_avx512(const Args<float>& args, const Packed<float>& packed, const Work<float>& work, std::int64_t user,
                    std::int64_t candidate) noexcept;

// All candidates of one user; adds to `partial`.
template <class T>
void backward_scalar(const Args<T>& args, const Gradients<T>& gradients, const Packed<T>& packed, const Work<T>& work,
                     const Partial<T>& partial, std::int64_t user) noexcept;
void backward_avx2(const Args<float>& args, const Gradients<float>& gradients, const Packed<float>& packed,
                   const Work<float>& work, const Partial<float>& partial, std::int64_t user) noexcept;
void backward_avx512(const Args<float>& args, const Gradients<float>& gradients, const Packed<float>& packed,
                     const Work<float>& work, const Partial<float>& partial, std::int64_t user) noexcept;

}  // namespace recfast::din_attention
