// BestList::keep with AVX-512; included inside a kernel's target region, after immintrin.h.
#pragma once

#include "common/best_list.h"

namespace recfast {
namespace {

template <class List>
std::int64_t keep_avx512(List& best, std::int32_t least, std::int32_t last) noexcept {
  std::int64_t kept = 0;
  const __m512i least_key = _mm512_set1_epi32(least);
  const __m512i last_id = _mm512_set1_epi32(last);
  for (std::int64_t i = 0; i < best.count; i += 16) {
    const auto used = static_cast<__mmask16>((1U << std::min<std::int64_t>(16, best.count - i)) - 1);
    const __m512i keys = _mm512_loadu_si512(best.keys + i);
    const __m512i ids = _mm512_loadu_si512(best.ids + i);
    const __m512 scores = _mm512_loadu_ps(best.scores + i);
    const __mmask16 above = _mm512_mask_cmpgt_epi32_mask(used, keys, least_key);
    const __mmask16 equal = _mm512_mask_cmpeq_epi32_mask(used, keys, least_key);
    const auto stay = static_cast<__mmask16>(above | _mm512_mask_cmple_epi32_mask(equal, ids, last_id));
    _mm512_storeu_ps(best.scores + kept, _mm512_maskz_compress_ps(stay, scores));
    _mm512_storeu_si512(best.ids + kept, _mm512_maskz_compress_epi32(stay, ids));
    kept += std::popcount(static_cast<std::uint32_t>(stay));
  }
  return kept;
}

}  // namespace
}  // namespace recfast
