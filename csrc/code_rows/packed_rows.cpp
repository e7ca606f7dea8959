#include "code_rows/packed_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/status.h"

#include "code_rows/packed_rows_search.h"

namespace recfast::code_rows {
namespace {

// What any processor can do.
struct Portable {
  static void bounds(const Named* rows, std::int64_t count, std::int64_t chunks, std::uint8_t* sums) noexcept {
    std::fill_n(sums, chunks * kGroups, std::uint8_t{0});
    for (std::int64_t j = 0; j < count; ++j) {
      const Named& row = rows[j];
      const std::uint8_t* level = row.levels;
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        std::uint8_t* of_chunk = sums + chunk * kGroups;
        for (std::uint64_t groups = row.present[chunk]; groups != 0; groups &= groups - 1) {
          std::uint8_t& sum = of_chunk[std::countr_zero(groups)];
          sum = static_cast<std::uint8_t>(std::min(255, sum + row.bounds[*level++]));
        }
      }
    }
  }

  static std::uint64_t reaching(const std::uint8_t* sums, int low, int high) noexcept {
    std::uint64_t bits = 0;
    for (int group = 0; group < kGroups; ++group) {
      bits |= static_cast<std::uint64_t>(sums[group] >= low && sums[group] < high) << group;
    }
    return bits;
  }

  static std::uint64_t allowed(std::uint64_t groups, std::int64_t first, const ItemMask& mask) noexcept {
    return allowed_groups(groups, first, mask);
  }

  static void narrow(const Named* rows, std::int64_t count, std::int64_t chunk, std::uint64_t groups,
                     std::int64_t first, const ItemMask& mask, Best<Portable>& best) noexcept {
    for (; groups != 0; groups &= groups - 1) {
      const int group = std::countr_zero(groups);
      float totals[16] = {};
      std::uint32_t held = 0;
      for (std::int64_t j = 0; j < count; ++j) {
        const Named& row = rows[j];
        const std::uint64_t present = row.present[chunk];
        if ((present >> group & 1) == 0) continue;
        const Start start = row.starts[chunk];
        const std::int64_t at = start.group + std::popcount(present & ((std::uint64_t{1} << group) - 1));
        const std::uint32_t record = static_cast<const std::uint32_t*>(row.groups)[at];
        const float* score = row.scores + start.posting + (record >> 16);
        held |= record & 0xFFFF;
        for (std::uint32_t items = record & 0xFFFF; items != 0; items &= items - 1) {
          totals[std::countr_zero(items)] += row.term(*score++);
        }
      }
      for (held &= mask.sixteen(first + group * 16); held != 0; held &= held - 1) {
        const int item = std::countr_zero(held);
        best.offer(totals[item], static_cast<std::int32_t>(first + group * 16 + item));
      }
    }
  }

  static std::int64_t keep(Best<Portable>& best, std::int32_t least, std::int32_t last) noexcept {
    return best.keep_plainly(least, last);
  }

