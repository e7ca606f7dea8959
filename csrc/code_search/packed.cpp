#include "code_search/packed.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "code_search/collector.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace recfast::code_search {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kSuperItems = kSuper * kItems;

// Deficits are requantised where the limit has fallen below the first, groups bounded anew below the second, if more
// than so many are within reach.
constexpr int kFine = 200;
constexpr int kCoarse = 100;
constexpr std::int64_t kManyGroups = 128;

// A piece of fewer superblocks is not worth a buffer and a merge of its own.
constexpr std::int64_t kMinPiece = 4;

// One superblock in this many is scanned first.
constexpr std::int64_t kAhead = 16;

// Queries that take turns, so that codes are read once from far away for all of them.
constexpr std::int64_t kTile = 16;
// What one of them reads in its turn: it stays in the second level of the cache for the others.
constexpr std::int64_t kTurnBytes = 256 * 1024;

// Groups that come first, the best of all; then this many times more, and so on. Few, since while theta is low, nearly
// all items of the best groups have to be scored.
constexpr std::int64_t kFirstGroups = 2;
constexpr std::int64_t kMoreGroups = 4;
// Before it is judged whether bounds are of use.
constexpr std::int64_t kJudged = 64;
// Blocks that are listed before they are looked into.
constexpr std::int64_t kListed = 256;
// The codes of a codebook that are looked up: so many times the number that makes one of them meet a group, were the
// codes of groups drawn at random.
constexpr std::int64_t kMeetings = 4;
constexpr std::int64_t kFewestCodes = 16;
// To find the groups that come first.
constexpr std::int64_t kFirstCodes = 8;

[[nodiscard]] constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) noexcept { return (a + b - 1) / b; }

// Codes that share a bit of a bitmap and a deficit: 2^shift.
[[nodiscard]] int shift_of(std::int64_t entries) noexcept {
  const auto bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(entries - 1)));
  return bits > 8 ? bits - 8 : 0;
}

// --- the scalar forms: no bound but block-max ---

void deficits_scalar(const float* values, std::int64_t count, float top, float inverse, std::uint8_t* out) noexcept {
  for (std::int64_t c = 0; c < count; ++c) {
    out[c] = static_cast<std::uint8_t>(std::min((top - values[c]) * inverse, 255.0f));
  }
  std::fill(out + count, out + kLevels, std::uint8_t{255});
}

float top_scalar(const float* values, std::int64_t count) noexcept { return *std::max_element(values, values + count); }

void bounds_scalar(const std::uint64_t* held, std::int64_t spans, std::int64_t rows, std::int64_t lanes,
                   const std::uint8_t* lut, const std::uint8_t* floors, std::uint8_t* out) noexcept {
  for (std::int64_t word = 0; word < spans * lanes; ++word) {
    int sums[kWord] = {};
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::uint64_t* const lines = held + (word / lanes * rows + row) * kLevels * lanes + word % lanes;
      int least[kWord];
      std::fill_n(least, kWord, int{floors[row]});
      for (std::int64_t code = 0; code < kLevels; ++code) {
        const int value = lut[row * kLevels + code];
        if (value >= floors[row]) continue;
        for (std::uint64_t bits = lines[code * lanes]; bits != 0; bits &= bits - 1) {
          int& its = least[std::countr_zero(bits)];
          its = std::min(its, value);
        }
      }
      for (std::int64_t g = 0; g < kWord; ++g) sums[g] += least[g];
    }
    for (std::int64_t g = 0; g < kWord; ++g) out[word * kWord + g] = static_cast<std::uint8_t>(std::min(sums[g], 255));
  }
}

std::uint64_t within_scalar(const std::uint8_t* values, int most) noexcept {
  std::uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= static_cast<std::uint64_t>(values[i] <= most ? 1 : 0) << i;
  return bits;
}

std::int64_t count_scalar(const std::uint8_t* values, const std::uint64_t* those, std::int64_t words,
                          int most) noexcept {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < words * 64; ++i) {
    found += (those[i / 64] >> (i % 64) & 1) != 0 && values[i] <= most ? 1 : 0;
  }
  return found;
}

std::int64_t bits_scalar(const std::uint64_t* words, std::int64_t count) noexcept {
  std::int64_t bits = 0;
  for (std::int64_t w = 0; w < count; ++w) bits += std::popcount(words[w]);
  return bits;
}

std::int64_t reach_scalar(const std::int32_t* keys, std::int64_t count, std::int32_t key) noexcept {
  std::int32_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) found += keys[i] >= key ? 1 : 0;
  return found;
}

template <class Code>
constexpr Forms<Code> kScalarForms{seek_none<Code>, deficits_scalar, top_scalar, bounds_scalar, within_scalar,
                                    count_scalar, bits_scalar, reach_scalar};

template <class Code>
[[nodiscard]] Forms<Code> pick(Plan plan) noexcept {
#if defined(__x86_64__)
  if (plan != Plan::kScalar) {
    if (has_vbmi()) return forms_avx512(Code{});
    if (active_isa() >= Isa::kAvx2) return forms_avx2(Code{});
  }
#endif
  return kScalarForms<Code>;
}

