#include "embedding_update/embedding_update.h"

#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")

namespace recfast::embedding_update {
namespace {

#include "embedding_update/embedding_update_rows.h"

}  // namespace

template <class Value>
std::int64_t rows_avx512(const Args<Value>& args, std::int64_t first, std::int64_t last, float* g, float* w) noexcept {
  return rows(args, first, last, g, w);
}

template std::int64_t rows_avx512(const Args<float>&, std::int64_t, std::int64_t, float*, float*) noexcept;
template std::int64_t rows_avx512(const Args<std::int8_t>&, std::int64_t, std::int64_t, float*, float*) noexcept;

}  // namespace recfast::embedding_update

#pragma GCC pop_options
#endif
