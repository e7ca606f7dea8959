// dpp_log_det: the log-determinants of many small kernels, and what their gradient is made of.
//
// Kernel       S = (1 - gamma) F F^T + gamma I over the valid rows of a list; 0 rows: log det = 0
// Results      log_det [B]; solved [B, K, D] = S^-1 F, zeros in rows that are not valid and in singular lists, for
//              d log det S / d F = 2 (1 - gamma) S^-1 F
// Method       Cholesky in the order of the rows. A list is singular (log det = -inf) where a pivot is at most
//              2^-50 (D + K) S_ii, what rounding leaves.
// Dtypes       features, log_det, solved: T, float32 or float64; all work in float64
// Determinism  each list by one thread; eight lanes, products and sums rounded apart on every instruction set
// Source       Gartrell, Paquet and Koenigstein, "Low-rank factorization of determinantal point processes", AAAI 2017
//              (such gradients, for learning)
#pragma once

#include <cstddef>
#include <cstdint>

namespace recfast::dpp_log_det {

template <class T>
struct Args {
  std::int64_t lists = 0;
  std::int64_t picks = 0;
  std::int64_t width = 0;
  double gamma = 0.0;
  const T* features = nullptr;            // [B, K, D]
  const std::int64_t* lengths = nullptr;  // [B] or null
  const bool* mask = nullptr;             // [B, K] or null
  T* log_det = nullptr;                   // [B]
  T* solved = nullptr;                    // [B, K, D] or null
  std::byte* scratch = nullptr;           // 64-byte aligned, scratch_bytes(...) a thread
};

[[nodiscard]] std::int64_t scratch_bytes(std::int64_t picks, std::int64_t width) noexcept;

// Threaded over lists.
template <class T>
void run(const Args<T>& args) noexcept;

// One list of `size` rows, [size, stride], filled up with zeros to a multiple of 8. Returns log det S. With `solve` the
// rows become S^-1 rows (unless singular). factor [size, size up to a multiple of 8] is room, diagonal [size] too.
double factorise_scalar(double* rows, std::int64_t size, std::int64_t stride, double gamma, double tolerance,
                        bool solve, double* factor, double* diagonal) noexcept;
double factorise_avx2(double* rows, std::int64_t size, std::int64_t stride, double gamma, double tolerance, bool solve,
                      double* factor, double* diagonal) noexcept;
double factorise_avx512(double* rows, std::int64_t size, std::int64_t stride, double gamma, double tolerance,
                        bool solve, double* factor, double* diagonal) noexcept;

}  // namespace recfast::dpp_log_det