  static void sort(std::uint64_t* keys, std::int64_t count, float* scores, std::int64_t* ids) noexcept {
    std::sort(keys, keys + count);
    for (std::int64_t i = 0; i < count; ++i) decode(keys[i], scores[i], ids[i]);
  }
};

void search_portable(const Packed& packed, const Query& query, std::int64_t number, std::byte* scratch) noexcept {
  Search<Portable>(packed, query, number, scratch).run();
}

using Form = void(const Packed&, const Query&, std::int64_t, std::byte*);

// The entries of `descending` that become bounds: the first few one by one, so that a row whose best scores stand out
// keeps tight bounds on the others, then evenly.
[[nodiscard]] std::int64_t rank_of(std::int64_t level, std::int64_t levels, std::int64_t groups) noexcept {
  const std::int64_t even = level * groups / levels;
  return level < 40 ? std::min((std::int64_t{1} << level) - 1, even) : even;
}

// Calls visit(chunk, group, first, last) for each group of a row, over positions of postings.
template <class Id, class Visit>
void each_group(const Packed& packed, const Id* item_ids, std::int64_t row, const Visit& visit) noexcept {
  const std::int64_t end = packed.indptr[row + 1];
  for (std::int64_t first = packed.indptr[row]; first < end;) {
    const std::int64_t group = static_cast<std::int64_t>(item_ids[first]) >> packed.shift;
    std::int64_t last = first + 1;
    while (last < end && static_cast<std::int64_t>(item_ids[last]) >> packed.shift == group) ++last;
    visit(group / kGroups, static_cast<int>(group % kGroups), first, last);
    first = last;
  }
}

template <class Id>
void fill_row(const Packed& packed, const Id* item_ids, std::int64_t row, float* maxima) noexcept {
  const std::int64_t begin = packed.indptr[row];
  const std::int64_t group_begin = packed.group_ptr[row];
  const std::int64_t groups = packed.group_ptr[row + 1] - group_begin;
  const std::int64_t chunks = packed.chunks();
  std::uint64_t* present = packed.present + row * chunks;
  Start* starts = packed.starts + row * (chunks + 1);
  float* upper = packed.upper + row * packed.level_count;
  std::fill_n(present, chunks, std::uint64_t{0});
  std::fill_n(upper, packed.level_count, 0.0f);
  packed.lowest[row] = 0.0f;

  std::int64_t at = 0;
  std::int64_t next_chunk = 0;  // the first whose start is not written yet
  each_group(packed, item_ids, row, [&](std::int64_t chunk, int group, std::int64_t first, std::int64_t last) {
    for (; next_chunk <= chunk; ++next_chunk) {
      starts[next_chunk] = {static_cast<std::int32_t>(first - begin), static_cast<std::int32_t>(at)};
    }
    present[chunk] |= std::uint64_t{1} << group;
    const auto offset = static_cast<std::uint32_t>(first - begin - starts[chunk].posting);
    if (packed.shift == kNarrow) {
      std::uint32_t items = 0;
      for (std::int64_t i = first; i < last; ++i) items |= std::uint32_t{1} << (item_ids[i] % 16);
      static_cast<std::uint32_t*>(packed.groups)[group_begin + at] = items | offset << 16;
    } else if (packed.shift <= kByteLocals) {
      static_cast<std::uint16_t*>(packed.groups)[group_begin + at] = static_cast<std::uint16_t>(offset);
    } else {
      static_cast<std::uint32_t*>(packed.groups)[group_begin + at] = offset;
    }
    const std::int64_t local_mask = (std::int64_t{1} << packed.shift) - 1;
    for (std::int64_t i = first; packed.shift != kNarrow && i < last; ++i) {
      const std::int64_t local = static_cast<std::int64_t>(item_ids[i]) & local_mask;
      if (packed.shift <= kByteLocals) {
        static_cast<std::uint8_t*>(packed.locals)[i] = static_cast<std::uint8_t>(local);
      } else {
        static_cast<std::uint16_t*>(packed.locals)[i] = static_cast<std::uint16_t>(local);
      }
    }
    maxima[at++] = *std::max_element(packed.scores + first, packed.scores + last);
  });
  for (; next_chunk <= chunks; ++next_chunk) {
    starts[next_chunk] = {static_cast<std::int32_t>(packed.indptr[row + 1] - begin), static_cast<std::int32_t>(at)};
  }
  if (groups == 0) return;

  packed.lowest[row] = *std::min_element(packed.scores + begin, packed.scores + packed.indptr[row + 1]);
  float* descending = maxima + groups;
  std::copy_n(maxima, groups, descending);
  std::sort(descending, descending + groups, std::greater<>());
  const std::int64_t levels = packed.level_count;
  for (std::int64_t level = 0; level < levels; ++level) {
    upper[levels - 1 - level] = descending[rank_of(level, levels, groups)];
  }
  for (std::int64_t i = 0; i < groups; ++i) {
    packed.levels[group_begin + i] =
        static_cast<std::uint8_t>(1 + (std::lower_bound(upper, upper + levels, maxima[i]) - upper));
  }
}

// Calls visit(chunk, group, position of its record, first posting, last posting) for each group of a packed row, or
// gives up where the row's own numbers would lead out of it.
template <class Visit>
bool walk(const Packed& packed, std::int64_t row, const Visit& visit) noexcept {
  const std::int64_t chunks = packed.chunks();
  const std::uint64_t* present = packed.present + row * chunks;
  const Start* starts = packed.starts + row * (chunks + 1);
  const std::int64_t group_begin = packed.group_ptr[row];
  const std::int64_t length = packed.indptr[row + 1] - packed.indptr[row];
  const std::int64_t groups = packed.group_ptr[row + 1] - group_begin;
  const auto* small = static_cast<const std::uint16_t*>(packed.groups) + group_begin;
  const auto* large = static_cast<const std::uint32_t*>(packed.groups) + group_begin;
  std::int64_t at = 0;
  std::int64_t posting = 0;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (starts[chunk].group != at || starts[chunk].posting != posting) return false;
    const std::int64_t count = std::popcount(present[chunk]);
    const std::int64_t next = starts[chunk + 1].posting;
    if (at + count > groups || next < posting || next > length) return false;
    const std::int64_t begin = posting;
    const auto offset_at = [&](std::int64_t i) {
      if (packed.shift == kNarrow) return std::int64_t{large[i] >> 16};
      return packed.shift <= kByteLocals ? std::int64_t{small[i]} : std::int64_t{large[i]};
    };
    std::uint64_t bits = present[chunk];
    for (std::int64_t i = 0; i < count; ++i, bits &= bits - 1) {
      const std::int64_t first = begin + offset_at(at + i);
      const std::int64_t last = i + 1 < count ? begin + offset_at(at + i + 1) : next;
      if (first != posting || last <= first || last > next) return false;
      if (!visit(chunk, std::countr_zero(bits), at + i, first, last)) return false;
      posting = last;
    }
    at += count;
    if (posting != next) return false;
  }
  return at == groups && posting == length && starts[chunks].group == groups && starts[chunks].posting == length;
}

