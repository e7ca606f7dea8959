// negatives_loss: the loss of rows, each with one positive and many negatives, without a matrix of their scores.
//
//   z_ij   = scale <q_i, w_j> + bias_j            q, w at length 1 where asked for: x / max(|x|, kSmallestNorm)
//   z_ij  -= log_expected_j                       negatives alone
//   N_i    = the columns of row i that count, K_i their number: not its positive (skip_positive), not excluded
//
//   kSoftmax      L_i = ln(e^z_ip + sum_N e^z_ij) - z_ip
//   kContrastive  L_i = 1 - z_ip + weight / K_i sum_N max(0, z_ij - margin);   with clamp: max(0, 1 - z_ip) + ...
//   kPairwise     L_i = weight / K_i sum_N softplus(z_ij - z_ip)
//   kBinary       L_i = positive_weight softplus(-z_ip) + weight / K_i sum_N softplus(z_ij)
//
// Columns      kAll: table rows from `first` on; kShared: one list of K ids; kPrivate: a list of K ids for each row.
// Shapes       queries [M, D], table [N, D] (rows may be strided), positives [M], negatives [K] or [M, K], bias [N],
//              log_expected [K] or [M, K]; loss [M], statistic [3, M], direction [M, D]
// Dtypes       float32, float64 or bfloat16 for queries, table and its gradient; all else in T: float64 with float64,
//              else float32; ids int64
// Memory       beside inputs and outputs: a few padded copies of queries, of the shared columns' rows (K D) and of what
//              there is once a row or once a column; a tile of scores a thread. kContrastive keeps one bit a pair.
// Plan         Queries are turned once, so that they are the lanes of vectors. Forward streams tiles of columns past
//              blocks of queries: scores, the online softmax (or the sums of the others), and, for a gradient,
//              dL_i/dq_i on the way (`direction`), which backward multiplies by the gradient of L_i. Backward computes
//              the scores of a tile again for the gradient of its rows; kContrastive reads its bits instead.
//              kPrivate gathers each row once forward; backward sorts the pairs by id, reads each row once and
//              multiplies it with its queries, which stay in cache.
// Accumulator  T. Every sum runs in one fixed order: over D, over the columns of a tile and the tiles (forward), over
//              the rows (gradient of a column), over the columns of an id, then its positives. Nothing depends on the
//              number of threads, and row i's loss not on the other rows. AVX2 and AVX-512 use FMA, the scalar form
//              does not, and the forms sum norms and private products in vectors of their own width:
//              |error of z| <= (D + 6) eps |scale| sum_d |q_d w_d|, and z enters a loss with slope at most 1 (weight).
// Limits       N < 2^31, M K < 2^31 for kPrivate; ids have been checked
// Sources      Bengio and Senecal 2008 (sampled softmax); Rendle et al., "BPR", UAI 2009; Mao et al., "SimpleX", CIKM
//              2021 (kContrastive); Petrov and Macdonald, "gSASRec", RecSys 2023 (weights of kBinary); Milakov and
//              Gimelshein, "Online normalizer calculation for softmax", 2018
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/arena.h"
#include "common/span.h"

namespace recfast::negatives_loss {

enum class Loss : std::int64_t { kSoftmax = 0, kContrastive = 1, kPairwise = 2, kBinary = 3 };
enum class Columns : std::int64_t { kAll = 0, kShared = 1, kPrivate = 2 };

// Shorter vectors have no direction: their gradient is 0.
inline constexpr double kSmallestNorm = 1e-12;

// What one computes in over rows of S (std::uint16_t: bfloat16).
template <class S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;
template <class T>
using Id = std::conditional_t<std::is_same_v<T, double>, std::int64_t, std::int32_t>;

template <class S>
struct Args {
  using T = Arithmetic<S>;
  Loss loss;
  Columns form;
  std::int64_t columns;  // K
  std::int64_t first;    // kAll: the id of column 0
  std::int64_t tile;     // columns that are scored together
  Rows<const S> queries;
  Rows<const S> table;
  const std::int64_t* positives;
  const std::int64_t* negatives;
  const T* bias;          // null: zeros, like the next
  const T* log_expected;
  // Row i leaves out excluded[exclude_offsets[i] : exclude_offsets[i + 1]], ascending: columns, or ids for kPrivate.
  const std::int64_t* excluded;
  const std::int64_t* exclude_offsets;
  bool normalize_queries;
  bool normalize_table;
  bool skip_positive;
  bool clamp;
  T scale;
  T margin;
  T weight;
  T positive_weight;
  T* losses;        // [M]
  T* statistic;     // [3, M]: log of the softmax's denominator, or weight / K_i; z_ip; dL_i/dz_ip
  T* direction;     // [M, D], null: no gradient is wanted
  // One bit a pair above the margin, kContrastive with a gradient alone: [K, words(M)], kPrivate [M, words(K)].
  std::uint16_t* active;
  T* scratch;

