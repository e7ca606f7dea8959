// One query over packed rows, for a Kernel that brings what an instruction set does better:
//   bounds(rows, count, chunks, sums)          the sums of bounds, 64 bytes a chunk
//   reaching(sums, low, high) -> uint64        which of a chunk's 64 sums lie in [low, high)
//   allowed(groups, first, mask) -> uint64     those of a chunk's groups of 16 that have an allowed item
//   narrow(rows, count, chunk, groups, first, mask, best)   adds up groups of 16 and offers what reaches theta
//   keep(best, least, last)                    leaves the entries above key `least`, and those at it with ids to `last`
//   sort(keys, count, scores, ids)             best first
// Included once per instruction set, inside its target region.

#include "code_rows/packed_rows.h"
#include "common/best_list.h"

namespace recfast::code_rows {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Kernel>
using Best = BestList<Kernel>;
constexpr std::int64_t kLut = 64;
// Postings of a row that are noted before they are added: room for these, for one group more and for some that are
// written in vain.
constexpr std::int64_t kNoted = 512;
constexpr std::int64_t kInVain = 4;

// A row that a query names.
struct Named {
  const std::uint64_t* present;
  const Start* starts;
  const std::uint8_t* levels;
  const void* groups;
  const void* locals;
  const float* scores;
  std::int64_t number;
  float weight;
  float bias;
  const std::uint8_t* bounds;  // [64] what a level may add, in units; 0 for level 0

  [[nodiscard]] float term(float score) const noexcept { return weight * score + bias; }
};

// Cuts a thread's scratch, or counts it (base null).
struct Scratch {
  std::byte* base;
  std::int64_t used = 0;

  template <class T>
  [[nodiscard]] T* take(std::int64_t size) noexcept {
    std::byte* piece = base == nullptr ? nullptr : base + used;
    used += (size * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);  // NOLINT: scratch has no type
  }
};

// The groups of a chunk that may hold one of the best.
struct Reaching {
  std::int64_t chunk;
  std::uint64_t groups;
};

template <class Kernel>
struct Parts {
  Named* rows;
  std::uint8_t* tables;
  std::uint8_t* sums;
  Reaching* chunks;
  Best<Kernel> best;
  std::uint32_t* totals;   // wide groups: bits of sums, of a chunk up to kByteLocals, else of a group
  std::uint32_t* touched;
  std::uint64_t* noted;
  std::uint64_t* order;
};

// A sum that nothing was added to: a NaN that no addition of finite numbers makes.
constexpr std::uint32_t kUntouched = 0xFFFFFFFF;

// Wide groups: the items whose sums are kept at a time.
inline std::int64_t summed_items(const Packed& packed) noexcept {
  if (packed.shift == kNarrow) return 0;
  return (packed.shift <= kByteLocals ? kGroups : 1) << packed.shift;
}

template <class Kernel>
Parts<Kernel> cut_scratch(const Packed& packed, std::int64_t width, std::int64_t k, Scratch& scratch) noexcept {
  const std::int64_t kept = std::min(k, packed.n_items);
  const std::int64_t capacity = best_capacity(kept);
  const std::int64_t summed = summed_items(packed);
  const bool in_chunks = packed.shift != kNarrow && packed.shift <= kByteLocals;
  return {.rows = scratch.take<Named>(width),
          .tables = scratch.take<std::uint8_t>(width * kLut),
          .sums = scratch.take<std::uint8_t>(packed.chunks() * kGroups),
          .chunks = scratch.take<Reaching>(packed.chunks() + 1),
          .best = {.scores = scratch.take<float>(capacity + 16),
                   .ids = scratch.take<std::int32_t>(capacity + 16),
                   .keys = scratch.take<std::int32_t>(capacity + 16),
                   .k = kept,
                   .capacity = capacity},
          .totals = scratch.take<std::uint32_t>(summed),
          .touched = scratch.take<std::uint32_t>(summed + 1),
          .noted = scratch.take<std::uint64_t>(in_chunks ? kNoted + (1 << kByteLocals) + kInVain : 0),
          .order = scratch.take<std::uint64_t>(kept)};
}

// Those of a chunk's narrow groups that have an allowed item.
inline std::uint64_t allowed_groups(std::uint64_t groups, std::int64_t first, const ItemMask& mask) noexcept {
  std::uint64_t left = 0;
  for (; groups != 0; groups &= groups - 1) {
    const int group = std::countr_zero(groups);
    left |= static_cast<std::uint64_t>(mask.any(first + group * 16, 16)) << group;
  }
  return left;
}

template <class Kernel>
class Search {
 public:
  Search(const Packed& packed, const Query& query, std::int64_t number, std::byte* scratch) noexcept
      : packed_(packed), query_(query), number_(number), chunks_(packed.chunks()),
        mask_(query.masks.of(number, packed.n_items)) {
    Scratch whole{.base = scratch};
    parts_ = cut_scratch<Kernel>(packed, query.width, query.k, whole);
  }

