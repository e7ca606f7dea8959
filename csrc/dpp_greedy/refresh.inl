// The body of refresh_<isa>, included once per instruction set inside its target region with RECFAST_LANES, the floats
// of a register. Items do not mix, and products and sums are rounded apart, so all forms give the same bits.

namespace {

using Floats = float __attribute__((vector_size(4 * RECFAST_LANES), may_alias));
using Ints = int __attribute__((vector_size(4 * RECFAST_LANES)));

constexpr int kLanes = RECFAST_LANES;
constexpr int kParts = static_cast<int>(kPanel) / kLanes;
constexpr int kStrip = 4;  // registers of items that are worked on together

// Natural logarithm of normal positive numbers to 2 ulp: the polynomial of Cephes' logf on [sqrt(1/2), sqrt(2)).
inline void log_of(Floats* x) noexcept {
  const Ints bits = (Ints)*x;  // for vector types the cast keeps the bits
  const Ints exponent = (bits - 0x3F3504F3) >> 23;
  const Ints mantissa = bits - (exponent << 23);
  const Floats m = (Floats)mantissa - 1.0f;
  const Floats e = __builtin_convertvector(exponent, Floats);
  const Floats square = m * m;
  Floats p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * square - e * 2.12194440e-4f - square * 0.5f;
  *x = p + m + e * 0.693359375f;
}

}  // namespace

float RECFAST_REFRESH(const float* panel, const float* directions, std::int64_t count, std::int64_t width, float slack,
                      const float* offset, float* rel, float* upper) noexcept {
  const auto* columns = reinterpret_cast<const Floats*>(panel);
  const auto* offsets = reinterpret_cast<const Floats*>(offset);
  auto* left = reinterpret_cast<Floats*>(rel);
  auto* out = reinterpret_cast<Floats*>(upper);

  for (int strip = 0; strip < kParts; strip += kStrip) {
    Floats r0 = left[strip];
    Floats r1 = left[strip + 1];
    Floats r2 = left[strip + 2];
    Floats r3 = left[strip + 3];
    std::int64_t v = 0;
    // Two directions at a time: each column is read once for both, and eight sums hide the adder's latency.
    for (; v + 2 <= count; v += 2) {
      const float* q = directions + v * width;
      const float* s = q + width;
      Floats a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{};
      for (std::int64_t c = 0; c < width; ++c) {
        const Floats* column = columns + c * kParts + strip;
        a0 += column[0] * q[c];
        a1 += column[1] * q[c];
        a2 += column[2] * q[c];
        a3 += column[3] * q[c];
        b0 += column[0] * s[c];
        b1 += column[1] * s[c];
        b2 += column[2] * s[c];
        b3 += column[3] * s[c];
      }
      r0 = r0 - a0 * a0 - b0 * b0;
      r1 = r1 - a1 * a1 - b1 * b1;
      r2 = r2 - a2 * a2 - b2 * b2;
      r3 = r3 - a3 * a3 - b3 * b3;
    }
    if (v < count) {
      const float* q = directions + v * width;
      Floats a0{}, a1{}, a2{}, a3{};
      for (std::int64_t c = 0; c < width; ++c) {
        const Floats* column = columns + c * kParts + strip;
        a0 += column[0] * q[c];
        a1 += column[1] * q[c];
        a2 += column[2] * q[c];
        a3 += column[3] * q[c];
      }
      r0 = r0 - a0 * a0;
      r1 = r1 - a1 * a1;
      r2 = r2 - a2 * a2;
      r3 = r3 - a3 * a3;
    }
    left[strip] = r0;
    left[strip + 1] = r1;
    left[strip + 2] = r2;
    left[strip + 3] = r3;
  }

  // 5e-7 is above the sum of what rounding the offset (u), the logarithm (4 u) and the two sums (2 u) can take away.
  constexpr float kRounding = 5e-7f;
  constexpr float kSmallest = 1.17549435e-38f;
  for (int part = 0; part < kParts; ++part) {
    Floats logarithm = left[part] + slack;
    logarithm = logarithm > kSmallest ? logarithm : Floats{} + kSmallest;
    log_of(&logarithm);
    const Floats size = (logarithm < 0.0f ? -logarithm : logarithm) +
                        (offsets[part] < 0.0f ? -offsets[part] : offsets[part]) + 1.0f;
    // An item that may not be picked has the offset -inf, and -inf + inf would be NaN.
    const Floats bound = offsets[part] + logarithm + size * kRounding;
    out[part] = offsets[part] < -3.0e38f ? offsets[part] : bound;
  }
  Floats best = out[0];
  for (int part = 1; part < kParts; ++part) best = out[part] > best ? out[part] : best;
  float greatest = best[0];
  for (int lane = 1; lane < kLanes; ++lane) greatest = best[lane] > greatest ? best[lane] : greatest;
  return greatest;
}
