// warp and warp_backward on the CPU: rows of voxels vectorised, rows or volumes in parallel.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string_view>

#include "checks.h"
#include "cpu/memory.h"
#include "cpu/multiarch.h"
#include "math/warp.h"

namespace spss {
namespace {



// The spatial axes of one batch element, strides in elements. A row is a line of voxels along the last axis.
template <int nd>
struct Grid {
  std::array<int64_t, nd> sides, image_strides, shift_strides;
  int64_t channels, image_channel, shift_axis;  // strides of the image's channels and of the displacement's components
  int64_t rows, row_length, voxels;

  Grid(const Tensor& image, const Tensor& displacement)
      : channels(image.size(1)),
        image_channel(image.stride(1)),
        shift_axis(displacement.stride(1)),
        rows(1),
        row_length(image.size(-1)),
        voxels(1) {
    for (int axis = 0; axis < nd; ++axis) {
      sides[axis] = image.size(2 + axis);
      image_strides[axis] = image.stride(2 + axis);
      shift_strides[axis] = displacement.stride(2 + axis);
      voxels *= sides[axis];
      if (axis < nd - 1) rows *= sides[axis];
    }
  }

  std::array<int64_t, nd> position(int64_t row) const {
    std::array<int64_t, nd> at{};
    for (int axis = nd - 2; axis >= 0; --axis) {
      at[axis] = row % sides[axis];
      row /= sides[axis];
    }
    return at;
  }
};

// What one row needs: its place, its displacements (component i at shift + i * shift_axis) and the image's axes.
template <typename T, typename Index, int nd>
struct Row {
  T origin[nd];
  Axis<T, Index> axes[nd];
  const T* shift;
  int64_t shift_axis, shift_step;
  int64_t length;

  Row(const Grid<nd>& grid, const T* displacement, int64_t row) : shift(displacement) {
    const auto at = grid.position(row);
    for (int axis = 0; axis < nd; ++axis) {
      origin[axis] = static_cast<T>(at[axis]);
      axes[axis] = Axis<T, Index>(grid.sides[axis], grid.image_strides[axis]);
      shift += at[axis] * grid.shift_strides[axis];
    }
    shift_axis = grid.shift_axis;
    shift_step = grid.shift_strides[nd - 1];
    length = grid.row_length;
  }
};

template <typename T, typename Index, int nd>
SPSS_HD T position_of(const Row<T, Index, nd>& row, int axis, int64_t j, int64_t step) {
  const T start = axis == nd - 1 ? row.origin[axis] + static_cast<T>(static_cast<int32_t>(j)) : row.origin[axis];
  return start + row.shift[axis * row.shift_axis + j * step];
}

template <bool border, typename T, typename Index, int nd>
SPSS_HD void find_corners(const Row<T, Index, nd>& row, int64_t j, int64_t step, Corner<T, Index>* corners) {
  for (int axis = 0; axis < nd; ++axis)
    corners[axis] = bilinear_corner<border>(position_of(row, axis, j, step), row.axes[axis]);
}

template <bool border, bool nearest, typename T, typename Index, int nd>
SPSS_HD T value_at(const Row<T, Index, nd>& row, const T* image, int64_t j, int64_t step) {
  if constexpr (nearest) {
    Index offset = 0;
    int inside = 1;
    for (int axis = 0; axis < nd; ++axis)
      offset += nearest_offset<border>(position_of(row, axis, j, step), row.axes[axis], inside);
    const T value = image[offset];
    return inside ? value : T(0);
  } else {
    Corner<T, Index> corners[nd];
    find_corners<border>(row, j, step, corners);
    return interpolate<0, nd>(image, corners, row.axes, lower<nd>(corners));
  }
}

template <bool border, bool nearest, typename T, typename Index, int nd>
SPSS_MULTIARCH void forward_row(const Row<T, Index, nd>& row, const T* __restrict image, T* __restrict out) {
  const Row<T, Index, nd> local = row;  // a copy the compiler knows nothing else can change
  if (local.shift_step == 1) {
    SPSS_SIMD
    for (int64_t j = 0; j < local.length; ++j) out[j] = value_at<border, nearest>(local, image, j, 1);
  } else {
    for (int64_t j = 0; j < local.length; ++j) out[j] = value_at<border, nearest>(local, image, j, local.shift_step);
  }
}

template <bool border, bool first, typename T, typename Index, int nd>
SPSS_HD void put_slopes(
    const Row<T, Index, nd>& row, const T* __restrict image, const T* __restrict grad, T* __restrict out,
    int64_t component, int64_t j, int64_t step) {
  Corner<T, Index> corners[nd];
  find_corners<border>(row, j, step, corners);
  const Jet<T, nd> jet = interpolate_jet<0, nd, T>(image, corners, row.axes, lower<nd>(corners));
  for (int axis = 0; axis < nd; ++axis) {
    const T value = grad[j] * jet.slope[axis];
    out[axis * component + j] = first ? value : out[axis * component + j] + value;
  }
}

// Adds grad * d image(p + u) / d u to the row's nd components, `component` apart; the first channel writes them.
template <bool border, bool first, typename T, typename Index, int nd>
SPSS_MULTIARCH void displacement_row(
    const Row<T, Index, nd>& row, const T* __restrict image, const T* __restrict grad, T* __restrict out,
    int64_t component) {
  const Row<T, Index, nd> local = row;
  if (local.shift_step == 1) {
    SPSS_SIMD
    for (int64_t j = 0; j < local.length; ++j) put_slopes<border, first>(local, image, grad, out, component, j, 1);
  } else {
    for (int64_t j = 0; j < local.length; ++j)
      put_slopes<border, first>(local, image, grad, out, component, j, local.shift_step);
  }
}

constexpr int kChunk = 64;

template <typename T, typename Index, int nd>
struct Chunk {
  alignas(64) Index offset[kChunk];
  alignas(64) T weight[nd][2][kChunk];

