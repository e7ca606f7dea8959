#include "code_trie/code_trie.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/best_list.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/status.h"

namespace recfast::code_trie {
namespace {

struct Compare {
  static std::uint32_t reaching(const float* values, float theta) noexcept {
    std::uint32_t bits = 0;
    for (int lane = 0; lane < 16; ++lane) bits |= static_cast<std::uint32_t>(values[lane] >= theta) << lane;
    return bits;
  }

  template <class Vector>
  static void fma(Vector* x, const Vector& a, const Vector& b) noexcept {
    for (int lane = 0; lane < 16; ++lane) (*x)[lane] = std::fma((*x)[lane], a[lane], b[lane]);
  }

  template <class List>
  static std::int64_t keep(List& best, std::int32_t least, std::int32_t last) noexcept {
    return best.keep_plainly(least, last);
  }
};

}  // namespace

#define RECFAST_ISA scalar
#include "code_trie/code_trie.inl"
#undef RECFAST_ISA

namespace {

template <class Logit>
constexpr IsaTable<Normalise<Logit>> kNormalise{
    .scalar = normalise_scalar,
#if defined(__x86_64__)
    .avx2 = normalise_avx2,
    .avx512 = normalise_avx512,
#endif
};

template <class Code, class Logit>
constexpr IsaTable<Select<Code, Logit>> kSelect{
    .scalar = select_scalar,
#if defined(__x86_64__)
    .avx2 = select_avx2,
    .avx512 = select_avx512,
#endif
};

[[nodiscard]] constexpr std::int64_t rounded(std::int64_t bytes) noexcept { return (bytes + 63) / 64 * 64; }

// What each batch row's selection needs.
[[nodiscard]] constexpr std::int64_t selection_bytes(std::int64_t width) noexcept {
  return rounded(8 * width + 12 * (best_capacity(width) + 16));
}

}  // namespace

std::int64_t scratch_bytes(std::int64_t batch, std::int64_t beams, std::int64_t n_codes, std::int64_t width) noexcept {
  const auto logit_row = rounded(n_codes * 4);
  return rounded(batch * beams * 4) + max_threads() * std::max(selection_bytes(width), logit_row);
}

template <class Code, class Logit>
Faults run(const Args<Code, Logit>& args) noexcept {
  const std::int64_t all = args.batch * args.beams;
  auto* z = reinterpret_cast<float*>(args.scratch);  // NOLINT: scratch has no type
  std::byte* rest = args.scratch + rounded(all * 4);
  const std::int64_t piece = std::max(selection_bytes(args.width), rounded(args.n_codes * 4));
  const auto normalise_beam = kNormalise<Logit>.pick();
  const auto select_row = kSelect<Code, Logit>.pick();
  FirstError states;
  FirstError scores;
  FirstError codes;
  FirstError logits;
  const auto one = [&](std::int64_t beam, int thread) {
    const std::int64_t state = args.states[beam];
    const float score = args.scores[beam];
    z[beam] = std::numeric_limits<float>::infinity();
    if (state < -1 || state >= args.inner) return states.report(beam);
    if (std::isnan(score) || score == std::numeric_limits<float>::infinity()) return scores.report(beam);
    if (state < 0 || score == -std::numeric_limits<float>::infinity()) return;
    const Logit* row = args.logits + beam * args.n_codes;
    const std::int64_t begin = args.first_child[state];
    const std::int64_t count = args.first_child[state + 1] - begin;
    const Code* children = args.codes + begin;
    if (count > 0 && children[count - 1] >= args.n_codes) return codes.report(beam);
    Normaliser found{};
    if (args.renormalise && count < args.n_codes) {
      auto* gathered = reinterpret_cast<Logit*>(rest + thread * piece);  // NOLINT: scratch has no type
      for (std::int64_t child = 0; child < count; ++child) gathered[child] = row[children[child]];
      found = normalise_beam(gathered, count);
    } else {
      found = normalise_beam(row, args.n_codes);
    }
    if (!found.good) {
      const auto wrong = [](float x) { return std::isnan(x) || x == std::numeric_limits<float>::infinity(); };
      const auto value = [&](std::int64_t code) {
        if constexpr (std::is_same_v<Logit, float>) return row[code];
        else return std::bit_cast<float>(static_cast<std::uint32_t>(row[code]) << 16);
      };
      const bool few = args.renormalise && count < args.n_codes;
      for (std::int64_t i = 0; i < (few ? count : args.n_codes); ++i) {
        const std::int64_t code = few ? children[i] : i;
        if (wrong(value(code))) return logits.report(beam * args.n_codes + code);
      }
    }
    z[beam] = found.z;
  };
  // Nodes lie anywhere in a large tree: what a beam reads of it is asked for some beams ahead, in two steps.
  const auto ask = [&](std::int64_t beam) {
    const auto known = [&](std::int64_t at) { return at < all && args.states[at] >= 0 && args.states[at] < args.inner; };
    if (known(beam + 16)) __builtin_prefetch(args.first_child + args.states[beam + 16]);
    if (known(beam + 8)) __builtin_prefetch(args.codes + args.first_child[args.states[beam + 8]]);
  };
  // Dealt out by blocks: a beam alone is less work than its turn.
  constexpr std::int64_t kBlock = 16;
  parallel_for_each((all + kBlock - 1) / kBlock, [&](std::int64_t block, int thread) {
    for (std::int64_t beam = block * kBlock; beam < std::min(all, (block + 1) * kBlock); ++beam) {
      ask(beam);
      one(beam, thread);
    }
  });
  const Faults faults{.states = states.position(),
                      .scores = scores.position(),
                      .codes = codes.position(),
                      .logits = logits.position()};
  if (std::max({faults.states, faults.scores, faults.codes, faults.logits}) >= 0) return faults;
  parallel_for_each(args.batch, [&](std::int64_t row, int thread) {
    select_row(args, row, z + row * args.beams, rest + thread * piece);
  });
  return faults;
}

template Faults run(const Args<std::uint8_t, float>&) noexcept;
template Faults run(const Args<std::uint8_t, std::uint16_t>&) noexcept;
template Faults run(const Args<std::uint16_t, float>&) noexcept;
template Faults run(const Args<std::uint16_t, std::uint16_t>&) noexcept;

}  // namespace recfast::code_trie
