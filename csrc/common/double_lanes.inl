// Small dense algebra in float64, for bodies that are included once per instruction set inside its target region.
// Vectors have eight lanes on all of them, and products and sums are rounded apart, so all forms give the same bits.

namespace {

inline constexpr std::int64_t kDoubleLanes = 8;

using Doubles = double __attribute__((vector_size(8 * kDoubleLanes), may_alias));

inline const Doubles* lanes(const double* x) noexcept { return reinterpret_cast<const Doubles*>(x); }
inline Doubles* lanes(double* x) noexcept { return reinterpret_cast<Doubles*>(x); }

inline double total(const Doubles* x) noexcept {
  const auto& v = *x;
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// All lengths are multiples of eight, filled up with zeros.
inline double dot(const double* a, const double* b, std::int64_t size) noexcept {
  Doubles sum{};
  for (std::int64_t c = 0; c < size / kDoubleLanes; ++c) sum += lanes(a)[c] * lanes(b)[c];
  return total(&sum);
}

// out[n] = dot(a, b + n stride) for n < 4
inline void four_dots(const double* a, const double* b, std::int64_t stride, std::int64_t size, double* out) noexcept {
  Doubles s0{}, s1{}, s2{}, s3{};
  for (std::int64_t c = 0; c < size / kDoubleLanes; ++c) {
    const Doubles x = lanes(a)[c];
    s0 += x * lanes(b)[c];
    s1 += x * lanes(b + stride)[c];
    s2 += x * lanes(b + 2 * stride)[c];
    s3 += x * lanes(b + 3 * stride)[c];
  }
  out[0] = total(&s0);
  out[1] = total(&s1);
  out[2] = total(&s2);
  out[3] = total(&s3);
}

// y -= factor x
inline void subtract(double* y, double factor, const double* x, std::int64_t size) noexcept {
  for (std::int64_t c = 0; c < size / kDoubleLanes; ++c) lanes(y)[c] -= factor * lanes(x)[c];
}

// y -= sum_n factors[n factor_stride] x_n, one n after the other, x_n = x + n stride
inline void subtract_rows(double* y, const double* factors, std::int64_t factor_stride, const double* x,
                          std::int64_t stride, std::int64_t count, std::int64_t size) noexcept {
  std::int64_t c = 0;
  for (; c + 4 <= size / kDoubleLanes; c += 4) {
    Doubles y0 = lanes(y)[c];
    Doubles y1 = lanes(y)[c + 1];
    Doubles y2 = lanes(y)[c + 2];
    Doubles y3 = lanes(y)[c + 3];
    for (std::int64_t n = 0; n < count; ++n) {
      const double factor = factors[n * factor_stride];
      const Doubles* row = lanes(x + n * stride) + c;
      y0 -= factor * row[0];
      y1 -= factor * row[1];
      y2 -= factor * row[2];
      y3 -= factor * row[3];
    }
    lanes(y)[c] = y0;
    lanes(y)[c + 1] = y1;
    lanes(y)[c + 2] = y2;
    lanes(y)[c + 3] = y3;
  }
  for (; c < size / kDoubleLanes; ++c) {
    Doubles sum = lanes(y)[c];
    for (std::int64_t n = 0; n < count; ++n) sum -= factors[n * factor_stride] * lanes(x + n * stride)[c];
    lanes(y)[c] = sum;
  }
}

}  // namespace