  template <bool border>
  SPSS_HD void put(const Row<T, Index, nd>& row, int64_t start, int64_t j, int64_t step) {
    Corner<T, Index> corners[nd];
    find_corners<border>(row, start + j, step, corners);
    offset[j] = lower<nd>(corners);
    for (int axis = 0; axis < nd; ++axis) {
      weight[axis][0][j] = corners[axis].weight0;
      weight[axis][1][j] = corners[axis].weight1;
    }
  }
};

// Adds one row's gradients to the voxels they came from. Offsets and weights come first, vectorised; the scattered sums
// that no vector unit has follow voxel by voxel.
template <bool border, bool nearest, typename T, typename Index, int nd>
SPSS_MULTIARCH void image_row(const Row<T, Index, nd>& row, const T* __restrict grad, T* __restrict out) {
  const Row<T, Index, nd> local = row;
  Chunk<T, Index, nd> chunk;
  for (int64_t start = 0; start < local.length; start += kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, local.length - start);
    if constexpr (nearest) {
      for (int64_t j = start; j < start + count; ++j) {
        Index to = 0;
        int inside = 1;
        for (int axis = 0; axis < nd; ++axis)
          to += nearest_offset<border>(position_of(local, axis, j, local.shift_step), local.axes[axis], inside);
        if (inside) out[to] += grad[j];
      }
      continue;
    }
    if (local.shift_step == 1) {
      SPSS_SIMD
      for (int64_t j = 0; j < count; ++j) chunk.template put<border>(local, start, j, 1);
    } else {
      for (int64_t j = 0; j < count; ++j) chunk.template put<border>(local, start, j, local.shift_step);
    }
    for (int64_t j = 0; j < count; ++j) {
      Corner<T, Index> corners[nd];
      for (int axis = 0; axis < nd; ++axis) {
        corners[axis].weight0 = chunk.weight[axis][0][j];
        corners[axis].weight1 = chunk.weight[axis][1][j];
      }
      T* const target = out + chunk.offset[j];
      spread<0, nd>(corners, local.axes, Index(0), grad[start + j], [&](Index to, T value) { target[to] += value; });
    }
  }
}

// Calls `run` with the compile-time choices of one call: padding, mode, dtype, index type, dimensions.
template <typename Run>
void choose(const Tensor& image, std::string_view mode, std::string_view padding, const Run& run) {
  int64_t extent = 0;
  for (int64_t axis = 2; axis < image.dim(); ++axis)
    extent += std::max<int64_t>(image.size(axis) - 1, 0) * image.stride(axis);
  const bool wide = extent > std::numeric_limits<int32_t>::max();
  const auto dimensions = [&](auto border, auto nearest, auto zero, auto index) {
    if (image.dim() == 4)
      run(border, nearest, zero, index, std::integral_constant<int, 2>());
    else
      run(border, nearest, zero, index, std::integral_constant<int, 3>());
  };
  const auto index = [&](auto border, auto nearest, auto zero) {
    wide ? dimensions(border, nearest, zero, int64_t()) : dimensions(border, nearest, zero, int32_t());
  };
  const auto dtype = [&](auto border, auto nearest) {
    image.scalar_type() == at::kDouble ? index(border, nearest, double()) : index(border, nearest, float());
  };
  const auto modes = [&](auto border) {
    mode == "nearest" ? dtype(border, std::true_type()) : dtype(border, std::false_type());
  };
  padding == "border" ? modes(std::true_type()) : modes(std::false_type());
}

// bf16 and fp16 are widened first: the scattered reads then convert nothing.
Tensor widened(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble || tensor.scalar_type() == at::kFloat ? tensor : tensor.to(at::kFloat);
}

constexpr int64_t kGrain = 4096;  // voxels below which a thread is not worth waking

Tensor warp(const Tensor& image, const Tensor& displacement, std::string_view mode, std::string_view padding) {
  check_warp(image, displacement, mode, padding);
  const Tensor source = widened(image);
  Tensor out = with_huge_pages(at::empty(image.sizes(), source.options()));
  if (out.numel() == 0) return out.to(image.scalar_type());
  choose(source, mode, padding, [&](auto border, auto nearest, auto zero, auto index, auto dimensions) {
    using T = decltype(zero);
    constexpr int nd = decltype(dimensions)::value;
    const Grid<nd> grid(source, displacement);
    const T* values = source.const_data_ptr<T>();
    const T* shifts = displacement.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    const int64_t grain = std::max<int64_t>(kGrain / grid.row_length, 1);
    at::parallel_for(0, image.size(0) * grid.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / grid.rows, r = i % grid.rows;
        const Row<T, decltype(index), nd> row(grid, shifts + b * displacement.stride(0), r);
        for (int64_t c = 0; c < grid.channels; ++c)
          forward_row<border.value, nearest.value>(
              row, values + b * source.stride(0) + c * grid.image_channel,
              result + (b * grid.channels + c) * grid.voxels + r * grid.row_length);
      }
    });
  });
  return out.to(image.scalar_type());
}

