// dpp_greedy: the greedy MAP list of a determinantal point process, one list a user, low-rank kernel.
//
// Kernel       L = Diag(q) S Diag(q), q_i = exp(alpha r_i), S = (1 - gamma) F F^T + gamma I
// Step         pick argmax_i of 2 alpha r_i + log rho_i, rho_i = det S_{Y+i} / det S_Y, ties by lowest index
// Method       rho_i = S_ii (1 - sum_t <b_i, q_t>^2): b_i is row i of F scaled so that S_ii = 1, q_t the Gram-Schmidt
//              direction of pick t. State N D bytes + K D (gamma > 0: K (D + K), for gamma I gives each pick a
//              coordinate of its own); neither an N x N kernel nor N x K Cholesky rows.
// Shapes       rows [U, N, D], [N, D] for all users, or a table [T, D] with candidates [U, N]; relevance [U, N];
//              results [U, K]
// Dtypes       rows float32, float64, bfloat16 or float16; relevance float32 or float64; weight, gains, log_det float64
// Exactness    Codes of 8 bits give an upper bound of every score (below), float64 decides among those whose bound
//              reaches the best; float64 scores closer than kTie + kTieRelative |best| are equal. So the indices
//              depend on neither thread count, batch, instruction set nor laziness.
// Bound        Row i has codes b'_i with |b_i - b'_i| <= delta_i, as measured when they are made; direction t has 16-bit
//              codes with an error of eta_t at most. q_t are orthonormal, so by Bessel's inequality
//              sqrt(sum <b, q_t>^2) >= sqrt(sum <b', q'_t>^2) - d, d = delta + |b'| sqrt(sum eta_t^2), however many picks.
//              Hence share <= 1 - S + 2 d sqrt(S), and sqrt(S) <= (S + 1/2) / sqrt(2). The products of codes are
//              integers: sums are exact.
// Laziness     rho only falls, so an old bound holds: a panel of 64 items is brought up to date (and even packed) only
//              while its bound can win.
// Window       The basis of the picks in the window is turned by Givens rotations so that the pick that leaves it has one
//              direction u of its own: rho_i += <b_i, u>^2. Two products a pick. rho may then rise: a panel not up to
//              date has the bound that relevance and norm alone give.
// Limits       N < 2^31, D <= kMaxWidth (sums of codes stay within 32 bits), squared norms within float64
// Sources      Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point process to improve
//              recommendation diversity", NeurIPS 2018 (the greedy rule, the window)
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/item_panels.h"
#include "common/status.h"

namespace recfast::dpp_greedy {

using item_panels::kPanel;

inline constexpr std::int64_t kMaxWidth = 65536;
inline constexpr double kTie = 1e-12;
inline constexpr double kTieRelative = 1e-15;
// A row with less than this share left adds no direction, whatever epsilon: it would be made of rounding.
inline constexpr double kNoDirection = 1e-10;
// Without `exact` an item is looked at only if it may be better than the best so far by more than this.
inline constexpr double kFast = 5e-5;

enum class Exhausted : int { kRelevance = 0, kStop = 1, kRestart = 2 };

struct Args {
  std::int64_t users = 0;
  std::int64_t items = 0;
  std::int64_t width = 0;
  std::int64_t picks = 0;
  std::int64_t shown_width = 0;
  std::int64_t window = 0;  // the next pick sees the window - 1 before it; 0: all of them
  double gamma = 0.0;
  double epsilon = 1e-10;   // an item is spent when less than this share of its S_ii is left
  Exhausted exhausted = Exhausted::kRelevance;
  bool exact = true;
  const std::byte* features = nullptr;
  Format format = Format::kFloat32;
  std::int64_t user_stride = 0;               // rows from one user to the next; 0: all have the same
  const std::int64_t* candidates = nullptr;   // [U, N] rows, checked, negative: none; or null
  const void* relevance = nullptr;
  bool relevance_is_double = false;
  const double* weight = nullptr;             // [U], 2 alpha; infinity: relevance alone
  const std::int64_t* lengths = nullptr;      // [U] or null
  const bool* mask = nullptr;                 // [U, N] or null; false: not a candidate
  const std::int64_t* shown = nullptr;        // [U, shown_width] items, or rows with candidates; checked, negative: none
  std::int64_t* indices = nullptr;
  std::int64_t* count = nullptr;
  double* gains = nullptr;
  double* log_det = nullptr;
  std::byte* scratch = nullptr;               // 64-byte aligned, scratch_bytes a thread
};

// Where the first value that is not finite stands, or -1. Only candidates and shown rows are looked at.
struct Outcome {
  std::int64_t wrong_feature = -1;    // flat in [U, N]: its row
  std::int64_t wrong_shown = -1;      // flat in [U, shown_width]: its row
  std::int64_t wrong_relevance = -1;  // flat in [U, N]
};

// Reads the sizes and options of `args` alone.
[[nodiscard]] std::int64_t scratch_bytes(const Args& args) noexcept;

// Threaded over users; one user alone, over panels.
Outcome run(const Args& args) noexcept;

// A direction in codes: value(c) = step * (256 high[c] + low[c]).
struct Direction {
  const std::int8_t* high = nullptr;  // [groups * 4]
  const std::int8_t* low = nullptr;
  float step = 0.0f;
  std::int32_t high_start = 0;        // -128 * sum of high: the codes of items are shifted by 128
  std::int32_t low_start = 0;
  float sign = 1.0f;                  // -1: it leaves the basis
};

// 64 items in codes.
struct Panel {
  std::uint8_t* codes;  // [groups, 64, 4] byte j of group g is column 4 g + j, plus 128
  float* step;          // [64] value = step * (code - 128)
  float* delta;         // [64] |b - b'|
  float* sum;           // [64] sum of <b', q'_t>^2
  float* offset;        // [64] score less log(share), less the greatest such; -inf: may not be picked
  float* upper;         // [64] upper bound of the score, less the same
};

struct Forms {
  // out[i] = sum of squares of row first + i, in float32; any value where that is not finite or not normal.
  void (*norms)(const item_panels::Rows& rows, std::int64_t first, std::int64_t count, const bool* wanted,
                float* out) noexcept;
  // offset[i] = relevance part[i] + log(diagonal[i]) for normal diagonals; the error is below 1e-6 (1 + |both|).
  void (*offsets)(const float* part, const float* diagonal, std::int64_t count, float* offset) noexcept;
  // The codes of 64 rows times scale; where scale[l] is 0 the row is not read.
  void (*pack)(const item_panels::Rows& rows, std::int64_t first, const double* scale, const Panel& panel) noexcept;
  // The codes of a direction of `width` doubles; returns an upper bound of |q - q'|.
  float (*encode)(const double* q, std::int64_t width, std::int64_t groups, std::int8_t* high, std::int8_t* low,
                  Direction* direction) noexcept;
  // sum += sign <b', q'>^2 for each direction, then upper; returns the greatest. `error` is that of b' Q (d less delta),
  // `slack` what else the share may be off.
  float (*refresh)(const Panel& panel, const Direction* directions, std::int64_t count, std::int64_t groups,
                   float error, float slack) noexcept;
  // Bit l: upper[l] >= least, of 64.
  std::uint64_t (*at_least)(const float* upper, float least) noexcept;
};

// Of the instruction set in force.
[[nodiscard]] const Forms& forms() noexcept;

extern const Forms kScalarForms;
#if defined(__x86_64__)
extern const Forms kAvx2Forms;
extern const Forms kVnniForms;
#endif

}  // namespace recfast::dpp_greedy
