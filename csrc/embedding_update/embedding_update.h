// embedding_update: one optimiser step on the rows that a batch looked up, in place, in every row format.
//
// Formula, for each row r that occurs, in this order:
//   g    = grad_scale * sum over its lookups i, in order, of c_i * grad[bag(i)]             (before anything is rounded)
//          with argmax (mode max): column d only of lookups with argmax[bag(i), d] = i
//   w    = step * code, or the row itself
//   h    = g + decay * w with decay l2;  else h = g, and w is first multiplied by 1 - lr * decay
//   w'   = w - lr * h                                                        sgd
//          w - lr * h / (sqrt(v) + eps),  v += mean(h^2)                     row-wise Adagrad: one v a row
//          w - lr * h / (sqrt(v) + eps),  v += h^2                           Adagrad: one v a weight
//          w - lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)        Adam, t = step_count + 1, rows without
//            m = b1 m + (1 - b1) h,  v = b2 v + (1 - b2) h^2                   lookups left alone (as SparseAdam)
//            with one v a row of mean(h^2)                                   row-wise Adam; m in float32 or in int8 rows
// formats with a step:
//   t    = step_scale * sum_d g_d * c(w'_d / step)          the step's gradient (LSQ) at the float w', with the old step;
//          c(x) = lo for x <= lo, hi for x >= hi, else round(x) - x
//   step'= step - step_lr * t                                                step_rule sgd
//          step - step_lr * t / (sqrt(v) + 1e-12),  v += t^2                 Adagrad
//          step - step_lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-12)    Adam
//          and then max(step', 1e-8) | abs(step') + 1e-10 | step itself unless step' > 1e-30   (floor: clamp, abs, none)
//          with `grow` also at least max |w'| / hi
//   code'= clip(round(w' / step'), lo, hi)
// bfloat16, float16: round(clip(w')) to the grid of the format, float8 likewise of w' / step'; float32: w'.
// round is floor(x), plus 1 where u < x - floor(x), on the grid, u the draw of the column (common/random.h) at counter
// (step_count, table_id, row); bfloat16 rounds the magnitude, floor(|x| + u). Or it is the nearest, ties to even. The 8-bit first moment is rounded with draws at table_id ^ 2^31, step max |m| / 127.
//
// Phases       whole: all of the above. first: up to w', which goes to `floats` [runs, D]; the row gets its nearest
//              codes with the old step, so that an ordinary forward pass gives Q_D(w', step). second: from w' in
//              `floats` on, with the gradient of the second backward pass (ALPT as published)
// Order        a row's lookups are summed in order in parts of kPart, and the parts in order. Sums over D: 16 lanes,
//              folded 8, 4, 2, 1. float32 throughout, products and sums apart: equal bits on every instruction set and
//              for any number of threads
// Bad values   a step of NaN or infinity stays so and its codes are the lowest; one below 1e-30 is read as 1e-8. NaN in
//              a float row stays NaN
// Limits       n < 2^31 lookups, T <= 2^32 rows, step_count < 2^32, table_id < 2^31
// Sources      ALPT: Li et al., "Adaptive low-precision training for embeddings in click-through rate prediction",
//              AAAI 2023 (doi 10.1609/aaai.v37i4.25564). LSQ: Esser et al., ICLR 2020. Row-wise Adagrad: Mudigere et
//              al., arXiv:2104.05158. Adam: Kingma and Ba, ICLR 2015; 8-bit moments: Dettmers et al., ICLR 2022.
#pragma once

#include <cstdint>

#include "common/group_ids.h"
#include "common/row_format.h"
#include "embedding_bag/lookups.h"

namespace recfast::embedding_update {

enum class Optimizer : int { kSgd = 0, kRowwiseAdagrad = 1, kAdagrad = 2, kAdam = 3, kRowwiseAdam = 4 };
enum class StepRule : int { kFixed = 0, kSgd = 1, kAdagrad = 2, kAdam = 3 };
enum class StepFloor : int { kClamp = 0, kAbs = 1, kNone = 2 };
enum class Phase : int { kWhole = 0, kFirst = 1, kSecond = 2 };

inline constexpr float kStepFloor = 1e-8f;
inline constexpr float kStepShift = 1e-10f;
inline constexpr float kSmallestStep = 1e-30f;
inline constexpr float kStepEps = 1e-12f;
inline constexpr float kBFloat16Max = 0x1.FEp127f;
inline constexpr std::uint32_t kMomentDomain = 0x80000000u;
inline constexpr std::int64_t kPart = 256;

// The gradient as slots see it (a slot is a bag or a position, see LookupGrouping).
struct SlotGradient {
  const float* grad;  // [B, D]
  std::int64_t width;
  const std::int32_t* bag_of;  // [n]; null: slot i is bag i
  const float* coefficient;    // [slots]; null: all 1
  const std::int32_t* argmax;  // [B, D]; null unless mode max