void pack_words_scalar(const std::uint8_t* mask, std::int64_t words, std::uint64_t* out) noexcept {
  for (std::int64_t w = 0; w < words; ++w) {
    std::uint64_t bits = 0;
    for (std::int64_t j = 0; j < kItems; j += 8) {
      std::uint64_t bytes;
      std::memcpy(&bytes, mask + w * kItems + j, 8);
      // The lowest bits of eight bytes meet in the highest byte.
      bits |= (bytes * 0x0102040810204080u >> 56) << j;
    }
    out[w] = bits;
  }
}

[[nodiscard]] PackWords* pick_pack_words() noexcept {
#if defined(__x86_64__)
  if (has_vbmi()) return pack_words_avx512;
  if (active_isa() >= Isa::kAvx2) return pack_words_avx2;
#endif
  return pack_words_scalar;
}

// --- one query ---

// What does not change during a call.
template <class Code>
struct Job {
  const Items<Code>& items;
  const Request& request;
  Forms<Code> forms;
  std::int64_t blocks = 0;
  std::int64_t supers = 0;
  std::int64_t groups = 0;
  std::int64_t words = 0;  // of groups, with the room that bitmaps have for more
  std::int64_t rows = 0;  // of a bitmap and of the deficits: codebooks, and levels where there is a bias
  std::int64_t kept = 0;  // min(k, N)
  int shift = 0;
  bool block_max = false;
};

// Cuts scratch into pieces at cache lines; base null: only counts.
class Carve {
 public:
  explicit Carve(std::byte* base) noexcept : base_(base) {}
  template <class T>
  [[nodiscard]] T* take(std::int64_t count) noexcept {
    std::byte* const piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += ceil_div(count * static_cast<std::int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(piece);  // NOLINT: scratch is bytes
  }
  [[nodiscard]] std::int64_t used() const noexcept { return used_; }

 private:
  std::byte* base_;
  std::int64_t used_ = 0;
};

// What a thread keeps of a query between two stretches of blocks.
template <class Code>
struct State {
  std::uint8_t* lut = nullptr;         // [rows, 256]
  float* tops = nullptr;               // [rows]
  float* dense = nullptr;              // [M, K], where the table is sparse
  float* shared = nullptr;             // [M, 256], where codes share a deficit: the largest entry
  std::uint8_t* floors = nullptr;      // [rows]
  std::uint8_t* bounds = nullptr;      // [words, 64] of groups
  std::uint64_t* left = nullptr;       // [words] the groups that have not been looked into
  Collector best;

  const float* table = nullptr;
  const std::uint64_t* mask = nullptr;
  std::atomic<float>* theta_of_all = nullptr;  // null: no other thread works for this query
  double tops_sum = 0;
  double tops_size = 0;  // A
  double inverse = 0;    // deficits to steps; 0: no bound yet
  double reach = 0;      // R
  double share = 1;      // of the items that are allowed
  int limit = 255;
  bool boundable = false;
  bool nothing = false;  // a codebook without an allowed code

  State() = default;
  State(const Job<Code>& job, Carve& carve) noexcept {
    const Items<Code>& items = job.items;
    lut = carve.template take<std::uint8_t>(job.rows * kLevels);
    tops = carve.template take<float>(job.rows);
    if (job.request.offsets != nullptr) dense = carve.template take<float>(items.books * items.entries);
    if (job.shift > 0 && job.block_max) shared = carve.template take<float>(items.books * kLevels);
    if (job.block_max) {
      floors = carve.template take<std::uint8_t>(job.rows);
      bounds = carve.template take<std::uint8_t>(job.words * kWord);
      left = carve.template take<std::uint64_t>(job.words);
    }
    const std::int64_t room = Collector::room(job.kept);
    auto* const kept = carve.template take<Scored>(room);
    best = Collector(kept, carve.template take<std::int32_t>(room), job.kept, job.forms.reach, items.slots, items.ids);
  }
};

// Books > 0 fixes the number of codebooks at compile time; 0 reads it.
template <class Code, int Books>
class Searcher {
 public:
  explicit Searcher(const Job<Code>& job) noexcept : job_(job), items_(job.items) {}

  void begin(State<Code>& s, std::int64_t query, std::atomic<float>* theta_of_all) const noexcept {
    const Request& r = job_.request;
    s.best.clear();
    s.best.raise(-kInfinity);
    s.theta_of_all = theta_of_all;
    s.mask = r.mask == nullptr ? nullptr : r.mask + query * r.mask_stride;
    s.table = r.offsets != nullptr ? s.dense : r.table + query * items_.books * items_.entries;
    if (r.offsets != nullptr) {
      std::fill_n(s.dense, items_.books * items_.entries, 0.0f);
      for (std::int64_t i = r.offsets[query]; i < r.offsets[query + 1]; ++i) s.dense[r.entries[i]] = r.values[i];
    }
    s.tops_sum = 0;
    s.tops_size = 0;
    s.inverse = 0;
    s.limit = 255;
    s.nothing = false;
    for (std::int64_t m = 0; m < job_.rows; ++m) {
      const bool book = m < items_.books;
      s.tops[m] = book ? job_.forms.top(s.table + m * items_.entries, items_.entries)
                       : job_.forms.top(items_.edges, kLevels);
      s.nothing |= s.tops[m] == -kInfinity;
      s.tops_sum += s.tops[m];
      s.tops_size += std::abs(s.tops[m]);
    }
    s.boundable = !s.nothing && s.tops_size < 1e38 && items_.books < 65536;
    if (s.shared != nullptr) {
      for (std::int64_t m = 0; m < items_.books; ++m) share(s.table + m * items_.entries, s.shared + m * kLevels);
    }
  }

