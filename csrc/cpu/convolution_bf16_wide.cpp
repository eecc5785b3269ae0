// convolve of bfloat16 maps with sixteen channels or more, convolve_transposed and convolve_upsampled, by registers of
// sixteen lanes.
#include "cpu/multiarch.h"

#if SPSS_HAS_FMA

#include <ATen/core/Tensor.h>

#include "cpu/operators.h"

#define SPSS_LANES 16
#include "cpu/vectors_bf16.h"
#include "cpu/minimal_filtering.h"
#include "cpu/direct_convolution.h"
#include "cpu/upsampled_convolution.h"

namespace spss {

at::Tensor convolve_bf16_wide(const at::Tensor& x, const at::Tensor& weight, ChannelSums* sums) {
  return convolved<16>(x, weight, sums);
}

std::tuple<at::Tensor, at::Tensor> convolve_bf16_wide_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad) {
  return convolved_backward<16>(grad, x, weight, x_grad, weight_grad);
}

at::Tensor convolve_transposed_bf16(const at::Tensor& x, const at::Tensor& weight, ChannelSums* sums) {
  return upsampled(x, weight, sums);
}

at::Tensor convolve_upsampled_bf16(
    const at::Tensor& x, const at::Tensor& skip, const at::Tensor& weight, const at::Tensor& bias, double slope) {
  return convolved_upsampled(x, skip, weight, bias, slope);
}

at::Tensor upsampled_backward_bf16(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dweight) {
  return upsampled_backward(grad, x, weight, dweight);
}

}  // namespace spss

#endif
