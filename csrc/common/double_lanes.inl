// Small dense algebra in float64, for bodies that are included once per instruction set inside its target region. Vectors
// have eight lanes on all of them, and products and sums are rounded apart, so all forms give the same bits.

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

// y -= factor x
inline void subtract(double* y, double factor, const double* x, std::int64_t size) noexcept {
  for (std::int64_t c = 0; c < size / kDoubleLanes; ++c) lanes(y)[c] -= factor * lanes(x)[c];
}

}  // namespace
