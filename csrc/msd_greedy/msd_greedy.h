// msd_greedy: maximal sum of distances, one list a user.
//
// Score        (1 - d) r_i + d sum_{j seen} (1 - <f_i, f_j>), with mean the sum over the number seen; nothing seen: the
//              greatest relevance
// Method       the sum is n - <f_i, g> with g the sum of the rows seen: a step is one matrix-vector product, with a window
//              or without, and no state an item
// Laziness     since it was looked at an item's <f_i, g> has changed by |f_i| |g - g_then| at most (Cauchy-Schwarz), which
//              for varied picks grows with the root of their number; n is the same for all
// Error bound  float32 dot products of rows of norm <= 1: 1.01 u (D + 4) |g|, u = 2^-24
// The rest     greedy/greedy.h
// Source       Borodin, Lee and Ye, "Max-sum diversification, monotone submodular functions and dynamic updates", PODS 2012
#pragma once

#include "greedy/greedy.h"

namespace recfast::msd_greedy {

struct Options {
  bool mean = false;
};

[[nodiscard]] std::int64_t scratch_bytes(const greedy::Args& args, const Options& options) noexcept;
greedy::Outcome run(const greedy::Args& args, const Options& options) noexcept;

}  // namespace recfast::msd_greedy
