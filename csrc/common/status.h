// How a kernel, which may not throw, tells its caller about the first wrong value it met.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

namespace recfast {

// Keeps the lowest offending position whatever the order in which threads find them.
class FirstError {
 public:
  void report(std::int64_t position) noexcept {
    std::int64_t seen = position_.load(std::memory_order_relaxed);
    while (position < seen && !position_.compare_exchange_weak(seen, position, std::memory_order_relaxed)) {
    }
  }

  // The lowest reported position, or -1.
  [[nodiscard]] std::int64_t position() const noexcept {
    const std::int64_t seen = position_.load(std::memory_order_relaxed);
    return seen == std::numeric_limits<std::int64_t>::max() ? -1 : seen;
  }

 private:
  std::atomic<std::int64_t> position_{std::numeric_limits<std::int64_t>::max()};
};

}  // namespace recfast
