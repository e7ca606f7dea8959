// The body of solve_<isa>, included once per instruction set inside its target region. Vectors have eight lanes on all
// of them, and products and sums are rounded apart, so all forms give the same bits.

#include "common/double_lanes.inl"

namespace {

// dual = rows^T rows
inline void gram(const Problem& p) noexcept {
  const std::int64_t stride = p.width_stride;
  std::fill_n(p.dual, stride * stride, 0.0);
  for (std::int64_t i = 0; i < p.items; i += kLanes) {
    const double* x = p.rows + i * stride;
    for (std::int64_t a = 0; a < p.width; ++a) {
      double* out = p.dual + a * stride;
      for (std::int64_t c = a / kLanes; c < stride / kLanes; ++c) {
        Doubles sum = lanes(out)[c];
        for (std::int64_t s = 0; s < kLanes; ++s) sum += x[s * stride + a] * lanes(x + s * stride)[c];
        lanes(out)[c] = sum;
      }
    }
  }
  for (std::int64_t a = 0; a < p.width; ++a) {
    for (std::int64_t b = 0; b < a; ++b) p.dual[a * stride + b] = p.dual[b * stride + a];
  }
}

// Rows of `factor` become the columns of a Cholesky factor, greatest pivot first; `kernel_row(pivot, out)` gives a row
// of the matrix. What has at most `limit` left is spent, and takes no part from then on. Returns the rank.
template <class KernelRow>
inline std::int64_t pivoted_cholesky(Problem& p, std::int64_t size, std::int64_t stride, std::int64_t most,
                                     const KernelRow& kernel_row) noexcept {
  constexpr double kDone = -1.0;
  for (std::int64_t i = 0; i < size; ++i) {
    if (p.left[i] <= p.limit[i]) p.left[i] = kDone;
  }
  std::int64_t rank = 0;
  while (rank < most) {
    const std::int64_t pivot = std::max_element(p.left, p.left + size) - p.left;
    if (p.left[pivot] == kDone) break;
    double* column = p.factor + rank * stride;
    kernel_row(pivot, column);
    subtract_rows(column, p.factor + pivot, stride, p.factor, stride, rank, stride);
    const double root = std::sqrt(p.left[pivot]);
    for (std::int64_t i = 0; i < stride; ++i) column[i] = i < size && p.left[i] != kDone ? column[i] / root : 0.0;
    column[pivot] = root;
    for (std::int64_t i = 0; i < size; ++i) {
      if (p.left[i] == kDone) continue;
      p.left[i] -= column[i] * column[i];
      if (i == pivot || p.left[i] <= p.limit[i]) p.left[i] = kDone;
    }
    ++rank;
  }
  return rank;
}

// Rotates two rows against each other so that they become orthogonal, and keeps their squared lengths; false if they
// are so already, up to `rounding`.
inline bool rotate(double* x, double* y, std::int64_t stride, double rounding, double& first, double& second) noexcept {
  const double both = dot(x, y, stride);
  if (std::fabs(both) <= rounding * std::sqrt(first) * std::sqrt(second)) return false;
  const double zeta = (second - first) / (2.0 * both);
  const double size = std::fabs(zeta);
  // Where zeta^2 would overflow, 1 / (2 zeta) is what is left of the formula.
  const double part = size > 1e150 ? 0.5 / size : 1.0 / (size + std::sqrt(1.0 + size * size));
  const double tangent = std::copysign(part, zeta);
  const double cosine = 1.0 / std::sqrt(1.0 + tangent * tangent);
  const double sine = cosine * tangent;
  for (std::int64_t c = 0; c < stride / kLanes; ++c) {
    const Doubles a = lanes(x)[c];
    const Doubles b = lanes(y)[c];
    lanes(x)[c] = cosine * a - sine * b;
    lanes(y)[c] = sine * a + cosine * b;
  }
  first = std::max(first - tangent * both, 0.0);
  second += tangent * both;
  return true;
}

// Rotates the rows of `factor` until all are orthogonal: they are then eigenvectors of factor^T factor, their squared
// lengths its eigenvalues.
inline void jacobi(double* factor, std::int64_t rank, std::int64_t stride, double* squared) noexcept {
  constexpr int kSweeps = 60;
  const double rounding = std::sqrt(static_cast<double>(stride)) * 2.220446049250313e-16;  // of a dot product
  // As in a tournament: each row meets each other once a sweep, and those that meet in a round are disjoint, so that
  // the processor need not wait for one pair to begin the next.
  const std::int64_t fixed = (rank + 1) / 2 * 2 - 1;  // with an odd number of rows, nobody
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool rotated = false;
    for (std::int64_t j = 0; j < rank; ++j) squared[j] = dot(factor + j * stride, factor + j * stride, stride);
    for (std::int64_t round = 0; round < fixed; ++round) {
      for (std::int64_t pair = 0; pair <= fixed / 2; ++pair) {
        std::int64_t i = round + pair < fixed ? round + pair : round + pair - fixed;
        std::int64_t j = pair == 0 ? fixed : round >= pair ? round - pair : round - pair + fixed;
        if (i > j) std::swap(i, j);
        if (j >= rank) continue;
        rotated |= rotate(factor + i * stride, factor + j * stride, stride, rounding, squared[i], squared[j]);
      }
    }
    if (!rotated) return;
  }
}

