// sdim_table, sdim_attention and both at once (sdim_history_attention): attention over a long history by hash
// collisions (SDIM).
//
//   table[u, j, b] = start[u, j, b] + sum_{l of user u: code[l, j] = b} v_l        j < M, b < 2^bits
//   out[c]         = 1/M sum_j n(table[u, j, qcode[c, j]])                         u: the user of candidate c
//   n(x)           = x / |x| where |x| > kEpsilon, else 0; or n(x) = x
//
// The table does not know the candidates: it is built once a user and shared by all. Gradients (the codes have none):
//   dv_l           = sum_j dtable[u, j, code[l, j]],   dstart = dtable
//   dtable[u, j, b] = 1/M sum_{c: qcode[c, j] = b} (g_c - n (n . g_c)) / |x|       or sum g_c / M where n(x) = x;
//                    0 where |x| <= kEpsilon
//
// Shapes       codes [T, M], values [T, Dv], qcodes [Nc, M] (rows may be strided), table [B, M, 2^bits, Dv] contiguous
//              user b: value rows value_begin[b] + l, code rows code_begin[b] + l, 0 <= l < prefix[b + 1] - prefix[b];
//              candidates[b] <= c < candidates[b + 1] (null: c = b)
// Dtypes       codes uint8; values float32, bfloat16 (widened, exact) or float64; the table sums in float32 for the
//              first two, float64 for the last; attention reads float32, bfloat16 or float64 tables and answers in
//              kind, with float32 arithmetic for the first two
// Accumulator  that type. Buckets add their events in the order of l, starting from `start`: a table that is continued
//              equals one built anew bit by bit. Sums over tables run in the order of j, over candidates in that of c,
//              those over Dv in kLanes partial sums. No FMA: equal bits on every instruction set, whatever the number
//              of threads and the rest of the batch
// Rounding     a bucket of n events: at most n eps sum |v|; attention: (Dv + M + 8) eps sum_j |n_j|
// Errors       a code outside [0, 2^bits) is found in the pass; its flat position (row * M + j) is returned, else -1
// Limits       1 <= bits <= 8; |x| below 1e19 where it is normalised (its square must be a float)
// Source       Cao et al., "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction",
//              CIKM 2022, arXiv 2205.10249
#pragma once

#include <cstdint>

#include "common/arena.h"
#include "common/span.h"

namespace recfast::sdim_attention {

inline constexpr double kEpsilon = 1e-12;

struct Shape {
  std::int64_t users = 0;
  std::int64_t tables = 0;
  std::int64_t bits = 0;
  std::int64_t width = 0;  // Dv

  [[nodiscard]] std::int64_t buckets() const noexcept { return std::int64_t{1} << bits; }
  [[nodiscard]] std::int64_t table_size() const noexcept { return buckets() * width; }      // of one hash
  [[nodiscard]] std::int64_t user_size() const noexcept { return tables * table_size(); }  // of all
};

// Whose events lie where.
struct Events {
  Rows<const std::uint8_t> codes;
  const std::int64_t* code_begin = nullptr;
  const std::int64_t* value_begin = nullptr;
  const std::int64_t* prefix = nullptr;  // [B + 1], from 0