  // theta from a sample spread over all items; what the sample finds is found again later.
  void seed(State<Code>& s) const noexcept {
    s.share = allowed_share(s);
    if (job_.kept == 0) return;
    const auto wanted = static_cast<double>(4 * job_.kept) / (kItems * s.share);
    if (wanted * 4 > static_cast<double>(job_.blocks)) return;
    const std::int64_t sample = std::max<std::int64_t>(16, static_cast<std::int64_t>(wanted) + 1);
    if (sample * 4 > job_.blocks) return;
    Pending pending;
    for (std::int64_t i = 0; i < sample; ++i) {
      const std::int64_t block = i * job_.blocks / sample;
      pending.add(block, word(s, block));
      if (pending.full() || i + 1 == sample) score(s, pending);
    }
    const float theta = s.best.settle();
    s.best.clear();
    s.best.raise(theta);
    aim(s);
  }

  // Superblocks [first, last), of which one in kAhead comes first, for queries that take turns.
  void scan(State<Code>* states, std::int64_t count, std::int64_t first, std::int64_t last) const noexcept {
    for (std::int64_t super = first; super < last; super += kAhead) {
      for (std::int64_t i = 0; i < count; ++i) run(states[i], super, super + 1);
    }
    const std::int64_t bytes = kSuperItems * items_.books * static_cast<std::int64_t>(sizeof(Code));
    const std::int64_t turn = count == 1 ? kAhead : std::clamp<std::int64_t>(kTurnBytes / bytes, 1, kAhead);
    for (std::int64_t super = first + 1; super < last;) {
      if ((super - first) % kAhead == 0) ++super;
      const std::int64_t stop = std::min({super + turn, last, first + ceil_div(super - first, kAhead) * kAhead});
      for (std::int64_t i = 0; i < count; ++i) run(states[i], super, stop);
      super = std::max(stop, super);
    }
  }

  // Groups best bound first; of `pieces` threads each has every pieces-th group. False where bounds are of no use and
  // nobody shares the query, which is then to be scanned.
  [[nodiscard]] bool search_best_first(State<Code>& s, std::int64_t piece, std::int64_t pieces) const noexcept {
    if (s.nothing) return true;
    if (s.inverse == 0) {  // too few found for a threshold: every superblock may matter
      for (std::int64_t super = piece; super < job_.supers; super += pieces) visit(s, super);
      return true;
    }
    std::fill_n(s.left, job_.words, std::uint64_t{0});
    if (pieces == 1) {
      std::fill_n(s.left, job_.groups / kWord, ~std::uint64_t{0});
      if (job_.groups % kWord != 0) s.left[job_.groups / kWord] = (std::uint64_t{1} << job_.groups % kWord) - 1;
    } else {
      for (std::int64_t group = piece; group < job_.groups; group += pieces) {
        s.left[group / kWord] |= std::uint64_t{1} << group % kWord;
      }
    }
    if (pieces == 1 && idle(s)) return false;
    bound(s, kFirstCodes);
    double scale = s.inverse;
    bool close = false;
    // With few items allowed it takes more groups to find some.
    const auto first = std::min(static_cast<std::int64_t>(kFirstGroups / s.share), job_.groups / 16 + 1);
    for (std::int64_t wanted = first;; wanted *= kMoreGroups) {
      int limit = limit_of(scale, s.reach);
      std::int64_t within = count(s, limit);
      const bool finer = !close || (limit < kCoarse && s.limit > 2 * limit);
      if (finer && wanted > first && within > kManyGroups) {
        bound(s, 0);
        close = true;
        scale = s.inverse;
        limit = limit_of(scale, s.reach);
        within = count(s, limit);
      }
      if (within <= wanted) {
        look_within(s, scale, limit);
        return true;
      }
      // Bounds turn out to be of little use: what is left, as it lies.
      if (wanted >= kJudged && wanted > first && within * 4 > job_.groups * 3) {
        scan_left(s, scale);
        return true;
      }
      int low = 0;
      for (int step = 128; step > 0; step /= 2) {
        if (low + step <= limit && count(s, low + step) <= wanted) low += step;
      }
      look_within(s, scale, low);
    }
  }

  // Neighbouring superblocks, all of their groups.
  void run(State<Code>& s, std::int64_t first, std::int64_t last) const noexcept {
    if (s.nothing) return;
    if (!masked(s)) {
      look(s, nullptr, nullptr, first * kSuper, std::min(last * kSuper, job_.blocks));
      return;
    }
    for (std::int64_t super = first; super < last; ++super) visit(s, super);
  }

  // All that may be among the k best of a superblock's blocks.
  void visit(State<Code>& s, std::int64_t super) const noexcept {
    if (s.nothing) return;
    const std::int64_t first = super * kSuper;
    const std::int64_t last = std::min(first + kSuper, job_.blocks);
    Listed listed;
    if (masked(s)) {
      list(s, first, last, listed);
      if (listed.count < last - first) return look(s, listed.blocks, listed.allowed, 0, listed.count);
    }
    look(s, nullptr, nullptr, first, last);
  }

