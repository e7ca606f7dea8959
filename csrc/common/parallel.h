// Loops over independent work. A result must never depend on how the range is cut.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>

namespace recfast {

#ifndef _OPENMP
// Compiled without OpenMP, as the checks with ThreadSanitizer are, every loop is serial.
inline int omp_in_parallel() noexcept { return 0; }
inline int omp_get_max_threads() noexcept { return 1; }
inline int omp_get_thread_num() noexcept { return 0; }
inline int omp_get_num_threads() noexcept { return 1; }
#endif

// The number of threads a loop may use: what torch.set_num_threads asked for, or 1 inside another loop.
[[nodiscard]] inline int max_threads() noexcept { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// body(first, last) over consecutive pieces of [0, size), one piece a thread, none smaller than `grain` (but the last).
// There is no num_threads() clause: changing the team's size makes libgomp rebuild its pool at each call.
template <class Body>
void parallel_for(std::int64_t size, std::int64_t grain, const Body& body) {
  if (size <= 0) return;
  const std::int64_t pieces = std::min<std::int64_t>(max_threads(), (size + grain - 1) / std::max<std::int64_t>(grain, 1));
  if (pieces <= 1) {
    body(std::int64_t{0}, size);
    return;
  }
#pragma omp parallel
  {
    // The team may be smaller than asked for, so pieces are dealt out, not assumed one a thread.
    for (std::int64_t piece = omp_get_thread_num(); piece < pieces; piece += omp_get_num_threads()) {
      const std::int64_t first = size * piece / pieces;
      const std::int64_t last = size * (piece + 1) / pieces;
      if (first < last) body(first, last);
    }
  }
}

// body(index, thread) for each index of [0, size), dealt out as threads come free: for work of uneven size.
// `thread` is below max_threads() as read before the loop, so that it can index scratch memory.
template <class Body>
void parallel_for_each(std::int64_t size, const Body& body) {
  if (size <= 0) return;
  if (size == 1 || max_threads() <= 1) {
    for (std::int64_t index = 0; index < size; ++index) body(index, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t index = 0; index < size; ++index) body(index, omp_get_thread_num());
}

}  // namespace recfast
