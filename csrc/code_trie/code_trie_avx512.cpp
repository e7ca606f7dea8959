#include "code_trie/code_trie.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,bmi,bmi2,lzcnt,popcnt")

#include "common/best_list_avx512.h"
namespace recfast::code_trie {
namespace {

struct Compare {
  static std::uint32_t reaching(const float* values, float theta) noexcept {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(theta), _CMP_GE_OQ);
  }

  template <class Vector>
  static void fma(Vector* x, const Vector& a, const Vector& b) noexcept {
    *x = _mm512_fmadd_ps(*x, a, b);
  }

  template <class List>
  static std::int64_t keep(List& best, std::int32_t least, std::int32_t last) noexcept {
    return keep_avx512(best, least, last);
  }
};

}  // namespace

#define RECFAST_ISA avx512
#include "code_trie/code_trie.inl"
#undef RECFAST_ISA

}  // namespace recfast::code_trie

#pragma GCC pop_options
#endif
