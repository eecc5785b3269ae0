// What every backend demands of an operator's arguments: the public functions check first and say more, these keep
// direct calls of torch.ops.spss_fast.* and C++ callers from reading out of bounds.
#pragma once

#include <ATen/ATen.h>

#include <array>
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

// Returns B, H, W, D.
inline std::array<int64_t, 4> check_propagate(
    const Tensor& labels, const Tensor& index, const Tensor& flow_up, const Tensor& flow_down, int64_t opening,
    int64_t closing, int64_t far_distance, int64_t far_iterations) {
  TORCH_CHECK_VALUE(labels.dim() == 3, "labels must be (B, H, W), not ", labels.sizes());
  TORCH_CHECK_VALUE(flow_up.dim() == 5, "flow_up must be (B, D - 1, 2, H, W), not ", flow_up.sizes());
  const int64_t batch = labels.size(0), height = labels.size(1), width = labels.size(2), depth = flow_up.size(1) + 1;
  const std::vector<int64_t> wanted{batch, depth - 1, 2, height, width};
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

}  // namespace spss