  void write(State<Code>& s, std::int64_t query) const noexcept {
    const std::int64_t k = job_.request.k;
    float* const scores = job_.request.scores + query * k;
    std::int64_t* const found = job_.request.found + query * k;
    const std::int64_t kept = s.best.write(scores, found);
    std::fill(scores + kept, scores + k, -kInfinity);
    std::fill(found + kept, found + k, std::int64_t{-1});
  }

 private:
  // Blocks of which something may be found, and what.
  struct Listed {
    std::int32_t blocks[kListed + kGroup];
    std::uint64_t allowed[kListed + kGroup];
    std::int64_t count = 0;
  };

  // Appends blocks [first, last).
  void list(const State<Code>& s, std::int64_t first, std::int64_t last, Listed& listed) const noexcept {
    const std::uint64_t* const live = items_.live;
    const std::uint64_t* const mask = job_.request.mask_by_position ? s.mask : nullptr;
    for (std::int64_t block = first; block < last; ++block) {
      std::uint64_t bits = live == nullptr ? ~std::uint64_t{0} : live[block];
      if (mask != nullptr) bits &= mask[block];
      if (block + 1 == job_.blocks) bits &= word(s, block);
      listed.blocks[listed.count] = static_cast<std::int32_t>(block);
      listed.allowed[listed.count] = bits;
      listed.count += bits != 0 ? 1 : 0;
    }
  }

  // Which share of the items is allowed, about; never 0.
  [[nodiscard]] double allowed_share(const State<Code>& s) const noexcept {
    if (items_.live == nullptr && s.mask == nullptr) return 1;
    constexpr std::int64_t kWords = 64;
    std::uint64_t words[kWords];
    for (std::int64_t i = 0; i < kWords; ++i) {
      const std::int64_t block = i * job_.blocks / kWords;
      // Of a mask by slot another order of the same bits.
      words[i] = word(s, block) & (s.mask == nullptr ? ~std::uint64_t{0} : s.mask[block]);
    }
    const std::int64_t bits = job_.forms.bits(words, kWords);
    return static_cast<double>(std::max<std::int64_t>(bits, 1)) / (kWords * kItems);
  }

  // How many codes of a codebook to look up.
  [[nodiscard]] std::int64_t worth(std::int64_t row) const noexcept {
    // How many a group holds, by a sample of lines.
    constexpr std::int64_t kSampled = 16;
    const std::int64_t lanes = items_.lanes;
    const std::int64_t spans = job_.words / lanes;
    std::int64_t bits = 0;
    for (std::int64_t i = 0; i < kSampled; ++i) {
      const std::int64_t line = (i * spans / kSampled * job_.rows + row) * kLevels + i * (kLevels / kSampled);
      bits += job_.forms.bits(items_.held + line * lanes, lanes);
    }
    const std::int64_t groups = std::min(job_.groups, lanes * kWord);
    return std::max(kFewestCodes, kMeetings * kSampled * groups / std::max<std::int64_t>(bits, 1));
  }

  // Bounds of all groups, in the present scale; by `codes` of each codebook, or as many as are worth it (0).
  void bound(State<Code>& s, std::int64_t codes) const noexcept {
    set_floors(s, codes);
    job_.forms.bounds(items_.held, job_.words / items_.lanes, job_.rows, items_.lanes, s.lut, s.floors, s.bounds);
  }

  // Whether next to all groups of some spans are within reach, so that bounding the others is idle.
  [[nodiscard]] bool idle(State<Code>& s) const noexcept {
    constexpr std::int64_t kSpans = 2;
    const std::int64_t lanes = items_.lanes;
    const std::int64_t spans = job_.words / lanes;
    if (spans < 2 * kSpans) return false;
    set_floors(s, 0);
    const int limit = limit_of(s.inverse, s.reach);
    std::int64_t within = 0;
    for (std::int64_t i = 0; i < kSpans; ++i) {
      const std::int64_t span = (2 * i + 1) * spans / (2 * kSpans);
      std::uint8_t* const bounds = s.bounds + span * lanes * kWord;
      job_.forms.bounds(items_.held + span * job_.rows * kLevels * lanes, 1, job_.rows, lanes, s.lut, s.floors, bounds);
      within += job_.forms.count(bounds, s.left + span * lanes, lanes, limit);
    }
    return within * 512 > kSpans * lanes * kWord * 511;
  }

  void set_floors(State<Code>& s, std::int64_t codes) const noexcept {
    for (std::int64_t row = 0; row < job_.rows; ++row) {
      const std::uint8_t* const lut = s.lut + row * kLevels;
      const std::int64_t most = codes > 0 ? codes : worth(row);
      // The highest floor, up to what is out of reach, that leaves no more codes below it.
      int floor = 0;
      for (int step = 128; step > 0; step /= 2) {
        if (floor + step > std::min(s.limit, 254) + 1) continue;
        constexpr std::uint64_t kAll[kLevels / 64] = {~std::uint64_t{0}, ~std::uint64_t{0}, ~std::uint64_t{0},
                                                      ~std::uint64_t{0}};
        if (job_.forms.count(lut, kAll, kLevels / 64, floor + step - 1) <= most) floor += step;
      }
      s.floors[row] = static_cast<std::uint8_t>(floor);
    }
  }

