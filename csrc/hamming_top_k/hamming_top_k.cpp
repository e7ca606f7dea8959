#include "hamming_top_k/hamming_top_k.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"

namespace recfast::hamming_top_k {
namespace {

void distances_scalar(const Planes& keys, const std::uint64_t* query, std::uint16_t* distances) noexcept {
  std::int64_t l = 0;
  for (; l < keys.length; ++l) {
    int sum = 0;
    for (std::int64_t w = 0; w < keys.words; ++w) sum += std::popcount(query[w] ^ keys.planes[w * keys.stride + l]);
    distances[l] = static_cast<std::uint16_t>(sum);
  }
  for (; l % kGroup != 0; ++l) distances[l] = kFar;
}

std::int64_t count_scalar(const std::uint16_t* distances, std::int64_t groups, std::uint16_t limit) noexcept {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < groups * kGroup; ++i) count += distances[i] <= limit;
  return count;
}

std::uint32_t near_scalar(const std::uint16_t* group, std::uint16_t limit) noexcept {
  std::uint32_t bits = 0;
  for (unsigned i = 0; i < kGroup; ++i) bits |= static_cast<std::uint32_t>(group[i] <= limit) << i;
  return bits;
}

Forms pick() noexcept {
#if defined(__x86_64__)
  if (has_vpopcnt()) return forms_avx512();
  if (active_isa() >= Isa::kAvx2) return forms_avx2();
#endif
  return {distances_scalar, count_scalar, near_scalar};
}

// Words of 64 bits that hold one code.
std::int64_t words_of(std::int64_t words, std::int64_t code_bytes) noexcept { return (words * code_bytes + 7) / 8; }

// One thread's working memory.
struct Work {
  std::uint64_t* planes;     // [words, room]: the keys, where they do not lie in planes already
  std::uint64_t* query;      // [words]
  std::uint16_t* distances;  // [room]
  std::int64_t* starts;      // [bits + 2]
  std::uint32_t* chosen;     // [k, at most room]: distance of each
  std::int64_t* places;      // likewise: its row
  std::int64_t room;         // whole groups that hold the longest history
  std::int64_t used;         // words

