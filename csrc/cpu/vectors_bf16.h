// bfloat16 maps for cpu/minimal_filtering.h and cpu/direct_convolution.h, on CPUs with AVX512-BF16: an instruction
// multiplies pairs of bfloat16 and adds both products to float32.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vectors.h"

#define SPSS_HOT __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define SPSS_HOT_INLINE SPSS_INLINE SPSS_HOT

namespace spss {
namespace {

struct BFloat16 {
  uint16_t bits;
};

using Element = BFloat16;
using Factor = BFloat16;
constexpr int kGroup = 2;
constexpr int kSums = 24;
constexpr int kAtOnce = 4;

#if SPSS_LANES == 8

using Row = __m256bh;

SPSS_HOT_INLINE Vector load(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Vector>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

SPSS_HOT_INLINE void store(BFloat16* to, const Vector& v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(v)));
}

SPSS_HOT_INLINE void store_group(BFloat16* to, const Vector (&v)[2]) {
  const __m256i both = reinterpret_cast<__m256i>(_mm256_cvtne2ps_pbh(v[1], v[0]));
  const __m256i pairs = _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutexvar_epi16(pairs, both));
}

SPSS_HOT_INLINE Row load_row(const BFloat16* from) {
  return reinterpret_cast<Row>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

SPSS_HOT_INLINE void add_multiple(Vector& sum, const BFloat16* pair, const Row& row) {
  const __m128i low = _mm_loadu_si32(pair);
  sum = _mm256_dpbf16_ps(sum, reinterpret_cast<Row>(_mm256_broadcastd_epi32(low)), row);
}

#else  // sixteen: half as many instructions, of which those that read a factor are what limits the products

using Row = __m512bh;

SPSS_HOT_INLINE Vector load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

SPSS_HOT_INLINE void store(BFloat16* to, const Vector& v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}

SPSS_HOT_INLINE void store_group(BFloat16* to, const Vector (&v)[2]) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0]));
  const __m512i pairs =  // 0, 16, 1, 17 and so on
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                       18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(pairs, both));
}

SPSS_HOT_INLINE Row load_row(const BFloat16* from) { return reinterpret_cast<Row>(_mm512_loadu_si512(from)); }

SPSS_HOT_INLINE void add_multiple(Vector& sum, const BFloat16* pair, const Row& row) {
  const __m128i low = _mm_loadu_si32(pair);
  sum = _mm512_dpbf16_ps(sum, reinterpret_cast<Row>(_mm512_broadcastd_epi32(low)), row);
}

#endif

SPSS_HOT_INLINE void store_group(BFloat16* to, const Vector (&v)[1]) { store(to, v[0]); }

}  // namespace
}  // namespace spss
