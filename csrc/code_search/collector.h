// The k best of a stream, kept in a buffer that is cut to them whenever it is full: cheaper than a heap where most of the
// stream is refused by a threshold.
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
  // Scratch of room(k) values each.
  Collector(Scored* kept, std::int32_t* keys, std::int64_t k, Reach* reach) noexcept
      : kept_(kept), keys_(keys), reach_(reach), k_(k), room_(room(k)) {}

  [[nodiscard]] static std::int64_t room(std::int64_t k) noexcept { return k + std::max<std::int64_t>(k, 64); }

  // What scores below this is not among the k best; -inf while that is unknown.
  [[nodiscard]] float theta() const noexcept { return theta_; }

  void clear() noexcept { size_ = 0; }

  // Another lower bound of the k-th best score, from elsewhere.
  void raise(float theta) noexcept {
    theta_ = theta;
    last_id_ = kNoId;
  }

  // For score >= theta() and > -inf. Whether theta has risen.
  bool offer(float score, std::int64_t id) noexcept {
    if (score == theta_ && id > last_id_) return false;
    kept_[size_] = {score, id};
    keys_[size_] = key(score);
    if (++size_ < room_) return false;
    const float before = theta_;
    cut();
    return theta_ > before;
  }

  // theta as it is after all that was offered.
  [[nodiscard]] float settle() noexcept {
    if (size_ >= k_ && k_ > 0) cut();
    return theta_;
  }

  void merge(const Collector& other) noexcept {
    if (other.theta_ > theta_) raise(other.theta_);
    for (std::int64_t i = 0; i < other.size_; ++i) {
      if (other.kept_[i].score >= theta_) offer(other.kept_[i].score, other.kept_[i].id);
    }
  }

  // The k best (or fewer), best first; how many. The buffer is empty afterwards.
  std::int64_t write(float* scores, std::int64_t* ids) noexcept {
    if (size_ > k_ && k_ > 0) cut();
    std::sort(kept_, kept_ + size_, goes_before);
    const std::int64_t count = std::min(size_, k_);
    for (std::int64_t i = 0; i < count; ++i) {
      scores[i] = kept_[i].score;
      ids[i] = kept_[i].id;
    }
    size_ = 0;
    return count;
  }

 private:
  static constexpr std::int64_t kNoId = std::numeric_limits<std::int64_t>::max();

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
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < size_; ++i) {
      kept_[count] = kept_[i];
      keys_[count] = keys_[i];
      count += keys_[i] >= low ? 1 : 0;
      if (keys_[i] == low && kept_[i].score > theta_) raise(kept_[i].score);
    }
    size_ = count;
    if (count > k_ + (room_ - k_) / 4) {
      std::sort(kept_, kept_ + count, goes_before);
      size_ = k_;
      for (std::int64_t i = 0; i < k_; ++i) keys_[i] = key(kept_[i].score);
      last_id_ = kept_[k_ - 1].id;
    }
  }

  Scored* kept_ = nullptr;
  std::int32_t* keys_ = nullptr;
  Reach* reach_ = nullptr;
  std::int64_t k_ = 0;
  std::int64_t room_ = 0;
  std::int64_t size_ = 0;
  float theta_ = -std::numeric_limits<float>::infinity();
  std::int64_t last_id_ = kNoId;
};

}  // namespace recfast::code_search