// Squared lengths of the rows of `factor` and their order, greatest first.
inline void sort_values(Problem& p, std::int64_t rank, std::int64_t stride) noexcept {
  double* squared = p.squared;
  for (std::int64_t j = 0; j < rank; ++j) {
    squared[j] = dot(p.factor + j * stride, p.factor + j * stride, stride);
    p.order[j] = j;
  }
  std::sort(p.order, p.order + rank, [squared](std::int64_t a, std::int64_t b) {
    return squared[a] > squared[b] || (squared[a] == squared[b] && a < b);
  });
  for (std::int64_t j = 0; j < rank; ++j) p.values[j] = squared[p.order[j]];
}

// By the dual; 0 where it cannot tell the first `picks` eigenvalues.
inline std::int64_t decompose_dual(Problem& p) noexcept {
  gram(p);
  double greatest = 0.0;
  for (std::int64_t a = 0; a < p.width; ++a) {
    p.left[a] = p.dual[a * p.width_stride + a];
    greatest = std::max(greatest, p.left[a]);
  }
  // Below this all is rounding of the sums over items.
  std::fill_n(p.limit, p.width, 1e-14 * greatest);
  const std::int64_t rank = pivoted_cholesky(p, p.width, p.width_stride, p.width, [&](std::int64_t a, double* out) {
    std::copy_n(p.dual + a * p.width_stride, p.width_stride, out);
  });
  if (rank < p.picks) return 0;
  jacobi(p.factor, rank, p.width_stride, p.squared);
  sort_values(p, rank, p.width_stride);
  return p.values[p.picks - 1] < kLost * p.values[0] ? 0 : rank;
}

// By the kernel itself: the rows of `factor` are then its eigenvectors.
inline std::int64_t decompose_kernel(Problem& p) noexcept {
  for (std::int64_t i = 0; i < p.items; ++i) {
    const double* row = p.rows + i * p.width_stride;
    p.left[i] = dot(row, row, p.width_stride) + (p.regularised ? p.own[i] : 0.0);
    p.limit[i] = kSpent * p.left[i];
  }
  const std::int64_t most = p.regularised ? p.items : std::min(p.items, p.width);
  const std::int64_t rank = pivoted_cholesky(p, p.items, p.item_stride, most, [&](std::int64_t j, double* out) {
    const double* row = p.rows + j * p.width_stride;
    // Rows are filled up with zeros to a multiple of 8.
    for (std::int64_t i = 0; i < p.item_stride; i += 4) {
      four_dots(row, p.rows + i * p.width_stride, p.width_stride, p.width_stride, out + i);
    }
    if (p.regularised) out[j] += p.own[j];
  });
  jacobi(p.factor, rank, p.item_stride, p.squared);
  sort_values(p, rank, p.item_stride);
  return rank;
}

