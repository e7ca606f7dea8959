#include "dpp_log_det/dpp_log_det.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/arena.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace recfast::dpp_log_det {

#define RECFAST_FACTORISE factorise_scalar
#include "dpp_log_det/factorise.inl"
#undef RECFAST_FACTORISE

namespace {

constexpr IsaTable<decltype(factorise_scalar)> kForms{
    .scalar = factorise_scalar,
#if defined(__x86_64__)
    .avx2 = factorise_avx2,
    .avx512 = factorise_avx512,
#endif
};

[[nodiscard]] constexpr std::int64_t whole(std::int64_t size) noexcept {
  return (size + kDoubleLanes - 1) / kDoubleLanes * kDoubleLanes;
}

struct Room {
  double* rows;      // [K, width up to a multiple of 8]
  double* factor;    // [K, K up to a multiple of 8]
  double* diagonal;  // [K]
  std::int64_t bytes;

  Room(double* start, std::int64_t picks, std::int64_t width) noexcept {
    Arena<double> arena(start);
    rows = arena.take(picks * whole(width));
    factor = arena.take(picks * whole(picks));
    diagonal = arena.take(picks);
    bytes = arena.used() * static_cast<std::int64_t>(sizeof(double));
  }
};

}  // namespace

std::int64_t scratch_bytes(std::int64_t picks, std::int64_t width) noexcept {
  return Room(nullptr, picks, width).bytes;
}

template <class T>
void run(const Args<T>& args) noexcept {
  const auto form = kForms.pick();
  const std::int64_t bytes = scratch_bytes(args.picks, args.width);
  const std::int64_t stride = whole(args.width);
  // 2^-50 a term, a few times what each rounds.
  const double tolerance = static_cast<double>(args.width + args.picks) * 8.8817841970012523e-16;
  parallel_for_each(args.lists, [&](std::int64_t list, int thread) {
    const Room room(reinterpret_cast<double*>(args.scratch + thread * bytes), args.picks, args.width);
    const T* features = args.features + list * args.picks * args.width;
    const std::int64_t length = args.lengths == nullptr ? args.picks : args.lengths[list];
    const auto valid = [&](std::int64_t i) {
      return i < length && (args.mask == nullptr || args.mask[list * args.picks + i]);
    };
    std::int64_t size = 0;
    for (std::int64_t i = 0; i < length; ++i) {
      if (!valid(i)) continue;
      double* row = room.rows + size++ * stride;
      for (std::int64_t d = 0; d < args.width; ++d) row[d] = static_cast<double>(features[i * args.width + d]);
      std::fill(row + args.width, row + stride, 0.0);
    }
    const double log_det =
        form(room.rows, size, stride, args.gamma, tolerance, args.solved != nullptr, room.factor, room.diagonal);
    args.log_det[list] = static_cast<T>(log_det);
    if (args.solved == nullptr) return;
    T* solved = args.solved + list * args.picks * args.width;
    const bool singular = std::isinf(log_det) && log_det < 0.0;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < args.picks; ++i) {
      const bool row_is_valid = valid(i);
      const double* row = room.rows + at * stride;
      at += row_is_valid ? 1 : 0;
      for (std::int64_t d = 0; d < args.width; ++d) {
        solved[i * args.width + d] = row_is_valid && !singular ? static_cast<T>(row[d]) : T{0};
      }
    }
  });
}

template void run(const Args<float>&) noexcept;
template void run(const Args<double>&) noexcept;

}  // namespace recfast::dpp_log_det