// The place in its group of a posting (not of narrow groups).
[[nodiscard]] std::int64_t local_at(const Packed& packed, std::int64_t position) noexcept {
  if (packed.shift <= kByteLocals) return static_cast<const std::uint8_t*>(packed.locals)[position];
  return static_cast<const std::uint16_t*>(packed.locals)[position];
}

bool good_row(const Packed& packed, std::int64_t row) noexcept {
  const std::int64_t levels = packed.level_count;
  const float* upper = packed.upper + row * levels;
  const std::int64_t begin = packed.indptr[row];
  const float* scores = packed.scores + begin;
  const std::int64_t length = packed.indptr[row + 1] - begin;
  for (std::int64_t level = 0; level < levels; ++level) {
    if (!std::isfinite(upper[level]) || (level > 0 && upper[level] < upper[level - 1])) return false;
  }
  for (std::int64_t i = 0; i < length; ++i) {
    if (!std::isfinite(scores[i]) || !(packed.lowest[row] <= scores[i])) return false;
  }
  if (!std::isfinite(packed.lowest[row])) return false;
  const std::int64_t size = std::int64_t{1} << packed.shift;
  return walk(packed, row, [&](std::int64_t chunk, int group, std::int64_t at, std::int64_t first, std::int64_t last) {
    const std::int64_t id = (chunk * kGroups + group) << packed.shift;
    std::int64_t highest = 0;
    if (packed.shift == kNarrow) {
      const std::uint32_t items = static_cast<const std::uint32_t*>(packed.groups)[packed.group_ptr[row] + at] & 0xFFFF;
      if (std::popcount(items) != last - first) return false;
      highest = 31 - std::countl_zero(items);
    } else {
      highest = -1;
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t local = local_at(packed, begin + i);
        if (local <= highest || local >= size) return false;
        highest = local;
      }
    }
    const std::int64_t level = packed.levels[packed.group_ptr[row] + at];
    return id + highest < packed.n_items && level >= 1 && level <= levels &&
           *std::max_element(scores + first, scores + last) <= upper[level - 1];
  });
}

}  // namespace