  void run() noexcept {
    if (parts_.best.k > 0 && name_rows() > 0) {
      std::fill_n(parts_.totals, summed_items(packed_), kUntouched);
      if (make_tables()) {
        Kernel::bounds(parts_.rows, count_, chunks_, parts_.sums);
        by_bounds();
      } else {
        everything();
      }
    }
    write();
  }

 private:
  // How many rows there are to add.
  std::int64_t name_rows() noexcept {
    const std::int64_t* rows = query_.rows + number_ * query_.width;
    const float* weights = query_.weights == nullptr ? nullptr : query_.weights + number_ * query_.width;
    group_bytes_ = packed_.shift == kNarrow || packed_.shift > kByteLocals ? 4 : 2;
    if (packed_.shift != kNarrow) local_bytes_ = packed_.shift > kByteLocals ? 2 : 1;
    for (std::int64_t j = 0; j < query_.width; ++j) {
      const std::int64_t row = rows[j];
      if (row < 0) continue;
      const std::int64_t first = packed_.indptr[row];
      const std::int64_t group = packed_.group_ptr[row];
      if (first == packed_.indptr[row + 1]) continue;
      const auto* groups = static_cast<const std::byte*>(packed_.groups) + group * group_bytes_;
      const auto* locals =
          packed_.locals == nullptr ? nullptr : static_cast<const std::byte*>(packed_.locals) + first * local_bytes_;
      const float bias = query_.row_bias == nullptr ? 0.0f : query_.row_bias[row];
      parts_.rows[count_++] = {.present = packed_.present + row * chunks_,
                               .starts = packed_.starts + row * (chunks_ + 1),
                               .levels = packed_.levels + group,
                               .groups = groups,
                               .locals = locals,
                               .scores = packed_.scores + first,
                               .number = row,
                               .weight = weights == nullptr ? 1.0f : weights[j],
                               .bias = bias,
                               .bounds = nullptr};
      postings_ += packed_.indptr[row + 1] - first;
    }
    return count_;
  }

  // What each level of each row may add, in units; false where bounds tell nothing.
  bool make_tables() noexcept {
    if (postings_ <= parts_.best.k) return false;
    const std::int64_t levels = packed_.level_count;
    float total = 0.0f;
    for (std::int64_t j = 0; j < count_; ++j) {
      const Named& row = parts_.rows[j];
      const float top =
          row.weight < 0.0f ? packed_.lowest[row.number] : packed_.upper[(row.number + 1) * levels - 1];
      total += std::max(0.0f, row.term(top));
    }
    if (!(total > 0.0f && total < kInfinity)) return false;
    // Sums above 255 stay at 255 and are always looked at, so a finer unit costs nothing but the order among those.
    // 1e-5 is for the roundings here, the rest for those of the sum of terms.
    const float slack = 1.00001f + 2.5e-7f * static_cast<float>(count_);
    unit_ = total / 320.0f;
    const float scale = slack / unit_;
    if (!(scale > 0.0f && scale < kInfinity)) return false;
    for (std::int64_t j = 0; j < count_; ++j) {
      Named& row = parts_.rows[j];
      std::uint8_t* table = parts_.tables + j * kLut;
      float steps[kLut];
      const float* upper = packed_.upper + row.number * levels;
      if (row.weight < 0.0f) {
        std::fill_n(steps, kMostLevels, row.term(packed_.lowest[row.number]));
      } else {
        for (std::int64_t level = 0; level < levels; ++level) steps[level] = row.term(upper[level]);
        std::fill(steps + levels, steps + kMostLevels, 0.0f);
      }
      table[0] = 0;
      for (std::int64_t level = 0; level < kMostLevels; ++level) {
        const float units = std::min(std::max(steps[level], 0.0f) * scale, 255.0f);
        const auto whole = static_cast<std::int32_t>(units);
        table[level + 1] = static_cast<std::uint8_t>(whole + (static_cast<float>(whole) < units));
      }
      row.bounds = table;
    }
    return true;
  }