  Work(std::uint64_t* base, const Shape& shape, std::int64_t code_bytes) noexcept {
    room = (shape.longest + kGroup - 1) / kGroup * kGroup;
    const std::int64_t words = words_of(shape.words, code_bytes);
    const std::int64_t kept = std::min(shape.k, room);
    planes = base;
    query = planes + words * room;
    distances = reinterpret_cast<std::uint16_t*>(query + words);  // NOLINT: scratch is bytes here
    starts = reinterpret_cast<std::int64_t*>(query + words + room / 4);
    places = starts + shape.words * code_bytes * 8 + 2;
    chosen = reinterpret_cast<std::uint32_t*>(places + kept);
    used = (words * room + words + room / 4 + shape.words * code_bytes * 8 + 2 + kept + (kept + 1) / 2 + 7) / 8 * 8;
  }
};

std::uint64_t pack(const std::uint64_t* row, std::int64_t, std::int64_t word) noexcept { return row[word]; }
std::uint64_t pack(const std::uint8_t* row, std::int64_t bytes, std::int64_t word) noexcept {
  std::uint64_t value = 0;
  std::memcpy(&value, row + word * 8, static_cast<std::size_t>(std::min<std::int64_t>(8, bytes - word * 8)));
  return value;
}

// The positions of one candidate, from its distances.
void select(const Forms& forms, const Work& work, std::int64_t length, std::int64_t bits, std::int64_t k,
            std::int64_t* out) noexcept {
  const std::int64_t groups = (length + kGroup - 1) / kGroup;
  const std::int64_t found = std::min(k, length);
  std::fill(out + found, out + k, std::int64_t{-1});
  if (found == 0) return;
  // The smallest limit that lets at least `found` through.
  std::int64_t low = 0;
  std::int64_t high = bits;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (forms.count(work.distances, groups, static_cast<std::uint16_t>(middle)) >= found) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const auto limit = static_cast<std::uint16_t>(low);
  const std::int64_t nearer = low == 0 ? 0 : forms.count(work.distances, groups, static_cast<std::uint16_t>(low - 1));
  // From the end, so that the later of two equal ones is met first. Those at the limit take what room is left.
  std::int64_t ties = found - nearer;
  std::int64_t kept = 0;
  std::fill_n(work.starts, low + 2, std::int64_t{0});
  for (std::int64_t group = groups - 1; group >= 0 && kept < found; --group) {
    const std::uint16_t* from = work.distances + group * kGroup;
    std::uint32_t near = forms.near(from, limit);
    while (near != 0) {
      const int lane = 31 - std::countl_zero(near);
      near ^= std::uint32_t{1} << lane;
      const std::uint16_t distance = from[lane];
      if (distance == limit && ties-- <= 0) continue;
      work.places[kept] = group * kGroup + lane;
      work.chosen[kept++] = distance;
      ++work.starts[distance + 1];
    }
  }
  for (std::int64_t d = 0; d < low; ++d) work.starts[d + 1] += work.starts[d];
  for (std::int64_t i = 0; i < kept; ++i) out[work.starts[work.chosen[i]]++] = work.places[i];
}

template <class Code>
void run_with(const Args<Code>& args) noexcept {
  const Shape& s = args.shape;
  if (s.k == 0) return;
  const Forms forms = pick();
  const std::int64_t words = words_of(s.words, sizeof(Code));
  const std::int64_t bits = s.words * static_cast<std::int64_t>(sizeof(Code)) * 8;
  const std::int64_t total = args.query.rows;
  const bool in_place = std::is_same_v<Code, std::uint64_t> && s.words == 1 && args.keys.stride == 1;
  // Candidates that a thread takes at once: many share the packing of their user's codes, few keep threads busy.
  const std::int64_t piece = std::clamp<std::int64_t>(total / (8 * max_threads()), 1, 64);
  parallel_for_each((total + piece - 1) / piece, [&](std::int64_t unit, int thread) {
    Work counted(nullptr, s, sizeof(Code));
    const Work work(args.scratch + thread * counted.used, s, sizeof(Code));
    const std::int64_t stop = std::min(total, (unit + 1) * piece);
    std::int64_t user = -1;
    Planes planes{};
    for (std::int64_t c = unit * piece; c < stop; ++c) {
      std::int64_t owner = c;
      if (args.candidates != nullptr) {
        owner = user;
        if (user < 0 || c >= args.candidates[user + 1]) {
          owner = std::upper_bound(args.candidates, args.candidates + s.users + 1, c) - args.candidates - 1;
        }
      }
      const std::int64_t begin = args.begin[owner];
      const std::int64_t length = args.end[owner] - begin;
      if (owner != user) {
        user = owner;
        planes = {.planes = work.planes, .stride = work.room, .words = words, .length = length};
        if constexpr (std::is_same_v<Code, std::uint64_t>) {
          if (in_place) planes.planes = args.keys.data + begin;
        }
        for (std::int64_t l = 0; l < (in_place ? 0 : length); ++l) {
          const Code* row = args.keys[begin + l];
          for (std::int64_t w = 0; w < words; ++w) work.planes[w * work.room + l] = pack(row, s.words, w);
        }
      }
      for (std::int64_t w = 0; w < words; ++w) work.query[w] = pack(args.query[c], s.words, w);
      forms.distances(planes, work.query, work.distances);
      select(forms, work, length, bits, s.k, args.out + c * s.k);
    }
  });
}

}  // namespace

std::int64_t scratch_size(const Shape& shape, std::int64_t code_bytes) noexcept {
  return max_threads() * Work(nullptr, shape, code_bytes).used;
}

void run(const Args<std::uint64_t>& args) noexcept { run_with(args); }
void run(const Args<std::uint8_t>& args) noexcept { run_with(args); }

}  // namespace recfast::hamming_top_k
