// convolve, convolve_transposed and convolve_upsampled of float32 and bfloat16 maps, the former by what is here.
#include "cpu/multiarch.h"

#if SPSS_HAS_FMA  // without it oneDNN, which compiles for the machine, is faster

#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution_backward.h>

#include "checks.h"
#include "cpu/operators.h"
#include "cpu/vectors.h"

namespace spss {
namespace {

using Element = float;
using Factor = float;
using Row = Vector;
constexpr int kGroup = 1;
constexpr int kSums = 12;
constexpr int kAtOnce = 1;

SPSS_INLINE void store_group(float* to, const Vector (&v)[1]) { store(to, v[0]); }
SPSS_INLINE Row load_row(const float* from) { return load(from); }
SPSS_INLINE void add_multiple(Vector& sum, const float* factor, const Row& row) { sum += *factor * row; }

}  // namespace
}  // namespace spss

#define SPSS_HOT SPSS_MULTIARCH
#define SPSS_HOT_INLINE SPSS_INLINE
#include "cpu/minimal_filtering.h"
#include "cpu/direct_convolution.h"
#include "cpu/upsampled_convolution.h"

namespace spss {
namespace {

bool is_float32(const at::Tensor& x) {
  if (x.scalar_type() == at::kFloat) return true;
  TORCH_CHECK_NOT_IMPLEMENTED(__builtin_cpu_supports("avx512bf16"),
                              "convolutions of bfloat16 need a CPU with AVX512-BF16: use the reference");
  return false;
}

// The gradients of a convolution with 3 taps along each axis by torch's own.
std::tuple<at::Tensor, at::Tensor> torchs_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad) {
  const std::vector<int64_t> ones(x.dim() - 2, 1), zeros(x.dim() - 2);
  const auto [dx, dweight, _] =
      at::convolution_backward(grad, x, weight.to(x.scalar_type()), std::nullopt, ones, ones, ones, false, zeros, 1,
                               {x_grad, weight_grad, false});
  const at::Tensor none = at::empty({0}, x.options());
  return {x_grad ? in_order(dx) : none, weight_grad ? empty_weight(weight).copy_(dweight) : none.to(at::kFloat)};
}

}  // namespace

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight) {
  check_convolve(x, weight);
  if (!is_float32(x)) return convolve_bf16(x, weight, nullptr);
  return x.size(1) == 1 ? convolved_channel(x, weight) : convolved<8>(x, weight);
}

std::tuple<at::Tensor, at::Tensor> convolve_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad) {
  check_convolve(x, weight);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[1] = weight.size(0);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(sizes) && grad.scalar_type() == x.scalar_type(),
                    "grad must be of y's shape and dtype");
  if (x.size(1) == 1) return torchs_backward(grad, x, weight, x_grad, weight_grad);
  const auto backward = is_float32(x) ? convolved_backward<8> : convolve_bf16_backward;
  return backward(grad, x, weight, x_grad, weight_grad);
}

at::Tensor convolve_transposed(const at::Tensor& x, const at::Tensor& weight) {
  check_convolve_transposed(x, weight);
  return is_float32(x) ? upsampled(x, weight) : convolve_transposed_bf16(x, weight, nullptr);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_moments(
    const at::Tensor& x, const at::Tensor& weight, bool transposed) {
  (transposed ? check_convolve_transposed : check_convolve)(x, weight);
  TORCH_CHECK_TYPE(!is_float32(x), "x must be bfloat16 for the moments of a convolution");
  const int64_t outputs = weight.size(transposed ? 1 : 0);
  ChannelSums sums(outputs);
  const at::Tensor y = (transposed ? convolve_transposed_bf16 : convolve_bf16)(x, weight, &sums);
  const auto [mean, variance] = sums.moments(y.numel() / outputs);
  return {y, mean, variance};
}

at::Tensor convolve_upsampled(
    const at::Tensor& x, const at::Tensor& skip, const at::Tensor& weight, const at::Tensor& bias, double slope) {
  check_convolve_upsampled(x, skip, weight, bias, slope);
  return (is_float32(x) ? convolved_upsampled : convolve_upsampled_bf16)(x, skip, weight, bias, slope);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> convolve_upsampled_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& x, const at::Tensor& skip, const at::Tensor& weight,
    double slope, bool skip_grad) {
  check_convolve_upsampled_backward(grad, y, x, skip, weight);
  const int64_t inputs = x.size(1), skips = skip.size(1);
  const auto [z_grad, dbias] = bias_leaky_relu_backward(grad, y, at::empty({weight.size(0)}, weight.options()), slope);
  const at::Tensor dweight = empty_weight(weight);
  const auto backward = is_float32(x) ? upsampled_backward : upsampled_backward_bf16;
  const at::Tensor dx = backward(z_grad, x, weight.narrow(1, 0, inputs), dweight.narrow(1, 0, inputs));
  const at::Tensor beside = weight.narrow(1, inputs, skips);
  const bool filtered = skips == weight.size(0) && are_filtered(skips);  // outputs come in multiples of 16
  const auto [dskip, dbeside] =
      (filtered ? convolve_backward : torchs_backward)(z_grad, skip, beside, skip_grad, true);
  dweight.narrow(1, inputs, skips).copy_(dbeside);
  return {dx, dskip, dweight, dbias};
}

}  // namespace spss

#endif