  // The lowest sum of bounds that may reach theta.
  [[nodiscard]] int level_of_theta() const noexcept {
    const float units = parts_.best.theta / unit_;
    if (!(units > 0.0f)) return 0;
    return static_cast<int>(std::ceil(std::min(units * 0.99999f, 255.0f)));
  }

  // The highest sum that at least `wanted` groups reach, by a sample of the chunks.
  int level_for(std::int64_t wanted) const noexcept {
    const std::int64_t stride = std::max<std::int64_t>(1, chunks_ / 256);
    const std::int64_t sampled = wanted / stride;
    int level = 0;
    for (int step = 128; step > 0; step /= 2) {
      std::int64_t found = 0;
      for (std::int64_t chunk = 0; chunk < chunks_ && found <= sampled; chunk += stride) {
        found += std::popcount(Kernel::reaching(parts_.sums + chunk * kGroups, level + step, 256));
      }
      if (found > sampled) level += step;
    }
    return level;
  }

  void by_bounds() noexcept {
    Best<Kernel>& best = parts_.best;
    int done = 256;
    for (std::int64_t wanted = best.k; done > 0; wanted = std::min(4 * wanted, packed_.n_items)) {
      best.cut();
      int level = level_of_theta();
      if (best.theta == -kInfinity) level = std::min(level_for(wanted), done - 1);
      if (level >= done) break;
      between(level, done);
      done = level;
    }
  }

  // All groups whose bound lies in [low, high); low rises with theta. Where rows are kept in main memory, what a chunk
  // needs is asked for while those before it are added up.
  void between(int low, int high) noexcept {
    std::int64_t found = 0;
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const std::uint64_t reaching = Kernel::reaching(parts_.sums + chunk * kGroups, low, high);
      parts_.chunks[found] = {.chunk = chunk, .groups = reaching};
      found += reaching != 0;
    }
    constexpr std::int64_t kStarts = 12;
    constexpr std::int64_t kGroupsAhead = 5;
    for (std::int64_t i = 0; i < std::min(found, kStarts); ++i) ask_starts(parts_.chunks[i].chunk);
    for (std::int64_t i = 0; i < std::min(found, kGroupsAhead); ++i) ask_groups(parts_.chunks[i]);
    float theta = parts_.best.theta;
    for (std::int64_t i = 0; i < found; ++i) {
      if (i + kStarts < found) ask_starts(parts_.chunks[i + kStarts].chunk);
      if (i + kGroupsAhead < found) ask_groups(parts_.chunks[i + kGroupsAhead]);
      if (parts_.best.theta != theta) {
        theta = parts_.best.theta;
        low = std::max(low, level_of_theta());
        if (low >= high) return;
      }
      const Reaching& one = parts_.chunks[i];
      std::uint64_t groups = one.groups;
      if (theta > -kInfinity) groups &= Kernel::reaching(parts_.sums + one.chunk * kGroups, low, high);
      // Where the bound is 0 a group may well be empty.
      if (low == 0) groups &= held(one.chunk);
      if (groups != 0) add_up(one.chunk, groups);
    }
  }

  void ask_starts(std::int64_t chunk) const noexcept {
    for (std::int64_t j = 0; j < count_; ++j) {
      __builtin_prefetch(parts_.rows[j].starts + chunk);
      __builtin_prefetch(parts_.rows[j].present + chunk);
    }
  }

  // The lines where the first of the groups begin.
  void ask_groups(const Reaching& one) const noexcept {
    const std::uint64_t below = (one.groups & (0 - one.groups)) - 1;
    for (std::int64_t j = 0; j < count_; ++j) {
      const Named& row = parts_.rows[j];
      const Start start = row.starts[one.chunk];
      const std::int64_t at = start.group + std::popcount(row.present[one.chunk] & below);
      __builtin_prefetch(static_cast<const std::byte*>(row.groups) + at * group_bytes_);
      __builtin_prefetch(row.scores + start.posting);
      if (local_bytes_ == 0) continue;
      __builtin_prefetch(static_cast<const std::byte*>(row.locals) + start.posting * local_bytes_);
    }
  }

