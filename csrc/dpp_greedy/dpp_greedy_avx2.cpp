#include "dpp_greedy/dpp_greedy.h"

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2")

namespace recfast::dpp_greedy {

#define RECFAST_LANES 8
#define RECFAST_REFRESH refresh_avx2
#include "dpp_greedy/refresh.inl"
#undef RECFAST_REFRESH
#undef RECFAST_LANES

}  // namespace recfast::dpp_greedy

#pragma GCC pop_options
#endif
