// The k best of a stream, in one order everywhere: score descending, ties by lowest id.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace recfast {

struct Scored {
  float score;
  std::int64_t id;
};

// Whether a goes before b. NaN must have been refused before.
[[nodiscard]] constexpr bool goes_before(const Scored& a, const Scored& b) noexcept {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// Keeps the `capacity` best in memory the caller owns; the worst kept one stands at the root of a binary heap.
// The outcome depends on the set that was offered, not on the order of offers.
class TopK {
 public:
  TopK(Scored* storage, std::int64_t capacity) noexcept : heap_(storage), capacity_(capacity) {}

  [[nodiscard]] std::int64_t size() const noexcept { return size_; }
  [[nodiscard]] bool full() const noexcept { return size_ == capacity_; }

  // A new entry must not score below this to be kept; -inf until the heap is full.
  [[nodiscard]] float threshold() const noexcept {
    return size_ < capacity_ || capacity_ == 0 ? -std::numeric_limits<float>::infinity() : heap_[0].score;
  }

  void offer(float score, std::int64_t id) noexcept {
    const Scored entry{score, id};
    if (size_ < capacity_) {
      heap_[size_++] = entry;
      std::push_heap(heap_, heap_ + size_, goes_before);
    } else if (capacity_ > 0 && goes_before(entry, heap_[0])) {
      std::pop_heap(heap_, heap_ + size_, goes_before);
      heap_[size_ - 1] = entry;
      std::push_heap(heap_, heap_ + size_, goes_before);
    }
  }

  // Writes the kept entries best first and fills the rest with (-inf, -1). The heap is empty afterwards.
  void write(float* scores, std::int64_t* ids) noexcept {
    std::sort_heap(heap_, heap_ + size_, goes_before);
    for (std::int64_t i = 0; i < capacity_; ++i) {
      scores[i] = i < size_ ? heap_[i].score : -std::numeric_limits<float>::infinity();
      ids[i] = i < size_ ? heap_[i].id : -1;
    }
    size_ = 0;
  }

 private:
  Scored* heap_;
  std::int64_t capacity_;
  std::int64_t size_ = 0;
};

}  // namespace recfast
