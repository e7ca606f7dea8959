#include "embedding_bag/embedding_bag.h"

#if defined(__x86_64__)
// GCC 12 takes the undefined registers of its own header for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <limits>

#include "embedding_bag/gradient.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")

namespace recfast::embedding_bag {
namespace {

#include "embedding_bag/resolver.h"

#include "embedding_bag/bag_kernels.h"

struct Vector {
  using Real = float;
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMostRegs = 8;

  static __mmask16 mask(int count) noexcept { return static_cast<__mmask16>((1u << count) - 1u); }
  static Reg zero() noexcept { return _mm512_setzero_ps(); }
  static Reg set(float x) noexcept { return _mm512_set1_ps(x); }
  static Reg add(Reg a, Reg b) noexcept { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) noexcept { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) noexcept { return _mm512_fmadd_ps(a, b, c); }
  static Reg div(Reg a, Reg b) noexcept { return _mm512_div_ps(a, b); }
  static void store(float* p, Reg x) noexcept { _mm512_storeu_ps(p, x); }
  static void store_part(float* p, Reg x, int count) noexcept { _mm512_mask_storeu_ps(p, mask(count), x); }
  static float half(std::uint16_t bits) noexcept { return _cvtsh_ss(bits); }

  // Whether `count` ids all lie in [0, highest].
  static bool inside(const std::int64_t* ids, std::int64_t count, std::int64_t highest) noexcept {
    const __m512i limit = _mm512_set1_epi64(highest);
    unsigned wrong = highest < 0 ? 1 : 0;
    for (; count > 0; count -= 8, ids += 8) {
      const auto lanes = static_cast<__mmask8>(count >= 8 ? 0xFFu : (1u << count) - 1u);
      wrong |= _mm512_mask_cmpgt_epu64_mask(lanes, _mm512_maskz_loadu_epi64(lanes, ids), limit);
    }
    return wrong == 0;
  }
  static bool inside(const std::int32_t* ids, std::int64_t count, std::int32_t highest) noexcept {
    const __m512i limit = _mm512_set1_epi32(highest);
    unsigned wrong = highest < 0 ? 1 : 0;
    for (; count > 0; count -= 16, ids += 16) {
      const auto lanes = static_cast<__mmask16>(count >= 16 ? 0xFFFFu : (1u << count) - 1u);
      wrong |= _mm512_mask_cmpgt_epu32_mask(lanes, _mm512_maskz_loadu_epi32(lanes, ids), limit);
    }
    return wrong == 0;
  }

  template <class C>
  static auto raw(const std::uint8_t* p) noexcept {
    if constexpr (C::kBits == 32) {
      return _mm512_loadu_si512(p);
    } else if constexpr (C::kBits == 16) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    } else {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    }
  }

