// 16 short codes to and from 16 signed bytes, for AVX2 and AVX-512; included in their unnamed namespaces.

inline __m128i bytes_of_int4(const std::uint8_t* codes) noexcept {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m128i low = _mm_set1_epi8(15);
  const __m128i halves = _mm_unpacklo_epi8(_mm_and_si128(packed, low), _mm_and_si128(_mm_srli_epi16(packed, 4), low));
  const __m128i sign = _mm_set1_epi8(8);
  return _mm_sub_epi8(_mm_xor_si128(halves, sign), sign);
}

inline __m128i bytes_of_int2(const std::uint8_t* codes) noexcept {
  const __m128i packed = _mm_cvtsi32_si128(read_at<std::int32_t>(codes));
  const __m128i low4 = _mm_set1_epi8(15);
  const __m128i fours = _mm_unpacklo_epi8(_mm_and_si128(packed, low4), _mm_and_si128(_mm_srli_epi16(packed, 4), low4));
  const __m128i low2 = _mm_set1_epi8(3);
  const __m128i twos = _mm_unpacklo_epi8(_mm_and_si128(fours, low2), _mm_and_si128(_mm_srli_epi16(fours, 2), low2));
  const __m128i sign = _mm_set1_epi8(2);
  return _mm_sub_epi8(_mm_xor_si128(twos, sign), sign);
}

inline void put_int4(std::uint8_t* codes, __m128i bytes) noexcept {
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
  const __m128i pairs = _mm_maddubs_epi16(low, _mm_set1_epi16(0x1001));  // even + 16 * odd
  _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(pairs, pairs));
}

inline void put_int2(std::uint8_t* codes, __m128i bytes) noexcept {
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(3));
  const __m128i pairs = _mm_maddubs_epi16(low, _mm_set1_epi16(0x0401));              // even + 4 * odd
  const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi32(0x00100001));           // even + 16 * odd
  const __m128i packed = _mm_packus_epi16(_mm_packus_epi32(fours, fours), _mm_setzero_si128());
  const std::int32_t word = _mm_cvtsi128_si32(packed);
  std::memcpy(codes, &word, sizeof word);
}

// A float8 as the half whose value is 2^-8 times as large, and back; NaN aside.
inline __m256i half_of_float8(__m256i wide) noexcept {
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  return _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7F)), 7));
}
inline __m256i float8_of_half(__m256i half) noexcept {
  const __m256i sign = _mm256_srli_epi16(_mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0x8000))), 8);
  return _mm256_or_si256(sign, _mm256_srli_epi16(_mm256_and_si256(half, _mm256_set1_epi16(0x7FFF)), 7));
}
