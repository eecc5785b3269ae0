// What every backend demands of an operator's arguments: the public functions check first and say more, these keep
// direct calls of torch.ops.spss_fast.* and C++ callers from reading out of bounds.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <vector>

namespace spss {

using at::Tensor;

inline void check_warp(
    const Tensor& image, const Tensor& displacement, std::string_view mode, std::string_view padding) {
  TORCH_CHECK_VALUE(image.dim() == 4 || image.dim() == 5, "image must be (B, C, H, W) or (B, C, H, W, D)");
  TORCH_CHECK_TYPE(image.is_floating_point(), "image must be of a floating dtype, not ", image.scalar_type());
  const auto wanted = image.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(
      displacement.scalar_type() == wanted, "displacement must be ", wanted, " for an image of ", image.scalar_type());
  TORCH_CHECK_VALUE(
      displacement.dim() == image.dim() && displacement.size(0) == image.size(0) &&
          displacement.size(1) == image.dim() - 2 && displacement.sizes().slice(2) == image.sizes().slice(2),
      "displacement must be (B, nd, *spatial) of image's sizes, not ", displacement.sizes());
  TORCH_CHECK_VALUE(displacement.device() == image.device(), "displacement must be on image's device");
  TORCH_CHECK_VALUE(mode == "bilinear" || mode == "nearest", "mode must be bilinear or nearest, not '", mode, "'");
  TORCH_CHECK_VALUE(padding == "zeros" || padding == "border", "padding must be zeros or border, not '", padding, "'");
}

inline void check_warp_backward(
    const Tensor& grad, const Tensor& image, const Tensor& displacement, std::string_view mode,
    std::string_view padding) {
  check_warp(image, displacement, mode, padding);
  TORCH_CHECK_VALUE(grad.sizes() == image.sizes(), "grad must be of image's sizes, not ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == image.scalar_type(), "grad must be of image's dtype");
  TORCH_CHECK_VALUE(grad.device() == image.device(), "grad must be on image's device");
}

inline void check_fill_holes(const Tensor& labels, int64_t classes) {
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kByte, "labels must be uint8, not ", labels.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 4, "labels must be (L, H, W, D), not ", labels.sizes());
  TORCH_CHECK_VALUE(classes >= 1, "classes must be at least 1, not ", classes);
}

// Returns B, H, W, D.
inline std::array<int64_t, 4> check_propagate(
    const Tensor& labels, const Tensor& index, const Tensor& flow_up, const Tensor& flow_down, int64_t opening,
    int64_t closing, int64_t far_distance, int64_t far_iterations) {
  TORCH_CHECK_VALUE(labels.dim() == 3, "labels must be (B, H, W), not ", labels.sizes());
  TORCH_CHECK_VALUE(flow_up.dim() == 5, "flow_up must be (B, D - 1, 2, H, W), not ", flow_up.sizes());
  const int64_t batch = labels.size(0), height = labels.size(1), width = labels.size(2), depth = flow_up.size(1) + 1;
  const std::array<int64_t, 5> shape{batch, depth - 1, 2, height, width};
  const at::IntArrayRef wanted = shape;
  TORCH_CHECK_VALUE(flow_up.sizes() == wanted, "flow_up must be ", wanted, " for these labels, not ", flow_up.sizes());
  TORCH_CHECK_VALUE(flow_down.sizes() == wanted, "flow_down must be ", wanted, ", as flow_up, not ", flow_down.sizes());
  TORCH_CHECK_TYPE(flow_down.scalar_type() == flow_up.scalar_type(), "flow_down must be of flow_up's dtype");
  TORCH_CHECK_VALUE(index.dim() == 1 && index.size(0) == batch, "index must be (B,), not ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index must be int64, not ", index.scalar_type());
  TORCH_CHECK_VALUE(opening > 0 && opening % 2 == 1, "opening must be odd and positive, not ", opening);
  TORCH_CHECK_VALUE(closing > 0 && closing % 2 == 1, "closing must be odd and positive, not ", closing);
  TORCH_CHECK_VALUE(far_distance >= 0, "far_distance must not be negative, not ", far_distance);
  TORCH_CHECK_VALUE(far_iterations >= 0, "far_iterations must not be negative, not ", far_iterations);
  for (const Tensor& tensor : {index, flow_up, flow_down})
    TORCH_CHECK_VALUE(tensor.device() == labels.device(), "index, flow_up and flow_down must be on labels' device");
  return {batch, height, width, depth};
}

// (B, C, *spatial) of a floating dtype.
inline void check_maps(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.is_floating_point(), name, " must be of a floating dtype, not ", tensor.scalar_type());
  TORCH_CHECK_VALUE(
      tensor.dim() >= 3 && tensor.size(1) >= 1, name, " must be (B, C, *spatial) with C >= 1, not ", tensor.sizes());
}

