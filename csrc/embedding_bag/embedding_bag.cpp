#include "embedding_bag/embedding_bag.h"

#include <algorithm>
#include <limits>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "common/isa.h"
#include "common/parallel.h"
#include "embedding_bag/gradient.h"

namespace recfast::embedding_bag {
namespace {

#include "embedding_bag/resolver.h"

#include "embedding_bag/bag_kernels.h"

// One column (or one byte of columns) at a time.
template <class Value>
struct Scalar {
  using Real = Value;
  using Reg = Value;
  static constexpr int kLanes = 1;
  static constexpr int kMostRegs = 0;  // bags stand in memory, where the compiler may still use vectors

  static Reg zero() noexcept { return 0; }
  static Reg set(Value x) noexcept { return x; }
  static Reg add(Reg a, Reg b) noexcept { return a + b; }
  static Reg mul(Reg a, Reg b) noexcept { return a * b; }
  static Reg div(Reg a, Reg b) noexcept { return a / b; }
  static void store(Value* p, Reg x) noexcept { *p = x; }
  static void store_part(Value*, Reg, int) noexcept {}
  static float half(std::uint16_t bits) noexcept { return float16_to_float(bits); }

  template <class C>
  static const std::uint8_t* raw(const std::uint8_t* p) noexcept {
    return p;
  }
  template <class C>
  static const std::uint8_t* raw_part(const std::uint8_t* p, int, std::int64_t) noexcept {
    return p;
  }
  template <class C>
  static void expand(const std::uint8_t* raw, Reg (&x)[C::kPer]) noexcept {
    if constexpr (C::kFormat == Format::kFloat32) {
      x[0] = read_at<float>(raw);
    } else if constexpr (C::kFormat == Format::kFloat64) {
      x[0] = static_cast<Value>(read_at<double>(raw));
    } else if constexpr (C::kFormat == Format::kBFloat16) {
      x[0] = bfloat16_to_float(read_at<std::uint16_t>(raw));
    } else if constexpr (C::kFormat == Format::kFloat16) {
      x[0] = float16_to_float(read_at<std::uint16_t>(raw));
    } else if constexpr (C::kFormat == Format::kFloat8) {
      x[0] = float8_to_float(*raw);
    } else {
      for (int k = 0; k < C::kPer; ++k) {
        x[k] = static_cast<float>(code_at(C::kFormat, raw, k, C::kHeader == Header::kStep));
      }
    }
  }

  template <int kPer>
  static void interleave(Reg (&)[kPer]) noexcept {}
};

// Below this many lookups a second thread costs more than it brings.
constexpr std::int64_t kGrain = 4096;

// Whether this is a processor of AMD's family 19h (Zen 3 and 4).
bool is_zen4() noexcept {
#if defined(__x86_64__)
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid(0, &a, &b, &c, &d) == 0 || b != signature_AMD_ebx) return false;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return false;
  return (a >> 8 & 0xFu) + (a >> 20 & 0xFFu) == 0x19;
#else
  return false;
#endif
}

// Lookups and bags before a bag, which is about the work before it.
std::int64_t work_before(const Lookups& lookups, std::int64_t bag) noexcept { return lookups.begin(bag) + bag; }

}  // namespace

std::int64_t first_bad_offset(const std::int64_t* offsets, std::int64_t bags, std::int64_t total) noexcept {
  if (offsets[0] != 0) return 0;
  for (std::int64_t bag = 0; bag < bags; ++bag) {
    if (offsets[bag + 1] < offsets[bag]) return bag + 1;
  }
  return offsets[bags] == total ? -1 : bags;
}

Status check_lookups(const Lookups& lookups) noexcept {
  if (lookups.offsets != nullptr) {
    const std::int64_t wrong = first_bad_offset(lookups.offsets, lookups.bags, lookups.total);
    if (wrong >= 0) return {Status::Kind::kOffset, wrong};
  }
  for (std::int64_t f = 0; f < lookups.features; ++f) {
    const std::int64_t first = lookups.feature_first[f];
    const std::int64_t rows = lookups.feature_rows[f];
    if (first < 0 || rows < 0 || first > lookups.rows || rows > lookups.rows - first) {
      return {Status::Kind::kFeature, f};
    }
  }
  if (lookups.bag_splits != nullptr) {
    const std::int64_t wrong = first_bad_offset(lookups.bag_splits, lookups.features, lookups.bags);
    if (wrong >= 0) return {Status::Kind::kSplit, wrong};
  }
  return {};
}

