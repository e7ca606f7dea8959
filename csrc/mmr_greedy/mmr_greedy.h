// mmr_greedy: maximal marginal relevance, one list a user.
//
// Score        (1 - d) r_i - d max_{j seen} <f_i, f_j>, with clip the dot product brought to [0, 1]; nothing seen: the
//              greatest relevance
// Method       m_i = max <f_i, f_j>: a step is one matrix-vector product; m only rises, so old bounds hold. With a window
//              what leaves takes m with it: panels whose first bound can win are worked out afresh, O(N D window) a pick
//              at most.
// Error bound  float32 dot products of rows of norm <= 1: 1.01 u (D + 4), u = 2^-24; nothing adds up over picks
// The rest     greedy/greedy.h
// Source       Carbonell and Goldstein, "The use of MMR, diversity-based reranking for reordering documents and producing
//              summaries", SIGIR 1998
#pragma once

#include "greedy/greedy.h"

namespace recfast::mmr_greedy {

struct Options {
  bool clip = false;
};

[[nodiscard]] std::int64_t scratch_bytes(const greedy::Args& args, const Options& options) noexcept;
greedy::Outcome run(const greedy::Args& args, const Options& options) noexcept;

}  // namespace recfast::mmr_greedy
