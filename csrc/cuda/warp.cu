// warp and warp_backward on the GPU: a thread a voxel, all channels in turn; csrc/math/warp.h is the arithmetic.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/launch.h"
#include "math/warp.h"

namespace spss {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Index, int nd>
struct Axes {
  Axis<T, Index> image[nd];
  Axis<T, Index> dense[nd];  // of a contiguous field of the same sides
};

// The position p + u(p) of a voxel.
template <typename T, int nd>
__device__ void find_position(const WarpGeometry& geometry, const T* shift, int64_t voxel, T* position) {
  int64_t offset = 0;
  int64_t at[nd];
#pragma unroll
  for (int axis = nd - 1; axis >= 0; --axis) {
    const auto rest = static_cast<uint32_t>(voxel), side = static_cast<uint32_t>(geometry.sides[axis]);
    if (geometry.voxels <= std::numeric_limits<uint32_t>::max()) {  // 32-bit divisions are several times cheaper
      at[axis] = rest % side;
      voxel = rest / side;
    } else {
      at[axis] = voxel % geometry.sides[axis];
      voxel /= geometry.sides[axis];
    }
    offset += at[axis] * geometry.shift_strides[axis];
  }
#pragma unroll
  for (int axis = 0; axis < nd; ++axis)
    position[axis] = static_cast<T>(at[axis]) + shift[offset + axis * geometry.shift_axis];
}

template <typename Image, typename T, typename Index, int nd, bool border, bool nearest>
__global__ void __launch_bounds__(kThreads)
    forward(WarpGeometry geometry, Axes<T, Index, nd> axes, const Image* image, const T* shift, Image* out) {
  const int64_t voxel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (voxel >= geometry.voxels) return;
  for (int64_t b = blockIdx.y; b < geometry.batch; b += gridDim.y) {
    T position[nd];
    find_position<T, nd>(geometry, shift + b * geometry.shift_batch, voxel, position);
    const Image* source = image + b * geometry.image_batch;
    Image* target = out + b * geometry.channels * geometry.voxels + voxel;
    if constexpr (nearest) {
      Index offset = 0;
      int inside = 1;
#pragma unroll
      for (int axis = 0; axis < nd; ++axis) offset += nearest_offset<border>(position[axis], axes.image[axis], inside);
      for (int64_t c = 0; c < geometry.channels; ++c)
        target[c * geometry.voxels] = inside ? source[c * geometry.image_channel + offset] : convert<Image>(T(0));
    } else {
      Corner<T, Index> corners[nd];
#pragma unroll
      for (int axis = 0; axis < nd; ++axis) corners[axis] = bilinear_corner<border>(position[axis], axes.image[axis]);
      const Index offset = lower<nd>(corners);
      for (int64_t c = 0; c < geometry.channels; ++c)
        target[c * geometry.voxels] = convert<Image>(
            interpolate<0, nd, T>(source + c * geometry.image_channel, corners, axes.image, offset));
    }
  }
}

// Adds to a sum that many threads share: as it is, or in whole units of 1 / scale, which makes the order irrelevant.
template <typename T>
struct FloatSum {
  T* to;
  __device__ void operator()(int64_t offset, T value) const { atomicAdd(to + offset, value); }
};

template <typename T>
struct FixedSum {
  unsigned long long* to;
  double scale;
  __device__ void operator()(int64_t offset, T value) const {
    atomicAdd(to + offset, static_cast<unsigned long long>(__double2ll_rn(static_cast<double>(value) * scale)));
  }
};

template <typename Image, typename T, typename Index, int nd, bool border, bool nearest, bool fixed>
__global__ void __launch_bounds__(kThreads) backward(
    WarpGeometry geometry, Axes<T, Index, nd> axes, const Image* grad, const Image* image, const T* shift,
    void* image_grad, const double* scale, T* shift_grad) {
  const int64_t voxel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (voxel >= geometry.voxels) return;
  for (int64_t b = blockIdx.y; b < geometry.batch; b += gridDim.y) {
    T position[nd];
    find_position<T, nd>(geometry, shift + b * geometry.shift_batch, voxel, position);
    const Image* source = image + b * geometry.image_batch;
    T slope[nd] = {};
    for (int64_t c = 0; c < geometry.channels; ++c) {
      const int64_t plane = (b * geometry.channels + c) * geometry.voxels;
      const T upstream = convert<T>(grad[plane + voxel]);
      if (image_grad != nullptr) {
        std::conditional_t<fixed, FixedSum<T>, FloatSum<T>> sum;
        if constexpr (fixed)
          sum = {static_cast<unsigned long long*>(image_grad) + plane, *scale};
        else
          sum = {static_cast<T*>(image_grad) + plane};
        if constexpr (nearest) {
          Index offset = 0;
          int inside = 1;
#pragma unroll
          for (int axis = 0; axis < nd; ++axis)
            offset += nearest_offset<border>(position[axis], axes.dense[axis], inside);
          if (inside) sum(offset, upstream);
        } else {
          Corner<T, Index> corners[nd];
#pragma unroll
          for (int axis = 0; axis < nd; ++axis)
            corners[axis] = bilinear_corner<border>(position[axis], axes.dense[axis]);
          spread<0, nd>(corners, axes.dense, lower<nd>(corners), upstream, [&](Index offset, T value) {
            if (value != T(0)) sum(offset, value);
          });
        }
      }
      if constexpr (!nearest) {
        if (shift_grad != nullptr) {
          Corner<T, Index> corners[nd];
#pragma unroll
          for (int axis = 0; axis < nd; ++axis)
            corners[axis] = bilinear_corner<border>(position[axis], axes.image[axis]);
          const Jet<T, nd> jet = interpolate_jet<0, nd, T>(
              source + c * geometry.image_channel, corners, axes.image, lower<nd>(corners));
#pragma unroll
          for (int axis = 0; axis < nd; ++axis) slope[axis] += upstream * jet.slope[axis];
        }
      }
    }
    if (shift_grad != nullptr) {
#pragma unroll
      for (int axis = 0; axis < nd; ++axis)
        shift_grad[(b * nd + axis) * geometry.voxels + voxel] = slope[axis];
    }
  }
}

template <typename T, typename Index, int nd>
Axes<T, Index, nd> make_axes(const WarpGeometry& geometry) {
  Axes<T, Index, nd> axes;
  int64_t dense = 1;
  for (int axis = nd - 1; axis >= 0; --axis) {
    axes.image[axis] = Axis<T, Index>(geometry.sides[axis], geometry.image_strides[axis]);
    axes.dense[axis] = Axis<T, Index>(geometry.sides[axis], dense);
    dense *= geometry.sides[axis];
  }
  return axes;
}

// Calls `run` with the compile-time choices of one call: types, dimensions, padding, mode.
template <typename Run>
cudaError_t choose(const WarpGeometry& geometry, Dtype dtype, const Run& run) {
  int64_t extent = geometry.voxels;
  int64_t reach = 0;
  for (int axis = 0; axis < geometry.nd; ++axis) reach += (geometry.sides[axis] - 1) * geometry.image_strides[axis];
  const bool wide = std::max(extent, reach) > std::numeric_limits<int32_t>::max();
  const auto modes = [&](auto image, auto zero, auto index, auto nd) {
    const auto paddings = [&](auto nearest) {
      geometry.border ? run(image, zero, index, nd, std::true_type(), nearest)
                      : run(image, zero, index, nd, std::false_type(), nearest);
    };
    geometry.nearest ? paddings(std::true_type()) : paddings(std::false_type());
  };
  const auto dimensions = [&](auto image, auto zero, auto index) {
    geometry.nd == 2 ? modes(image, zero, index, std::integral_constant<int, 2>())
                     : modes(image, zero, index, std::integral_constant<int, 3>());
  };
  const auto indices = [&](auto image, auto zero) {
    wide ? dimensions(image, zero, int64_t()) : dimensions(image, zero, int32_t());
  };
  switch (dtype) {
    case Dtype::float32: indices(float(), float()); break;
    case Dtype::float64: indices(double(), double()); break;
    case Dtype::float16: indices(__half(), float()); break;
    case Dtype::bfloat16: indices(__nv_bfloat16(), float()); break;
  }
  return cudaGetLastError();
}

dim3 grid_of(const WarpGeometry& geometry) {
  return dim3(
      static_cast<unsigned>((geometry.voxels + kThreads - 1) / kThreads),
      static_cast<unsigned>(std::min<int64_t>(geometry.batch, 65535)));
}

}  // namespace

