#include "embedding_update/embedding_update.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/random.h"
#include "common/status.h"

namespace recfast::embedding_update {
namespace {

constexpr int kLanes = 16;

struct F {
  float lane[kLanes];
};
struct M {
  bool lane[kLanes];
};

template <class Function>
F map(const Function& function) noexcept {
  F out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = function(i);
  return out;
}

inline F set(float x) noexcept {
  return map([=](int) { return x; });
}
inline F zero() noexcept { return set(0.0f); }
inline F load(const float* p) noexcept {
  return map([=](int i) { return p[i]; });
}
inline void store(float* p, const F& x) noexcept { std::copy(x.lane, x.lane + kLanes, p); }
inline M lanes_below(std::int64_t n) noexcept {
  M out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = i < n;
  return out;
}
inline F load_tail(const float* p, std::int64_t n) noexcept {
  return map([=](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store_tail(float* p, const F& x, std::int64_t n) noexcept { std::copy(x.lane, x.lane + n, p); }
inline F add(const F& a, const F& b) noexcept {
  return map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F sub(const F& a, const F& b) noexcept {
  return map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F mul(const F& a, const F& b) noexcept {
  return map([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F div(const F& a, const F& b) noexcept {
  return map([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F root(const F& a) noexcept {
  return map([&](int i) { return std::sqrt(a.lane[i]); });
}
inline F larger(const F& a, const F& b) noexcept {
  return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F smaller(const F& a, const F& b) noexcept {
  return map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F magnitude(const F& a) noexcept {
  return map([&](int i) { return std::fabs(a.lane[i]); });
}
inline F floored(const F& a) noexcept {
  return map([&](int i) { return std::floor(a.lane[i]); });
}
inline F rounded(const F& a) noexcept {
  return map([&](int i) { return std::nearbyint(a.lane[i]); });
}
inline M less(const F& a, const F& b) noexcept {
  M out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = a.lane[i] < b.lane[i];
  return out;
}
inline M between(const F& low, const F& x, const F& high) noexcept {
  M out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = low.lane[i] < x.lane[i] && x.lane[i] < high.lane[i];
  return out;
}
inline F select(const M& m, const F& yes, const F& no) noexcept {
  return map([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; });
}
inline M lanes_equal(const std::int32_t* p, std::int64_t n, std::int32_t x) noexcept {
  M out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = i < n && p[i] == x;
  return out;
}

inline std::int64_t count_changed(const F& x, const F& y) noexcept {
  std::int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) count += x.lane[i] < y.lane[i] || x.lane[i] > y.lane[i];
  return count;
}

inline F exponent_of(const F& x) noexcept {
  return map([&](int i) { return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x.lane[i]) & 0x7F800000u); });
}
inline F reciprocal_of_power(const F& x) noexcept {
  return map([&](int i) { return std::bit_cast<float>(0x7F000000u - std::bit_cast<std::uint32_t>(x.lane[i])); });
}

inline float fold(F x) noexcept {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
  }
  return x.lane[0];
}
inline F larger_bits(const F& a, const F& b) noexcept {
  return map([&](int i) {
    return std::bit_cast<std::int32_t>(a.lane[i]) > std::bit_cast<std::int32_t>(b.lane[i]) ? a.lane[i] : b.lane[i];
  });
}
inline float fold_largest(F x) noexcept {
  for (int i = 1; i < kLanes; ++i) {
    if (std::bit_cast<std::int32_t>(x.lane[i]) > std::bit_cast<std::int32_t>(x.lane[0])) x.lane[0] = x.lane[i];
  }
  return x.lane[0];
}

inline float bfloat16_raised(float x, std::uint32_t by) noexcept {
  if (std::isnan(x)) return std::bit_cast<float>(0x7FC00000u);
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(x) + by) & 0xFFFF0000u);
}
inline F bfloat16_drawn(const F& x, const F& u) noexcept {
  return map([&](int i) { return bfloat16_raised(x.lane[i], static_cast<std::uint32_t>(u.lane[i] * 65536.0f)); });
}
inline F bfloat16_nearest(const F& x) noexcept {
  return map([&](int i) {
    return bfloat16_raised(x.lane[i], 0x7FFFu + (std::bit_cast<std::uint32_t>(x.lane[i]) >> 16 & 1u));
  });
}

template <Format kFormat>
inline F decode(const std::uint8_t* codes) noexcept {
  return map([=](int i) {
    if constexpr (kFormat == Format::kBFloat16) return bfloat16_to_float(read_at<std::uint16_t>(codes + 2 * i));
    if constexpr (kFormat == Format::kFloat16) return float16_to_float(read_at<std::uint16_t>(codes + 2 * i));
    if constexpr (kFormat == Format::kFloat8) return float8_to_float(codes[i]);
    if constexpr (kFormat == Format::kFloat32) return read_at<float>(codes + 4 * i);
    return static_cast<float>(code_at(kFormat, codes, i, true));
  });
}

template <Format kFormat>
inline void encode(std::uint8_t* codes, const F& x) noexcept {
  if constexpr (kFormat == Format::kFloat32) {
    std::memcpy(codes, x.lane, sizeof x.lane);
  } else if constexpr (kFormat == Format::kBFloat16 || kFormat == Format::kFloat16) {
    for (int i = 0; i < kLanes; ++i) {
      const std::uint16_t bits =
          kFormat == Format::kBFloat16 ? encode_bfloat16(x.lane[i]) : encode_float16(x.lane[i]);
      std::memcpy(codes + 2 * i, &bits, sizeof bits);
    }
  } else if constexpr (kFormat == Format::kFloat8) {
    for (int i = 0; i < kLanes; ++i) codes[i] = encode_float8(x.lane[i]);
  } else {
    constexpr int bits = bits_of(kFormat);
    constexpr int per_byte = 8 / bits;
    for (int byte = 0; byte < kLanes / per_byte; ++byte) {
      int packed = 0;
      for (int i = 0; i < per_byte; ++i) {
        packed |= (static_cast<int>(x.lane[byte * per_byte + i]) & ((1 << bits) - 1)) << (i * bits);
      }
      codes[byte] = static_cast<std::uint8_t>(packed);
    }
  }
}

// 2 blocks make 16 columns.
constexpr int kDrawn = 1;

class Draws {
 public:
  Draws(std::uint64_t seed, std::uint32_t step_count, std::uint32_t table_id) noexcept
      : philox_(seed), step_count_(step_count), table_id_(table_id) {}

  void make(std::int64_t row, std::int64_t unit, F* u) const noexcept {
    for (int block = 0; block < 2; ++block) {
      std::uint32_t words[4];
      philox_(step_count_, table_id_, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(2 * unit + block),
              words);
      for (int i = 0; i < 4; ++i) {
        u->lane[8 * block + 2 * i] = uniform01(words[i]);
        u->lane[8 * block + 2 * i + 1] = uniform01(exchange_halves(words[i]));
      }
    }
  }

 private:
  Philox philox_;
  std::uint32_t step_count_;
  std::uint32_t table_id_;
};

#include "embedding_update/embedding_update_rows.h"

// Rows a thread takes at a time: rows are of uneven length.
constexpr std::int64_t kChunk = 256;
constexpr std::int64_t kValues = 16384;  // of a gradient, looked through at a time

const Functions& pick(const Table& table) noexcept {
  const auto form = IsaTable<const Functions&(Format, std::int64_t) noexcept>{
      .scalar = [](Format format, std::int64_t) noexcept -> const Functions& { return functions_of<0>(format); },
#if defined(__x86_64__)
      .avx2 = functions_avx2,
      .avx512 = functions_avx512,
#endif
  }.pick();
  return form(table.format, table.width);
}

// The position of the first NaN or infinity, or -1.
std::int64_t first_not_finite(const float* values, std::int64_t size) noexcept {
  constexpr std::int32_t kInfinity = 0x7F800000;
  FirstError error;
  parallel_for(size, kValues, [&](std::int64_t first, std::int64_t last) {
    // A whole stretch at once, signed, since that is what every instruction set compares.
    for (std::int64_t from = first; from < last; from += kValues) {
      const std::int64_t to = std::min(last, from + kValues);
      std::int32_t wrong = 0;
      for (std::int64_t i = from; i < to; ++i) {
        wrong |= (std::bit_cast<std::int32_t>(values[i]) & 0x7FFFFFFF) >= kInfinity ? -1 : 0;
      }
      for (std::int64_t i = from; wrong != 0 && i < to; ++i) {
        if ((std::bit_cast<std::int32_t>(values[i]) & 0x7FFFFFFF) >= kInfinity) {
          error.report(i);
          return;
        }
      }
    }
  });
  return error.position();
}

std::int64_t first_bad_offset(const std::int64_t* offsets, std::int64_t bags, std::int64_t total) noexcept {
  if (offsets[0] != 0) return 0;
  for (std::int64_t bag = 0; bag < bags; ++bag) {
    if (offsets[bag + 1] < offsets[bag]) return bag + 1;
  }
  return offsets[bags] == total ? -1 : bags;
}

// The scratch memory of a call, dealt out in pieces of whole cache lines.
class Scratch {
 public:
  explicit Scratch(std::uint8_t* memory) noexcept : memory_(memory) {}

  template <class T>
  T* take(std::int64_t count) noexcept {
    T* const piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }

  [[nodiscard]] std::int64_t used() const noexcept { return used_; }

 private:
  std::uint8_t* memory_;
  std::int64_t used_ = 0;
};

struct Memory {
  std::uint64_t* keys = nullptr;
  std::int32_t* starts = nullptr;
  std::uint32_t* histograms = nullptr;
  std::int64_t* counts = nullptr;
  std::int32_t* bag_of = nullptr;
  float* coefficient = nullptr;
  float* buffers = nullptr;
  LongRun* long_runs = nullptr;
  float* part_sums = nullptr;
  double* chunk_sums = nullptr;
  std::int64_t used = 0;
};

Memory lay_out(std::uint8_t* memory, std::int64_t total, std::int64_t bags, std::int64_t width, bool offsets,
               bool coefficients, bool owns_groups, int threads) noexcept {
  Scratch scratch(memory);
  Memory out;
  if (owns_groups) {
    out.keys = scratch.take<std::uint64_t>(2 * total);
    out.starts = scratch.take<std::int32_t>(total + 1);
  }
  const std::int64_t pieces = LookupGrouping::pieces(total, bags, threads);
  out.histograms = scratch.take<std::uint32_t>(LookupGrouping::histogram_words(pieces));
  out.counts = scratch.take<std::int64_t>(pieces + 1);
  if (coefficients) out.coefficient = scratch.take<float>(std::max(total, bags));
  if (offsets) out.bag_of = scratch.take<std::int32_t>(total);
  out.buffers = scratch.take<float>(buffer_floats(width) * threads);
  if (threads > 1) {
    out.long_runs = scratch.take<LongRun>(total / kPart + 1);
    out.part_sums = scratch.take<float>((total / kPart + 1) * padded(width));
  }
  if (!owns_groups) out.chunk_sums = scratch.take<double>(total / kChunk + 1);
  out.used = scratch.used();
  return out;
}

// Finds runs of more than kPart lookups and sums all their parts but the first, each part on a thread of its own.
std::int64_t sum_long_runs(const Functions& form, const Args& args, LongRun* long_runs, float* part_sums) noexcept {
  const Grouped& groups = args.groups;
  std::int64_t found = 0;
  std::int64_t parts = 0;
  for (std::int64_t run = 0; run < groups.runs; ++run) {
    const std::int64_t length = groups.starts[run + 1] - groups.starts[run];
    if (length <= kPart) continue;
    long_runs[found++] = {run, parts};
    parts += (length + kPart - 1) / kPart - 1;
  }
  const std::int64_t full = padded(args.table.width);
  parallel_for_each(parts, [&](std::int64_t part, int thread) {
    const LongRun* const owner = std::upper_bound(long_runs, long_runs + found, part,
                                                  [](std::int64_t wanted, const LongRun& long_run) {
                                                    return wanted < long_run.first_part;
                                                  }) - 1;
    const std::int64_t first = groups.starts[owner->run] + (part - owner->first_part + 1) * kPart;
    const std::int64_t last = std::min<std::int64_t>(groups.starts[owner->run + 1], first + kPart);
    form.part(args, first, last, args.buffers + buffer_floats(args.table.width) * thread, part_sums + part * full);
  });
  return found;
}

// Checks, groups (or takes the groups of phase first) and fills in what of `args` depends on them.
Result prepare(const Call& call, const Memory& memory, Args& args) noexcept {
  const embedding_bag::Lookups& lookups = call.lookups;
  const bool again = call.phase == Phase::kSecond;
  for (std::int64_t f = 0; f < lookups.features; ++f) {
    const std::int64_t first = lookups.feature_first[f];
    const std::int64_t rows = lookups.feature_rows[f];
    if (first < 0 || rows < 0 || first > lookups.rows || rows > lookups.rows - first) return {Outcome::kBadFeature, f};
  }
  if (lookups.bag_splits != nullptr) {
    const std::int64_t wrong = first_bad_offset(lookups.bag_splits, lookups.features, lookups.bags);
    if (wrong >= 0) return {Outcome::kBadSplit, wrong};
  }
  if (lookups.offsets != nullptr && !again) {
    const std::int64_t wrong = first_bad_offset(lookups.offsets, lookups.bags, lookups.total);
    if (wrong >= 0) return {Outcome::kBadOffset, wrong};
  }
  if (call.check) {
    std::int64_t wrong = first_not_finite(call.grad, lookups.bags * args.table.width);
    if (wrong >= 0) return {Outcome::kBadGradient, wrong};
    wrong = call.weights == nullptr ? -1 : first_not_finite(call.weights, lookups.total);
    if (wrong >= 0) return {Outcome::kBadWeight, wrong};
  }
  // A lookup is known by its bag where nothing tells the lookups of a bag apart: one indirection less.
  const bool by_bag = call.weights == nullptr && call.argmax == nullptr;
  const bool mean = call.mean && lookups.offsets != nullptr;
  if (again) {
    args.groups = {call.keys + call.counts[2] * lookups.total, call.starts, call.counts[0], call.counts[1]};
  } else {
    FirstError error;
    std::uint64_t* const keys = call.keys == nullptr ? memory.keys : call.keys;
    std::int32_t* const starts = call.starts == nullptr ? memory.starts : call.starts;
    args.groups = LookupGrouping::run(lookups, by_bag, keys, keys + lookups.total, starts, memory.histograms,
                                      memory.counts, LookupGrouping::pieces(lookups.total, lookups.bags, max_threads()),
                                      error);
    if (error.position() >= 0) return {Outcome::kBadIndex, error.position()};
    if (call.counts != nullptr) {
      call.counts[0] = args.groups.kept;
      call.counts[1] = args.groups.runs;
      call.counts[2] = args.groups.keys == keys ? 0 : 1;
    }
  }
  SlotGradient gradient{call.grad, args.table.width, nullptr, call.weights, call.argmax};
  if (lookups.offsets != nullptr && (mean || !by_bag)) {
    parallel_for(lookups.bags, 1024, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t bag = first; bag < last; ++bag) {
        float share = 1.0f;
        if (mean) {
          std::int64_t length = lookups.begin(bag + 1) - lookups.begin(bag);
          if (lookups.skip_missing) {
            for (std::int64_t i = lookups.begin(bag); i < lookups.begin(bag + 1); ++i) length -= lookups.id(i) == -1;
          }
          share = static_cast<float>(length);
        }
        if (by_bag) {
          memory.coefficient[bag] = 1.0f / share;
          continue;
        }
        for (std::int64_t i = lookups.begin(bag); i < lookups.begin(bag + 1); ++i) {
          memory.bag_of[i] = static_cast<std::int32_t>(bag);
          if (call.weights != nullptr) memory.coefficient[i] = mean ? call.weights[i] / share : call.weights[i];
        }
      }
    });
    if (!by_bag) gradient.bag_of = memory.bag_of;
    if (by_bag || call.weights != nullptr) gradient.coefficient = memory.coefficient;
  }
  args.gradient = gradient;
  args.floats = call.floats;
  args.phase = call.phase;
  args.buffers = memory.buffers;
  return {Outcome::kDone, 0};
}

Memory memory_of(const Table& table, const Call& call) noexcept {
  return lay_out(call.scratch, call.lookups.total, call.lookups.bags, table.width, call.lookups.offsets != nullptr,
                 call.weights != nullptr || call.mean, call.keys == nullptr, max_threads());
}

}  // namespace

std::int64_t scratch_bytes(std::int64_t total, std::int64_t bags, std::int64_t width, bool offsets, bool coefficients,
                           bool owns_groups, int threads) noexcept {
  return lay_out(nullptr, total, bags, width, offsets, coefficients, owns_groups, threads).used;
}

Result run(const Table& table, const State& state, const Rule& rule, const Call& call) noexcept {
  const Functions& form = pick(table);
  const Memory memory = memory_of(table, call);
  Args args{.table = table, .state = state, .rule = rule};
  Result result = prepare(call, memory, args);
  if (result.outcome != Outcome::kDone) return result;
  if (max_threads() > 1) {
    args.long_run_count = sum_long_runs(form, args, memory.long_runs, memory.part_sums);
    args.long_runs = memory.long_runs;
    args.part_sums = memory.part_sums;
  }
  std::atomic<std::int64_t> clipped{0};
  const std::int64_t runs = args.groups.runs;
  const std::int64_t stride = buffer_floats(table.width);
  if (max_threads() == 1) {
    clipped = form.rows(args, 0, runs, args.buffers);
  } else {
    parallel_for_each((runs + kChunk - 1) / kChunk, [&](std::int64_t chunk, int thread) {
      clipped += form.rows(args, chunk * kChunk, std::min(runs, (chunk + 1) * kChunk), args.buffers + stride * thread);
    });
  }
  return {Outcome::kDone, clipped};
}

Result table_step_gradient(const Table& table, const Rule& rule, const Call& call, double* out) noexcept {
  const Functions& form = pick(table);
  const Memory memory = memory_of(table, call);
  Args args{.table = table, .state = {}, .rule = rule};
  const Result result = prepare(call, memory, args);
  if (result.outcome != Outcome::kDone) return result;
  // One sum a chunk, in order, and the chunks' sums in order.
  const std::int64_t runs = args.groups.runs;
  const std::int64_t chunks = (runs + kChunk - 1) / kChunk;
  const std::int64_t stride = buffer_floats(table.width);
  parallel_for_each(chunks, [&](std::int64_t chunk, int thread) {
    float slopes_of[kChunk];
    const std::int64_t first = chunk * kChunk;
    const std::int64_t last = std::min(runs, first + kChunk);
    form.slopes(args, first, last, args.buffers + stride * thread, slopes_of);
    double sum = 0.0;
    for (std::int64_t i = 0; i < last - first; ++i) sum += static_cast<double>(slopes_of[i]);
    memory.chunk_sums[chunk] = sum;
  });
  *out = 0.0;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) *out += memory.chunk_sums[chunk];
  *out *= static_cast<double>(rule.step_scale);
  return result;
}

std::int64_t requantize(const Table& table, const Rule& rule, float step, const Call& call) noexcept {
  const Functions& form = pick(table);
  Args args{.table = table, .state = {}, .rule = rule};
  args.buffers = reinterpret_cast<float*>(call.scratch);
  if (call.keys != nullptr) {
    args.groups = {call.keys + call.counts[2] * call.lookups.total, call.starts, call.counts[0], call.counts[1]};
    args.floats = call.floats;
  }
  std::atomic<std::int64_t> clipped{0};
  const std::int64_t stride = buffer_floats(table.width);
  parallel_for_each((table.rows + kChunk - 1) / kChunk, [&](std::int64_t chunk, int thread) {
    clipped += form.requantize(args, chunk * kChunk, std::min(table.rows, (chunk + 1) * kChunk), step,
                               args.buffers + stride * thread);
  });
  return clipped;
}

}  // namespace recfast::embedding_update
