// greedy: what mmr_greedy, msd_greedy, ssd_greedy and xquad_greedy share: one list a user, each pick the item with the
// greatest score given those that it sees.
//
// Score        w r_i + (what the rule makes of item i and the picks seen), w = 1 - diversity; the rules stand in
//              mmr_greedy.h, msd_greedy.h, ssd_greedy.h and xquad_greedy.h
// Seen         shown items and picks so far, or (window > 0) the last window - 1 of them
// Shapes       rows [U, N, D], [N, D] for all users or [T, D] with candidates; relevance [U, N], results [U, K]
// Dtypes       rows float32, float64, bfloat16, float16; relevance, diversity, gains float64; indices int64
// Exactness    float32 gives an upper bound of every score (each rule proves its own), float64 decides among those whose
//              bound reaches the best; float64 scores closer than kTie of the magnitude of their terms are equal, and
//              the lowest index wins. Relevance alone (diversity 0, nothing seen) is compared as it is. So the indices
//              depend on neither thread count, batch, instruction set nor laziness.
// Laziness     an old bound, raised by what the rule says may have changed since, still holds: a panel of 64 items is
//              brought up to date (and even packed) only while its bound can win.
// Units        scores are scanned as (score - greatest w r) / unit, rows divided by the greatest norm, so that float32
//              neither overflows nor loses what counts, whatever the scale of the arguments
// Limits       squared norms and |relevance| at most kLargest
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/row_format.h"

namespace recfast::greedy {

inline constexpr double kTie = 1e-12;
inline constexpr double kLargest = 1e200;

struct Args {
  std::int64_t users = 0;
  std::int64_t items = 0;
  std::int64_t width = 0;
  std::int64_t picks = 0;
  std::int64_t shown_width = 0;
  std::int64_t window = 0;  // the next pick sees the window - 1 before it; 0: all of them
  bool exact = true;
  Format format = Format::kFloat32;
  std::int64_t user_stride = 0;  // bytes from one user's rows to the next; 0: all have the same
  const std::byte* features = nullptr;
  const double* relevance = nullptr;
  const double* diversity = nullptr;         // [U]
  const std::int64_t* candidates = nullptr;  // [U, N] rows of the table, checked, -1: none; or null: item i is row i
  const std::int64_t* lengths = nullptr;     // [U] or null
  const bool* mask = nullptr;                // [U, N] or null; false: not a candidate
  const std::int64_t* shown = nullptr;       // [U, shown_width], checked, -1 padded: items, or rows of the table
  std::int64_t* indices = nullptr;
  std::int64_t* count = nullptr;
  double* gains = nullptr;
  std::byte* scratch = nullptr;  // 64-byte aligned, scratch_bytes a thread
};

// Where the first value that is not allowed stands, or -1. Only candidates and what was shown are looked at.
struct Outcome {
  std::int64_t item = -1;       // flat in [U, N]: its row
  std::int64_t shown = -1;      // flat in [U, shown_width]: its row
  std::int64_t relevance = -1;  // flat in [U, N]
};

}  // namespace recfast::greedy
