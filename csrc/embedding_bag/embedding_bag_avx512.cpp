#include "embedding_bag/embedding_bag.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")

namespace recfast::embedding_bag {
namespace {

struct Vector {
  using Reg = __m512;
  static constexpr int kLanes = 16;

  static __mmask16 mask(int count) noexcept { return static_cast<__mmask16>((1u << count) - 1u); }
  static Reg zero() noexcept { return _mm512_setzero_ps(); }
  static Reg set(float x) noexcept { return _mm512_set1_ps(x); }
  static Reg add(Reg a, Reg b) noexcept { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) noexcept { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) noexcept { return _mm512_div_ps(a, b); }
  static Reg load(const float* p) noexcept { return _mm512_loadu_ps(p); }
  static Reg load_part(const float* p, int count) noexcept { return _mm512_maskz_loadu_ps(mask(count), p); }
  static Reg load(const std::int8_t* p) noexcept {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Reg load_part(const std::int8_t* p, int count) noexcept {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask(count), p)));
  }
  static void store(float* p, Reg x) noexcept { _mm512_storeu_ps(p, x); }
  static void store_part(float* p, Reg x, int count) noexcept { _mm512_mask_storeu_ps(p, mask(count), x); }
};

#include "embedding_bag/embedding_bag_simd.h"

}  // namespace

template <class Value, class Index>
void bags_avx512(const Args<Value, Index>& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  bags<Vector>(args, first, last, error);
}

template void bags_avx512(const Args<float, std::int32_t>&, std::int64_t, std::int64_t, FirstError&) noexcept;
template void bags_avx512(const Args<float, std::int64_t>&, std::int64_t, std::int64_t, FirstError&) noexcept;
template void bags_avx512(const Args<std::int8_t, std::int32_t>&, std::int64_t, std::int64_t, FirstError&) noexcept;
template void bags_avx512(const Args<std::int8_t, std::int64_t>&, std::int64_t, std::int64_t, FirstError&) noexcept;

}  // namespace recfast::embedding_bag

#pragma GCC pop_options
#endif