cudaError_t launch_warp(
    const WarpGeometry& geometry, Dtype dtype, const void* image, const void* displacement, void* out,
    cudaStream_t stream) {
  return choose(geometry, dtype, [&](auto type, auto zero, auto index, auto dimensions, auto border, auto nearest) {
    using Image = decltype(type);
    using T = decltype(zero);
    constexpr int nd = decltype(dimensions)::value;
    forward<Image, T, decltype(index), nd, decltype(border)::value, decltype(nearest)::value>
        <<<grid_of(geometry), kThreads, 0, stream>>>(
            geometry, make_axes<T, decltype(index), nd>(geometry), static_cast<const Image*>(image),
            static_cast<const T*>(displacement), static_cast<Image*>(out));
  });
}

cudaError_t launch_warp_backward(
    const WarpGeometry& geometry, Dtype dtype, const void* grad, const void* image, const void* displacement,
    void* image_grad, const double* scale, void* displacement_grad, cudaStream_t stream) {
  return choose(geometry, dtype, [&](auto type, auto zero, auto index, auto dimensions, auto border, auto nearest) {
    using Image = decltype(type);
    using T = decltype(zero);
    constexpr int nd = decltype(dimensions)::value;
    const auto launch = [&](auto fixed) {
      backward<Image, T, decltype(index), nd, decltype(border)::value, decltype(nearest)::value, decltype(fixed)::value>
          <<<grid_of(geometry), kThreads, 0, stream>>>(
              geometry, make_axes<T, decltype(index), nd>(geometry), static_cast<const Image*>(grad),
              static_cast<const Image*>(image), static_cast<const T*>(displacement), image_grad, scale,
              static_cast<T*>(displacement_grad));
    };
    scale != nullptr ? launch(std::true_type()) : launch(std::false_type());
  });
}

}  // namespace spss
