#include "simhash/simhash.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/row_format.h"

namespace recfast::simhash {
namespace {

constexpr IsaTable<decltype(signs_avx2)> kSigns{
    .scalar = signs_scalar<float>,
#if defined(__x86_64__)
    .avx2 = signs_avx2,
    .avx512 = signs_avx512,
#endif
};

// Multiply-adds below which another thread does not pay.
constexpr std::int64_t kGrain = 1 << 17;

std::uint64_t word_at(const std::uint8_t* bytes) noexcept {
  std::uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  return word;
}

// Spreads the low 8 * bits bits over 8 bytes, `bits` in each: the halves move apart, then their halves, then theirs.
std::uint64_t spread(std::uint64_t x, std::int64_t bits) noexcept {
  const std::uint64_t one = (std::uint64_t{1} << bits) - 1;
  const std::uint64_t two = (one << bits) | one;
  const std::uint64_t four = (two << (2 * bits)) | two;
  constexpr std::uint64_t kHalves = 0x100000001;
  constexpr std::uint64_t kQuarters = 0x0001000100010001;
  const auto gap = static_cast<unsigned>(8 - bits);
  x = (x & four) | ((x << (4 * gap)) & (four << 32));
  x = (x & (two * kHalves)) | ((x << (2 * gap)) & ((two << 16) * kHalves));
  return (x & (one * kQuarters)) | ((x << gap) & ((one << 8) * kQuarters));
}

void write_small(const std::uint8_t* signs, std::int64_t tables, std::int64_t bits, std::uint8_t* codes) noexcept {
  std::int64_t j = 0;
  // The codes of eight tables fill `bits` bytes of the signs.
  for (; j < tables; j += 8) {
    const std::uint64_t eight = spread(word_at(signs), bits);
    signs += bits;
    if (tables - j >= 8 && std::endian::native == std::endian::little) {
      std::memcpy(codes + j, &eight, 8);
      continue;
    }
    for (std::int64_t i = 0; i < std::min<std::int64_t>(8, tables - j); ++i) {
      codes[j + i] = static_cast<std::uint8_t>(eight >> (8 * i));
    }
  }
}

void write_large(const std::uint8_t* signs, std::int64_t tables, std::int64_t bits, std::int64_t* codes) noexcept {
  const std::uint64_t mask = bits == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1;
  for (std::int64_t j = 0; j < tables; ++j) {
    const std::uint8_t* from = signs + j * bits / 8;
    const auto shift = static_cast<unsigned>(j * bits % 8);
    std::uint64_t code = word_at(from) >> shift;
    if (shift > 0) code |= static_cast<std::uint64_t>(from[8]) << (64 - shift);
    codes[j] = static_cast<std::int64_t>(code & mask);
  }
}

std::int64_t thread_size(std::int64_t dim, std::int64_t columns, bool widened, std::int64_t value_bytes) noexcept {
  const std::int64_t signs = (kBlock * sign_bytes(columns) + value_bytes - 1) / value_bytes;
  return padded(signs) + (widened ? kBlock * padded(dim) : 0);
}

template <class X, class T, class Form>
void run_with(const Args<X, T>& args, Form form) noexcept {
  const std::int64_t rows = args.outer * args.inner;
  const std::int64_t columns = args.columns();
  if (rows == 0 || args.tables == 0) return;
  constexpr bool kWidened = std::is_same_v<X, std::uint16_t>;
  const std::int64_t width = padded(columns);
  T* packed = args.scratch;
  for (std::int64_t d = 0; d < args.dim; ++d) {
    std::copy_n(args.projections + d * columns, columns, packed + d * width);
    std::fill_n(packed + d * width + columns, width - columns, T{0});
  }
  T* work = packed + args.dim * width;
  const std::int64_t work_size = thread_size(args.dim, columns, kWidened, sizeof(T));
  const std::int64_t blocks = (rows + kBlock - 1) / kBlock;
  const std::int64_t grain = kGrain / std::max<std::int64_t>(kBlock * args.dim * width, 1) + 1;
  const std::int64_t groups = (blocks + grain - 1) / grain;
  parallel_for_each(groups, [&](std::int64_t group, int thread) {
    T* mine = work + thread * work_size;
    Block<T> block{};
    block.dim = args.dim;
    block.projections = packed;
    block.columns = width;
    block.signs = reinterpret_cast<std::uint8_t*>(mine);  // NOLINT: scratch is bytes here
    T* wide = mine + work_size - (kWidened ? kBlock * padded(args.dim) : 0);
    std::int64_t taken[kBlock];
    const auto flush = [&] {
      form(block);
      for (std::int64_t r = 0; r < block.count; ++r) {
        const std::uint8_t* signs = block.signs + r * sign_bytes(width);
        const std::int64_t at = taken[r] * args.tables;
        if (args.bits <= 8) {
          write_small(signs, args.tables, args.bits, args.small + at);
        } else {
          write_large(signs, args.tables, args.bits, args.large + at);
        }
      }
      block.count = 0;
    };
    const std::int64_t end = std::min(rows, (group + 1) * grain * kBlock);
    std::int64_t row = group * grain * kBlock;
    std::int64_t outer = row / args.inner;
    std::int64_t inner = row % args.inner;
    while (row < end) {
      const std::int64_t stop = std::min(args.inner, inner + end - row);
      const std::int64_t live = args.lengths == nullptr ? stop : std::clamp(args.lengths[outer], inner, stop);
      for (; inner < live; ++inner, ++row) {
        const X* from = args.x + outer * args.outer_stride + inner * args.inner_stride;
        if constexpr (kWidened) {
          T* to = wide + block.count * padded(args.dim);
          for (std::int64_t d = 0; d < args.dim; ++d) to[d] = bfloat16_to_float(from[d]);
          block.rows[block.count] = to;
        } else {
          block.rows[block.count] = from;
        }
        taken[block.count++] = row;
        if (block.count == kBlock) flush();
      }
      const std::int64_t dead = (stop - inner) * args.tables;
      if (args.bits <= 8) {
        std::fill_n(args.small + row * args.tables, dead, std::uint8_t{0});
      } else {
        std::fill_n(args.large + row * args.tables, dead, std::int64_t{0});
      }
      row += stop - inner;
      inner = 0;
      ++outer;
    }
    if (block.count > 0) flush();
  });
}

}  // namespace

template <class T>
void signs_scalar(const Block<T>& block) noexcept {
  for (std::int64_t r = 0; r < block.count; ++r) {
    std::uint8_t* signs = block.signs + r * sign_bytes(block.columns);
    for (std::int64_t h = 0; h < block.columns; h += kLanes) {
      T sum[kLanes]{};
      for (std::int64_t d = 0; d < block.dim; ++d) {
        const T x = block.rows[r][d];
        const T* projection = block.projections + d * block.columns + h;
        for (std::int64_t i = 0; i < kLanes; ++i) sum[i] = std::fma(x, projection[i], sum[i]);
      }
      unsigned bits = 0;
      for (std::int64_t i = 0; i < kLanes; ++i) bits |= static_cast<unsigned>(sum[i] > T{0}) << i;
      signs[h / 8] = static_cast<std::uint8_t>(bits);
      signs[h / 8 + 1] = static_cast<std::uint8_t>(bits >> 8);
    }
  }
}

std::int64_t scratch_size(std::int64_t dim, std::int64_t columns, bool widened) noexcept {
  return dim * padded(columns) + max_threads() * thread_size(dim, columns, widened, sizeof(float));
}

void run(const Args<float, float>& args) noexcept { run_with(args, kSigns.pick()); }
void run(const Args<std::uint16_t, float>& args) noexcept { run_with(args, kSigns.pick()); }
void run(const Args<double, double>& args) noexcept { run_with(args, signs_scalar<double>); }

}  // namespace recfast::simhash
