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
    const double* row = rows + t * stride;
    std::int64_t i = t;
    for (; i + 4 <= size; i += 4) four_dots(row, rows + i * stride, stride, stride, column + i);
    for (; i < size; ++i) column[i] = dot(row, rows + i * stride, stride);
    for (i = t; i < size; ++i) column[i] *= shared;
    column[t] += gamma;
    diagonal[t] = column[t];
  }
  double log_det = 0.0;
  for (std::int64_t t = 0; t < size; ++t) {
    double* column = factor + t * whole;
    const std::int64_t from = t / kDoubleLanes * kDoubleLanes;
    subtract_rows(column + from, factor + t, whole, factor + from, whole, t, whole - from);
    const double pivot = column[t];
    if (pivot <= tolerance * diagonal[t]) return -std::numeric_limits<double>::infinity();
    log_det += std::log(pivot);
    const double root = std::sqrt(pivot);
    for (std::int64_t i = t; i < size; ++i) column[i] /= root;
  }
  if (!solve) return log_det;
  for (std::int64_t t = 0; t < size; ++t) {
    double* row = rows + t * stride;
    subtract_rows(row, factor + t, whole, rows, stride, t, stride);
    for (std::int64_t d = 0; d < stride; ++d) row[d] /= factor[t * whole + t];
  }
  for (std::int64_t t = size - 1; t >= 0; --t) {
    double* row = rows + t * stride;
    const std::int64_t next = t + 1;
    subtract_rows(row, factor + t * whole + next, 1, rows + next * stride, stride, size - next, stride);
    for (std::int64_t d = 0; d < stride; ++d) row[d] /= factor[t * whole + t];
  }
  return log_det;
}
