// embedding_bag: out[b] = sum of c_i * row(i) over the positions i of bag b, for tables in eight formats and for many
// tables in one call; its gradients stand in gradient.h.
//
// Formula      row(i) is the row that indices[i] stands for (lookups.h); its values are those of row_format.h
//              c_i = weights[i], or 1
//              sum   the sum of c_i * row(i);  none is the same with one id a bag
//              mean  the sum over the number of ids that stand for a row
//              max   the largest value of each column and, if asked, the position it came from; without weights. The
//                    first position wins among equals; NaN is larger than anything, the first one stays
//              A bag without rows gives zeros (argmax -1)
// Shapes       table [T, D] in rows of `stride` bytes, indices [n], offsets [B + 1] or none (then B = n), weights [n]
//              or none, out [B, D], argmax [B, D] or none; all but the table contiguous
// Dtypes       table in any format; out and weights float64 for a float64 table, else float32; indices int32 or int64
// Accumulator  the type of out, from zero, in the order of the positions. With a header the factor step * weight is
//              rounded first; factor * code is then added by one FMA, rounded once, on every instruction set (where the
//              processor has none, the C library computes it): equal bits on all of them and for any number of threads.
//              Affine rows sum bias_i * c_i apart, rounded twice, and add it at the end; max compares scale * code
//              and then + bias, rounded apart
// Error bound  |out - exact| <= (k + 3) * eps * sum |terms| for a bag of k rows; affine: scale * code and bias are two
//              terms
// Ids outside  are found in the kernel's own pass: such a row counts as zeros (max leaves it out) and the lowest
//              position is returned. With skip_missing an id of -1 stands for nothing: no row, not counted by mean
// Reads        never beyond the last byte of a row's codes: a table may end where its page ends
// Source       EmbeddingBag: Naumov et al., "Deep Learning Recommendation Model", arXiv:1906.00091
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/row_format.h"
#include "common/status.h"
#include "embedding_bag/lookups.h"

namespace recfast::embedding_bag {

struct Table {
  const std::uint8_t* data;
  std::int64_t rows;
  std::int64_t width;   // D
  std::int64_t stride;  // bytes from one row to the next; any number that holds a row
  Format format;
  Header header;

  [[nodiscard]] const std::uint8_t* row(std::int64_t index) const noexcept { return data + index * stride; }
  // The bytes of a row that are read.
  [[nodiscard]] std::int64_t used_bytes() const noexcept {
    return code_bytes(format, width) + (header == Header::kNone ? 0 : kHeaderBytes);
  }
};

enum class Mode : int { kSum = 0, kMean = 1, kMax = 2, kNone = 3 };

struct Args {
  Table table;
  Lookups lookups;
  const void* weights;   // float, or double for a float64 table; may be null
  Mode mode;
  void* out;             // float, or double for a float64 table
  std::int32_t* argmax;  // only with max; may be null
};

// What a call may find wrong, and where: the lowest position of an id outside its table, the first wrong entry of the
// offsets or of the features' bag_splits, or the first feature whose rows do not lie in the table.
struct Status {
  enum class Kind : int { kDone, kIndex, kOffset, kSplit, kFeature } kind = Kind::kDone;
  std::int64_t position = -1;
};

// The first entry that is not 0 (at 0), falls, or (at the end) is not `total`; -1 where all is well.
[[nodiscard]] std::int64_t first_bad_offset(const std::int64_t* offsets, std::int64_t bags,
                                            std::int64_t total) noexcept;

// What is wrong with the lookups apart from the ids themselves.
[[nodiscard]] Status check_lookups(const Lookups& lookups) noexcept;

// Threaded over bags, dispatched by instruction set. Nothing is computed unless check_lookups is content.
[[nodiscard]] Status run(const Args& args) noexcept;

// The bags of piece `part` of `parts` with about as many positions as any other piece: [first, last).
struct BagRange {
  std::int64_t first;
  std::int64_t last;
};
[[nodiscard]] BagRange piece_of_bags(const Lookups& lookups, std::int64_t part, std::int64_t parts) noexcept;

// How many positions ahead rows are asked for, and into which cache. Measured on Zen 5: for tables in memory about 256
// lines should be under way, for tables in the last cache 32 positions will do, and the first cache is the better place
// by 1.0 to 1.4 times; on Zen 4 the second cache was the better one for tables in memory by up to 2.9 times.
enum class Hint { kNear, kFar };
struct Ahead {
  std::int64_t positions;
  Hint hint;
};
[[nodiscard]] Ahead choose_ahead(std::int64_t table_bytes, std::int64_t row_bytes) noexcept;

// The forms behind it, one thread each, for bags [first, last).
using Form = void(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept;
Form bags_scalar, bags_avx2, bags_avx512;

// Columns [column, column + count) of a row as floats; `column` is a multiple of 64. Not for float64.
using DecodeForm = void(const Table& table, const std::uint8_t* row, std::int64_t column, std::int64_t count,
                        float* out) noexcept;
DecodeForm decode_scalar, decode_avx2, decode_avx512;
[[nodiscard]] DecodeForm* decoder() noexcept;

// Rows [0, T) as floats [T, D]; threaded. Not for float64.
void dequantize(const Table& table, float* out) noexcept;

}  // namespace recfast::embedding_bag
