// convolve, convolve_transposed and convolve_upsampled of float32 and bfloat16 maps, the former by what is here.
#include "cpu/multiarch.h"

#if SPSS_HAS_FMA  // without it oneDNN, which compiles for the machine, is faster

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
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
  if (x.size(1) == 1) {  // by torch's own
    const auto [dx, dweight, _] = at::convolution_backward(
        grad, x, weight.to(x.scalar_type()), std::nullopt, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, false, {0, 0, 0}, 1,
        {x_grad, weight_grad, false});
    const at::Tensor none = at::empty({0}, x.options());
    return {x_grad ? in_order(dx) : none, weight_grad ? at::empty_like(weight).copy_(dweight) : none.to(at::kFloat)};
  }
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
  const auto [mean, variance] = sums.moments(std::max<int64_t>(1, y.numel() / outputs));
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
  check_convolve_upsampled(x, skip, weight);
  const int64_t outputs = weight.size(0), inputs = x.size(1);
  const auto [z_grad, dbias] = bias_leaky_relu_backward(grad, y, at::empty({outputs}, weight.options()), slope);
  // an axis's three taps from the last to the first, and the first to the last: where both fall, they add up
  const at::Tensor flipped = weight.narrow(1, 0, inputs).flip({2, 3}).transpose(0, 1);
  const auto pad = [&](int64_t h, int64_t w) { return at::constant_pad_nd(flipped, {w, 1 - w, h, 1 - h}); };
  const at::Tensor taps = pad(0, 0) + pad(0, 1) + pad(1, 0) + pad(1, 1);  // (I, O, 4, 4)
  const auto [dx, dtaps, none] = at::convolution_backward(
      z_grad, x, taps.to(x.scalar_type()), std::nullopt, {2, 2}, {1, 1}, {1, 1}, true, {0, 0}, 1, {true, true, false});
  const auto [dskip, dfine, no] = at::convolution_backward(
      z_grad, skip, weight.narrow(1, inputs, skip.size(1)).to(x.scalar_type()), std::nullopt, {1, 1}, {1, 1}, {1, 1},
      false, {0, 0}, 1, {skip_grad, true, false});
  const at::Tensor wide = dtaps.to(at::kFloat);
  const auto cut = [&](int64_t h, int64_t w) { return wide.narrow(2, h, 3).narrow(3, w, 3); };
  const at::Tensor dcoarse = (cut(0, 0) + cut(0, 1) + cut(1, 0) + cut(1, 1)).flip({2, 3}).transpose(0, 1);
  return {in_order(dx), skip_grad ? in_order(dskip) : at::empty({0}, skip.options()),
          at::empty_like(weight).copy_(at::cat({dcoarse, dfine.to(at::kFloat)}, 1)), dbias};
}

}  // namespace spss

#endif
