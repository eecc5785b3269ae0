// The rows of warp and warp_backward on the CPU: scattered reads in scalar loops, the arithmetic vectorised.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstring>

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

  Grid(const at::Tensor& image, const at::Tensor& displacement)
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

  // Of voxel j along one axis, where the displacements lie side by side.
  SPSS_HD T position(int axis, int64_t j) const {
    const T start = axis == nd - 1 ? origin[axis] + static_cast<T>(static_cast<int32_t>(j)) : origin[axis];
    return start + shift[axis * shift_axis + j];
  }
};

template <bool border, typename T, typename Index, int nd>
SPSS_HD Index nearest_corner(const Row<T, Index, nd>& row, int64_t j, int& inside) {
  Index offset = 0;
  for (int axis = 0; axis < nd; ++axis) offset += nearest_offset<border>(row.position(axis, j), row.axes[axis], inside);
  return offset;
}

template <bool border, typename T, typename Index, int nd>
SPSS_HD void find_corners(const Row<T, Index, nd>& row, int64_t j, Corner<T, Index>* corners) {
  for (int axis = 0; axis < nd; ++axis) corners[axis] = bilinear_corner<border>(row.position(axis, j), row.axes[axis]);
}

template <bool border, typename T, typename Index, int nd>
SPSS_HD Index lower_corner(const Row<T, Index, nd>& row, int64_t j) {
  Corner<T, Index> corners[nd];
  find_corners<border>(row, j, corners);
  return lower<nd>(corners);
}

constexpr int kChunk = 128;  // voxels whose corners are collected at a time, in the first-level cache

// A stretch of a row. Its scattered reads are a scalar loop of their own, two neighbours along the last axis in one
// load, which is measured to be faster than gather instructions. The vectorised loops then read `values` where they
// would read the image, through axes that describe how it lies: the arithmetic stays that of math/warp.h.
//
// What a vectorised loop does for a voxel is a function of its own: GCC gives arrays declared in the body of an omp
// simd loop a copy per lane in memory, and then does not vectorise it.
template <typename T, typename Index, int nd>
struct Chunk {
  static constexpr int kLines = 1 << (nd - 1);  // of two voxels each
  alignas(64) T values[kLines][kChunk][2];
  alignas(64) T shifts[nd][kChunk];
  alignas(64) Index offset[kChunk];

  // How `values` lie, to the compiler as constants.
  static SPSS_HD void describe(Axis<T, Index>* axes) {
    for (int axis = 0; axis < nd; ++axis) axes[axis].upper = axis == nd - 1 ? 1 : 2 * kChunk << (nd - 2 - axis);
  }

  // The row from `start` on, its displacements made contiguous.
  SPSS_HD Row<T, Index, nd> part(const Row<T, Index, nd>& row, int64_t start) {
    Row<T, Index, nd> local = row;
    local.length = std::min<int64_t>(kChunk, row.length - start);
    local.origin[nd - 1] = row.origin[nd - 1] + static_cast<T>(start);
    local.shift = row.shift + start * row.shift_step;
    if (row.shift_step != 1) {
      for (int axis = 0; axis < nd; ++axis)
        for (int64_t j = 0; j < local.length; ++j)
          shifts[axis][j] = local.shift[axis * row.shift_axis + j * row.shift_step];
      local.shift = shifts[0];
      local.shift_axis = kChunk;
    }
    return local;
  }

  template <bool border>
  SPSS_HD void locate(const Row<T, Index, nd>& row) {
    SPSS_SIMD
    for (int64_t j = 0; j < row.length; ++j) offset[j] = lower_corner<border>(row, j);
  }

  SPSS_HD void collect(const Row<T, Index, nd>& row, const T* image) {
    const T* lines[kLines];
    for (int line = 0; line < kLines; ++line) {
      lines[line] = image;
      for (int axis = 0; axis < nd - 1; ++axis)
        if (line >> (nd - 2 - axis) & 1) lines[line] += row.axes[axis].upper;
    }
    const Index upper = row.axes[nd - 1].upper;
    if (upper == 1) {
      for (int64_t j = 0; j < row.length; ++j) {
        SPSS_SCALAR;
        const Index at = offset[j];
        for (int line = 0; line < kLines; ++line)
          std::memcpy(values[line][j], lines[line] + at, sizeof values[line][j]);
      }
    } else {
      for (int64_t j = 0; j < row.length; ++j) {
        SPSS_SCALAR;
        const Index at = offset[j];
        for (int line = 0; line < kLines; ++line) {
          values[line][j][0] = lines[line][at];
          values[line][j][1] = (lines[line] + upper)[at];
        }
      }
    }
  }
};

template <bool border, typename T, typename Index, int nd>
SPSS_HD T nearest_value(const Row<T, Index, nd>& row, const T* image, int64_t j) {
  int inside = 1;
  const T value = image[nearest_corner<border>(row, j, inside)];
  return inside ? value : T(0);
}

template <bool border, typename T, typename Index, int nd>
SPSS_HD T value_at(const Row<T, Index, nd>& row, const Chunk<T, Index, nd>& chunk, int64_t j) {
  Corner<T, Index> corners[nd];
  find_corners<border>(row, j, corners);
  Axis<T, Index> axes[nd];
  chunk.describe(axes);
  return interpolate<0, nd, T>(chunk.values[0][0], corners, axes, static_cast<Index>(2 * j));
}

