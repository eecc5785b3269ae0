// The arithmetic of warped(p) = image(p + u(p)), once for the host and the device.
#pragma once

#include "math/common.h"

namespace spss {

// One axis of a field. The two voxels around a position always lie `stride` apart at an offset inside the image, so all
// corners of a voxel follow from ONE computed offset: that is what the scattered reads' cost hangs on.
template <typename T, typename Index>
struct Axis {
  T last;     // side - 1
  T top;      // the highest lower neighbour: side - 2, or 0 for a side of 1
  T step;     // 1; 0.5 for a side of 1, where no upper neighbour exists and none must compare equal
  Index stride;   // of the image, in elements
  Index upper;    // offset of the upper neighbour: stride, or 0 for a side of 1

  SPSS_HD Axis() {}
  SPSS_HD Axis(int64_t side, int64_t image_stride)
      : last(static_cast<T>(side - 1)),
        top(static_cast<T>(side > 1 ? side - 2 : 0)),
        step(side > 1 ? T(1) : T(0.5)),
        stride(static_cast<Index>(image_stride)),
        upper(static_cast<Index>(side > 1 ? image_stride : 0)) {}
};

// The lower of the two voxels, as an offset, and both weights with their derivatives. Weights of voxels outside are 0.
// A NaN position has a valid offset and NaN weights.
template <typename T, typename Index>
struct Corner {
  Index offset;
  T weight0, weight1, slope0, slope1;
};

// Clamped before the conversion, as a float outside the integer's range has no defined value; NaN gives 0.
template <typename T>
SPSS_HD T clamp_index(T value, T top) {
  value = value > T(0) ? value : T(0);
  return value < top ? value : top;
}

// The same for a position, which keeps NaN.
template <typename T>
SPSS_HD T clamp_position(T value, T last) {
  value = value < T(0) ? T(0) : value;
  return value > last ? last : value;
}

template <bool border, typename T, typename Index>
SPSS_HD Corner<T, Index> bilinear_corner(T position, const Axis<T, Index>& axis) {
  Corner<T, Index> corner;
  if constexpr (border) {
    const T inside = clamp_position(position, axis.last);
    const T base = clamp_index(std::floor(inside), axis.top);
    corner.offset = static_cast<Index>(base) * axis.stride;
    corner.weight1 = inside - base;
    corner.weight0 = T(1) - corner.weight1;
    corner.slope1 = T((position >= T(0)) & (position < axis.last));
    corner.slope0 = -corner.slope1;
  } else {
    const T low = std::floor(position), high = low + T(1), fraction = position - low, rest = T(1) - fraction;
    const T base = clamp_index(low, axis.top), next = base + axis.step;
    // Products with 0 or 1 rather than choices: they vectorise everywhere, and keep NaN.
    const T low_base = T(low == base), low_next = T(low == next);
    const T high_base = T(high == base), high_next = T(high == next);
    corner.offset = static_cast<Index>(base) * axis.stride;
    corner.weight0 = rest * low_base + fraction * high_base;
    corner.weight1 = rest * low_next + fraction * high_next;
    corner.slope0 = high_base - low_base;
    corner.slope1 = high_next - low_next;
  }
  return corner;
}

// The offset of the voxel nearest to a position, halves to even as torch.round; clears `inside` where that is outside.
template <bool border, typename T, typename Index>
SPSS_HD Index nearest_offset(T position, const Axis<T, Index>& axis, int& inside) {
  const T nearest = std::rint(position);
  if constexpr (!border) inside &= (nearest >= T(0)) & (nearest <= axis.last);
  return static_cast<Index>(clamp_index(nearest, axis.last)) * axis.stride;
}

// The interpolated value at the corners, and its derivative along each axis. The corners share one offset; it is the
// image's address that moves by the constant strides between them.
template <typename T, int nd>
struct Jet {
  T value, slope[nd];
};

template <int axis, int nd, typename T, typename Index, typename Image>
SPSS_HD T interpolate(const Image* image, const Corner<T, Index>* corners, const Axis<T, Index>* axes, Index offset) {
  if constexpr (axis == nd) {
    return convert<T>(image[offset]);
  } else {
    return corners[axis].weight0 * interpolate<axis + 1, nd, T>(image, corners, axes, offset) +
        corners[axis].weight1 * interpolate<axis + 1, nd, T>(image + axes[axis].upper, corners, axes, offset);
  }
}

template <int axis, int nd, typename T, typename Index, typename Image>
SPSS_HD Jet<T, nd> interpolate_jet(
    const Image* image, const Corner<T, Index>* corners, const Axis<T, Index>* axes, Index offset) {
  Jet<T, nd> jet;
  if constexpr (axis == nd) {
    jet.value = convert<T>(image[offset]);
  } else {
    const Corner<T, Index>& corner = corners[axis];
    const Jet<T, nd> low = interpolate_jet<axis + 1, nd, T>(image, corners, axes, offset);
    const Jet<T, nd> high = interpolate_jet<axis + 1, nd, T>(image + axes[axis].upper, corners, axes, offset);
    jet.value = corner.weight0 * low.value + corner.weight1 * high.value;
    jet.slope[axis] = corner.slope0 * low.value + corner.slope1 * high.value;
    for (int later = axis + 1; later < nd; ++later)
      jet.slope[later] = corner.weight0 * low.slope[later] + corner.weight1 * high.slope[later];
  }
  return jet;
}

// Hands every corner's offset and weight to `add(offset, weight)`: the transpose of interpolate.
template <int axis, int nd, typename T, typename Index, typename Add>
SPSS_HD void spread(
    const Corner<T, Index>* corners, const Axis<T, Index>* axes, Index offset, T weight, const Add& add) {
  if constexpr (axis == nd) {
    add(offset, weight);
  } else {
    spread<axis + 1, nd>(corners, axes, offset, weight * corners[axis].weight0, add);
    spread<axis + 1, nd>(corners, axes, offset + axes[axis].upper, weight * corners[axis].weight1, add);
  }
}

// The lower corner of all axes together.
template <int nd, typename T, typename Index>
SPSS_HD Index lower(const Corner<T, Index>* corners) {
  Index offset = corners[0].offset;
  for (int axis = 1; axis < nd; ++axis) offset += corners[axis].offset;
  return offset;
}

}  // namespace spss
