// The k best of a stream without a heap: scores that reach the k-th so far are appended, and sorted out when room runs
// out. For kernels that compare many scores at a time. Order: score descending, ties by lowest id (0 or more); the
// outcome depends on the set that was offered alone.
// Included inside a kernel's target region; the standard headers (algorithm, bit, cstdint, limits) before it.
#pragma once

namespace recfast {
namespace {

// Entries a list of k should have room for; its arrays have room for 16 more, so that a whole vector may be written.
[[nodiscard]] constexpr std::int64_t best_capacity(std::int64_t k) noexcept {
  return k + (k / 2 > 1024 ? k / 2 : 1024);
}

// An int32 that orders as the float does, -0 and 0 alike, since they are a tie; never called on NaN.
[[nodiscard]] inline std::int32_t ordered(float value) noexcept {
  const auto bits = std::bit_cast<std::int32_t>(value + 0.0f);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// The best so far: an unordered list that is cut back to k whenever it is full. Kernel::keep(list, least, last) leaves
// the entries above key `least` and those at it with ids up to `last`, and returns how many.
template <class Kernel>
struct BestList {
  float* scores;
  std::int32_t* ids;
  std::int32_t* keys;
  std::int64_t k;
  std::int64_t capacity;  // the arrays have room for 16 more
  std::int64_t count = 0;
  float theta = -std::numeric_limits<float>::infinity();  // the k-th score, once k are known
  std::int32_t theta_id = 0;                              // and its id: that score enters with a lower one only

  [[nodiscard]] bool admits(float score, std::int32_t id) const noexcept {
    return score > theta || (score == theta && id < theta_id);
  }

  void offer(float score, std::int32_t id) noexcept {
    if (!admits(score, id)) return;
    scores[count] = score;
    ids[count++] = id;
    if (count >= capacity) cut();
  }

  // Keeps the k best. Selection by bits of the key: passes over a few cache lines without a branch to mispredict.
  void cut() noexcept {
    if (count < k || (count == k && theta > -std::numeric_limits<float>::infinity())) return;
    std::int32_t low = std::numeric_limits<std::int32_t>::max();
    std::int32_t high = std::numeric_limits<std::int32_t>::min();
    for (std::int64_t i = 0; i < count; ++i) {
      keys[i] = ordered(scores[i]);
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    // The highest key that at least k entries reach.
    std::int64_t at = low;
    for (std::int64_t step = std::bit_floor(static_cast<std::uint64_t>(std::int64_t{high} - low) | 1); step > 0;
         step /= 2) {
      if (at + step > high) continue;
      if (reaching(static_cast<std::int32_t>(at + step)) >= k) at += step;
    }
    const auto least = static_cast<std::int32_t>(at);
    std::int64_t above = 0;
    std::int64_t ties = 0;
    std::int32_t last = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      above += keys[i] > least;
      ties += keys[i] == least;
      last = std::max(last, keys[i] == least ? ids[i] : 0);
    }
    if (above + ties > k) last = tie(least, k - above);
    count = Kernel::keep(*this, least, last);
    theta = std::bit_cast<float>(least ^ ((least >> 31) & 0x7FFFFFFF));
    theta_id = last;
  }

  // Kernel::keep for any processor.
  std::int64_t keep_plainly(std::int32_t least, std::int32_t last) noexcept {
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const float score = scores[i];
      const std::int32_t id = ids[i];
      const std::int32_t key = keys[i];
      scores[kept] = score;
      ids[kept] = id;
      kept += (key > least) | ((key == least) & (id <= last));
    }
    return kept;
  }

 private:
  [[nodiscard]] std::int64_t reaching(std::int32_t key) const noexcept {
    std::int32_t found = 0;
    for (std::int64_t i = 0; i < count; ++i) found += keys[i] >= key;
    return found;
  }

  // The wanted-th lowest id among entries of this key.
  [[nodiscard]] std::int32_t tie(std::int32_t key, std::int64_t wanted) const noexcept {
    std::int64_t at = -1;  // fewer than `wanted` ids are at most this
    for (std::int64_t step = std::int64_t{1} << 30; step > 0; step /= 2) {
      const auto limit = static_cast<std::int32_t>(at + step);
      std::int32_t found = 0;
      for (std::int64_t i = 0; i < count; ++i) found += (keys[i] == key) & (ids[i] <= limit);
      if (found < wanted) at += step;
    }
    return static_cast<std::int32_t>(at + 1);
  }
};

// A number that orders entries: descending score, ascending id.
[[nodiscard]] inline std::uint64_t sort_key(float score, std::int32_t id) noexcept {
  const auto key = static_cast<std::uint32_t>(~ordered(score)) ^ 0x80000000U;
  return std::uint64_t{key} << 32 | static_cast<std::uint32_t>(id);
}

inline void decode(std::uint64_t key, float& score, std::int64_t& id) noexcept {
  const std::int32_t bits = ~static_cast<std::int32_t>(static_cast<std::uint32_t>(key >> 32) ^ 0x80000000U);
  score = std::bit_cast<float>(bits ^ ((bits >> 31) & 0x7FFFFFFF));
  id = static_cast<std::int64_t>(key & 0xFFFFFFFF);
}

}  // namespace
}  // namespace recfast