std::tuple<Tensor, Tensor> warp_backward(
    const Tensor& grad, const Tensor& image, const Tensor& displacement, std::string_view mode,
    std::string_view padding, bool image_grad, bool displacement_grad) {
  check_warp_backward(grad, image, displacement, mode, padding);
  const Tensor source = widened(image), upstream = widened(grad).contiguous();
  Tensor for_image = image_grad ? with_huge_pages(at::empty(image.sizes(), source.options())).zero_()
                                : at::empty({0}, source.options());
  const bool slopes = displacement_grad && mode != "nearest" && grad.numel() > 0;
  Tensor for_displacement = displacement_grad ? at::empty(displacement.sizes(), displacement.options())
                                              : at::empty({0}, displacement.options());
  if (slopes)
    with_huge_pages(for_displacement);
  else
    for_displacement.zero_();
  if (grad.numel() == 0) return {for_image.to(image.scalar_type()), for_displacement};
  if (slopes) {
    choose(source, mode, padding, [&](auto border, auto, auto zero, auto index, auto dimensions) {
      using T = decltype(zero);
      constexpr int nd = decltype(dimensions)::value;
      const Grid<nd> grid(source, displacement);
      const T* values = source.const_data_ptr<T>();
      const T* shifts = displacement.const_data_ptr<T>();
      const T* grads = upstream.const_data_ptr<T>();
      T* result = for_displacement.mutable_data_ptr<T>();
      const int64_t grain = std::max<int64_t>(kGrain / grid.row_length, 1);
    at::parallel_for(0, image.size(0) * grid.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / grid.rows, r = i % grid.rows;
          const Row<T, decltype(index), nd> row(grid, shifts + b * displacement.stride(0), r);
          const T* from = values + b * source.stride(0);
          const T* up = grads + b * grid.channels * grid.voxels + r * grid.row_length;
          T* to = result + b * nd * grid.voxels + r * grid.row_length;
          displacement_row<border.value, true>(row, from, up, to, grid.voxels);
          for (int64_t c = 1; c < grid.channels; ++c)
            displacement_row<border.value, false>(
                row, from + c * grid.image_channel, up + c * grid.voxels, to, grid.voxels);
        }
      });
    });
  }
  if (image_grad) {
    choose(for_image, mode, padding, [&](auto border, auto nearest, auto zero, auto index, auto dimensions) {
      using T = decltype(zero);
      constexpr int nd = decltype(dimensions)::value;
      const Grid<nd> grid(for_image, displacement);
      const T* shifts = displacement.const_data_ptr<T>();
      const T* grads = upstream.const_data_ptr<T>();
      T* result = for_image.mutable_data_ptr<T>();
      // Rows scatter anywhere in their volume, so a volume is one thread's: no atomics, and the sums' order is fixed.
      at::parallel_for(0, image.size(0) * grid.channels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t r = 0; r < grid.rows; ++r) {
            const Row<T, decltype(index), nd> row(grid, shifts + i / grid.channels * displacement.stride(0), r);
            const T* up = grads + i * grid.voxels + r * grid.row_length;
            image_row<border.value, nearest.value>(row, up, result + i * grid.voxels);
          }
      });
    });
  }
  return {for_image.to(image.scalar_type()), for_displacement};
}

}  // namespace

TORCH_LIBRARY_IMPL(spss_fast, CPU, library) {
  library.impl("warp", &warp);
  library.impl("warp_backward", &warp_backward);
}

}  // namespace spss
