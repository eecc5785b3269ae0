// The CPU kernels of spss_fast/ops/schemas.inc. csrc/ops.cpp registers them, and it alone reads torch/library.h, which
// costs a compiler more time than all other headers together.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "cpu/multiarch.h"

namespace spss {

class ChannelSums;

at::Tensor warp(
    const at::Tensor& image, const at::Tensor& displacement, std::string_view mode, std::string_view padding);
std::tuple<at::Tensor, at::Tensor> warp_backward(
    const at::Tensor& grad, const at::Tensor& image, const at::Tensor& displacement, std::string_view mode,
    std::string_view padding, bool image_grad, bool displacement_grad);

at::Tensor propagate(
    const at::Tensor& labels, const at::Tensor& index, const at::Tensor& flow_up, const at::Tensor& flow_down,
    int64_t opening, int64_t closing, int64_t far_distance, int64_t far_iterations);

at::Tensor fill_holes(const at::Tensor& labels, int64_t classes);

void accumulate_softmax(at::Tensor& total, const at::Tensor& logits);
std::tuple<at::Tensor, at::Tensor> uncertainty_mask(const at::Tensor& total, int64_t passes, const at::Tensor& keep);

std::tuple<at::Tensor, at::Tensor> select_prototypes(const at::Tensor& logits, int64_t k);
// Gradients of the features are those of the loss itself (upstream 1), of the compute type, in the features' layout.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& n, const at::Tensor& logits_a,
    const at::Tensor& logits_n, int64_t k, double temperature, bool bidirectional, bool with_grad);

// Losses and the sums that the backward pass needs: (B, 2), then (C, 4), float64.
std::tuple<at::Tensor, at::Tensor> masked_ce_dice(
    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& mask, bool on_probabilities);
at::Tensor masked_ce_dice_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& target, const at::Tensor& mask,
    const at::Tensor& sums, bool on_probabilities);
std::tuple<at::Tensor, at::Tensor> weighted_ce_dice(
    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weight);
at::Tensor weighted_ce_dice_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weight,
    const at::Tensor& sums);

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_relu(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& skip,
    const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& variance, double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_relu_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& variance, double eps, bool batch_statistics);

at::Tensor bias_leaky_relu(
    const at::Tensor& x, const at::Tensor& bias, const std::optional<at::Tensor>& added, double slope);
std::tuple<at::Tensor, at::Tensor> bias_leaky_relu_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& bias, double slope);

#if SPSS_HAS_FMA  // without it oneDNN, which compiles for the machine, is faster
at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight);
std::tuple<at::Tensor, at::Tensor> convolve_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad);
at::Tensor convolve_transposed(const at::Tensor& x, const at::Tensor& weight);
// Either of them, the mean and the biased variance of its channels.
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_moments(
    const at::Tensor& x, const at::Tensor& weight, bool transposed);
at::Tensor convolve_upsampled(
    const at::Tensor& x, const at::Tensor& skip, const at::Tensor& weight, const at::Tensor& bias, double slope);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> convolve_upsampled_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& x, const at::Tensor& skip, const at::Tensor& weight,
    double slope, bool skip_grad);
// The same of checked arguments, x bfloat16, on a CPU with AVX512-BF16; `sums` may be null.
at::Tensor convolve_bf16(const at::Tensor& x, const at::Tensor& weight, ChannelSums* sums);
std::tuple<at::Tensor, at::Tensor> convolve_bf16_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad);
// of sixteen channels or more
at::Tensor convolve_bf16_wide(const at::Tensor& x, const at::Tensor& weight, ChannelSums* sums);
std::tuple<at::Tensor, at::Tensor> convolve_bf16_wide_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad);
at::Tensor convolve_transposed_bf16(const at::Tensor& x, const at::Tensor& weight, ChannelSums* sums);
at::Tensor convolve_upsampled_bf16(
    const at::Tensor& x, const at::Tensor& skip, const at::Tensor& weight, const at::Tensor& bias, double slope);
at::Tensor upsampled_backward_bf16(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dweight);

at::Tensor flow_head(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);
std::tuple<at::Tensor, at::Tensor, at::Tensor> flow_head_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight);
#endif

}  // namespace spss
