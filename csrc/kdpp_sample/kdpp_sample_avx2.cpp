#include "kdpp_sample/kdpp_sample.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "common/random.h"

#pragma GCC push_options
#pragma GCC target("avx2")

namespace recfast::kdpp_sample {

#define RECFAST_SOLVE solve_avx2
#include "kdpp_sample/solve.inl"
#undef RECFAST_SOLVE

}  // namespace recfast::kdpp_sample

#pragma GCC pop_options
#endif