  // How many of the groups left have a bound of at most `most`.
  [[nodiscard]] std::int64_t count(const State<Code>& s, int most) const noexcept {
    return job_.forms.count(s.bounds, s.left, job_.words, most);
  }

  // Looks into the groups left with a bound of at most `most`, as long as that is within reach.
  void look_within(State<Code>& s, double scale, int most) const noexcept {
    Listed listed;
    std::int64_t full = 2 * kGroup;  // theta rises soonest in the beginning
    for (std::int64_t word = 0; word < job_.words; ++word) {
      const int limit = std::min(most, limit_of(scale, s.reach));
      std::uint64_t groups = job_.forms.within(s.bounds + word * kWord, limit) & s.left[word];
      s.left[word] &= ~groups;
      for (; groups != 0; groups &= groups - 1) {
        const std::int64_t first = (word * kWord + std::countr_zero(groups)) * kGroup;
        list(s, first, std::min(first + kGroup, job_.blocks), listed);
        if (listed.count < full) continue;
        look(s, listed.blocks, listed.allowed, 0, listed.count);
        listed.count = 0;
        full = std::min(2 * full, kListed);
      }
    }
    look(s, listed.blocks, listed.allowed, 0, listed.count);
  }

  // Looks into all groups left that are within reach, in runs; of superblocks one in kAhead first.
  void scan_left(State<Code>& s, double scale) const noexcept {
    constexpr std::int64_t kGroups = kSuper / kGroup;
    for (int turn = 0; turn < 2; ++turn) {
      for (std::int64_t group = 0; group < job_.groups;) {
        const std::int64_t super = group / kGroups;
        if ((super % kAhead == 0) != (turn == 0)) {
          group = (super + 1) * kGroups;
          continue;
        }
        const int limit = limit_of(scale, s.reach);
        const auto wanted = [&](std::int64_t g) {
          return (s.left[g / kWord] >> (g % kWord) & 1) != 0 && s.bounds[g] <= limit;
        };
        if (!wanted(group)) {
          ++group;
          continue;
        }
        std::int64_t last = group + 1;
        const std::int64_t stop =
            std::min((turn == 0 ? super + 1 : (super / kAhead + 1) * kAhead) * kGroups, job_.groups);
        while (last < stop && wanted(last)) ++last;
        if (masked(s)) {
          Listed listed;
          for (std::int64_t g = group; g < last; ++g) {
            list(s, g * kGroup, std::min((g + 1) * kGroup, job_.blocks), listed);
            if (listed.count < kListed && g + 1 < last) continue;
            look(s, listed.blocks, listed.allowed, 0, listed.count);
            listed.count = 0;
          }
        } else {
          look(s, nullptr, nullptr, group * kGroup, std::min(last * kGroup, job_.blocks));
        }
        group = last;
      }
    }
  }

  [[nodiscard]] static int limit_of(double inverse, double reach) noexcept {
    // Each deficit and its product are rounded once; limits above 254 would let saturated sums through, which is no
    // error.
    return static_cast<int>(std::min(inverse * (1 + 0x1p-22) * reach, 255.0));
  }

  // The largest entry of the codes that share a bit.
  void share(const float* values, float* out) const noexcept {
    const std::int64_t width = std::int64_t{1} << job_.shift;
    std::fill_n(out, kLevels, -kInfinity);
    for (std::int64_t c = 0; c < items_.entries; ++c) out[c / width] = std::max(out[c / width], values[c]);
  }

  // After theta has risen.
  void aim(State<Code>& s) const noexcept {
    const float theta = s.best.theta();
    if (!s.boundable || theta == -kInfinity) return;
    const double distance = s.tops_sum - static_cast<double>(theta);
    if (!(std::abs(distance) < 1e38)) return;
    const double n = static_cast<double>(items_.books + 1);
    const double g = n * 0x1p-24 / (1 - n * 0x1p-24);
    // One per cent more pays for the rounding of this arithmetic, the rest for results too small to be rounded
    // relatively.
    const double slack = 1.01 * g / (1 - g) * (s.tops_size + std::abs(distance)) + n * 0x1p-120;
    s.reach = std::max(distance, 0.0) + slack;
    if (s.inverse > 0) {
      s.limit = limit_of(s.inverse, s.reach);
      if (s.limit >= kFine) return;
    }
    const auto inverse = static_cast<float>(std::min(254.5 / s.reach * (1 - 0x1p-20), 1e36));
    s.inverse = inverse;
    s.limit = std::min(limit_of(s.inverse, s.reach), 254);
    for (std::int64_t m = 0; m < job_.rows; ++m) {
      const bool book = m < items_.books;
      const float* values = book ? s.table + m * items_.entries : items_.edges;
      std::int64_t count = book ? std::min(items_.entries, kLevels) : kLevels;
      if (job_.shift > 0 && book) {
        if (s.shared == nullptr) continue;
        values = s.shared + m * kLevels;
        count = kLevels;
      }
      job_.forms.deficits(values, count, s.tops[m], inverse, s.lut + m * kLevels);
    }
  }

