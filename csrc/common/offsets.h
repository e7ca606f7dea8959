// Offsets of a jagged array: list b is [offsets[b], offsets[b + 1]).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/span.h"

namespace recfast {

// The first position where `offsets` [size] does not start at 0, falls, or does not end at `total`; -1 if none.
// `longest` becomes the largest step.
[[nodiscard]] inline std::int64_t check_offsets(Span<const std::int64_t> offsets, std::int64_t total,
                                                std::int64_t& longest) noexcept {
  longest = 0;
  if (offsets.empty() || offsets.front() != 0) return 0;
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    // Compared, not subtracted: from wild offsets the difference may pass 2^63 and come back positive.
    if (offsets[i] < offsets[i - 1]) return static_cast<std::int64_t>(i);
    longest = std::max(longest, offsets[i] - offsets[i - 1]);
  }
  return offsets.back() == total ? -1 : static_cast<std::int64_t>(offsets.size()) - 1;
}

}  // namespace recfast