  [[nodiscard]] std::int64_t rows() const noexcept { return queries.rows; }
  [[nodiscard]] std::int64_t dim() const noexcept { return queries.width; }
};

// Sixteen bits of `active` are a word.
[[nodiscard]] constexpr std::int64_t words(std::int64_t size) noexcept { return (size + 15) / 16; }

// The contributions to the gradients of table rows, grouped by id: entry order[e] for e in [starts[r], starts[r + 1])
// belongs to row ids[r]; ids ascend. Entries are numbered: pairs (kPrivate) or columns (kShared), then the positives.
struct Groups {
  std::uint32_t* order;
  std::uint32_t* starts;
  std::int64_t* ids;
  std::int64_t runs;
};

template <class S>
struct Gradients {
  using T = Arithmetic<S>;
  const T* losses;  // [M]
  S* table;         // dense [N, D] (zeros outside the groups have been written), or sparse [runs, D]
  bool sparse;
  T* bias;          // [N] zeros, or null
  Groups groups;
};

template <class S>
[[nodiscard]] std::int64_t forward_scratch(const Args<S>& args) noexcept;
template <class S>
[[nodiscard]] std::int64_t backward_scratch(const Args<S>& args) noexcept;

template <class S>
void forward(const Args<S>& args) noexcept;
template <class S>
void backward(const Args<S>& args, const Gradients<S>& gradients) noexcept;

// How many contributions there are, bytes of scratch to group them, and the grouping.
template <class S>
[[nodiscard]] std::int64_t entries(const Args<S>& args) noexcept;
[[nodiscard]] std::int64_t group_scratch(std::int64_t entries, std::int64_t table_rows) noexcept;
template <class S>
[[nodiscard]] std::int64_t group(const Args<S>& args, std::int64_t entries, const Groups& groups,
                                 std::uint64_t* scratch) noexcept;

// --- what the forms share ---

// Queries that go past a tile together.
inline constexpr std::int64_t kBlock = 64;
// Columns of a private list that are scored together.
inline constexpr std::int64_t kChunk = 128;

// Blocks of queries of even size, whole lanes each.
struct Blocks {
  std::int64_t groups;
  std::int64_t count;

  explicit Blocks(std::int64_t rows) noexcept
      : groups((rows + kLanes - 1) / kLanes), count((groups * kLanes + kBlock - 1) / kBlock) {}
  [[nodiscard]] std::int64_t first(std::int64_t block) const noexcept { return groups * block / count * kLanes; }
};

// What is made once a call, from which all threads read. Rows and widths are padded.
template <class T>
struct Prepared {
  T* rows;        // scale q  [Mp, Dp]
  T* turned;      // the same, a block after the other, each [Dp, lanes]
  T* inverse;     // 1 / |q|, or 1  [Mp]
  Id<T>* positive;  // [Mp], -1 where it does not matter
  T* own;         // z_ip  [Mp]
  T* high;        // softmax: highest score so far; backward: log of the denominator
  T* sum;         // sum so far; backward: gradient of the loss, times weight / K_i
  T* count;       // columns that count
  T* slope;       // kPairwise: sum of the sigmoids
  T* along;       // sum_j c_ij w_j  [Mp, Dp], forward with a gradient alone
  T* gathered;    // kShared: rows of the columns [K, Dp]
  T* dgathered;   // kShared backward: their gradients [K, Dp]
  T* dbias;       // kShared backward: those of their biases [K]
  T* factor;      // 1 / |w| or 1, a column each [K]; not for kPrivate, like the next two
  T* addend;      // bias - log_expected
  Id<T>* ids;