  [[nodiscard]] bool masked(const State<Code>& s) const noexcept {
    return items_.live != nullptr || (s.mask != nullptr && job_.request.mask_by_position);
  }

  // Takes over what another thread has found out.
  void hear(State<Code>& s) const noexcept {
    if (s.theta_of_all == nullptr) return;
    const float theta = s.theta_of_all->load(std::memory_order_relaxed);
    if (theta > s.best.theta()) {
      s.best.raise(theta);
      aim(s);
    }
  }

  // Positions of a block that exist and are allowed, as far as bits by position say.
  [[nodiscard]] std::uint64_t word(const State<Code>& s, std::int64_t block) const noexcept {
    std::uint64_t bits = ~std::uint64_t{0};
    const std::int64_t rest = items_.size - block * kItems;
    if (rest < kItems) bits = (std::uint64_t{1} << rest) - 1;
    if (items_.live != nullptr) bits &= items_.live[block];
    if (s.mask != nullptr && job_.request.mask_by_position) bits &= s.mask[block];
    return bits;
  }

  void look(State<Code>& s, const std::int32_t* list, const std::uint64_t* allowed, std::int64_t first,
            std::int64_t last) const noexcept {
    Sight<Code> sight{.planes = items_.planes,
                      .levels = items_.levels,
                      .lut = s.lut,
                      .list = list,
                      .allowed = allowed,
                      .books = items_.books,
                      .entries = items_.entries,
                      .limit = 0,
                      .table = s.table,
                      .bias = items_.bias,
                      .size = items_.size,
                      .theta = 0};
    Hit hits[kHits];
    for (std::int64_t at = first; at < last;) {
      hear(s);
      sight.limit = s.limit;
      sight.theta = s.best.theta();
      // Without a threshold yet everything is looked into.
      const std::int64_t count = s.inverse > 0 ? job_.forms.seek(sight, at, last, hits, &at)
                                               : seek_none(sight, at, std::min(at + kGroup, last), hits, &at);
      Pending pending;
      for (std::int64_t h = 0; h < count; ++h) {
        for (std::int64_t i = 0; i < std::min(kGroup, last - hits[h].at); ++i) {
          const std::int64_t block = sight.block(hits[h].at + i);
          pending.add(block, list == nullptr ? hits[h].masks[i] & word(s, block) : hits[h].masks[i]);
        }
        if (pending.full() || h + 1 == count) score(s, pending);
      }
    }
  }

  // Positions to be scored: first all of them are noted, then all are scored, then all are compared, so that no step
  // waits for a guess about the one before.
  struct Pending {
    static constexpr std::int64_t kRoom = 2 * kGroup * kItems;
    std::int64_t positions[kRoom];
    std::int64_t count = 0;

    // Whether another group might not fit.
    [[nodiscard]] bool full() const noexcept { return count > kRoom - kGroup * kItems; }

    void add(std::int64_t block, std::uint64_t bits) noexcept {
      const std::int64_t first = block * kItems;
      // Most often there are none, one or two.
      for (int turn = 0; turn < 2; ++turn) {
        positions[count] = first + (std::countr_zero(bits) & 63);
        count += bits != 0 ? 1 : 0;
        bits &= bits - 1;
      }
      for (; bits != 0; bits &= bits - 1) positions[count++] = first + std::countr_zero(bits);
    }
  };

  [[nodiscard]] float sum(const float* table, const Code* planes, std::int64_t item) const noexcept {
    const std::int64_t count = Books > 0 ? Books : items_.books;
    float total = table[planes[item]];
    for (std::int64_t m = 1; m < count; ++m) total += table[m * items_.entries + planes[m * kItems + item]];
    return total;
  }

  // Scores what is pending and keeps what is good enough.
  void score(State<Code>& s, Pending& pending) const noexcept {
    if (s.mask != nullptr && !job_.request.mask_by_position) {
      std::int64_t allowed = 0;
      for (std::int64_t i = 0; i < pending.count; ++i) {
        const std::int64_t position = pending.positions[i];
        const auto slot = static_cast<std::uint64_t>(items_.slots == nullptr ? position : items_.slots[position]);
        pending.positions[allowed] = position;
        allowed += static_cast<std::int64_t>(s.mask[slot / 64] >> (slot % 64) & 1);
      }
      pending.count = allowed;
    }
    float scores[Pending::kRoom];
    for (std::int64_t i = 0; i < pending.count; ++i) {
      const std::int64_t position = pending.positions[i];
      const std::int64_t item = position & (kItems - 1);
      scores[i] = sum(s.table, items_.planes + (position - item) * items_.books, item);
    }
    if (items_.bias != nullptr) {
      for (std::int64_t i = 0; i < pending.count; ++i) scores[i] += items_.bias[pending.positions[i]];
    }
    const bool risen = s.best.offer(scores, pending.positions, pending.count);
    pending.count = 0;
    if (risen) {
      tell(s);
      aim(s);
    }
  }

  static void tell(State<Code>& s) noexcept {
    if (s.theta_of_all == nullptr) return;
    const float theta = s.best.theta();
    float seen = s.theta_of_all->load(std::memory_order_relaxed);
    while (theta > seen && !s.theta_of_all->compare_exchange_weak(seen, theta, std::memory_order_relaxed)) {
    }
  }

