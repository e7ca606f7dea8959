// Which items a query may return: one byte an item, one bit an item (little endian), or all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace recfast::code_rows {

enum class MaskKind : int { kNone = 0, kBytes = 1, kBits = 2 };

// One query's mask.
struct ItemMask {
  MaskKind kind = MaskKind::kNone;
  const std::uint8_t* data = nullptr;
  std::int64_t n_items = 0;

  [[nodiscard]] bool allows(std::int64_t item) const noexcept {
    if (kind == MaskKind::kNone) return true;
    if (kind == MaskKind::kBytes) return data[item] != 0;
    return (data[item / 8] >> (item % 8) & 1) != 0;
  }

  // The bits of items first .. first + 15, first a multiple of 16; those beyond the last item are 0 (or, without a
  // mask, 1).
  [[nodiscard]] std::uint32_t sixteen(std::int64_t first) const noexcept {
    if (kind == MaskKind::kNone) return 0xFFFF;
    if (kind == MaskKind::kBits) {
      const std::uint32_t low = data[first / 8];
      return first + 8 < n_items ? low | std::uint32_t{data[first / 8 + 1]} << 8 : low;
    }
    const std::int64_t count = std::min<std::int64_t>(16, n_items - first);
    std::uint64_t bytes[2] = {0, 0};
    if (count == 16) {
      std::memcpy(bytes, data + first, 16);
    } else {
      std::memcpy(bytes, data + first, static_cast<std::size_t>(count));
    }
    // Bytes are 0 or 1: the product gathers the lowest bits of eight into the highest byte.
    constexpr std::uint64_t kGather = 0x0102040810204080;
    return static_cast<std::uint32_t>((bytes[0] * kGather) >> 56 | ((bytes[1] * kGather) >> 56) << 8);
  }

  // Whether any of items first .. first + count - 1 is allowed; both are multiples of 16.
  [[nodiscard]] bool any(std::int64_t first, std::int64_t count) const noexcept {
    if (kind == MaskKind::kNone) return true;
    const std::int64_t unit = kind == MaskKind::kBits ? 8 : 1;
    const std::int64_t last = std::min(first + count, n_items);
    const std::uint8_t* at = data + first / unit;
    std::int64_t bytes = (last - first + unit - 1) / unit;
    std::uint64_t found = 0;
    for (; bytes >= 8; bytes -= 8, at += 8) {
      std::uint64_t word;
      std::memcpy(&word, at, 8);
      found |= word;
    }
    for (; bytes > 0; --bytes) found |= *at++;
    return found != 0;
  }
};

// The masks of a batch.
struct Masks {
  MaskKind kind = MaskKind::kNone;
  const std::uint8_t* data = nullptr;
  std::int64_t stride = 0;  // bytes from one query's mask to the next; 0 where all share one

  [[nodiscard]] ItemMask of(std::int64_t query, std::int64_t n_items) const noexcept {
    return {.kind = kind, .data = data + query * stride, .n_items = n_items};
  }
};

}  // namespace recfast::code_rows