  template <class S>
  Prepared(Arena<T>& arena, const Args<S>& args, bool backward) noexcept {
    const std::int64_t m = padded(args.rows());
    const std::int64_t d = padded(args.dim());
    const std::int64_t k = args.form == Columns::kPrivate ? 0 : args.columns;
    const std::int64_t shared = args.form == Columns::kShared ? args.columns : 0;
    rows = arena.take(m * d);
    turned = arena.take(args.form == Columns::kPrivate ? 0 : m * d);
    inverse = arena.take(m);
    positive = reinterpret_cast<Id<T>*>(arena.take(m));
    own = arena.take(m);
    high = arena.take(m);
    sum = arena.take(m);
    count = arena.take(m);
    slope = arena.take(m);
    along = arena.take(!backward && args.direction != nullptr ? m * d : 0);
    gathered = arena.take(shared * d);
    dgathered = arena.take(backward ? shared * d : 0);
    dbias = arena.take(backward ? shared : 0);
    factor = arena.take(k);
    addend = arena.take(k);
    ids = reinterpret_cast<Id<T>*>(arena.take(k));
  }
};

// One thread's working memory.
template <class T>
struct Work {
  T* scores;    // [tile, kBlock], kPrivate [kChunk]
  T* columns;   // table rows, widened: [tile, Dp], kPrivate [kChunk, Dp]
  T* dcolumns;  // gradients of a tile's rows [tile, Dp]
  T* row;       // [Dp]
  T* other;     // [Dp]
  T* lanes;     // [max(tile, kBlock), kLanes]

  template <class S>
  Work(Arena<T>& arena, const Args<S>& args, bool backward) noexcept {
    const std::int64_t d = padded(args.dim());
    const bool own_lists = args.form == Columns::kPrivate;
    const std::int64_t tile = own_lists ? kChunk : args.tile;
    scores = arena.take(own_lists ? 2 * kChunk : tile * kBlock);
    columns = arena.take(tile * d);
    dcolumns = arena.take(backward && !own_lists ? tile * d : 0);
    row = arena.take(d);
    other = arena.take(d);
    lanes = arena.take(std::max(tile, kBlock) * kLanes);
  }
};

// One form of the kernel: an instruction set and a type of rows.
template <class S>
struct Form {
  using T = Arithmetic<S>;
  // Queries and positives of block `block`; columns [first, last).
  void (*prepare_queries)(const Args<S>&, const Prepared<T>&, const Work<T>&, std::int64_t block) noexcept;
  void (*prepare_columns)(const Args<S>&, const Prepared<T>&, const Work<T>&, std::int64_t first,
                          std::int64_t last) noexcept;
  // All columns past blocks [first, last); what backward needs of the statistic, for those blocks; all rows of a tile.
  void (*forward)(const Args<S>&, const Prepared<T>&, const Work<T>&, std::int64_t first, std::int64_t last) noexcept;
  void (*begin_backward)(const Args<S>&, const Gradients<S>&, const Prepared<T>&) noexcept;
  void (*backward)(const Args<S>&, const Gradients<S>&, const Prepared<T>&, const Work<T>&, std::int64_t tile) noexcept;
  // kShared: groups [first, last) summed and put away.
  void (*join)(const Args<S>&, const Gradients<S>&, const Prepared<T>&, const Work<T>&, std::int64_t first,
               std::int64_t last) noexcept;
  // kPrivate: rows [first, last); groups [first, last).
  void (*forward_private)(const Args<S>&, const Prepared<T>&, const Work<T>&, std::int64_t first,
                          std::int64_t last) noexcept;
  void (*backward_private)(const Args<S>&, const Gradients<S>&, const Prepared<T>&, const Work<T>&, std::int64_t first,
                           std::int64_t last) noexcept;
};

template <class S>
[[nodiscard]] Form<S> form_avx2() noexcept;
template <class S>
[[nodiscard]] Form<S> form_avx512() noexcept;

}  // namespace recfast::negatives_loss