// vectors[i, c] = entry of item i in eigenvector columns[c], and the running sums of their squares.
inline void take_vectors(Problem& p, bool dual, std::int64_t count) noexcept {
  const std::int64_t stride = p.value_stride;
  const std::int64_t used = (count + kLanes - 1) / kLanes;  // vectors of lanes
  if (dual) {
    for (std::int64_t d = 0; d < p.width; ++d) {
      double* out = p.weights + d * stride;
      std::fill_n(out, used * kLanes, 0.0);
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t n = p.columns[c];
        out[c] = p.factor[p.order[n] * p.width_stride + d] / (p.values[n] * p.greatest);
      }
    }
    constexpr std::int64_t kStrip = 4;
    for (std::int64_t i = 0; i < p.items; i += 2) {  // rows are filled up to an even number
      const double* x = p.rows + i * p.width_stride;
      const double* y = x + p.width_stride;
      for (std::int64_t first = 0; first < used; first += kStrip) {
        const std::int64_t strip = std::min(kStrip, used - first);
        Doubles a[kStrip] = {};
        Doubles b[kStrip] = {};
        if (strip == kStrip) {
          for (std::int64_t d = 0; d < p.width; ++d) {
            const Doubles* w = lanes(p.weights + d * stride) + first;
            for (std::int64_t s = 0; s < kStrip; ++s) {
              a[s] += x[d] * w[s];
              b[s] += y[d] * w[s];
            }
          }
        } else {
          for (std::int64_t s = 0; s < strip; ++s) {
            for (std::int64_t d = 0; d < p.width; ++d) {
              const Doubles w = lanes(p.weights + d * stride)[first + s];
              a[s] += x[d] * w;
              b[s] += y[d] * w;
            }
          }
        }
        for (std::int64_t s = 0; s < strip; ++s) {
          lanes(p.vectors + i * stride)[first + s] = a[s];
          lanes(p.vectors + (i + 1) * stride)[first + s] = b[s];
        }
      }
    }
  } else {
    for (std::int64_t c = 0; c < used * kLanes; ++c) {
      if (c >= count) {
        for (std::int64_t i = 0; i < p.items; ++i) p.vectors[i * stride + c] = 0.0;
        continue;
      }
      const std::int64_t n = p.columns[c];
      const double length = std::sqrt(p.values[n] * p.greatest);
      const double* column = p.factor + p.order[n] * p.item_stride;
      for (std::int64_t i = 0; i < p.items; ++i) p.vectors[i * stride + c] = column[i] / length;
    }
  }
  for (std::int64_t i = 0; i < p.items; ++i) {
    const double* before = i == 0 ? nullptr : p.cumulative + (i - 1) * stride;
    for (std::int64_t s = 0; s < used; ++s) {
      const Doubles v = lanes(p.vectors + i * stride)[s];
      const Doubles sum = before == nullptr ? Doubles{} : lanes(before)[s];
      lanes(p.cumulative + i * stride)[s] = sum + v * v;
    }
  }
}

// Numbers in [0, 1) to 53 bits, two a block.
class Draws {
 public:
  Draws(std::uint64_t seed, std::uint64_t key, std::int64_t sample) noexcept
      : philox_(seed), key_(key), sample_(static_cast<std::uint32_t>(sample)) {}

  [[nodiscard]] double next() noexcept {
    if (used_ == 4) {
      philox_(static_cast<std::uint32_t>(key_), static_cast<std::uint32_t>(key_ >> 32), sample_, block_++, words_);
      used_ = 0;
    }
    const double high = static_cast<double>(words_[used_] >> 5);
    const double low = static_cast<double>(words_[used_ + 1] >> 6);
    used_ += 2;
    return (high * 67108864.0 + low) / 9007199254740992.0;
  }

 private:
  Philox philox_;
  std::uint64_t key_;
  std::uint32_t sample_;
  std::uint32_t block_ = 0;
  std::uint32_t words_[4] = {};
  int used_ = 4;
};

// ratios[n, m - 1] = e_m / e_(m-1) of the first n eigenvalues; returns log e_picks of all of them.
inline double fill_ratios(Problem& p, std::int64_t rank, std::int64_t picks) noexcept {
  std::fill_n(p.ratios, picks, 0.0);
  for (std::int64_t n = 0; n < rank; ++n) {
    const double value = p.values[n];
    const double* before = p.ratios + n * picks;
    double* after = p.ratios + (n + 1) * picks;
    for (std::int64_t m = 0; m < picks; ++m) {
      if (m > n) {
        after[m] = 0.0;
      } else {
        after[m] = m == 0 ? before[0] + value : (before[m] + value) / (1.0 + value / before[m - 1]);
      }
    }
  }
  double log_sum = 0.0;
  for (std::int64_t m = 0; m < picks; ++m) log_sum += std::log(p.ratios[rank * picks + m]);
  return log_sum;
}

// chosen = positions, in descending order of eigenvalues, of the eigenvectors that the sample is made of.
inline void choose_vectors(Problem& p, std::int64_t rank, std::int64_t picks, Draws& draws) noexcept {
  std::int64_t missing = picks;
  for (std::int64_t n = rank - 1; n >= 0 && missing > 0; --n) {
    const double ratio = p.ratios[n * picks + missing - 1];
    // With as many left as are missing the ratio is 0, and each is taken.
    if (draws.next() * (ratio + p.values[n]) < p.values[n]) p.chosen[--missing] = n;
  }
}

// The row of `item` among the chosen columns -> p.row; returns its squared length.
inline double gather(Problem& p, std::int64_t item, std::int64_t picks) noexcept {
  const double* vector = p.vectors + item * p.value_stride;
  for (std::int64_t c = 0; c < picks; ++c) p.row[c] = vector[p.chosen[c]];
  return dot(p.row, p.row, p.pick_stride);
}

