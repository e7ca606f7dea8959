#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace recfast {
namespace {

Isa detect() noexcept {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2) return Isa::kScalar;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : Isa::kAvx2;
#else
  return Isa::kScalar;
#endif
}

// An unknown name or a level that the processor lacks leaves the detected one: the variable may only lower it.
// `recfast doctor` prints the level in force, so a typing error is seen there.
Isa from_environment() noexcept {
  const Isa best = detected_isa();
  const char* name = std::getenv("RECFAST_ISA");
  if (name == nullptr) return best;
  for (std::size_t level = 0; level < kIsaNames.size(); ++level) {
    if (kIsaNames[level] == name) return level < static_cast<std::size_t>(best) ? static_cast<Isa>(level) : best;
  }
  return best;
}

std::atomic<int>& level() noexcept {
  static std::atomic<int> value{static_cast<int>(from_environment())};
  return value;
}

}  // namespace

Isa detected_isa() noexcept {
  static const Isa best = detect();
  return best;
}

bool has_vbmi() noexcept {
#if defined(__x86_64__)
  static const bool offered = __builtin_cpu_supports("avx512vbmi") != 0;
  return offered && active_isa() == Isa::kAvx512;
#else
  return false;
#endif
}

bool has_bf16() noexcept {
#if defined(__x86_64__)
  static const bool offered = __builtin_cpu_supports("avx512bf16") != 0;
  return offered && active_isa() == Isa::kAvx512;
#else
  return false;
#endif
}

bool has_vpopcnt() noexcept {
#if defined(__x86_64__)
  static const bool offered = __builtin_cpu_supports("avx512vpopcntdq") != 0;
  return offered && active_isa() == Isa::kAvx512;
#else
  return false;
#endif
}

Isa active_isa() noexcept { return static_cast<Isa>(level().load(std::memory_order_relaxed)); }

void set_isa(Isa wanted) {
  if (wanted > detected_isa()) {
    throw std::invalid_argument("set_isa: this processor offers " +
                                std::string(kIsaNames[static_cast<std::size_t>(detected_isa())]) + " at most, got " +
                                std::string(kIsaNames[static_cast<std::size_t>(wanted)]));
  }
  level().store(static_cast<int>(wanted), std::memory_order_relaxed);
}

}  // namespace recfast