// All channels of one row, `image_channel` and `out_channel` apart.
template <bool border, bool nearest, typename T, typename Index, int nd>
SPSS_MULTIARCH void forward_row(
    const Row<T, Index, nd>& whole, const T* __restrict image, int64_t image_channel, T* __restrict out,
    int64_t out_channel, int64_t channels) {
  Chunk<T, Index, nd> chunk;
  for (int64_t start = 0; start < whole.length; start += kChunk) {
    const Row<T, Index, nd> row = chunk.part(whole, start);
    if constexpr (nearest) {
      for (int64_t c = 0; c < channels; ++c) {
        const T* from = image + c * image_channel;
        T* to = out + c * out_channel + start;
        SPSS_SIMD
        for (int64_t j = 0; j < row.length; ++j) to[j] = nearest_value<border>(row, from, j);
      }
    } else {
      chunk.template locate<border>(row);
      for (int64_t c = 0; c < channels; ++c) {
        chunk.collect(row, image + c * image_channel);
        T* to = out + c * out_channel + start;
        SPSS_SIMD
        for (int64_t j = 0; j < row.length; ++j) to[j] = value_at<border>(row, chunk, j);
      }
    }
  }
}

template <bool border, bool first, typename T, typename Index, int nd>
SPSS_HD void put_slopes(
    const Row<T, Index, nd>& row, const Chunk<T, Index, nd>& chunk, const T* __restrict grad, T* __restrict out,
    int64_t component, int64_t j) {
  Corner<T, Index> corners[nd];
  find_corners<border>(row, j, corners);
  Axis<T, Index> axes[nd];
  chunk.describe(axes);
  const Jet<T, nd> jet = interpolate_jet<0, nd, T>(chunk.values[0][0], corners, axes, static_cast<Index>(2 * j));
  for (int axis = 0; axis < nd; ++axis) {
    const T value = grad[j] * jet.slope[axis];
    out[axis * component + j] = first ? value : out[axis * component + j] + value;
  }
}

// Sums grad * d image(p + u) / d u over the channels into the row's nd components, `component` apart.
template <bool border, typename T, typename Index, int nd>
SPSS_MULTIARCH void displacement_row(
    const Row<T, Index, nd>& whole, const T* __restrict image, int64_t image_channel, const T* __restrict grad,
    T* __restrict out, int64_t component, int64_t channels) {
  Chunk<T, Index, nd> chunk;
  for (int64_t start = 0; start < whole.length; start += kChunk) {
    const Row<T, Index, nd> row = chunk.part(whole, start);
    chunk.template locate<border>(row);
    chunk.collect(row, image);
    SPSS_SIMD
    for (int64_t j = 0; j < row.length; ++j)
      put_slopes<border, true>(row, chunk, grad + start, out + start, component, j);
    for (int64_t c = 1; c < channels; ++c) {
      chunk.collect(row, image + c * image_channel);
      const T* up = grad + c * component + start;
      SPSS_SIMD
      for (int64_t j = 0; j < row.length; ++j) put_slopes<border, false>(row, chunk, up, out + start, component, j);
    }
  }
}

template <bool border, typename T, typename Index, int nd>
SPSS_HD Index put_weights(const Row<T, Index, nd>& row, T (*weights)[2][kChunk], int64_t j) {
  Corner<T, Index> corners[nd];
  find_corners<border>(row, j, corners);
  for (int axis = 0; axis < nd; ++axis) {
    weights[axis][0][j] = corners[axis].weight0;
    weights[axis][1][j] = corners[axis].weight1;
  }
  return lower<nd>(corners);
}

// Adds one row's gradients to the voxels they came from. Offsets and weights come first, vectorised; the scattered sums
// that no vector unit has follow voxel by voxel.
template <bool border, bool nearest, typename T, typename Index, int nd>
SPSS_MULTIARCH void image_row(const Row<T, Index, nd>& whole, const T* __restrict grad, T* __restrict out) {
  Chunk<T, Index, nd> chunk;
  alignas(64) T weights[nd][2][kChunk];
  for (int64_t start = 0; start < whole.length; start += kChunk) {
    const Row<T, Index, nd> row = chunk.part(whole, start);
    if constexpr (nearest) {
      for (int64_t j = 0; j < row.length; ++j) {
        int inside = 1;
        const Index to = nearest_corner<border>(row, j, inside);
        if (inside) out[to] += grad[start + j];
      }
    } else {
      SPSS_SIMD
      for (int64_t j = 0; j < row.length; ++j) chunk.offset[j] = put_weights<border>(row, weights, j);
      for (int64_t j = 0; j < row.length; ++j) {
        Corner<T, Index> corners[nd];
        for (int axis = 0; axis < nd; ++axis) {
          corners[axis].weight0 = weights[axis][0][j];
          corners[axis].weight1 = weights[axis][1][j];
        }
        T* const target = out + chunk.offset[j];
        spread<0, nd>(corners, row.axes, Index(0), grad[start + j], [&](Index to, T value) { target[to] += value; });
      }
    }
  }
}

}  // namespace
}  // namespace spss
