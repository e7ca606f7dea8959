// kdpp_sample: exact samples of a k-DPP, sets of k items drawn with P(Y) = det L_Y / e_k(L), low-rank kernel.
//
// Kernel       L = Diag(q) S Diag(q), q_i = exp(quality_i), S = (1 - gamma) F F^T + gamma I
// Method       1. Eigenvectors of L: from those of the D x D dual B^T B, B = sqrt(1 - gamma) Diag(q) F; where N <= D,
//                 where gamma > 0, or where the dual has lost the k-th eigenvalue (below kLost of the first), from the
//                 pivoted Cholesky factor of L itself. Both by one-sided Jacobi rotations of a pivoted Cholesky factor.
//              2. Which k of them: eigenvector n with probability lambda_n / (R_m + lambda_n), m still to choose, where
//                 R_m = e_m / e_(m-1) of the eigenvalues before n. The ratios stay in the eigenvalues' own range:
//                 R_m <- (R_m + lambda) / (1 + lambda / R_(m-1)), all terms positive.
//              3. Items one after the other, in proportion to what is left of their rows v_i of the chosen
//                 eigenvectors. By rejection: propose an eigenvector evenly and an item by its squared entries there,
//                 accept with probability |rest of v_i|^2 / |v_i|^2. After kRejections k proposals in vain all items
//                 are weighed; the draw does not depend on what was refused, so that both are exact.
// Shapes       features [U, N, D] or [N, D] for all users (user_stride 0), quality [U, N], indices [U, S, K]
// Dtypes       features float32 or float64; all work and quality float64; indices int64
// Randomness   Philox with counter (user, sample, block): a draw depends on seed, user's key, sample and candidates
//              alone. Products and sums are rounded apart and summed in eight lanes on every instruction set.
// Rank         an item's direction is spent below kSpent of its L_ii; k is cut to the rank. An item whose q is below
//              exp(-kRange) of the user's greatest weighs nothing.
// Accuracy     eigenvalues, relatively: about 2^-53 (N + D) / kLost at worst by the dual.
// Limits       N, D < 2^31, squared norms within float64
// Sources      Kulesza and Taskar, "k-DPPs: fixed-size determinantal point processes", ICML 2011 (steps 1 and 2);
//              Barthelme, Tremblay and Amblard, "A faster sampler for discrete determinantal point processes",
//              AISTATS 2023 (step 3); Drmac and Veselic, "New fast and accurate Jacobi SVD algorithm", 2008 (step 1)
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/status.h"

namespace recfast::kdpp_sample {

inline constexpr std::int64_t kLanes = 8;      // doubles that are summed apart
inline constexpr std::int64_t kRejections = 8;  // times k
inline constexpr double kSpent = 1e-10;
inline constexpr double kLost = 1e-8;
inline constexpr double kRange = 300.0;

template <class T>
struct Args {
  std::int64_t users = 0;
  std::int64_t items = 0;
  std::int64_t width = 0;
  std::int64_t picks = 0;
  std::int64_t samples = 0;
  double gamma = 0.0;
  std::uint64_t seed = 0;
  const T* features = nullptr;
  std::int64_t user_stride = 0;
  const double* quality = nullptr;        // [U, N] or null: 0
  const std::int64_t* lengths = nullptr;  // [U] or null
  const bool* mask = nullptr;             // [U, N] or null; false: not a candidate
  const std::int64_t* keys = nullptr;     // [U] or null: 0, 1, ...
  std::int64_t* indices = nullptr;        // ascending, then -1
  std::int64_t* count = nullptr;          // [U]
  double* log_normaliser = nullptr;       // [U], log e_count(L)
  std::byte* scratch = nullptr;           // 64-byte aligned, scratch_bytes(...) a thread
};

// Where the first value that is not finite stands (flat), or -1. Only candidates are looked at.
struct Outcome {
  std::int64_t wrong_feature = -1;
  std::int64_t wrong_quality = -1;
};

[[nodiscard]] std::int64_t scratch_bytes(std::int64_t items, std::int64_t width, std::int64_t picks,
                                         bool regularised) noexcept;

// Threaded over users.
template <class T>
Outcome run(const Args<T>& args) noexcept;

// One user: its candidates' rows, and room to work in.
struct Problem {
  std::int64_t items = 0;  // candidates
  std::int64_t width = 0;
  std::int64_t picks = 0;  // no more than the rank can be
  std::int64_t samples = 0;
  std::int64_t sample_stride = 0;  // of indices
  bool regularised = false;
  std::uint64_t seed = 0;
  std::uint64_t key = 0;
  double* rows = nullptr;  // [items up to a multiple of 8, width_stride]: b_i, then zeros
  double* own = nullptr;   // [items]: gamma q_i^2, if regularised

  std::int64_t width_stride = 0;  // multiples of 8
  std::int64_t item_stride = 0;
  std::int64_t value_stride = 0;
  std::int64_t pick_stride = 0;
  double* dual = nullptr;        // [width, width_stride]
  double* factor = nullptr;      // [rank, width_stride or item_stride]
  double* left = nullptr;        // [width_stride or item_stride]
  double* limit = nullptr;       // the same
  double* squared = nullptr;     // [rank]
  double* values = nullptr;      // [rank] eigenvalues over the greatest, descending
  double greatest = 0.0;
  double* ratios = nullptr;      // [rank + 1, picks]
  double* weights = nullptr;     // [width, value_stride]
  double* vectors = nullptr;     // [items up to a multiple of 8, value_stride]
  double* cumulative = nullptr;  // [items, value_stride]
  double* directions = nullptr;  // [picks, pick_stride]
  double* row = nullptr;         // [pick_stride]
  std::int64_t* order = nullptr;    // [rank]
  std::int64_t* columns = nullptr;  // [rank]
  std::int64_t* chosen = nullptr;   // [picks]
  bool* taken = nullptr;            // [items]

  std::int64_t* indices = nullptr;  // [samples, sample_stride]: positions among the candidates, ascending
  std::int64_t count = 0;
  double log_normaliser = 0.0;
};

void solve_scalar(Problem& problem) noexcept;
void solve_avx2(Problem& problem) noexcept;
void solve_avx512(Problem& problem) noexcept;

}  // namespace recfast::kdpp_sample
