// The arithmetic of warped(p) = image(p + u(p)), once for the host and the device.
#pragma once

#include "math/common.h"

namespace spss {

// Along one axis: the two voxels a position lies between, as offsets into the image, and their weights. A voxel outside
// has weight 0 and a valid offset; slope0 and slope1 are the weights' derivatives. A NaN position has valid offsets and
// NaN weights.
template <typename T, typename Index>
struct Corner {
  Index offset0, offset1;
  T weight0, weight1, slope0, slope1;
};

// Clamped before the conversion, as a float outside the integer's range has no defined value; NaN gives 0.
template <typename T>
SPSS_HD T clamp_index(T value, T last) {
  value = value > T(0) ? value : T(0);
  return value < last ? value : last;
}

// p < 0 ? 0 : p > last ? last : p, which keeps NaN.
template <typename T>
SPSS_HD T clamp_position(T value, T last) {
  value = value < T(0) ? T(0) : value;
  return value > last ? last : value;
}

template <bool border, typename T, typename Index>
SPSS_HD Corner<T, Index> bilinear_corner(T position, T last, Index stride) {
  const T inside = border ? clamp_position(position, last) : position;
  const T low = std::floor(inside), high = low + T(1), fraction = inside - low;
  Corner<T, Index> corner;
  corner.offset0 = static_cast<Index>(clamp_index(low, last)) * stride;
  corner.offset1 = static_cast<Index>(clamp_index(high, last)) * stride;
  if (border) {
    const bool moved = position < T(0) || position > last;
    corner.weight0 = T(1) - fraction;
    corner.weight1 = fraction;
    corner.slope1 = moved ? T(0) : T(1);
    corner.slope0 = -corner.slope1;
  } else {
    const bool outside0 = low < T(0) || low > last, outside1 = high < T(0) || high > last;
    corner.weight0 = outside0 ? T(0) : T(1) - fraction;
    corner.weight1 = outside1 ? T(0) : fraction;
    corner.slope0 = outside0 ? T(0) : T(-1);
    corner.slope1 = outside1 ? T(0) : T(1);
  }
  return corner;
}

// The offset of the voxel nearest to a position, halves to even as torch.round; clears `inside` where that is outside.
template <bool border, typename T, typename Index>
SPSS_HD Index nearest_offset(T position, T last, Index stride, bool& inside) {
  const T nearest = std::nearbyint(border ? clamp_position(position, last) : position);
  inside = inside && !(nearest < T(0) || nearest > last);
  return static_cast<Index>(clamp_index(nearest, last)) * stride;
}

// The interpolated value at the corners, and its derivative along each axis. `offset` is that of the axes before.
template <typename T, int nd>
struct Jet {
  T value, slope[nd];
};

template <int axis, int nd, typename T, typename Index, typename Image>
SPSS_HD T interpolate(const Image* image, const Corner<T, Index>* corners, Index offset) {
  if constexpr (axis == nd) {
    return static_cast<T>(image[offset]);
  } else {
    const Corner<T, Index>& corner = corners[axis];
    return corner.weight0 * interpolate<axis + 1, nd, T>(image, corners, offset + corner.offset0) +
        corner.weight1 * interpolate<axis + 1, nd, T>(image, corners, offset + corner.offset1);
  }
}

template <int axis, int nd, typename T, typename Index, typename Image>
SPSS_HD Jet<T, nd> interpolate_jet(const Image* image, const Corner<T, Index>* corners, Index offset) {
  Jet<T, nd> jet;
  if constexpr (axis == nd) {
    jet.value = static_cast<T>(image[offset]);
  } else {
    const Corner<T, Index>& corner = corners[axis];
    const Jet<T, nd> low = interpolate_jet<axis + 1, nd, T>(image, corners, offset + corner.offset0);
    const Jet<T, nd> high = interpolate_jet<axis + 1, nd, T>(image, corners, offset + corner.offset1);
    jet.value = corner.weight0 * low.value + corner.weight1 * high.value;
    jet.slope[axis] = corner.slope0 * low.value + corner.slope1 * high.value;
    for (int later = axis + 1; later < nd; ++later)
      jet.slope[later] = corner.weight0 * low.slope[later] + corner.weight1 * high.slope[later];
  }
  return jet;
}

// Hands every corner's offset and weight to `add(offset, weight)`: the transpose of interpolate.
template <int axis, int nd, typename T, typename Index, typename Add>
SPSS_HD void spread(const Corner<T, Index>* corners, Index offset, T weight, const Add& add) {
  if constexpr (axis == nd) {
    add(offset, weight);
  } else {
    const Corner<T, Index>& corner = corners[axis];
    spread<axis + 1, nd>(corners, offset + corner.offset0, weight * corner.weight0, add);
    spread<axis + 1, nd>(corners, offset + corner.offset1, weight * corner.weight1, add);
  }
}

}  // namespace spss
