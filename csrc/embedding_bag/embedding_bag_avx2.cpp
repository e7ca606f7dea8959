#include "embedding_bag/embedding_bag.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "embedding_bag/gradient.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace recfast::embedding_bag {
namespace {

#include "embedding_bag/resolver.h"

#include "embedding_bag/bag_kernels.h"

struct Vector {
  using Real = float;
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kMostRegs = 8;

  static __m256i mask(int count) noexcept {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg zero() noexcept { return _mm256_setzero_ps(); }
  static Reg set(float x) noexcept { return _mm256_set1_ps(x); }
  static Reg add(Reg a, Reg b) noexcept { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) noexcept { return _mm256_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) noexcept { return _mm256_fmadd_ps(a, b, c); }
  static Reg div(Reg a, Reg b) noexcept { return _mm256_div_ps(a, b); }
  static void store(float* p, Reg x) noexcept { _mm256_storeu_ps(p, x); }
  static void store_part(float* p, Reg x, int count) noexcept { _mm256_maskstore_ps(p, mask(count), x); }
  static float half(std::uint16_t bits) noexcept { return _cvtsh_ss(bits); }

  // Whether `count` ids all lie in [0, highest]. An id outside has a sign of its own, or highest - id has one.
  static bool inside(const std::int64_t* ids, std::int64_t count, std::int64_t highest) noexcept {
    const __m256i limit = _mm256_set1_epi64x(highest);
    __m256i signs = _mm256_setzero_si256();
    std::int64_t sign = highest;
    std::int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      const __m256i id = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids + i));
      signs = _mm256_or_si256(signs, _mm256_or_si256(id, _mm256_sub_epi64(limit, id)));
    }
    for (; i < count; ++i) sign |= ids[i] < 0 ? -1 : highest - ids[i];
    return sign >= 0 && _mm256_movemask_pd(_mm256_castsi256_pd(signs)) == 0;
  }
  static bool inside(const std::int32_t* ids, std::int64_t count, std::int32_t highest) noexcept {
    const __m256i limit = _mm256_set1_epi32(highest);
    __m256i signs = _mm256_setzero_si256();
    std::int32_t sign = highest;
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m256i id = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids + i));
      signs = _mm256_or_si256(signs, _mm256_or_si256(id, _mm256_sub_epi32(limit, id)));
    }
    for (; i < count; ++i) sign |= ids[i] < 0 ? -1 : highest - ids[i];
    return sign >= 0 && _mm256_movemask_ps(_mm256_castsi256_ps(signs)) == 0;
  }

  template <class C>
  static auto raw(const std::uint8_t* p) noexcept {
    if constexpr (C::kBits == 32) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    } else if constexpr (C::kBits == 16) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    } else {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    }
  }

  // The first `bytes` bytes of a group, nothing behind them being touched; `before` bytes of the row lie before it.
  template <class C>
  static auto raw_part(const std::uint8_t* p, int bytes, std::int64_t before) noexcept {
    if constexpr (C::kBits == 32) {
      return _mm256_castps_si256(_mm256_maskload_ps(reinterpret_cast<const float*>(p), mask(bytes / 4)));
    } else if constexpr (C::kBits == 16) {
      if (bytes == 16) return raw<C>(p);
      alignas(16) std::uint8_t group[16] = {};
      std::memcpy(group, p, static_cast<std::size_t>(bytes & 15));
      return _mm_load_si128(reinterpret_cast<const __m128i*>(group));
    } else {
      std::uint64_t word = 0;
      if (before + bytes >= 8) {
        word = read_at<std::uint64_t>(p + bytes - 8) >> (64 - 8 * bytes);
      } else {
        std::memcpy(&word, p, static_cast<std::size_t>(bytes & 7));
      }
      return _mm_cvtsi64_si128(static_cast<std::int64_t>(word));
    }
  }

  template <class C, class Raw>
  static void expand(Raw raw, Reg (&x)[C::kPer]) noexcept {
    constexpr bool kSigned = C::kHeader == Header::kStep;
    if constexpr (C::kFormat == Format::kFloat32) {
      x[0] = _mm256_castsi256_ps(raw);
    } else if constexpr (C::kFormat == Format::kBFloat16) {
      x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    } else if constexpr (C::kFormat == Format::kFloat16) {
      x[0] = _mm256_cvtph_ps(raw);
    } else if constexpr (C::kFormat == Format::kFloat8) {
      // As float16 bits a code is 2^-8 of its value; only the NaN code has no such form.
      const __m128i wide = _mm_cvtepu8_epi16(raw);
      const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7F));
      const __m128i sign = _mm_slli_epi16(_mm_xor_si128(wide, magnitude), 8);
      const Reg value = _mm256_cvtph_ps(_mm_or_si128(sign, _mm_slli_epi16(magnitude, 7)));
      const __m256i nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F)));
      const Reg number = _mm256_mul_ps(value, set(256.0f));
      x[0] = _mm256_blendv_ps(number, set(__builtin_nanf("")), _mm256_castsi256_ps(nan));
    } else if constexpr (C::kFormat == Format::kInt8) {
      x[0] = _mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(raw) : _mm256_cvtepu8_epi32(raw));
    } else if constexpr (C::kFormat == Format::kInt4) {
      const __m256i bytes = _mm256_cvtepu8_epi32(raw);
      const __m256i even = kSigned ? _mm256_srai_epi32(_mm256_slli_epi32(bytes, 28), 28)
                                   : _mm256_and_si256(bytes, _mm256_set1_epi32(15));
      const __m256i odd =
          kSigned ? _mm256_srai_epi32(_mm256_slli_epi32(bytes, 24), 28) : _mm256_srli_epi32(bytes, 4);
      x[0] = _mm256_cvtepi32_ps(even);
      x[1] = _mm256_cvtepi32_ps(odd);
    } else {  // the permutation reads the low three bits of each lane, and the table repeats after four
      const __m256i bytes = _mm256_cvtepu8_epi32(raw);
      const Reg values = kSigned ? _mm256_setr_ps(0, 1, -2, -1, 0, 1, -2, -1) : _mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3);
      for (int k = 0; k < 4; ++k) x[k] = _mm256_permutevar8x32_ps(values, _mm256_srli_epi32(bytes, 2 * k));
    }
  }

  static Reg low_pairs(Reg a, Reg b) noexcept {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  }
  static Reg high_pairs(Reg a, Reg b) noexcept {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  }
  static void interleave(Reg (&)[1]) noexcept {}
  static void interleave(Reg (&x)[2]) noexcept {
    const Reg low = _mm256_unpacklo_ps(x[0], x[1]);
    const Reg high = _mm256_unpackhi_ps(x[0], x[1]);
    x[0] = _mm256_permute2f128_ps(low, high, 0x20);
    x[1] = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static void interleave(Reg (&x)[4]) noexcept {
    const Reg low01 = _mm256_unpacklo_ps(x[0], x[1]);
    const Reg high01 = _mm256_unpackhi_ps(x[0], x[1]);
    const Reg low23 = _mm256_unpacklo_ps(x[2], x[3]);
    const Reg high23 = _mm256_unpackhi_ps(x[2], x[3]);
    const Reg r0 = low_pairs(low01, low23);  // lane l: the four columns of byte 4 l
    const Reg r1 = high_pairs(low01, low23);   // of byte 4 l + 1
    const Reg r2 = low_pairs(high01, high23);
    const Reg r3 = high_pairs(high01, high23);
    x[0] = _mm256_permute2f128_ps(r0, r1, 0x20);
    x[1] = _mm256_permute2f128_ps(r2, r3, 0x20);
    x[2] = _mm256_permute2f128_ps(r0, r1, 0x31);
    x[3] = _mm256_permute2f128_ps(r2, r3, 0x31);
  }
};

}  // namespace

void bags_avx2(const Args& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  bags<Vector>(args, first, last, error);
}

void decode_avx2(const Table& table, const std::uint8_t* row, std::int64_t column, std::int64_t count,
                 float* out) noexcept {
  pick_decode<Vector>(table)(table, row, column, count, out);
}

void weights_avx2(const Args& args, const void* grad, void* out, std::int64_t first, std::int64_t last) noexcept {
  pick_dots<Vector>(args.table)(args, grad, out, first, last);
}

}  // namespace recfast::embedding_bag

#pragma GCC pop_options
#endif