  const Job<Code>& job_;
  const Items<Code>& items_;
};

// --- a call ---

template <class Code>
[[nodiscard]] Job<Code> job_of(const Items<Code>& items, const Request& request) noexcept {
  Job<Code> job{.items = items, .request = request, .forms = pick<Code>(request.plan)};
  job.blocks = ceil_div(items.size, kItems);
  job.supers = ceil_div(job.blocks, kSuper);
  job.groups = ceil_div(job.blocks, kGroup);
  job.rows = items.books + (items.bias == nullptr ? 0 : 1);
  job.kept = std::min(request.k, items.size);
  // A byte has no more than 256 codes, whatever the table has room for.
  job.shift = sizeof(Code) == 1 ? 0 : shift_of(items.entries);
  job.block_max = request.plan == Plan::kBlockMax && items.held != nullptr;
  if (job.block_max) job.words = ceil_div(job.groups, kWord * items.lanes) * items.lanes;
  return job;
}

// Queries are cut in pieces where there are fewer than threads.
[[nodiscard]] std::int64_t pieces_of(std::int64_t queries, std::int64_t supers) noexcept {
  const std::int64_t threads = max_threads();
  if (queries == 0 || queries >= threads) return 1;
  return std::clamp<std::int64_t>(supers / kMinPiece, 1, ceil_div(threads, queries));
}

// Queries that a thread takes at once.
[[nodiscard]] std::int64_t tile_of(std::int64_t queries) noexcept {
  return std::clamp<std::int64_t>(queries / max_threads(), 1, kTile);
}

template <class Code, int Books>
void run(const Job<Code>& job) noexcept {
  const Request& r = job.request;
  const Searcher<Code, Books> searcher(job);
  Carve carve(r.scratch);
  const std::int64_t pieces = pieces_of(r.queries, job.supers);
  if (pieces == 1) {
    const std::int64_t tile = tile_of(r.queries);
    Carve one(nullptr);
    static_cast<void>(State<Code>(job, one));
    std::byte* const states = carve.template take<std::byte>(one.used() * tile * max_threads());
    parallel_for_each(ceil_div(r.queries, tile), [&](std::int64_t unit, int thread) {
      State<Code> state[kTile];
      std::int64_t queries[kTile];
      const std::int64_t first = unit * tile;
      const std::int64_t count = std::min(tile, r.queries - first);
      Carve own(states + one.used() * tile * thread);
      for (std::int64_t i = 0; i < count; ++i) {
        state[i] = State<Code>(job, own);
        queries[i] = first + i;
        searcher.begin(state[i], queries[i], nullptr);
        searcher.seed(state[i]);
      }
      if (job.kept > 0) {
        // Queries that are to be scanned come first.
        std::int64_t scanned = job.block_max ? 0 : count;
        for (std::int64_t i = scanned; i < count; ++i) {
          if (!searcher.search_best_first(state[i], 0, 1)) {
            std::swap(state[i], state[scanned]);
            std::swap(queries[i], queries[scanned++]);
          }
        }
        if (scanned > 0) searcher.scan(state, scanned, 0, job.supers);
      }
      for (std::int64_t i = 0; i < count; ++i) searcher.write(state[i], queries[i]);
    });
    return;
  }
  auto* const states = carve.template take<State<Code>>(r.queries * pieces);
  auto* const thetas = carve.template take<std::atomic<float>>(r.queries);
  for (std::int64_t query = 0; query < r.queries; ++query) new (thetas + query) std::atomic<float>(-kInfinity);
  for (std::int64_t task = 0; task < r.queries * pieces; ++task) states[task] = State<Code>(job, carve);
  parallel_for_each(r.queries * pieces, [&](std::int64_t task, int) {
    const std::int64_t query = task / pieces;
    const std::int64_t piece = task % pieces;
    State<Code>& state = states[task];
    searcher.begin(state, query, thetas + query);
    if (job.kept == 0) return;
    searcher.seed(state);
    if (job.block_max) {
      static_cast<void>(searcher.search_best_first(state, piece, pieces));
    } else {
      searcher.scan(&state, 1, job.supers * piece / pieces, job.supers * (piece + 1) / pieces);
    }
  });
  parallel_for_each(r.queries, [&](std::int64_t query, int) {
    State<Code>& first = states[query * pieces];
    for (std::int64_t piece = 1; piece < pieces; ++piece) first.best.merge(states[query * pieces + piece].best);
    searcher.write(first, query);
  });
}

}  // namespace

template <class Code>
std::int64_t scratch_size(const Items<Code>& items, const Request& request) noexcept {
  const Job<Code> job = job_of(items, request);
  const std::int64_t pieces = pieces_of(request.queries, job.supers);
  Carve one(nullptr);
  static_cast<void>(State<Code>(job, one));
  if (pieces == 1) return one.used() * tile_of(request.queries) * max_threads();
  Carve all(nullptr);
  static_cast<void>(all.take<State<Code>>(request.queries * pieces));
  static_cast<void>(all.take<std::atomic<float>>(request.queries));
  return all.used() + one.used() * request.queries * pieces;
}

