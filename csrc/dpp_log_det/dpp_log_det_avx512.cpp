#include "dpp_log_det/dpp_log_det.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <limits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")

namespace recfast::dpp_log_det {

#define RECFAST_FACTORISE factorise_avx512
#include "dpp_log_det/factorise.inl"
#undef RECFAST_FACTORISE

}  // namespace recfast::dpp_log_det

#pragma GCC pop_options
#endif
