// dpp_greedy_kernel: the greedy MAP list of a determinantal point process whose similarities are given as a matrix.
//
// Kernel       L = Diag(q) S' Diag(q), q_i = exp(alpha r_i), S' = (1 - gamma) S + gamma I
// Step         pick argmax_i of 2 alpha r_i + log rho_i, rho_i = det S'_{Y+i} / det S'_Y, ties by lowest index
// Method       Cholesky rows: e_t = (S'[j, :] - sum_v e_v[j] e_v) / sqrt(rho_j), rho -= e_t^2. O(N t) for pick t; in a
//              window of w, all of its rows afresh: O(N w^2 / 2).
// Shapes       similarity [U, N, N], or [N, N] for all users; results [U, K]
// Dtypes       similarity float32 or float64; all else float64
// Memory       the K x N rows; of S only the diagonal, the rows of picks and one column are read
// Checks       what is read is finite; the diagonal is not negative; the column of the first pick equals its row, and so
//              do entries between picks; no rho_i is below 0 by more than rounding makes it
// Sources      Chen, Zhang and Zhou, NeurIPS 2018
#pragma once

#include <cstddef>
#include <cstdint>

#include "dpp_greedy/dpp_greedy.h"

namespace recfast::dpp_greedy_kernel {

struct Args {
  std::int64_t users = 0;
  std::int64_t items = 0;
  std::int64_t picks = 0;
  std::int64_t shown_width = 0;
  std::int64_t window = 0;  // the next pick sees the window - 1 before it; 0: all of them
  double gamma = 0.0;
  double epsilon = 1e-10;   // an item is spent when less than this share of its S'_ii is left
  dpp_greedy::Exhausted exhausted = dpp_greedy::Exhausted::kRelevance;
  const std::byte* similarity = nullptr;
  bool is_double = false;
  bool is_shared = false;                 // one matrix for all users
  const double* relevance = nullptr;      // [U, N]
  const double* weight = nullptr;         // [U], 2 alpha; infinity: relevance alone
  const std::int64_t* lengths = nullptr;  // [U] or null
  const bool* mask = nullptr;             // [U, N] or null; false: not a candidate
  const std::int64_t* shown = nullptr;    // [U, shown_width], checked, negative: none
  std::int64_t* indices = nullptr;
  std::int64_t* count = nullptr;
  double* gains = nullptr;
  double* log_det = nullptr;
  std::byte* scratch = nullptr;           // 64-byte aligned, scratch_bytes a thread
};

// Where the first wrong value stands, flat, or -1: (user, row, column) of the similarity, (user, item) of the relevance
// and of an item whose rho is negative.
struct Outcome {
  std::int64_t not_finite = -1;
  std::int64_t negative = -1;
  std::int64_t asymmetric = -1;
  std::int64_t indefinite = -1;
  std::int64_t relevance = -1;
};

// Reads the sizes of `args` alone.
[[nodiscard]] std::int64_t scratch_bytes(const Args& args) noexcept;

// Threaded over users.
Outcome run(const Args& args) noexcept;

}  // namespace recfast::dpp_greedy_kernel