template <class Code>
void search(const Items<Code>& items, const Request& request) noexcept {
  const Job<Code> job = job_of(items, request);
  switch (items.books) {
    case 4:
      return run<Code, 4>(job);
    case 8:
      return run<Code, 8>(job);
    case 16:
      return run<Code, 16>(job);
    default:
      return run<Code, 0>(job);
  }
}

SparseFault check_sparse(const Request& request, std::int64_t count, std::int64_t table_size) noexcept {
  using Kind = SparseFault::Kind;
  const std::int64_t* const offsets = request.offsets;
  if (offsets[0] != 0) return {.kind = Kind::kOffset, .position = 0};
  for (std::int64_t query = 0; query < request.queries; ++query) {
    if (offsets[query + 1] < offsets[query]) return {.kind = Kind::kOffset, .position = query + 1};
  }
  if (offsets[request.queries] != count) return {.kind = Kind::kOffset, .position = request.queries};
  for (std::int64_t query = 0; query < request.queries; ++query) {
    for (std::int64_t i = offsets[query]; i < offsets[query + 1]; ++i) {
      const std::int64_t entry = request.entries[i];
      if (entry < 0 || entry >= table_size) return {.kind = Kind::kEntry, .position = i};
      if (i > offsets[query] && entry <= request.entries[i - 1]) return {.kind = Kind::kOrder, .position = i};
      if (!(request.values[i] < kInfinity)) return {.kind = Kind::kValue, .position = i};
    }
  }
  return {};
}

void pack_mask(const std::uint8_t* mask, std::int64_t rows, std::int64_t items, std::uint64_t* out) noexcept {
  const std::int64_t words = ceil_div(items, kItems);
  const std::int64_t whole = items / kItems;
  PackWords* const pack = pick_pack_words();
  parallel_for(rows * words, 4096, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end;) {
      const std::int64_t row = i / words;
      const std::int64_t first = i - row * words;
      const std::int64_t last = std::min(words, first + end - i);
      const std::uint8_t* const from = mask + row * items;
      if (first < whole) pack(from + first * kItems, std::min(last, whole) - first, out + i);
      if (last > whole) {
        std::uint64_t bits = 0;
        for (std::int64_t j = whole * kItems; j < items; ++j) {
          bits |= static_cast<std::uint64_t>(from[j]) << (j % kItems);
        }
        out[row * words + whole] = bits;
      }
      i += last - first;
    }
  });
}

std::int64_t count_bits(const std::uint64_t* words, std::int64_t count) noexcept {
#if defined(__x86_64__)
  if (has_vbmi()) return count_bits_avx512(words, count);
  if (active_isa() >= Isa::kAvx2) return count_bits_avx2(words, count);
#endif
  return bits_scalar(words, count);
}

void order_mask(const std::uint64_t* mask, std::int64_t rows, std::int64_t items, const std::int32_t* slots,
                const std::int32_t* positions, std::uint64_t* out) noexcept {
  const std::int64_t words = ceil_div(items, kItems);
  parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::uint64_t* const from = mask + row * words;
      std::uint64_t* const to = out + row * words;
      const std::int64_t allowed = count_bits(from, words);
      if (allowed > items / 2) {
        for (std::int64_t w = 0; w < words; ++w) {
          std::uint64_t bits = 0;
          for (std::int64_t j = 0; j < std::min(kItems, items - w * kItems); ++j) {
            const std::int64_t slot = slots[w * kItems + j];
            bits |= (from[slot / 64] >> (slot % 64) & 1) << j;
          }
          to[w] = bits;
        }
        continue;
      }
      std::fill_n(to, words, std::uint64_t{0});
      for (std::int64_t w = 0; w < words; ++w) {
        for (std::uint64_t bits = from[w]; bits != 0; bits &= bits - 1) {
          const std::int64_t slot = w * kItems + std::countr_zero(bits);
          if (slot >= items) break;
          const std::int64_t position = positions[slot];
          to[position / 64] |= std::uint64_t{1} << (position % 64);
        }
      }
    }
  });
}

template <class Code>
void pack_planes(const Code* codes, const std::int32_t* slots, std::int64_t items, std::int64_t books,
                 Code* planes) noexcept {
  parallel_for(ceil_div(items, kItems), 256, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      Code* const to = planes + block * books * kItems;
      const std::int64_t count = std::min(kItems, items - block * kItems);
      for (std::int64_t j = 0; j < kItems; ++j) {
        const std::int64_t position = block * kItems + j;
        const Code* const from = j < count ? codes + (slots == nullptr ? position : slots[position]) * books : nullptr;
        for (std::int64_t m = 0; m < books; ++m) to[m * kItems + j] = from == nullptr ? Code{0} : from[m];
      }
    }
  });
}

template std::int64_t scratch_size(const Items<std::uint8_t>&, const Request&) noexcept;
template std::int64_t scratch_size(const Items<std::uint16_t>&, const Request&) noexcept;
template void search(const Items<std::uint8_t>&, const Request&) noexcept;
template void search(const Items<std::uint16_t>&, const Request&) noexcept;
template void pack_planes(const std::uint8_t*, const std::int32_t*, std::int64_t, std::int64_t, std::uint8_t*) noexcept;
template void pack_planes(const std::uint16_t*, const std::int32_t*, std::int64_t, std::int64_t,
                          std::uint16_t*) noexcept;

}  // namespace recfast::code_search
