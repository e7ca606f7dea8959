// The k best of a stream, kept in a buffer that is cut to them whenever it is full: cheaper than a heap where most of
// the stream is refused by a threshold. Items come by position; what they are called is looked up, many at once, for
// those that are still there at a cut.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "code_search/packed.h"
#include "common/top_k.h"

namespace recfast::code_search {

// The outcome depends on the set that was offered, not on the order of offers.
class Collector {
 public:
  Collector() = default;
  // Scratch of room(k) values each; slots and ids as in Items.
  Collector(Scored* kept, std::int32_t* keys, std::int64_t k, Reach* reach, const std::int32_t* slots,
            const std::int64_t* ids) noexcept
      : kept_(kept), keys_(keys), reach_(reach), slots_(slots), ids_(ids), k_(k), room_(room(k)) {}

  [[nodiscard]] static std::int64_t room(std::int64_t k) noexcept { return k + std::max<std::int64_t>(k, 64); }

  // What scores below this is not among the k best; -inf while that is unknown.
  [[nodiscard]] float theta() const noexcept { return theta_; }

  void clear() noexcept {
    size_ = 0;
    named_ = 0;
  }

  // Another lower bound of the k-th best score, from elsewhere.
  void raise(float theta) noexcept {
    theta_ = theta;
    last_id_ = kNoId;
  }

  // Keeps what is good enough; -inf and NaN never are. Whether theta has risen.
  bool offer(const float* scores, const std::int64_t* positions, std::int64_t count) noexcept {
    const float before = theta_;
    for (std::int64_t i = 0; i < count;) {
      // No branch while there is room: which ones are good enough cannot be foreseen.
      const std::int64_t stop = std::min(count, i + room_ - size_);
      const float least = std::max(theta_, std::numeric_limits<float>::lowest());
      for (; i < stop; ++i) {
        if (last_id_ != kNoId && scores[i] == theta_ && name(positions[i]) > last_id_) continue;
        kept_[size_] = {scores[i], positions[i]};
        keys_[size_] = key(scores[i]);
        size_ += scores[i] >= least ? 1 : 0;
      }
      if (size_ == room_) cut();
    }
    return theta_ > before;
  }

  // theta as it is after all that was offered.
  [[nodiscard]] float settle() noexcept {
    if (size_ >= k_ && k_ > 0) cut();
    return theta_;
  }

  void merge(Collector& other) noexcept {
    if (other.theta_ > theta_) raise(other.theta_);
    other.name_all();
    name_all();
    for (std::int64_t i = 0; i < other.size_; ++i) {
      const Scored& one = other.kept_[i];
      if (one.score < theta_ || (one.score == theta_ && one.id > last_id_)) continue;
      kept_[size_] = one;
      keys_[size_] = key(one.score);
      named_ = ++size_;
      if (size_ == room_) cut();
    }
  }

  // The k best (or fewer), best first; how many. The buffer is empty afterwards.
  std::int64_t write(float* scores, std::int64_t* ids) noexcept {
    if (size_ > k_ && k_ > 0) cut();
    name_all();
    const std::int64_t count = std::min(size_, k_);
    if (size_ <= kRanked && rank(scores, ids)) {
      clear();
      return count;
    }
    std::sort(kept_, kept_ + size_, [](const Scored& a, const Scored& b) { return goes_before(a, b); });
    for (std::int64_t i = 0; i < count; ++i) {
      scores[i] = kept_[i].score;
      ids[i] = kept_[i].id;
    }
    clear();
    return count;
  }

 private:
  static constexpr std::int64_t kNoId = std::numeric_limits<std::int64_t>::max();

  // Up to here counting how many keys are higher beats sorting.
  static constexpr std::int64_t kRanked = 320;

  // Writes each entry to the place that as many as have higher scores leave it; false where two have the same.
  bool rank(float* scores, std::int64_t* ids) const noexcept {
    if (size_ > k_) return false;
    std::fill_n(ids, size_, std::int64_t{-1});
    for (std::int64_t i = 0; i < size_; ++i) {
      const std::int64_t place = reach_(keys_, size_, keys_[i] + 1);
      if (ids[place] >= 0) return false;
      scores[place] = kept_[i].score;
      ids[place] = kept_[i].id;
    }
    return true;
  }

  // Ordered as the scores are; -0 and 0 are equal.
  [[nodiscard]] static std::int32_t key(float score) noexcept {
    const auto bits = std::bit_cast<std::int32_t>(score + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
  }

  // Keeps the k best of size_ >= k; of several at the k-th score, more, as long as there is room.
  void cut() noexcept {
    std::int32_t low = keys_[0];
    std::int32_t high = keys_[0];
    for (std::int64_t i = 1; i < size_; ++i) {
      low = std::min(low, keys_[i]);
      high = std::max(high, keys_[i]);
    }
    while (low < high) {  // the largest key that k entries reach
      const auto middle = static_cast<std::int32_t>((static_cast<std::int64_t>(low) + high + 1) >> 1);
      if (reach_(keys_, size_, middle) >= k_) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    low = std::max(low, key(theta_));
    const std::int64_t size = size_;
    const std::int64_t named = named_;
    size_ = 0;
    keep(0, named, low);
    named_ = size_;
    keep(named, size, low);
    name_all();
    if (size_ > k_ + (room_ - k_) / 4) {
      std::sort(kept_, kept_ + size_, goes_before);
      size_ = named_ = k_;
      for (std::int64_t i = 0; i < k_; ++i) keys_[i] = key(kept_[i].score);
      last_id_ = kept_[k_ - 1].id;
    }
  }

  // Appends those of entries [first, last) whose key is at least `low`.
  void keep(std::int64_t first, std::int64_t last, std::int32_t low) noexcept {
    for (std::int64_t i = first; i < last; ++i) {
      const Scored entry = kept_[i];
      const std::int32_t its = keys_[i];
      kept_[size_] = entry;
      keys_[size_] = its;
      size_ += its >= low ? 1 : 0;
      if (its == low && entry.score > theta_) raise(entry.score);
    }
  }

  [[nodiscard]] std::int64_t name(std::int64_t position) const noexcept {
    const std::int64_t slot = slots_ == nullptr ? position : slots_[position];
    return ids_ == nullptr ? slot : ids_[slot];
  }

  void name_all() noexcept {
    for (; named_ < size_; ++named_) kept_[named_].id = name(kept_[named_].id);
  }

  Scored* kept_ = nullptr;
  std::int32_t* keys_ = nullptr;
  Reach* reach_ = nullptr;
  const std::int32_t* slots_ = nullptr;
  const std::int64_t* ids_ = nullptr;
  std::int64_t k_ = 0;
  std::int64_t room_ = 0;
  std::int64_t size_ = 0;
  std::int64_t named_ = 0;  // entries before this have an id, the rest a position
  float theta_ = -std::numeric_limits<float>::infinity();
  std::int64_t last_id_ = kNoId;
};

}  // namespace recfast::code_search
