// ssd_greedy: sliding spectrum decomposition, one list a user.
//
// Score        (1 - d) r_i + d gamma P sqrt(rho_i), rho_i = |f_i|^2 (1 - sum_q <b_i, q>^2): b_i the unit row, q
//              orthonormal directions; P = 1, or with volume the product of sqrt(rho) of the picks so far (at most
//              kMostVolume). Nothing seen: the greatest relevance
// Directions   exact: of what the window holds (Gram-Schmidt), worked out afresh when something leaves it.
//              paper: each pick's is what is left of its row, at that time, outside those of the window - 1 before it, and
//              stays so when they leave. (Bases made so are orthogonal, hence "restoring" the coefficient of the one that
//              leaves, as published, is leaving out its square: no residual vectors are kept.)
// Spent        rho_i = 0 where less than kSpent of |f_i|^2 is left: what remains of a float32 row is rounding noise
// Method       a step is one matrix-vector product; without a window rho only falls, so old bounds hold. With one, panels
//              whose first bound can win are worked out afresh, O(N D window) a pick at most.
// Error bound  float32 share after t directions: 1.01 u (2 (D + 4) sqrt(t) + 2 t + 4) + t ((D + 4) u)^2, u = 2^-24: each dot
//              product is off by (D + 4) u |b| |q| at most, and sum <b, q>^2 <= 1 (Cauchy-Schwarz)
// Limits       gamma in [0, 1e100], so that its product with volume and norm is finite
// The rest     greedy/greedy.h
// Source       Huang, Wang, Zhang and Xu, "Sliding spectrum decomposition for diversified recommendation", KDD 2021
#pragma once

#include "greedy/greedy.h"

namespace recfast::ssd_greedy {

inline constexpr double kSpent = 1e-10;
inline constexpr double kMostVolume = 1e100;

struct Options {
  double gamma = 1.0;
  bool paper = false;
  bool volume = false;
};

[[nodiscard]] std::int64_t scratch_bytes(const greedy::Args& args, const Options& options) noexcept;
greedy::Outcome run(const greedy::Args& args, const Options& options) noexcept;

}  // namespace recfast::ssd_greedy
