// The CUDA launchers, free of ATen: raw pointers, sizes in a struct, a stream. Each returns the launch's status.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "math/propagate_settings.h"

namespace spss {

enum class Dtype { float32, float64, float16, bfloat16 };

// A batch of images with nd spatial axes and their displacements; strides in elements. 2-D uses the first two of each.
struct WarpGeometry {
  int nd;
  int64_t batch, channels, voxels;
  int64_t sides[3], image_strides[3], shift_strides[3];
  int64_t image_batch, image_channel, shift_batch, shift_axis;
  bool border, nearest;
};

// `out` is contiguous, of the image's dtype; the displacement is float32, or float64 for a float64 image.
cudaError_t launch_warp(
    const WarpGeometry& geometry, Dtype dtype, const void* image, const void* displacement, void* out,
    cudaStream_t stream);

// `grad` is contiguous, of the image's dtype. `image_grad` (null: not wanted) is contiguous, zeroed, of the
// displacement's dtype, or int64 in units of 1 / *scale if `scale` (on the device) is given: sums that do not depend on
// their order. `displacement_grad` (null: not wanted) is contiguous; every element is written.
cudaError_t launch_warp_backward(
    const WarpGeometry& geometry, Dtype dtype, const void* grad, const void* image, const void* displacement,
    void* image_grad, const double* scale, void* displacement_grad, cudaStream_t stream);

struct PropagateGeometry {
  int64_t batch, height, width, depth;
};

// Bytes of device memory that launch_propagate needs at `scratch`; 0 where a slice fits into shared memory.
size_t propagate_scratch(const PropagateGeometry& geometry, int device);

// `labels` (B, H, W) bytes, `out` (B, H, W, D) zeroed bytes, flows contiguous (B, D - 1, 2, H, W). One launch, one
// block a volume and direction.
cudaError_t launch_propagate(
    const PropagateGeometry& geometry, const PostSettings& settings, Dtype dtype, const uint8_t* labels,
    const int64_t* index, const void* flow_up, const void* flow_down, uint8_t* out, void* scratch, int device,
    cudaStream_t stream);

struct HolesGeometry {
  int64_t batch;
  int height, width, depth;  // a volume has fewer than 2^31 - 1 voxels
};

// `labels` (B, H, W, D) bytes, `filled` a copy of them; `parent` and `count` are memory for B (H W D + 1) numbers,
// `tightest` holds the largest int B H W D times. Four launches a class.
cudaError_t launch_fill_holes(
    const HolesGeometry& geometry, int classes, const uint8_t* labels, uint8_t* filled, int* parent, int* count,
    int* tightest, cudaStream_t stream);

}  // namespace spss