// (B, *spatial) of the maps' sizes where `channels` is 0, else (B, channels, *spatial).
inline void check_goes_with(
    const Tensor& tensor, const char* name, const Tensor& maps, const char* source, int64_t channels = 0) {
  std::vector<int64_t> shape = maps.sizes().vec();
  if (channels > 0)
    shape[1] = channels;
  else
    shape.erase(shape.begin() + 1);
  const at::IntArrayRef wanted = shape;
  TORCH_CHECK_VALUE(
      tensor.sizes() == wanted, name, " must be of shape ", wanted, " for this ", source, ", not ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == maps.device(), name, " must be on ", source, "'s device");
}

inline void check_accumulate_softmax(const Tensor& total, const Tensor& logits) {
  check_maps(logits, "logits");
  const auto wanted = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(total.scalar_type() == wanted, "total must be ", wanted, " for these logits");
  check_goes_with(total, "total", logits, "logits", logits.size(1));
}

inline void check_uncertainty_mask(const Tensor& total, int64_t passes, const Tensor& keep) {
  check_maps(total, "total");
  TORCH_CHECK_TYPE(
      total.scalar_type() == at::kFloat || total.scalar_type() == at::kDouble, "total must be float32 or float64");
  TORCH_CHECK_VALUE(
      total.numel() / total.size(1) < int64_t(1) << 32, "total must hold fewer than 2^32 voxels, not ",
      total.numel() / total.size(1));  // a histogram's bin is 32 bits wide
  TORCH_CHECK_VALUE(passes >= 1, "passes must be at least 1, not ", passes);
  TORCH_CHECK_TYPE(keep.scalar_type() == at::kLong, "keep must be int64, not ", keep.scalar_type());
  TORCH_CHECK_VALUE(keep.dim() == 0, "keep must have no dimensions, not be ", keep.sizes());
  TORCH_CHECK_VALUE(keep.device() == total.device(), "keep must be on total's device");
}

inline void check_select_prototypes(const Tensor& logits, int64_t k) {
  check_maps(logits, "logits");
  TORCH_CHECK_VALUE(k >= 0, "k must not be negative, not ", k);
}

inline void check_contrastive_loss(
    const Tensor& a, const Tensor& b, const Tensor& n, const Tensor& logits_a, const Tensor& logits_n, int64_t k,
    double temperature) {
  check_maps(a, "a");
  check_goes_with(b, "b", a, "a", a.size(1));
  check_goes_with(n, "n", a, "a", a.size(1));
  TORCH_CHECK_TYPE(b.scalar_type() == a.scalar_type(), "b must be of a's dtype, not ", b.scalar_type());
  TORCH_CHECK_TYPE(n.scalar_type() == a.scalar_type(), "n must be of a's dtype, not ", n.scalar_type());
  check_maps(logits_a, "logits_a");
  check_goes_with(logits_a, "logits_a", a, "a", logits_a.size(1));
  check_maps(logits_n, "logits_n");
  check_goes_with(logits_n, "logits_n", logits_a, "logits_a", logits_a.size(1));
  TORCH_CHECK_VALUE(k >= 0, "k must not be negative, not ", k);
  TORCH_CHECK_VALUE(temperature > 0, "temperature must be above 0, not ", temperature);
}

// `weight` is the mask (bool) of masked_ce_dice or the weight (floating) of weighted_ce_dice.
inline void check_ce_dice(const Tensor& logits, const Tensor& target, const Tensor& weight, bool masked) {
  const char* const name = masked ? "mask" : "weight";
  check_maps(logits, "logits");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64, not ", target.scalar_type());
  check_goes_with(target, "target", logits, "logits");
  TORCH_CHECK_TYPE(
      masked ? weight.scalar_type() == at::kBool : weight.is_floating_point(), name, " must be ",
      masked ? "bool" : "of a floating dtype", ", not ", weight.scalar_type());
  check_goes_with(weight, name, logits, "logits");
  TORCH_CHECK_VALUE(masked || logits.size(1) >= 2, "logits must have a background and at least one foreground channel");
}

inline void check_ce_dice_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& weight, const Tensor& sums,
    bool masked) {
  check_ce_dice(logits, target, weight, masked);
  TORCH_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == (masked ? 3 : 2), "grad must be one number a loss");
  TORCH_CHECK_TYPE(sums.scalar_type() == at::kDouble, "sums must be what the forward pass returned");
  TORCH_CHECK_VALUE(
      sums.dim() == 1 && sums.size(0) == 2 * logits.size(0) + 4 * logits.size(1) && sums.device() == logits.device(),
      "sums must be what the forward pass returned for these logits");
}

