#include "code_trie/code_trie.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,lzcnt,popcnt")

#include "common/best_list.h"

namespace recfast::code_trie {
namespace {

struct Compare {
  static std::uint32_t reaching(const float* values, float theta) noexcept {
    const __m256 low = _mm256_cmp_ps(_mm256_loadu_ps(values), _mm256_set1_ps(theta), _CMP_GE_OQ);
    const __m256 high = _mm256_cmp_ps(_mm256_loadu_ps(values + 8), _mm256_set1_ps(theta), _CMP_GE_OQ);
    const auto upper = static_cast<std::uint32_t>(_mm256_movemask_ps(high));
    return static_cast<std::uint32_t>(_mm256_movemask_ps(low)) | upper << 8;
  }

  template <class Vector>
  static void fma(Vector* x, const Vector& a, const Vector& b) noexcept {
    __m256 to[2];
    __m256 by[2];
    __m256 plus[2];
    std::memcpy(to, x, sizeof to);
    std::memcpy(by, &a, sizeof by);
    std::memcpy(plus, &b, sizeof plus);
    for (int half = 0; half < 2; ++half) to[half] = _mm256_fmadd_ps(to[half], by[half], plus[half]);
    std::memcpy(x, to, sizeof to);
  }

  template <class List>
  static std::int64_t keep(List& best, std::int32_t least, std::int32_t last) noexcept {
    return best.keep_plainly(least, last);
  }
};

}  // namespace

#define RECFAST_ISA avx2
#include "code_trie/code_trie.inl"
#undef RECFAST_ISA

}  // namespace recfast::code_trie

#pragma GCC pop_options
#endif
