// dpp_greedy: the greedy MAP list of a determinantal point process, one list a user, low-rank kernel.
//
// Kernel       L = Diag(q) S Diag(q), q_i = exp(alpha r_i), S = (1 - gamma) F F^T + gamma I
// Step         pick argmax_i of 2 alpha r_i + log rho_i, rho_i = det S_{Y+i} / det S_Y, ties by lowest index
// Method       rho_i = S_ii (1 - sum_t <b_i, q_t>^2): b_i is row i of F scaled so that S_ii = 1, q_t the Gram-Schmidt
//              direction of pick t. State N + K D (gamma > 0: N + K (D + K), for gamma I gives each pick a coordinate
//              of its own); neither an N x N kernel nor N x K Cholesky rows.
// Shapes       features [U, N, D] or [N, D] for all users (user_stride 0), relevance [U, N], results [U, K]
// Dtypes       features float32 or float64; relevance, weight, gains, log_det float64; indices int64
// Exactness    float32 gives an upper bound of every score (error bound below), float64 decides among those whose
//              bound reaches the best; float64 scores closer than kTie + kTieRelative |best| are equal.
//              So the indices depend on neither thread count, batch, instruction set nor laziness.
// Error bound  float32 residual share: 1.01 u (2 (D + 4) sqrt(t) + 2 t + 4) + t ((D + 4) u)^2 after t picks, u = 2^-24:
//              each dot product is off by (D + 4) u |b| |q| at most, and sum_t <b, q_t>^2 <= 1 (Cauchy-Schwarz).
// Laziness     rho only falls, so an old bound holds: a panel of 64 items is brought up to date (and even packed) only
//              while its bound can win.
// Limits       N, D < 2^31, squared norms within float64
// Sources      Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point process to improve
//              recommendation diversity", NeurIPS 2018 (the greedy rule, the window)
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/status.h"

namespace recfast::dpp_greedy {

inline constexpr std::int64_t kPanel = 64;
// An item is spent when less than this share of its S_ii is left: what remains of a float32 row is rounding noise.
inline constexpr double kSpent = 1e-10;
inline constexpr double kTie = 1e-12;
inline constexpr double kTieRelative = 1e-15;

enum class Exhausted : int { kRelevance = 0, kStop = 1, kRestart = 2 };

template <class T>
struct Args {
  std::int64_t users = 0;
  std::int64_t items = 0;
  std::int64_t width = 0;
  std::int64_t picks = 0;
  std::int64_t shown_width = 0;
  std::int64_t window = 0;  // the next pick sees the window - 1 before it; 0: all of them
  double gamma = 0.0;
  Exhausted exhausted = Exhausted::kRelevance;
  bool exact = true;
  const T* features = nullptr;
  std::int64_t user_stride = 0;
  const double* relevance = nullptr;
  const double* weight = nullptr;         // [U], 2 alpha; infinity: relevance alone
  const std::int64_t* lengths = nullptr;  // [U] or null
  const bool* mask = nullptr;             // [U, N] or null; false: not a candidate
  const std::int64_t* shown = nullptr;    // [U, shown_width], checked, -1 padded
  std::int64_t* indices = nullptr;
  std::int64_t* count = nullptr;
  double* gains = nullptr;
  double* log_det = nullptr;
  std::byte* scratch = nullptr;  // 64-byte aligned, scratch_bytes(..., gamma > 0) a thread
};

// Where the first value that is not finite stands (flat), or -1. Only candidates are looked at.
struct Outcome {
  std::int64_t wrong_feature = -1;
  std::int64_t wrong_relevance = -1;
};

[[nodiscard]] std::int64_t scratch_bytes(std::int64_t items, std::int64_t width, std::int64_t picks,
                                         std::int64_t shown_width, bool regularised) noexcept;

// Threaded over users.
template <class T>
Outcome run(const Args<T>& args) noexcept;

// rel[l] -= <panel[:, l], directions[v]>^2 for `count` directions of D values one after the other;
// panel is [D, 64], 64-byte aligned like rel, offset and upper.
// Then upper[l] >= offset[l] + log(rel[l] + slack); returns the greatest.
float refresh_scalar(const float* panel, const float* directions, std::int64_t count, std::int64_t width, float slack,
                     const float* offset, float* rel, float* upper) noexcept;
float refresh_avx2(const float* panel, const float* directions, std::int64_t count, std::int64_t width, float slack,
                   const float* offset, float* rel, float* upper) noexcept;
float refresh_avx512(const float* panel, const float* directions, std::int64_t count, std::int64_t width, float slack,
                     const float* offset, float* rel, float* upper) noexcept;

}  // namespace recfast::dpp_greedy
