// Counter-based random numbers: Philox-4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
// seven rounds are the fewest that pass all of BigCrush there). The draw for (seed, step, table, row, block) is a pure
// function, so it is the same on every device, for every thread count and after a resume.
//
// The draws of a row: column d takes word d % 8 / 2 of block d / 8, an odd column with its halves exchanged, and of
// that the upper 24 bits. Each column is uniform to 24 bits; two columns share a word, but their upper 16 bits, which
// decide all but one rounding in 65,536, are independent. That halves the work of generating.
#pragma once

#include <array>
#include <cstdint>

#if defined(__CUDACC__)
#define RECFAST_HOST_DEVICE __host__ __device__
#else
#define RECFAST_HOST_DEVICE
#endif

namespace recfast {

struct Philox {
  static constexpr int kRounds = 7;

  std::uint32_t key0;
  std::uint32_t key1;

  RECFAST_HOST_DEVICE explicit constexpr Philox(std::uint64_t seed)
      : key0(static_cast<std::uint32_t>(seed)), key1(static_cast<std::uint32_t>(seed >> 32)) {}

  // Writes the four 32-bit words of counter (c0, c1, c2, c3).
  RECFAST_HOST_DEVICE constexpr void operator()(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                                                std::uint32_t (&out)[4]) const {
    std::uint32_t k0 = key0;
    std::uint32_t k1 = key1;
    for (int round = 0; round < kRounds; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
      const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
      const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c0 = n0;
      c1 = static_cast<std::uint32_t>(p1);
      c2 = n2;
      c3 = static_cast<std::uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
  }
};

// A word as a float in [0, 1): the upper 24 bits, so that every value is exact.
RECFAST_HOST_DEVICE constexpr float uniform01(std::uint32_t word) {
  return static_cast<float>(word >> 8) * (1.0f / 16777216.0f);
}

// The draw of an odd column from the word it shares with the even one before it.
RECFAST_HOST_DEVICE constexpr std::uint32_t exchange_halves(std::uint32_t word) { return word << 16 | word >> 16; }

}  // namespace recfast
