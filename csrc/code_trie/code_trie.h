// code_trie_step: one level of a beam search over a prefix tree of codes.
//
//   s(b, w, c) = score[b, w] + (x[b, w, c] - z[b, w]),   z = log sum_c' exp x[b, w, c']
//   the `width` best of all c that continue the prefix of beam w, over all beams w of b
//
// z            over all K codes (the model's own distribution), or over those that continue the prefix (`renormalise`)
// Tree         nodes of one level after the other, in the order of their prefixes: the children of node v are the nodes
//              first_child[v] .. first_child[v + 1] - 1, their codes strictly rising; node 0 is the root
// Shapes       first_child [V + 1] for the V nodes above the leaves; codes [nodes]; states [B, W], -1 for a dead beam;
//              x [B, W, K]; score [B, W], -inf for a dead beam; out [B, width]; contiguous
// Dtypes       first_child int32; codes uint8 or uint16; x float32 or the bits of bfloat16 (widened, exact); else
//              float32 and int64
// Rounding     exp to 2 ulp, by FMA on every set; 16 partial sums (term i goes to sum i mod 16), added in halves;
//              z = float(double(max) + log(double(sum))); difference and sum rounded apart. The bits are equal on every
//              instruction set. |z - exact| <= (K / 16 + 8) eps + eps |z| / 2
// Order        s descending, ties by lowest w, then lowest code; never depends on threads, B, or other batch rows
// Left out     s = -inf
// Padding      state -1, code 0, score -inf, parent 0: states tell, parents and codes stay valid indices
// Limits       W K < 2^31; states in [-1, V); codes of the children below K; no NaN in scores, none and no +inf in x
//              where it is read: dead beams are not, nor, with `renormalise`, what does not continue a prefix
// Source       the tree as flat arrays: STATIC, arXiv 2602.22647
#pragma once

#include <cstddef>
#include <cstdint>

namespace recfast::code_trie {

template <class Code, class Logit>
struct Args {
  const std::int32_t* first_child = nullptr;
  const Code* codes = nullptr;
  const std::int64_t* states = nullptr;
  const Logit* logits = nullptr;
  const float* scores = nullptr;
  std::byte* scratch = nullptr;  // scratch_bytes(...), 64-byte aligned
  std::int64_t* out_states = nullptr;
  std::int64_t* out_codes = nullptr;
  float* out_scores = nullptr;
  std::int64_t* out_parents = nullptr;
  std::int64_t inner = 0;        // V
  std::int64_t batch = 0;
  std::int64_t beams = 0;        // W
  std::int64_t n_codes = 0;      // K
  std::int64_t width = 0;
  bool renormalise = false;
};

// Flat positions of the first value that breaks a limit, or -1; then the outputs mean nothing.
struct Faults {
  std::int64_t states;
  std::int64_t scores;
  std::int64_t codes;   // a beam with a child whose code is K or more
  std::int64_t logits;
};

[[nodiscard]] std::int64_t scratch_bytes(std::int64_t batch, std::int64_t beams, std::int64_t n_codes,
                                         std::int64_t width) noexcept;

// Threaded over beams, then over batch rows.
template <class Code, class Logit>
[[nodiscard]] Faults run(const Args<Code, Logit>& args) noexcept;

// What the instruction sets do: z of one beam, and the selection for one batch row.
struct Normaliser {
  float z;
  bool good;
};

template <class Logit>
using Normalise = Normaliser(const Logit* logits, std::int64_t count);

template <class Code, class Logit>
using Select = void(const Args<Code, Logit>& args, std::int64_t row, const float* z, std::byte* scratch);

#define RECFAST_TRIE_FORMS(isa)                                                                                  \
  Normaliser normalise_##isa(const float*, std::int64_t) noexcept;                                               \
  Normaliser normalise_##isa(const std::uint16_t*, std::int64_t) noexcept;                                       \
  void select_##isa(const Args<std::uint8_t, float>&, std::int64_t, const float*, std::byte*) noexcept;          \
  void select_##isa(const Args<std::uint8_t, std::uint16_t>&, std::int64_t, const float*, std::byte*) noexcept;  \
  void select_##isa(const Args<std::uint16_t, float>&, std::int64_t, const float*, std::byte*) noexcept;         \
  void select_##isa(const Args<std::uint16_t, std::uint16_t>&, std::int64_t, const float*, std::byte*) noexcept;

RECFAST_TRIE_FORMS(scalar)
RECFAST_TRIE_FORMS(avx2)
RECFAST_TRIE_FORMS(avx512)
#undef RECFAST_TRIE_FORMS

}  // namespace recfast::code_trie