  [[nodiscard]] std::int64_t length(std::int64_t user) const noexcept { return prefix[user + 1] - prefix[user]; }
};

// Stored: float, double, or std::uint16_t for the bits of bfloat16. T: the type of the sums.
template <class Stored, class T>
struct TableArgs {
  Shape shape;
  Events events;
  Rows<const Stored> values;
  const T* start = nullptr;  // [B, M, 2^bits, Dv], or null: zeros
  T* table = nullptr;
};

template <class Stored, class T>
struct TableGradient {
  Shape shape;
  Events events;  // value_begin: of dvalues
  const T* dtable = nullptr;
  Rows<Stored> dvalues;  // rows outside every history are left alone
};

template <class Stored, class T>
struct Lookup {
  Shape shape;
  Rows<const std::uint8_t> codes;  // [Nc, M]
  const Stored* table = nullptr;
  const std::int64_t* candidates = nullptr;
  bool normalize = true;
  Stored* out = nullptr;  // [Nc, Dv]
  T* scratch = nullptr;   // lookup_scratch(shape) values
};

template <class Stored, class T>
struct LookupGradient {
  Shape shape;
  Rows<const std::uint8_t> codes;
  const Stored* table = nullptr;
  const std::int64_t* candidates = nullptr;
  bool normalize = true;
  Rows<const T> grad;  // [Nc, Dv]
  T* dtable = nullptr;
};

// The first wrong code of events and of candidates, or -1.
struct Faults {
  std::int64_t codes = -1;
  std::int64_t query = -1;
};

// Table and attention at once: the table of a user stays in scratch, and of a user with a single candidate only the M
// rows that it asks for are summed. Equal to `build` and `lookup` (and their gradients) bit by bit.
template <class Stored, class T>
struct Direct {
  Shape shape;
  Events events;
  Rows<const Stored> values;
  Rows<const std::uint8_t> query;  // [Nc, M]
  const std::int64_t* candidates = nullptr;
  bool normalize = true;
  T* out = nullptr;      // [Nc, Dv]
  Rows<const T> grad;    // [Nc, Dv], for backward like the next two
  Rows<Stored> dvalues;  // rows outside every history are left alone
  const std::int64_t* dvalue_begin = nullptr;
  T* scratch = nullptr;   // direct_scratch(shape) values
  std::int64_t cuts = 1;  // set by the kernel: passes over a history in which its tables are filled
};

[[nodiscard]] std::int64_t direct_scratch(const Shape& shape) noexcept;
// A user's events stay on one thread.
template <class Stored, class T>
[[nodiscard]] Faults direct(const Direct<Stored, T>& args) noexcept;
// The codes must have passed `direct`.
template <class Stored, class T>
void direct_backward(const Direct<Stored, T>& args) noexcept;

template <class Stored, class T>
[[nodiscard]] std::int64_t build(const TableArgs<Stored, T>& args) noexcept;
template <class Stored, class T>
void build_backward(const TableGradient<Stored, T>& args) noexcept;

[[nodiscard]] std::int64_t lookup_scratch(const Shape& shape) noexcept;
template <class Stored, class T>
[[nodiscard]] std::int64_t lookup(const Lookup<Stored, T>& args) noexcept;
// The codes must have passed `lookup`.
template <class Stored, class T>
void lookup_backward(const LookupGradient<Stored, T>& args) noexcept;

// --- what the forms share ---

// Tables [first, last) of user `user`; returns the first wrong code's position or -1.
template <class Stored, class T>
using Build = std::int64_t(const TableArgs<Stored, T>&, std::int64_t user, std::int64_t first,
                           std::int64_t last) noexcept;
// Events [first, last) of one user.
template <class Stored, class T>
using BuildBackward = void(const TableGradient<Stored, T>&, std::int64_t user, std::int64_t first,
                           std::int64_t last) noexcept;
// Candidates [first, last) of one user; `scales` [M * (2^bits + 1)] is scratch.
template <class Stored, class T>
using Look = std::int64_t(const Lookup<Stored, T>&, std::int64_t user, std::int64_t first, std::int64_t last,
                          T* scales) noexcept;
// Tables [first, last) of one user.
template <class Stored, class T>
using LookBackward = void(const LookupGradient<Stored, T>&, std::int64_t user, std::int64_t first,
                          std::int64_t last) noexcept;

// The candidates [first, last) of one user, with 2 * user_size() + M * (2^bits + 1) values of scratch.
template <class Stored, class T>
using DirectOf = Faults(const Direct<Stored, T>&, std::int64_t user, std::int64_t first, std::int64_t last,
                        T* scratch) noexcept;
template <class Stored, class T>
using DirectBackward = void(const Direct<Stored, T>&, std::int64_t user, std::int64_t first, std::int64_t last,
                            T* scratch) noexcept;

template <class Stored, class T>
struct Forms {
  Build<Stored, T>* build;
  BuildBackward<Stored, T>* build_backward;
  Look<Stored, T>* look;
  LookBackward<Stored, T>* look_backward;
  DirectOf<Stored, T>* direct;
  DirectBackward<Stored, T>* direct_backward;
};

[[nodiscard]] Forms<float, float> forms_avx2(float) noexcept;
[[nodiscard]] Forms<std::uint16_t, float> forms_avx2(std::uint16_t) noexcept;
[[nodiscard]] Forms<float, float> forms_avx512(float) noexcept;
[[nodiscard]] Forms<std::uint16_t, float> forms_avx512(std::uint16_t) noexcept;

}  // namespace recfast::sdim_attention