Ahead choose_ahead(std::int64_t table_bytes, std::int64_t row_bytes) noexcept {
  constexpr std::int64_t kCached = std::int64_t{8} << 20;
  static const bool kFewMisses = is_zen4();
  if (table_bytes <= kCached) return {.positions = 32, .hint = Hint::kNear};
  return {.positions = row_bytes <= 128 ? 128 : 64, .hint = kFewMisses ? Hint::kFar : Hint::kNear};
}

BagRange piece_of_bags(const Lookups& lookups, std::int64_t part, std::int64_t parts) noexcept {
  const auto bag_at = [&](std::int64_t piece) {
    if (piece == 0) return std::int64_t{0};
    if (piece == parts) return lookups.bags;
    const std::int64_t work = work_before(lookups, lookups.bags) / parts * piece;
    std::int64_t low = 0;
    std::int64_t high = lookups.bags;
    while (low < high) {
      const std::int64_t middle = low + (high - low) / 2;
      if (work_before(lookups, middle) < work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  return {bag_at(part), bag_at(part + 1)};
}

void bags_scalar(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  if (args.table.format == Format::kFloat64) {  // serves gradcheck, not speed
    using C = Code<Format::kFloat64, Header::kNone>;
    (args.mode == Mode::kMax ? &wide_bags<Scalar<double>, C, true> : &wide_bags<Scalar<double>, C, false>)(
        args, first, last, error);
  } else {
    bags<Scalar<float>>(args, first, last, error);
  }
}

void decode_scalar(const Table& table, const std::uint8_t* row, std::int64_t column, std::int64_t count,
                   float* out) noexcept {
  pick_decode<Scalar<float>>(table)(table, row, column, count, out);
}

void weights_scalar(const Args& args, const void* grad, void* out, std::int64_t first, std::int64_t last) noexcept {
  if (args.table.format == Format::kFloat64) {
    dots<Scalar<double>, Code<Format::kFloat64, Header::kNone>>(args, grad, out, first, last);
  } else {
    pick_dots<Scalar<float>>(args.table)(args, grad, out, first, last);
  }
}

DecodeForm* decoder() noexcept {
#if defined(__x86_64__)
  constexpr IsaTable<DecodeForm> kForms{.scalar = &decode_scalar, .avx2 = &decode_avx2, .avx512 = &decode_avx512};
  return kForms.pick();
#else
  return &decode_scalar;
#endif
}

Status run(const Args& args) noexcept {
  const Lookups& lookups = args.lookups;
  const Status status = check_lookups(lookups);
  if (status.kind != Status::Kind::kDone || args.table.width == 0) return status;
  Form* form = &bags_scalar;
#if defined(__x86_64__)
  if (args.table.format != Format::kFloat64) {
    constexpr IsaTable<Form> kForms{.scalar = &bags_scalar, .avx2 = &bags_avx2, .avx512 = &bags_avx512};
    form = kForms.pick();
  }
#endif
  FirstError error;
  const std::int64_t pieces =
      std::clamp<std::int64_t>(work_before(lookups, lookups.bags) / kGrain, 1, std::max(1, max_threads()));
  parallel_for(pieces, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t piece = first; piece < last; ++piece) {
      const BagRange range = piece_of_bags(lookups, piece, pieces);
      if (range.first < range.last) form(args, range.first, range.last, error);
    }
  });
  if (error.position() >= 0) return {Status::Kind::kIndex, error.position()};
  return {};
}

void dequantize(const Table& table, float* out) noexcept {
  constexpr std::int64_t kColumns = 1024;
  DecodeForm* decode = decoder();
  parallel_for(table.rows, std::max<std::int64_t>(1, (1 << 16) / std::max<std::int64_t>(table.width, 1)),
               [&](std::int64_t first, std::int64_t last) {
                 for (std::int64_t row = first; row < last; ++row) {
                   for (std::int64_t column = 0; column < table.width; column += kColumns) {
                     decode(table, table.row(row), column, std::min(kColumns, table.width - column),
                            out + row * table.width + column);
                   }
                 }
               });
}

}  // namespace recfast::embedding_bag
