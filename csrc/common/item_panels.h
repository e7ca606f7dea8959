// What re-rankers share: the rows of a user's items, given or gathered from a table, read as float64 or turned into
// panels of 64 items, and the products of these with directions.
//
// Panel        [D, 64] float32, 64-byte aligned: column c of 64 items lies together, so that one broadcast of a
//              direction's coordinate meets 64 items and no sum crosses lanes.
// Same bits    on scalar, AVX2 and AVX-512: every product is added by a fused multiply-add, in the order below.
// Precision    panels float32 (each value float64 * scale, rounded once); `dots` and `squared_norm` float64
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/row_format.h"

namespace recfast::item_panels {

inline constexpr std::int64_t kPanel = 64;
// float64 vectors are padded with zeros to a multiple of this, and summed in as many partial sums.
inline constexpr std::int64_t kPad = 16;

[[nodiscard]] constexpr std::int64_t padded_width(std::int64_t width) noexcept {
  return (width + kPad - 1) / kPad * kPad;
}

// The rows of one user's items.
struct Rows {
  const std::byte* data = nullptr;    // one row after the other, without gaps
  Format format = Format::kFloat32;   // float32, float64, bfloat16 or float16
  std::int64_t width = 0;
  const std::int64_t* ids = nullptr;  // [items] row of each item, checked; null: item i is row i

  [[nodiscard]] std::int64_t row(std::int64_t item) const noexcept { return ids == nullptr ? item : ids[item]; }
  [[nodiscard]] const std::byte* at(std::int64_t item) const noexcept {
    return data + row(item) * width * (bits_of(format) / 8);
  }
  [[nodiscard]] double value(std::int64_t item, std::int64_t column) const noexcept {
    const std::byte* from = at(item) + column * (bits_of(format) / 8);
    switch (format) {
      case Format::kFloat64: {
        double x;
        std::memcpy(&x, from, sizeof x);
        return x;
      }
      case Format::kBFloat16:
      case Format::kFloat16: {
        std::uint16_t bits;
        std::memcpy(&bits, from, sizeof bits);
        return format == Format::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
      }
      default: {
        float x;
        std::memcpy(&x, from, sizeof x);
        return x;
      }
    }
  }
};

struct Forms {
  // to[c] = scale * row[c], in float64, for padded_width values: zeros after the width.
  void (*read)(const Rows& rows, std::int64_t item, double scale, double* to) noexcept;

  // sum of row[c]^2: lane c % 16 of 16 in the order of c, then halves folded onto halves.
  double (*squared_norm)(const Rows& rows, std::int64_t item) noexcept;

  // out[v] = <x, vectors + v * stride>, summed as in squared_norm; `width` is a multiple of kPad.
  void (*dots)(const double* x, const double* vectors, std::int64_t stride, std::int64_t count, std::int64_t width,
               double* out) noexcept;

  // x[c] -= sum_v parts[v] * vectors[v * stride + c], terms in the order of v; `width` is a multiple of kPad.
  void (*subtract)(double* x, const double* vectors, std::int64_t stride, const double* parts, std::int64_t count,
                   std::int64_t width) noexcept;

  // panel[c, l] = float(scale[l] * row[c]) of item first + l. Where scale[l] is 0 the row is not read and gives zeros.
  void (*pack)(const Rows& rows, std::int64_t first, const double* scale, float* panel) noexcept;

  // out[v, l] = sum_c panel[c, l] * directions[v * stride + c], terms in the order of c, for `count` directions.
  // out is 64-byte aligned. Two directions cost little more than one.
  void (*products)(const float* panel, const float* directions, std::int64_t stride, std::int64_t count,
                   std::int64_t width, float* out) noexcept;
};

// Of the instruction set in force.
[[nodiscard]] const Forms& forms() noexcept;

extern const Forms kScalarForms;
#if defined(__x86_64__)
extern const Forms kAvx2Forms;
extern const Forms kAvx512Forms;
#endif

}  // namespace recfast::item_panels
