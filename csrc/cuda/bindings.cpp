// The CUDA operators' ATen side: checks, allocation, the current stream. With a CPU build of torch and the CUDA toolkit's
// headers it compiles as well, though nothing can run it there.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#if __has_include(<c10/cuda/impl/cuda_cmake_macros.h>)  // generated for CUDA builds only
#include <c10/cuda/CUDAStream.h>
#define SPSS_TORCH_HAS_CUDA
#endif

#include <algorithm>
#include <limits>

#include "checks.h"
#include "cuda/launch.h"

namespace spss {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
#ifdef SPSS_TORCH_HAS_CUDA
  return c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
#else
  const auto* guard = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
  return static_cast<cudaStream_t>(guard->getStream(tensor.device()).native_handle());
#endif
}

void launched(cudaError_t status, const char* name) {
  TORCH_CHECK(status == cudaSuccess, name, ": ", cudaGetErrorString(status));
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kHalf: return Dtype::float16;
    case at::kBFloat16: return Dtype::bfloat16;
    default: TORCH_CHECK_TYPE(false, "no CUDA kernel for ", tensor.scalar_type());
  }
}

WarpGeometry geometry_of(
    const Tensor& image, const Tensor& displacement, std::string_view mode, std::string_view padding) {
  WarpGeometry geometry{};
  geometry.nd = static_cast<int>(image.dim()) - 2;
  geometry.batch = image.size(0);
  geometry.channels = image.size(1);
  geometry.voxels = 1;
  for (int axis = 0; axis < geometry.nd; ++axis) {
    geometry.sides[axis] = image.size(2 + axis);
    geometry.image_strides[axis] = image.stride(2 + axis);
    geometry.shift_strides[axis] = displacement.stride(2 + axis);
    geometry.voxels *= image.size(2 + axis);
  }
  geometry.image_batch = image.stride(0);
  geometry.image_channel = image.stride(1);
  geometry.shift_batch = displacement.stride(0);
  geometry.shift_axis = displacement.stride(1);
  geometry.border = padding == "border";
  geometry.nearest = mode == "nearest";
  return geometry;
}

Tensor warp(const Tensor& image, const Tensor& displacement, std::string_view mode, std::string_view padding) {
  check_warp(image, displacement, mode, padding);
  const c10::OptionalDeviceGuard guard(image.device());
  Tensor out = at::empty(image.sizes(), image.options());
  if (out.numel() == 0) return out;
  launched(
      launch_warp(
          geometry_of(image, displacement, mode, padding), dtype_of(image), image.const_data_ptr(),
          displacement.const_data_ptr(), out.mutable_data_ptr(), current_stream(image)),
      "warp");
  return out;
}

std::tuple<Tensor, Tensor> warp_backward(
    const Tensor& grad, const Tensor& image, const Tensor& displacement, std::string_view mode,
    std::string_view padding, bool image_grad, bool displacement_grad) {
  check_warp_backward(grad, image, displacement, mode, padding);
  const c10::OptionalDeviceGuard guard(image.device());
  Tensor for_displacement = displacement_grad ? at::empty(displacement.sizes(), displacement.options())
                                              : at::empty({0}, displacement.options());
  if (!image_grad && !displacement_grad) return {at::empty({0}, image.options()), for_displacement};
  const Tensor upstream = grad.contiguous();
  const bool fixed = image_grad && grad.numel() > 0 && at::globalContext().deterministicAlgorithms();
  Tensor sums, scale;
  if (image_grad) sums = at::zeros(image.sizes(), fixed ? image.options().dtype(at::kLong) : displacement.options());
  if (grad.numel() > 0) {
    const WarpGeometry geometry = geometry_of(image, displacement, mode, padding);
    if (fixed)  // units so fine that no sum of a volume's gradients leaves 63 bits
      scale = upstream.abs().amax().to(at::kDouble).clamp_min(1e-300).mul(static_cast<double>(geometry.voxels))
                  .reciprocal().mul(0x1p62);
    launched(
        launch_warp_backward(
            geometry, dtype_of(image), upstream.const_data_ptr(), image.const_data_ptr(),
            displacement.const_data_ptr(), image_grad ? sums.mutable_data_ptr() : nullptr,
            fixed ? scale.const_data_ptr<double>() : nullptr,
            displacement_grad ? for_displacement.mutable_data_ptr() : nullptr, current_stream(image)),
        "warp_backward");
  } else if (displacement_grad) {
    for_displacement.zero_();  // no channels
  }
  if (!image_grad) return {at::empty({0}, image.options()), for_displacement};
  return {(fixed ? sums / scale : sums).to(image.scalar_type()), for_displacement};
}