  void everything() noexcept {
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const std::uint64_t groups = held(chunk);
      if (groups != 0) add_up(chunk, groups);
    }
  }

  [[nodiscard]] std::uint64_t held(std::int64_t chunk) const noexcept {
    std::uint64_t groups = 0;
    for (std::int64_t j = 0; j < count_; ++j) groups |= parts_.rows[j].present[chunk];
    return groups;
  }

  void add_up(std::int64_t chunk, std::uint64_t groups) noexcept {
    const std::int64_t first = chunk * packed_.chunk_items();
    if (packed_.shift == kNarrow) {
      if (mask_.kind != MaskKind::kNone) groups = Kernel::allowed(groups, first, mask_);
      if (groups != 0) Kernel::narrow(parts_.rows, count_, chunk, groups, first, mask_, parts_.best);
    } else if (packed_.shift <= kByteLocals) {
      if (mask_.kind != MaskKind::kNone) groups = allowed_wide(groups, first);
      if (groups != 0) by_rows(chunk, groups, first);
    } else {
      by_groups(chunk, groups);
    }
  }

  // Those of a chunk's groups that have an allowed item, as far as it pays to look.
  [[nodiscard]] std::uint64_t allowed_wide(std::uint64_t groups, std::int64_t first) const noexcept {
    const std::int64_t size = std::int64_t{1} << packed_.shift;
    if (mask_.kind != MaskKind::kBits && size > 128) return groups;
    std::uint64_t left = groups;
    for (std::uint64_t rest = groups; rest != 0; rest &= rest - 1) {
      const int group = std::countr_zero(rest);
      if (!mask_.any(first + group * size, size)) left &= ~(std::uint64_t{1} << group);
    }
    return left;
  }

  // Groups of a chunk, row after row. A row has one or two postings in a group, or none: no jump depends on which.
  void by_rows(std::int64_t chunk, std::uint64_t groups, std::int64_t first) noexcept {
    std::int64_t found = 0;
    for (std::int64_t j = 0; j < count_; ++j) {
      const Named& row = parts_.rows[j];
      const std::uint64_t present = row.present[chunk];
      const Start start = row.starts[chunk];
      const Start next = row.starts[chunk + 1];
      const auto* const offsets = static_cast<const std::uint16_t*>(row.groups) + start.group;
      const auto here = static_cast<std::uint32_t>(next.posting - start.posting);
      const std::int64_t last = next.group - start.group - 1;
      std::uint64_t* const noted = parts_.noted;
      std::int64_t count = 0;
      for (std::uint64_t rest = groups & present; rest != 0; rest &= rest - 1) {
        const std::uint64_t lowest = rest & (0 - rest);
        const std::int64_t at = std::popcount(present & (lowest - 1));
        const std::uint32_t begin = offsets[at];
        const std::uint32_t beyond = offsets[at + 1];  // of the next chunk or row, or the one behind the last
        const std::uint32_t end = at == last ? here : beyond;
        // A place in the chunk above, a posting below.
        const std::uint64_t entry = static_cast<std::uint64_t>(std::countr_zero(rest)) << (32 + packed_.shift) | begin;
        for (std::int64_t i = 0; i < kInVain; ++i) noted[count + i] = entry + static_cast<std::uint64_t>(i);
        for (std::uint32_t i = kInVain; i < end - begin; ++i) noted[count + i] = entry + i;
        count += end - begin;
        if (count < kNoted) continue;
        found = add_noted(row, start.posting, count, first, found);
        count = 0;
      }
      found = add_noted(row, start.posting, count, first, found);
    }
    std::uint32_t* const totals = parts_.totals;
    for (std::int64_t i = 0; i < found; ++i) {
      const std::uint32_t place = parts_.touched[i];
      const float total = std::bit_cast<float>(totals[place]);
      totals[place] = kUntouched;
      parts_.best.offer(total, static_cast<std::int32_t>(first + place));
    }
  }

  // Adds the postings noted of a row; how many items are touched then.
  std::int64_t add_noted(const Named& row, std::int32_t posting, std::int64_t count, std::int64_t first,
                         std::int64_t found) noexcept {
    const auto* const locals = static_cast<const std::uint8_t*>(row.locals) + posting;
    const float* const scores = row.scores + posting;
    const float weight = row.weight;
    const float bias = row.bias;
    std::uint64_t* const noted = parts_.noted;
    if (mask_.kind != MaskKind::kNone) {
      std::int64_t allowed = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        const std::uint64_t entry = noted[i];
        noted[allowed] = entry;
        const std::uint64_t place = (entry >> 32) + locals[static_cast<std::uint32_t>(entry)];
        allowed += mask_.allows(first + static_cast<std::int64_t>(place)) ? 1 : 0;
      }
      count = allowed;
    }
    std::uint32_t* const totals = parts_.totals;
    std::uint32_t* const touched = parts_.touched;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::uint32_t>(noted[i]);
      const std::uint32_t place = static_cast<std::uint32_t>(noted[i] >> 32) + locals[at];
      const std::uint32_t bits = totals[place];
      const std::uint32_t fresh = bits == kUntouched ? 1 : 0;
      touched[found] = place;
      found += fresh;
      const float before = std::bit_cast<float>(bits & (fresh - 1));  // 0 where fresh
      totals[place] = std::bit_cast<std::uint32_t>(before + (weight * scores[at] + bias));
    }
    return found;
  }

  void by_groups(std::int64_t chunk, std::uint64_t groups) noexcept {
    using Local = std::uint16_t;
    using Offset = std::uint32_t;
    const std::int64_t size = std::int64_t{1} << packed_.shift;
    // To look for an allowed item first pays only while a group is not much longer than its few postings.
    const bool masked = mask_.kind != MaskKind::kNone;
    const bool look = mask_.kind == MaskKind::kBits && size <= 1024;
    std::uint32_t* totals = parts_.totals;
    std::uint32_t* touched = parts_.touched;
    for (; groups != 0; groups &= groups - 1) {
      const int group = std::countr_zero(groups);
      const std::int64_t first = (chunk * kGroups + group) << packed_.shift;
      if (look && !mask_.any(first, size)) continue;
      std::int64_t found = 0;
      for (std::int64_t j = 0; j < count_; ++j) {
        const Named& row = parts_.rows[j];
        const std::uint64_t present = row.present[chunk];
        if ((present >> group & 1) == 0) continue;
        const auto* offsets = static_cast<const Offset*>(row.groups);
        const auto* locals = static_cast<const Local*>(row.locals);
        const Start start = row.starts[chunk];
        const Start next = row.starts[chunk + 1];
        const std::int64_t at = start.group + std::popcount(present & ((std::uint64_t{1} << group) - 1));
        const std::int64_t begin = start.posting + std::int64_t{offsets[at]};
        const std::int64_t end = at + 1 == next.group ? next.posting : start.posting + std::int64_t{offsets[at + 1]};
        for (std::int64_t i = begin; i < end; ++i) {
          const std::uint32_t local = locals[i];
          if (masked && !mask_.allows(first + local)) continue;
          const std::uint32_t bits = totals[local];
          const bool fresh = bits == kUntouched;
          touched[found] = local;
          found += fresh;
          totals[local] = std::bit_cast<std::uint32_t>((fresh ? 0.0f : std::bit_cast<float>(bits)) +
                                                       row.term(row.scores[i]));
        }
      }
      for (std::int64_t i = 0; i < found; ++i) {
        const float total = std::bit_cast<float>(totals[touched[i]]);
        totals[touched[i]] = kUntouched;
        const auto id = static_cast<std::int32_t>(first + touched[i]);
        parts_.best.offer(total, id);
      }
    }
  }

  void write() noexcept {
    Best<Kernel>& best = parts_.best;
    best.cut();
    for (std::int64_t i = 0; i < best.count; ++i) parts_.order[i] = sort_key(best.scores[i], best.ids[i]);
    float* scores = query_.out_scores + number_ * query_.k;
    std::int64_t* ids = query_.out_ids + number_ * query_.k;
    Kernel::sort(parts_.order, best.count, scores, ids);
    std::fill(scores + best.count, scores + query_.k, -kInfinity);
    std::fill(ids + best.count, ids + query_.k, std::int64_t{-1});
  }

  const Packed& packed_;
  const Query& query_;
  std::int64_t number_;
  std::int64_t chunks_;
  ItemMask mask_;
  Parts<Kernel> parts_{};
  std::int64_t count_ = 0;
  std::int64_t postings_ = 0;
  std::int64_t group_bytes_ = 4;
  std::int64_t local_bytes_ = 0;
  float unit_ = 1.0f;
};

}  // namespace
}  // namespace recfast::code_rows