  // The first `bytes` bytes of a group, `before` bytes after the row's beginning. A masked load reads no others, but it
  // waits for their line, so short codes are read with what lies before them instead.
  template <class C>
  static auto raw_part(const std::uint8_t* p, int bytes, std::int64_t before) noexcept {
    if constexpr (C::kBits == 32) {
      return _mm512_maskz_loadu_epi32(mask(bytes / 4), p);
    } else if constexpr (C::kBits == 16) {
      return _mm256_maskz_loadu_epi16(mask(bytes / 2), p);
    } else if (before + bytes >= 16) {
      const __m128i shift = _mm_add_epi8(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                         _mm_set1_epi8(static_cast<char>(16 - bytes)));
      const __m128i ending = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + bytes - 16));
      return _mm_maskz_shuffle_epi8(mask(bytes), ending, shift);
    } else if (before + bytes >= 8 && bytes <= 8) {
      const auto ending = read_at<std::uint64_t>(p + bytes - 8) >> (64 - 8 * bytes);
      return _mm_cvtsi64_si128(static_cast<std::int64_t>(ending));
    } else {
      return _mm_maskz_loadu_epi8(mask(bytes), p);
    }
  }

  // The values of all codes of 4 or 2 bits.
  template <class C>
  static Reg values() noexcept {
    if constexpr (C::kBits == 4 && C::kHeader == Header::kStep) {
      return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    } else if constexpr (C::kBits == 4) {
      return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    } else if constexpr (C::kHeader == Header::kStep) {
      return _mm512_setr4_ps(0, 1, -2, -1);
    } else {
      return _mm512_setr4_ps(0, 1, 2, 3);
    }
  }

  template <class C, class Raw>
  static void expand(Raw raw, Reg (&x)[C::kPer]) noexcept {
    if constexpr (C::kFormat == Format::kFloat32) {
      x[0] = _mm512_castsi512_ps(raw);
    } else if constexpr (C::kFormat == Format::kBFloat16) {
      x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    } else if constexpr (C::kFormat == Format::kFloat16) {
      x[0] = _mm512_cvtph_ps(raw);
    } else if constexpr (C::kFormat == Format::kFloat8) {
      // As float16 bits a code is 2^-8 of its value; only the NaN code has no such form.
      const __m256i wide = _mm256_cvtepu8_epi16(raw);
      const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7F));
      const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(wide, magnitude), 8);
      const Reg value = _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7)));
      const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7F));
      x[0] = _mm512_mask_mov_ps(_mm512_mul_ps(value, set(256.0f)), nan, set(__builtin_nanf("")));
    } else if constexpr (C::kFormat == Format::kInt8) {
      x[0] = _mm512_cvtepi32_ps(C::kHeader == Header::kStep ? _mm512_cvtepi8_epi32(raw) : _mm512_cvtepu8_epi32(raw));
    } else {  // the permutation reads the low four bits of each lane; of 2-bit codes every table repeats
      const __m512i bytes = _mm512_cvtepu8_epi32(raw);
      x[0] = _mm512_permutexvar_ps(bytes, values<C>());
      for (int k = 1; k < C::kPer; ++k) {
        x[k] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, static_cast<unsigned>(k * C::kBits)), values<C>());
      }
    }
  }

  static Reg low_pairs(Reg a, Reg b) noexcept {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Reg high_pairs(Reg a, Reg b) noexcept {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static void interleave(Reg (&)[1]) noexcept {}
  static void interleave(Reg (&x)[2]) noexcept {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const Reg first = _mm512_permutex2var_ps(x[0], low, x[1]);
    x[1] = _mm512_permutex2var_ps(x[0], high, x[1]);
    x[0] = first;
  }
  static void interleave(Reg (&x)[4]) noexcept {
    const Reg low01 = _mm512_unpacklo_ps(x[0], x[1]);
    const Reg high01 = _mm512_unpackhi_ps(x[0], x[1]);
    const Reg low23 = _mm512_unpacklo_ps(x[2], x[3]);
    const Reg high23 = _mm512_unpackhi_ps(x[2], x[3]);
    const Reg r0 = low_pairs(low01, low23);  // lane l: the four columns of byte 4 l
    const Reg r1 = high_pairs(low01, low23);   // of byte 4 l + 1
    const Reg r2 = low_pairs(high01, high23);
    const Reg r3 = high_pairs(high01, high23);
    const Reg a = _mm512_shuffle_f32x4(r0, r1, 0x44);
    const Reg b = _mm512_shuffle_f32x4(r2, r3, 0x44);
    const Reg c = _mm512_shuffle_f32x4(r0, r1, 0xEE);
    const Reg d = _mm512_shuffle_f32x4(r2, r3, 0xEE);
    x[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    x[1] = _mm512_shuffle_f32x4(a, b, 0xDD);
    x[2] = _mm512_shuffle_f32x4(c, d, 0x88);
    x[3] = _mm512_shuffle_f32x4(c, d, 0xDD);
  }
};

}  // namespace

void bags_avx512(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  bags<Vector>(args, first, last, error);
}

void decode_avx512(const Table& table, const std::uint8_t* row, std::int64_t column, std::int64_t count,
                   float* out) noexcept {
  pick_decode<Vector>(table)(table, row, column, count, out);
}

void weights_avx512(const Args& args, const void* grad, void* out, std::int64_t first, std::int64_t last) noexcept {
  pick_dots<Vector>(args.table)(args, grad, out, first, last);
}

}  // namespace recfast::embedding_bag

#pragma GCC pop_options
#endif
