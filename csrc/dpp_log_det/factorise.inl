// The body of factorise_<isa>, included once per instruction set inside its target region.

#include "common/double_lanes.inl"

double RECFAST_FACTORISE(double* rows, std::int64_t size, std::int64_t stride, double gamma, double tolerance,
                         bool solve, double* factor, double* diagonal) noexcept {
  const std::int64_t whole = (size + kDoubleLanes - 1) / kDoubleLanes * kDoubleLanes;
  const double shared = 1.0 - gamma;
  // Row t of `factor` becomes column t of the Cholesky factor; what lies before the diagonal is never read.
  for (std::int64_t t = 0; t < size; ++t) {
    double* column = factor + t * whole;
    std::fill_n(column, whole, 0.0);
    for (std::int64_t i = t; i < size; ++i) {
      column[i] = shared * dot(rows + t * stride, rows + i * stride, stride) + (i == t ? gamma : 0.0);
    }
    diagonal[t] = column[t];
  }
  double log_det = 0.0;
  for (std::int64_t t = 0; t < size; ++t) {
    double* column = factor + t * whole;
    const std::int64_t from = t / kDoubleLanes * kDoubleLanes;
    for (std::int64_t s = 0; s < t; ++s) {
      const double* before = factor + s * whole;
      subtract(column + from, before[t], before + from, whole - from);
    }
    const double pivot = column[t];
    if (pivot <= tolerance * diagonal[t]) return -std::numeric_limits<double>::infinity();
    log_det += std::log(pivot);
    const double root = std::sqrt(pivot);
    for (std::int64_t i = t; i < size; ++i) column[i] /= root;
  }
  if (!solve) return log_det;
  for (std::int64_t t = 0; t < size; ++t) {
    double* row = rows + t * stride;
    for (std::int64_t s = 0; s < t; ++s) subtract(row, factor[s * whole + t], rows + s * stride, stride);
    for (std::int64_t d = 0; d < stride; ++d) row[d] /= factor[t * whole + t];
  }
  for (std::int64_t t = size - 1; t >= 0; --t) {
    double* row = rows + t * stride;
    for (std::int64_t s = t + 1; s < size; ++s) subtract(row, factor[t * whole + s], rows + s * stride, stride);
    for (std::int64_t d = 0; d < stride; ++d) row[d] /= factor[t * whole + t];
  }
  return log_det;
}
