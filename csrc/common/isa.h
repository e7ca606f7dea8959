// Which instruction set a kernel runs on, decided once at run time.
#pragma once

#include <array>
#include <string_view>

namespace recfast {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

inline constexpr std::array<std::string_view, 3> kIsaNames{"scalar", "avx2", "avx512"};

// The highest level that this processor and operating system offer.
// kAvx2 stands for AVX2 + FMA + F16C; kAvx512 for AVX-512 F, BW, DQ and VL on top.
[[nodiscard]] Isa detected_isa() noexcept;

// AVX-512 VBMI (byte permutes over 128 bytes), which kernels on kAvx512 must ask for apart.
[[nodiscard]] bool has_vbmi() noexcept;

// AVX-512 BF16 (products of pairs of bfloat16, summed in float32), likewise.
[[nodiscard]] bool has_bf16() noexcept;

// AVX-512 VPOPCNTDQ (bits counted in each 64-bit lane), likewise.
[[nodiscard]] bool has_vpopcnt() noexcept;

// The level in force: the detected one, lowered by RECFAST_ISA=scalar|avx2|avx512 or by set_isa.
[[nodiscard]] Isa active_isa() noexcept;

// Lowers (or restores) the level for the whole process; throws std::invalid_argument above the detected one.
void set_isa(Isa level);

// One kernel in up to three forms. A missing form falls back to the next lower one.
template <class Function>
struct IsaTable {
  Function* scalar = nullptr;
  Function* avx2 = nullptr;
  Function* avx512 = nullptr;

  [[nodiscard]] Function* pick() const noexcept {
    const Isa level = active_isa();
    if (level >= Isa::kAvx512 && avx512 != nullptr) return avx512;
    if (level >= Isa::kAvx2 && avx2 != nullptr) return avx2;
    return scalar;
  }
};

}  // namespace recfast