inline void check_like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  TORCH_CHECK_VALUE(tensor.sizes() == other.sizes(), name, " must be of ", other_name, "'s shape, not ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), name, " must be of ", other_name, "'s dtype, not ",
                   tensor.scalar_type());
}

inline void check_batch_norm_relu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& skip,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& variance) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(1) > 0, "x must be (B, C, *spatial) with C >= 1, not ", x.sizes());
  TORCH_CHECK_VALUE(mean.has_value() == variance.has_value(), "mean and variance go together: both, or neither");
  const auto is_channels = [&](const char* name, const Tensor& t) {
    TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == x.size(1), name, " must be (C,), not ", t.sizes());
    TORCH_CHECK_TYPE(t.is_floating_point(), name, " must be of a floating dtype, not ", t.scalar_type());
  };
  is_channels("weight", weight);
  is_channels("bias", bias);
  if (mean) is_channels("mean", *mean), is_channels("variance", *variance);
  if (!skip) return;
  check_like("skip", *skip, "x", x);
}

inline void check_bias_leaky_relu(const char* name, const Tensor& maps, const Tensor& bias, double slope) {
  TORCH_CHECK_VALUE(maps.dim() >= 2 && maps.size(1) > 0, name, " must be (B, C, *spatial) with C >= 1, not ",
                    maps.sizes());
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == maps.size(1), "bias must be (C,), not ", bias.sizes());
  TORCH_CHECK_TYPE(bias.is_floating_point(), "bias must be of a floating dtype, not ", bias.scalar_type());
  TORCH_CHECK_VALUE(slope >= 0 && std::isfinite(slope), "slope must be a finite number of at least 0, not ", slope);
}

// What all convolutions on a CPU ask of their maps and weights but for the shapes.
inline void check_maps_and_weight(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                   "x must be float32 or bfloat16, not ", x.scalar_type());
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat, "weight must be float32, not ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.device() == x.device(), "weight must be on x's device");
}

// Numbers of channels that minimal filtering takes, of slices from 16 on.
inline bool are_filtered(int64_t channels) {
  return channels >= 8 && channels <= 128 && (channels & (channels - 1)) == 0;
}

inline void check_convolve(const Tensor& x, const Tensor& weight) {
  check_maps_and_weight(x, weight);
  TORCH_CHECK_VALUE(x.dim() == 5 || (x.dim() == 4 && x.size(1) >= 16),
                    "x must be (B, C, H, W, D), or (B, C, H, W) with 16 channels or more, not ", x.sizes());
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(
      channels == 1 || are_filtered(channels),
      "x must have 1, 8, 16, 32, 64 or 128 channels, not ", channels);
  for (int64_t axis = 2; axis < x.dim(); ++axis)
    TORCH_CHECK_VALUE(x.size(axis) > 0, "x must have voxels, not be ", x.sizes());
  TORCH_CHECK_VALUE(weight.dim() == x.dim(), "weight must be (O, C, 3, 3, 3), or of pixels (O, C, 3, 3), not ",
                    weight.sizes());
  std::vector<int64_t> wanted(x.dim(), 3);
  wanted[0] = channels == 1 ? weight.size(0) : channels, wanted[1] = channels;
  TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(0) % 8 == 0, "weight must have outputs in multiples of 8");
  TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(wanted), "weight must be ", at::IntArrayRef(wanted),
                    " for this x, not ", weight.sizes());
}