template <class Id>
void count_groups(const Packed& packed, const Id* item_ids) noexcept {
  parallel_for_each(packed.n_rows, [&](std::int64_t row, int) {
    std::int64_t groups = 0;
    each_group(packed, item_ids, row, [&](std::int64_t, int, std::int64_t, std::int64_t) { ++groups; });
    packed.group_ptr[row + 1] = groups;
  });
  packed.group_ptr[0] = 0;
  for (std::int64_t row = 0; row < packed.n_rows; ++row) packed.group_ptr[row + 1] += packed.group_ptr[row];
}

template <class Id>
void fill(const Packed& packed, const Id* item_ids, float* maxima, std::int64_t longest) noexcept {
  parallel_for_each(packed.n_rows, [&](std::int64_t row, int thread) {
    fill_row(packed, item_ids, row, maxima + thread * 2 * longest);
  });
  const std::int64_t groups = packed.group_ptr[packed.n_rows];
  std::fill_n(packed.levels + groups, kLevelPadding, std::uint8_t{0});
  if (packed.shift == kNarrow || packed.shift > kByteLocals) {
    static_cast<std::uint32_t*>(packed.groups)[groups] = 0;
  } else {
    static_cast<std::uint16_t*>(packed.groups)[groups] = 0;
  }
}

std::int64_t verify(const Packed& packed) noexcept {
  FirstError fault;
  parallel_for_each(packed.n_rows, [&](std::int64_t row, int) {
    if (!good_row(packed, row)) fault.report(row);
  });
  return fault.position();
}

void unpack(const Packed& packed, std::int32_t* item_ids) noexcept {
  parallel_for_each(packed.n_rows, [&](std::int64_t row, int) {
    std::int32_t* ids = item_ids + packed.indptr[row];
    walk(packed, row, [&](std::int64_t chunk, int group, std::int64_t at, std::int64_t first, std::int64_t last) {
      const auto base = static_cast<std::int32_t>((chunk * kGroups + group) << packed.shift);
      std::uint32_t items = 0;
      if (packed.shift == kNarrow) items = static_cast<const std::uint32_t*>(packed.groups)[packed.group_ptr[row] + at];
      for (std::int64_t i = first; i < last; ++i, items &= items - 1) {
        ids[i] = base + (packed.shift == kNarrow ? std::countr_zero(items)
                                                 : static_cast<std::int32_t>(local_at(packed, packed.indptr[row] + i)));
      }
      return true;
    });
  });
}

std::int64_t scratch_bytes(const Packed& packed, std::int64_t width, std::int64_t k) noexcept {
  Scratch counted{.base = nullptr};
  (void)cut_scratch<Portable>(packed, width, k, counted);
  return counted.used;
}

QueryFaults check(const Packed& packed, const Query& query) noexcept {
  QueryFaults faults{.rows = -1, .weights = -1};
  for (std::int64_t i = query.queries * query.width - 1; i >= 0; --i) {
    if (query.rows[i] < -1 || query.rows[i] >= packed.n_rows) faults.rows = i;
    if (query.weights != nullptr && !std::isfinite(query.weights[i])) faults.weights = i;
  }
  return faults;
}

void run(const Packed& packed, const Query& query) noexcept {
  Form* form = active_isa() == Isa::kAvx512 && has_avx512_form() ? search_avx512 : search_portable;
  const std::int64_t bytes = scratch_bytes(packed, query.width, query.k);
  parallel_for_each(query.queries, [&](std::int64_t number, int thread) {
    form(packed, query, number, query.scratch + thread * bytes);
  });
}

template void count_groups(const Packed&, const std::int32_t*) noexcept;
template void count_groups(const Packed&, const std::int64_t*) noexcept;
template void fill(const Packed&, const std::int32_t*, float*, std::int64_t) noexcept;
template void fill(const Packed&, const std::int64_t*, float*, std::int64_t) noexcept;

#if !defined(__x86_64__)
bool has_avx512_form() noexcept { return false; }
void search_avx512(const Packed&, const Query&, std::int64_t, std::byte*) noexcept {}
#endif

}  // namespace recfast::code_rows
