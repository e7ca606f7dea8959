// Rows of heads of a batch of sequences, jagged or padded, read and written where they lie.
#pragma once

#include <cstdint>

namespace recfast {

// Row i of head h of sequence b is the side by side values at data + b * batch + i * row + h * head; jagged, i counts
// from the first row of all and batch is 0.
template <class S>
struct Heads {
  S* data = nullptr;
  std::int64_t batch = 0;
  std::int64_t row = 0;
  std::int64_t head = 0;
};

// Sequence b has rows offsets[b] <= i < offsets[b + 1] of all (jagged), or the first lengths[b] of its own (padded).
struct Sequences {
  std::int64_t count = 0;
  const std::int64_t* offsets = nullptr;  // [count + 1]; null when padded
  const std::int64_t* lengths = nullptr;  // [count]; null when jagged

  [[nodiscard]] std::int64_t length(std::int64_t sequence) const noexcept {
    return offsets == nullptr ? lengths[sequence] : offsets[sequence + 1] - offsets[sequence];
  }
  // Row `row` of a head of a sequence.
  template <class S>
  [[nodiscard]] S* at(const Heads<S>& x, std::int64_t sequence, std::int64_t head,
                      std::int64_t row = 0) const noexcept {
    return x.data + sequence * x.batch + (row + (offsets == nullptr ? 0 : offsets[sequence])) * x.row + head * x.head;
  }
};

}  // namespace recfast