inline std::int64_t weigh_all(Problem& p, std::int64_t picks, std::int64_t picked, double uniform) noexcept {
  double sum = 0.0;
  for (std::int64_t i = 0; i < p.items; ++i) {
    double rest = 0.0;
    if (!p.taken[i]) {
      rest = gather(p, i, picks);
      for (std::int64_t s = 0; s < picked; ++s) {
        const double part = dot(p.row, p.directions + s * p.pick_stride, p.pick_stride);
        rest -= part * part;
      }
    }
    sum += std::max(rest, 0.0);
    p.left[i] = sum;
  }
  const double* at = std::upper_bound(p.left, p.left + p.items, uniform * sum);
  return std::min<std::int64_t>(at - p.left, p.items - 1);
}

inline void draw_items(Problem& p, std::int64_t picks, Draws& draws, std::int64_t* out) noexcept {
  const std::int64_t stride = p.pick_stride;
  std::fill_n(p.taken, p.items, false);
  std::fill_n(p.row, stride, 0.0);
  for (std::int64_t picked = 0; picked < picks; ++picked) {
    std::int64_t item = -1;
    for (std::int64_t attempt = 0; attempt < kRejections * picks && item < 0; ++attempt) {
      const auto which = static_cast<std::int64_t>(draws.next() * static_cast<double>(picks));
      const std::int64_t column = p.chosen[std::min(which, picks - 1)];
      const double* sums = p.cumulative + column;
      const double wanted = draws.next() * sums[(p.items - 1) * p.value_stride];
      std::int64_t low = 0;
      for (std::int64_t high = p.items - 1; low < high;) {
        const std::int64_t middle = (low + high) / 2;
        if (sums[middle * p.value_stride] > wanted) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      const double uniform = draws.next();
      if (p.taken[low]) continue;
      double rest = gather(p, low, picks);
      const double threshold = uniform * rest;
      for (std::int64_t s = 0; s < picked && rest > threshold; ++s) {
        const double part = dot(p.row, p.directions + s * stride, stride);
        rest -= part * part;
      }
      if (rest > threshold) item = low;
    }
    if (item < 0) item = weigh_all(p, picks, picked, draws.next());
    p.taken[item] = true;
    out[picked] = item;
    if (picked + 1 == picks) break;
    // Twice, for the first time leaves rounding of the size of the whole row.
    gather(p, item, picks);
    for (int pass = 0; pass < 2; ++pass) {
      for (std::int64_t s = 0; s < picked; ++s) {
        const double* direction = p.directions + s * stride;
        subtract(p.row, dot(p.row, direction, stride), direction, stride);
      }
    }
    const double length = std::sqrt(dot(p.row, p.row, stride));
    double* direction = p.directions + picked * stride;
    for (std::int64_t c = 0; c < stride; ++c) direction[c] = length > 0.0 ? p.row[c] / length : 0.0;
  }
  std::sort(out, out + picks);
}

}  // namespace

void RECFAST_SOLVE(Problem& p) noexcept {
  bool dual = !p.regularised && p.width < p.items;
  std::int64_t rank = 0;
  if (p.picks > 0) {
    rank = dual ? decompose_dual(p) : 0;
    if (rank == 0) {
      dual = false;
      rank = decompose_kernel(p);
    }
  }
  const std::int64_t picks = std::min(p.picks, rank);
  p.count = picks;
  p.log_normaliser = 0.0;
  if (picks == 0) return;
  // The first eigenvalue becomes 1, so that no ratio leaves the range.
  p.greatest = p.values[0];
  for (std::int64_t n = 0; n < rank; ++n) p.values[n] /= p.greatest;
  p.log_normaliser = fill_ratios(p, rank, picks) + static_cast<double>(picks) * std::log(p.greatest);
  p.pick_stride = (picks + kLanes - 1) / kLanes * kLanes;
  p.value_stride = (rank + kLanes - 1) / kLanes * kLanes;
  // Of many samples each eigenvector is wanted, of one only its own.
  const bool all = p.samples * picks >= rank;
  if (all) {
    std::iota(p.columns, p.columns + rank, std::int64_t{0});
    take_vectors(p, dual, rank);
  }
  for (std::int64_t sample = 0; sample < p.samples; ++sample) {
    Draws draws(p.seed, p.key, sample);
    choose_vectors(p, rank, picks, draws);
    if (!all) {
      std::copy_n(p.chosen, picks, p.columns);
      std::iota(p.chosen, p.chosen + picks, std::int64_t{0});
      take_vectors(p, dual, picks);
    }
    draw_items(p, picks, draws, p.indices + sample * p.sample_stride);
  }
}
