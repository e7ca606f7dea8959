#include "common/item_panels.h"

#include <algorithm>
#include <cmath>

#include "common/isa.h"

namespace recfast::item_panels {
namespace {

double folded(double (&lanes)[kPad]) noexcept {
  for (std::int64_t half = kPad / 2; half > 0; half /= 2) {
    for (std::int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

void read(const Rows& rows, std::int64_t item, double scale, double* to) noexcept {
  for (std::int64_t c = 0; c < rows.width; ++c) to[c] = rows.value(item, c) * scale;
  std::fill(to + rows.width, to + padded_width(rows.width), 0.0);
}

double squared_norm(const Rows& rows, std::int64_t item) noexcept {
  double lanes[kPad]{};
  for (std::int64_t c = 0; c < rows.width; ++c) {
    const double x = rows.value(item, c);
    lanes[c % kPad] = std::fma(x, x, lanes[c % kPad]);
  }
  return folded(lanes);
}

void dots(const double* x, const double* vectors, std::int64_t stride, std::int64_t count, std::int64_t width,
          double* out) noexcept {
  for (std::int64_t v = 0; v < count; ++v) {
    double lanes[kPad]{};
    for (std::int64_t c = 0; c < width; ++c) lanes[c % kPad] = std::fma(x[c], vectors[v * stride + c], lanes[c % kPad]);
    out[v] = folded(lanes);
  }
}

void subtract(double* x, const double* vectors, std::int64_t stride, const double* parts, std::int64_t count,
              std::int64_t width) noexcept {
  for (std::int64_t v = 0; v < count; ++v) {
    for (std::int64_t c = 0; c < width; ++c) x[c] = std::fma(-parts[v], vectors[v * stride + c], x[c]);
  }
}

void pack(const Rows& rows, std::int64_t first, const double* scale, float* panel) noexcept {
  for (std::int64_t l = 0; l < kPanel; ++l) {
    for (std::int64_t c = 0; c < rows.width; ++c) {
      panel[c * kPanel + l] = scale[l] == 0.0 ? 0.0f : static_cast<float>(rows.value(first + l, c) * scale[l]);
    }
  }
}

void products(const float* panel, const float* directions, std::int64_t stride, std::int64_t count, std::int64_t width,
              float* out) noexcept {
  for (std::int64_t v = 0; v < count; ++v) {
    float* sums = out + v * kPanel;
    std::fill_n(sums, kPanel, 0.0f);
    for (std::int64_t c = 0; c < width; ++c) {
      const float q = directions[v * stride + c];
      for (std::int64_t l = 0; l < kPanel; ++l) sums[l] = std::fma(panel[c * kPanel + l], q, sums[l]);
    }
  }
}

}  // namespace

constexpr Forms kScalarForms{read, squared_norm, dots, subtract, pack, products};

const Forms& forms() noexcept {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return kAvx512Forms;
  if (active_isa() >= Isa::kAvx2) return kAvx2Forms;
#endif
  return kScalarForms;
}

}  // namespace recfast::item_panels
