#include "embedding_bag/embedding_bag.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2")

namespace recfast::embedding_bag {
namespace {

struct Vector {
  using Reg = __m256;
  static constexpr int kLanes = 8;

  static __m256i mask(int count) noexcept {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg zero() noexcept { return _mm256_setzero_ps(); }
  static Reg set(float x) noexcept { return _mm256_set1_ps(x); }
  static Reg add(Reg a, Reg b) noexcept { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) noexcept { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) noexcept { return _mm256_div_ps(a, b); }
  static Reg load(const float* p) noexcept { return _mm256_loadu_ps(p); }
  static Reg load_part(const float* p, int count) noexcept { return _mm256_maskload_ps(p, mask(count)); }
  static Reg load(const std::int8_t* p) noexcept {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Reg load_part(const std::int8_t* p, int count) noexcept {
    alignas(8) std::int8_t bytes[8] = {};  // a plain load could leave the table's last page
    std::memcpy(bytes, p, static_cast<std::size_t>(count));
    return load(bytes);
  }
  static void store(float* p, Reg x) noexcept { _mm256_storeu_ps(p, x); }
  static void store_part(float* p, Reg x, int count) noexcept { _mm256_maskstore_ps(p, mask(count), x); }
};

#include "embedding_bag/embedding_bag_simd.h"

}  // namespace

template <class Value, class Index>
void bags_avx2(const Args<Value, Index>& args, std::int64_t first, std::int64_t last, FirstError& error) noexcept {
  bags<Vector>(args, first, last, error);
}

template void bags_avx2(const Args<float, std::int32_t>&, std::int64_t, std::int64_t, FirstError&) noexcept;
template void bags_avx2(const Args<float, std::int64_t>&, std::int64_t, std::int64_t, FirstError&) noexcept;
template void bags_avx2(const Args<std::int8_t, std::int32_t>&, std::int64_t, std::int64_t, FirstError&) noexcept;
template void bags_avx2(const Args<std::int8_t, std::int64_t>&, std::int64_t, std::int64_t, FirstError&) noexcept;

}  // namespace recfast::embedding_bag

#pragma GCC pop_options
#endif