Tensor propagate(
    const Tensor& labels, const Tensor& index, const Tensor& flow_up, const Tensor& flow_down, int64_t opening,
    int64_t closing, int64_t far_distance, int64_t far_iterations) {
  const auto [batch, height, width, depth] =
      check_propagate(labels, index, flow_up, flow_down, opening, closing, far_distance, far_iterations);
  const c10::OptionalDeviceGuard guard(labels.device());
  Tensor out = at::zeros({batch, height, width, depth}, labels.options().dtype(at::kByte));
  if (out.numel() == 0) return out;
  const PropagateGeometry geometry{batch, height, width, depth};
  const Tensor given = labels.gt(0).contiguous(), starts = index.contiguous();
  const Tensor up = flow_up.contiguous(), down = flow_down.contiguous();
  const int device = labels.device().index();
  const Tensor scratch =
      at::empty({static_cast<int64_t>(propagate_scratch(geometry, device))}, labels.options().dtype(at::kByte));
  launched(
      launch_propagate(
          geometry, post_settings(height, width, depth, opening, closing, far_distance, far_iterations), dtype_of(up),
          static_cast<const uint8_t*>(given.const_data_ptr()), starts.const_data_ptr<int64_t>(), up.const_data_ptr(),
          down.const_data_ptr(), out.mutable_data_ptr<uint8_t>(), scratch.mutable_data_ptr(), device,
          current_stream(labels)),
      "propagate");
  return out;
}

Tensor fill_holes(const Tensor& labels, int64_t classes) {
  check_fill_holes(labels, classes);
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  const int64_t voxels = labels.size(1) * labels.size(2) * labels.size(3);
  TORCH_CHECK_VALUE(voxels < kMost, "a volume of labels must have fewer than ", kMost, " voxels, not ", voxels);
  const c10::OptionalDeviceGuard guard(labels.device());
  const Tensor given = labels.contiguous();
  Tensor filled = given.clone();
  if (filled.numel() == 0 || classes == 1) return filled;
  const auto numbers = labels.options().dtype(at::kInt);
  const Tensor parent = at::empty({labels.size(0), voxels + 1}, numbers), count = at::empty_like(parent);
  const Tensor tightest = at::full(labels.sizes(), kMost, numbers);
  const HolesGeometry geometry{
      labels.size(0), static_cast<int>(labels.size(1)), static_cast<int>(labels.size(2)),
      static_cast<int>(labels.size(3))};
  launched(
      launch_fill_holes(
          geometry, static_cast<int>(std::min<int64_t>(classes, 256)), given.const_data_ptr<uint8_t>(),
          filled.mutable_data_ptr<uint8_t>(), parent.mutable_data_ptr<int>(), count.mutable_data_ptr<int>(),
          tightest.mutable_data_ptr<int>(), current_stream(labels)),
      "fill_holes");
  return filled;
}

}  // namespace

TORCH_LIBRARY_IMPL(spss_fast, CUDA, library) {
  library.impl("warp", &warp);
  library.impl("warp_backward", &warp_backward);
  library.impl("propagate", &propagate);
  library.impl("fill_holes", &fill_holes);
}

}  // namespace spss