inline void check_convolve_transposed(const Tensor& x, const Tensor& weight) {
  check_maps_and_weight(x, weight);
  TORCH_CHECK_VALUE(x.dim() == 5, "x must be (B, I, H, W, D), not ", x.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 5, "weight must be (I, O, 2, 2, 2), not ", weight.sizes());
  TORCH_CHECK_VALUE(x.size(2) > 0 && x.size(3) > 0 && x.size(4) > 0, "x must have voxels, not be ", x.sizes());
  TORCH_CHECK_VALUE(
      weight.numel() > 0 && weight.size(0) % 2 == 0 && weight.size(1) % 8 == 0,
      "weight must have an even number of input channels, and output channels in multiples of 8, not be ",
      weight.sizes());
  const std::array<int64_t, 5> shape{x.size(1), weight.size(1), 2, 2, 2};
  const at::IntArrayRef wanted = shape;
  TORCH_CHECK_VALUE(weight.sizes() == wanted, "weight must be ", wanted, " for this x, not ", weight.sizes());
}

inline void check_convolve_upsampled(const Tensor& x, const Tensor& skip, const Tensor& weight) {
  check_maps_and_weight(x, weight);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) > 0 && x.size(1) % 16 == 0 && x.size(2) > 0 && x.size(3) > 0,
                    "x must be (B, I, H, W) with pixels and an I in multiples of 16, not ", x.sizes());
  TORCH_CHECK_TYPE(skip.scalar_type() == x.scalar_type(), "skip must be of x's dtype");
  TORCH_CHECK_VALUE(skip.device() == x.device(), "skip must be on x's device");
  TORCH_CHECK_VALUE(skip.dim() == 4 && skip.size(0) == x.size(0) && skip.size(1) > 0 && skip.size(1) % 2 == 0 &&
                        skip.size(2) == 2 * x.size(2) && skip.size(3) == 2 * x.size(3),
                    "skip must be (B, S, 2 H, 2 W) of x's B, H and W with an even S, not ", skip.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) > 0 && weight.size(0) % 16 == 0,
                    "weight must have outputs in multiples of 16, not be ", weight.sizes());
  const std::array<int64_t, 4> shape{weight.size(0), x.size(1) + skip.size(1), 3, 3};
  const at::IntArrayRef wanted = shape;
  TORCH_CHECK_VALUE(weight.sizes() == wanted, "weight must be ", wanted, " for this x and skip, not ", weight.sizes());
}

inline void check_convolve_upsampled(
    const Tensor& x, const Tensor& skip, const Tensor& weight, const Tensor& bias, double slope) {
  check_convolve_upsampled(x, skip, weight);
  TORCH_CHECK_TYPE(bias.scalar_type() == at::kFloat, "bias must be float32, not ", bias.scalar_type());
  TORCH_CHECK_VALUE(bias.device() == x.device(), "bias must be on x's device");
  check_bias_leaky_relu("weight", weight.transpose(0, 1), bias, slope);
}

inline void check_convolve_upsampled_backward(
    const Tensor& grad, const Tensor& y, const Tensor& x, const Tensor& skip, const Tensor& weight) {
  check_convolve_upsampled(x, skip, weight);
  const std::array<int64_t, 4> shape{x.size(0), weight.size(0), skip.size(2), skip.size(3)};
  const at::IntArrayRef wanted = shape;
  TORCH_CHECK_VALUE(y.sizes() == wanted, "y must be ", wanted, " for this x and weight, not ", y.sizes());
  TORCH_CHECK_TYPE(y.scalar_type() == x.scalar_type(), "y must be of x's dtype");
  TORCH_CHECK_VALUE(y.device() == x.device(), "y must be on x's device");
  check_like("grad", grad, "y", y);
}

inline void check_flow_head_weight(const Tensor& x, const Tensor& weight) {
  check_maps_and_weight(x, weight);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == 16, "x must be (B, 16, H, W), not ", x.sizes());
  TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef({2, 16, 3, 3}), "weight must be (2, 16, 3, 3), not ",
                    weight.sizes());
}

inline void check_flow_head(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_flow_head_weight(x, weight);
  TORCH_CHECK_TYPE(bias.scalar_type() == at::kFloat, "bias must be float32, not ", bias.scalar_type());
  TORCH_CHECK_VALUE(bias.sizes() == at::IntArrayRef({2}), "bias must be (2,), not ", bias.sizes());
  TORCH_CHECK_VALUE(bias.device() == x.device(), "bias must be on x's device");
}

inline void check_flow_head_backward(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  check_flow_head_weight(x, weight);
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat, "grad must be float32, not ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({x.size(0), 2, x.size(2), x.size(3)}),
                    "grad must be (B, 2, H, W) of x's B, H, W, not ", grad.sizes());
  TORCH_CHECK_VALUE(grad.device() == x.device(), "grad must be on x's device");
}

}  // namespace spss
