// xquad_greedy: explicit query aspect diversification, one list a user.
//
// Score        (1 - d) r_i + d sum_z P(z | u) P(i | z) prod_{j seen} (1 - P(j | z))
// Method       the sum is <p_i, v>, v_z = P(z | u) prod (1 - P(j | z)): a step is one matrix-vector product, no state an item
// Laziness     v only falls, and so do scores: old bounds hold. With a window they rise by sum_z max(v_z - then, 0) at most.
// Error bound  float32 dot products of p in [0, 1]: 1.01 u (Z + 4) sum_z v_z, u = 2^-24
// Limits       topics in [0, 1], preferences in [0, kLargest]
// The rest     greedy/greedy.h
// Source       Santos, Macdonald and Ounis, "Exploiting query reformulations for web search result diversification", WWW 2010
#pragma once

#include "greedy/greedy.h"

namespace recfast::xquad_greedy {

struct Options {
  const double* preferences = nullptr;  // [U, Z]
};

[[nodiscard]] std::int64_t scratch_bytes(const greedy::Args& args, const Options& options) noexcept;
greedy::Outcome run(const greedy::Args& args, const Options& options) noexcept;

}  // namespace recfast::xquad_greedy
