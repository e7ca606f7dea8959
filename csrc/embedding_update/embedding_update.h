// embedding_update: one optimiser step on the rows of a batch, in place, float rows or 8-bit rows with a step size.
//
// Formula, for each row r that occurs, in this order:
//   g   = grad_scale * sum over its positions i, ascending, of c_i * grad[bag(i)]          (before anything is rounded)
//   w   = step * code (int8) or the row itself
//   h   = g + weight_decay * w
//   w'  = w - lr * h                                   sgd
//         w - lr / (sqrt(m) + eps) * h,  m += mean(h^2)          row-wise Adagrad, one m a row
//         w - lr * h / (sqrt(m) + eps),  m += h^2                Adagrad, one m a weight
// then for int8:
//   t   = step_scale * sum_d g_d * c(w'_d / step)               the step's gradient (LSQ) at the float w', old step;
//         c(x) = -128 for x <= -128, 127 for x >= 127, else round(x) - x
//   step' = max(step - step_lr * t [/ (sqrt(v) + 1e-12), v += t^2 with step Adagrad], 1e-8); with `grow` also at least
//         max |w'| / 127
//   code' = clip(floor(w' / step' + u), -128, 127), u uniform in [0, 1), or the nearest (ties to even)
// The draw u of column d comes from word d % 4 of Philox(seed) at counter (step_count, table_id, row, d / 4).
//
// Shapes       table [T, D]; step, m (row-wise), v [T]; m (Adagrad) [T, D]; grad [B, D]; all contiguous
// Dtypes       table float32 or int8; all else float32
// Rounding     float32 throughout, products and sums apart; sums over D in 16 lanes folded 8, 4, 2, 1. The outcome is a
//              function of the arguments alone: equal bits on every instruction set and for any number of threads
// Limits       n < 2^31 lookups, T <= 2^32 rows, step_count and table_id below 2^32
// Sources      ALPT: Li et al., "Adaptive low-precision training for embeddings in click-through rate prediction",
//              AAAI 2023 (doi 10.1609/aaai.v37i4.25564), in a single pass: g of the first backward stands for the
//              gradient at w'. LSQ: Esser et al., ICLR 2020. Row-wise Adagrad: Mudigere et al., arXiv:2104.05158.
#pragma once

#include <cstdint>

#include "common/span.h"
#include "embedding_bag/gradient.h"

namespace recfast::embedding_update {

enum class Optimizer : int { kSgd = 0, kRowwiseAdagrad = 1, kAdagrad = 2 };
enum class StepRule : int { kFixed = 0, kSgd = 1, kAdagrad = 2 };

inline constexpr float kStepFloor = 1e-8f;
inline constexpr float kStepEps = 1e-12f;

template <class Value>
struct Args {
  Rows<Value> table;
  float* step;         // int8 only
  float* moment;       // null with sgd
  float* step_moment;  // only with StepRule::kAdagrad
  embedding_bag::PositionGradient<float> gradient;
  const std::uint64_t* sorted;  // as sort_ids and find_runs left them
  const std::int64_t* starts;
  std::int64_t runs;
  Optimizer optimizer;
  float lr;
  float eps;
  float weight_decay;
  float grad_scale;
  StepRule step_rule;
  float step_lr;
  float step_scale;
  bool grow;
  bool stochastic;
  std::uint64_t seed;
  std::uint32_t step_count;
  std::uint32_t table_id;
  float* scratch;  // [max_threads(), 2 * padded(D)]
};

// Row buffers are padded to full registers.
[[nodiscard]] constexpr std::int64_t padded(std::int64_t width) noexcept { return (width + 15) / 16 * 16; }

// Threaded over rows. Returns how many codes were clipped.
template <class Value>
std::int64_t run(const Args<Value>& args) noexcept;

// The forms behind it, one thread each, for runs [first, last); g and w are zeros of padded(D).
template <class Value>
std::int64_t rows_scalar(const Args<Value>& args, std::int64_t first, std::int64_t last, float* g, float* w) noexcept;
template <class Value>
std::int64_t rows_avx2(const Args<Value>& args, std::int64_t first, std::int64_t last, float* g, float* w) noexcept;
template <class Value>
std::int64_t rows_avx512(const Args<Value>& args, std::int64_t first, std::int64_t last, float* g, float* w) noexcept;

// The position of the first NaN or infinity, or -1.
[[nodiscard]] std::int64_t first_not_finite(const float* values, std::int64_t size) noexcept;

}  // namespace recfast::embedding_update