  [[nodiscard]] std::int64_t bag(std::int64_t slot) const noexcept { return bag_of == nullptr ? slot : bag_of[slot]; }
};

// A row with more than kPart lookups, and where the sums of its parts begin in `part_sums`.
struct LongRun {
  std::int64_t run;
  std::int64_t first_part;
};

struct Table {
  std::uint8_t* data;
  std::int64_t rows;
  std::int64_t width;
  std::int64_t stride;  // bytes
  Format format;
};

struct State {
  float* row;                 // [T, row_stride]: the columns below, in this order
  std::int64_t row_stride;
  int second_column;          // of the row-wise optimisers' second moment, or -1
  int step_second_column;     // or -1
  int step_first_column;      // or -1
  void* moment;               // first moment: float32 [T, D], or int8 rows
  std::int64_t moment_stride;  // bytes
  bool moment_short;
  float* second;              // [T, D]
};

struct Rule {
  Optimizer optimizer;
  float lr;
  float adam_rate;  // lr * sqrt(1 - b2^t) / (1 - b1^t)
  float beta1, beta2;
  float one_less_beta1, one_less_beta2;  // rounded from the exact differences
  float eps;
  float decay;  // l2; 0 for none
  float keep;   // 1 - lr * decay where decay is decoupled, else 1
  float grad_scale;
  StepRule step_rule;
  float step_lr;
  float step_scale;
  float step_correction1, step_correction2;  // 1 / (1 - b^t)
  StepFloor step_floor;
  bool grow;
  bool stochastic;
  std::uint64_t seed;
  std::uint32_t step_count;
  std::uint32_t table_id;
};

struct Args {
  Table table;
  State state;
  Rule rule;
  Phase phase = Phase::kWhole;
  SlotGradient gradient{};
  Grouped groups{};
  float* floats = nullptr;              // [runs, D]: w' of the phases first and second
  float* buffers = nullptr;             // [max_threads(), 3 * padded(D)], 64-byte aligned
  const LongRun* long_runs = nullptr;   // ascending; only where part_sums is not null
  std::int64_t long_run_count = 0;
  const float* part_sums = nullptr;     // [parts, padded(D)]; null: rows are summed where they are updated
};

// Row buffers are padded to full registers.
[[nodiscard]] constexpr std::int64_t padded(std::int64_t width) noexcept { return (width + 15) / 16 * 16; }

// Runs [first, last), one thread, with buffers of 3 * padded(D). Returns how many values were clipped.
using RowsFunction = std::int64_t(const Args& args, std::int64_t first, std::int64_t last, float* buffers) noexcept;
// out[0, padded(D)) = sum over keys [first, last), at most kPart of them.
using PartFunction = void(const Args& args, std::int64_t first, std::int64_t last, float* buffers,
                          float* out) noexcept;
// out[run - first] = the step's gradient at `floats` of runs [first, last), without grad_scale and step_scale.
using SlopesFunction = void(const Args& args, std::int64_t first, std::int64_t last, float* buffers,
                            float* out) noexcept;
// Rows [first, last) of a table with steps, from codes with their steps to codes with the step `step`.
using RequantizeFunction = std::int64_t(const Args& args, std::int64_t first, std::int64_t last, float step,
                                        float* buffers) noexcept;

struct Functions {
  RowsFunction* rows;
  PartFunction* part;
  SlopesFunction* slopes;
  RequantizeFunction* requantize;
};

[[nodiscard]] const Functions& functions_avx2(Format format, std::int64_t width) noexcept;
[[nodiscard]] const Functions& functions_avx512(Format format, std::int64_t width) noexcept;

enum class Outcome : int {
  kDone = 0,
  kBadIndex = 1,
  kBadOffset = 2,
  kBadGradient = 3,
  kBadWeight = 4,
  kBadFeature = 5,
  kBadSplit = 6,
};

struct Result {
  Outcome outcome;
  std::int64_t value;  // values clipped (kDone), else the position of what is wrong
};

// What one call brings along beside table, state and rule.
struct Call {
  embedding_bag::Lookups lookups;
  const float* grad;     // [bags, D]
  const float* weights;  // [n] or null
  const std::int32_t* argmax;
  bool mean;
  bool check;
  Phase phase;
  std::uint64_t* keys;    // phases first and second: [2n], kept between them; whole: null
  std::int32_t* starts;   // likewise [n + 1]
  std::int64_t* counts;   // likewise [3]: lookups kept, runs, which half of `keys` they are in
  float* floats;          // likewise [n, D]
  std::uint8_t* scratch;  // scratch_bytes(...)
};

[[nodiscard]] std::int64_t scratch_bytes(std::int64_t total, std::int64_t bags, std::int64_t width, bool offsets,
                                         bool coefficients, bool owns_groups, int threads) noexcept;

// Groups, checks, updates. Nothing is written to table and state unless all that was given is sound.
[[nodiscard]] Result run(const Table& table, const State& state, const Rule& rule, const Call& call) noexcept;

// The sum over the rows of phase first of the step's gradient (times grad_scale and step_scale), in row order.
[[nodiscard]] Result table_step_gradient(const Table& table, const Rule& rule, const Call& call, double* out) noexcept;

// Every row of a table with steps to the step `step`; rows of phase first come from `floats` (keys null: none did).
[[nodiscard]] std::int64_t requantize(const Table& table, const Rule& rule, float step, const Call& call) noexcept;

}  // namespace recfast::embedding_update
