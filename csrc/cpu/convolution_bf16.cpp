// convolve and convolve_transposed of bfloat16 maps, on CPUs with AVX512-BF16: an instruction multiplies pairs of
// bfloat16 and adds both products to float32. The transforms are float32, and so is the filter until it is transformed.
#include "cpu/multiarch.h"

#if SPSS_HAS_FMA

#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <cstdint>

#include "cpu/operators.h"
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
using Row = __m256bh;
constexpr int kGroup = 2;
constexpr int kSums = 24;
constexpr int kAtOnce = 4;

SPSS_HOT_INLINE Vector load(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Vector>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

SPSS_HOT_INLINE void store(BFloat16* to, const Vector& v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(v)));
}

SPSS_HOT_INLINE void store_group(BFloat16* to, const Vector (&v)[1]) { store(to, v[0]); }

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

}  // namespace
}  // namespace spss

#include "cpu/minimal_filtering.h"
#include "cpu/direct_convolution.h"

namespace spss {
namespace {

void check_cpu() {
  TORCH_CHECK_NOT_IMPLEMENTED(__builtin_cpu_supports("avx512bf16"),
                              "convolutions of bfloat16 need a CPU with AVX512-BF16: use the reference");
}

}  // namespace

at::Tensor convolve_bf16(const at::Tensor& x, const at::Tensor& weight) {
  check_cpu();
  return x.size(1) == 1 ? convolved_channel(x, weight) : convolved(x, weight);
}

std::tuple<at::Tensor, at::Tensor> convolve_bf16_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad) {
  check_cpu();
  return convolved_backward(grad, x, weight, x_grad, weight_grad);
}

at::Tensor convolve_transposed_bf16(const at::Tensor& x, const at::Tensor& weight) {
  check_cpu();
  return upsampled(x, weight);
}

}  // namespace spss

#endif
