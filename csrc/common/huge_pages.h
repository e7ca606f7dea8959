// Asking the system to back memory by pages of 2 MB, so that random rows of a big table miss fewer address translations.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace recfast {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

// To be called before the memory is first touched. Returns the bytes advised: those of the whole pages of 2 MB inside
// [address, address + bytes), or 0 where the system does not know of such pages.
inline std::size_t advise_huge_pages(std::uintptr_t address, std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (address + bytes) / kHugePage * kHugePage;
  if (first >= last) return 0;
  return madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0 ? last - first : 0;
#else
  static_cast<void>(address);
  static_cast<void>(bytes);
  return 0;
#endif
}

}  // namespace recfast
