// What the V-Net convolves directly: the image, whose single channel leaves minimal filtering nothing to gain, and
// upwards. Of either, rows of voxels along the last axis are products of matrices, written where they belong.
//
// Who includes this file says what maps hold and what is multiplied, as for cpu/minimal_filtering.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>

#include <algorithm>
#include <memory>

#include "cpu/minimal_filtering.h"

namespace spss {
namespace {

constexpr int64_t kGrain = 1 << 20;  // products that are worth a thread

// How many voxels of a row are computed at once, if `most` fit into registers: such tiles cover a row, where the last
// may overlap the one before.
int64_t tile_size(int64_t voxels, int64_t most) { return voxels >= most ? most : voxels >= 3 ? 3 : 1; }

// body(the first voxel of a tile, how many of its voxels the one before had as well).
template <class Body>
void each_tile(int64_t voxels, int64_t size, Body body) {
  for (int64_t v = 0; v < voxels; v += size) {
    const int64_t first = std::min(v, voxels - size);
    body(first, v - first);
  }
}

// The results of a tile to y, whose voxels are `outputs` apart, and those of voxels from `fresh` on to the moments,
// unless null, `width` being those of all channels.
template <int V, int L>
SPSS_HOT_INLINE void store_tile(
    const Vector (&sums)[V][L], int64_t outputs, Element* y, int64_t fresh, float* moments, int64_t width) {
  SPSS_UNROLL for (int v = 0; v < V; ++v)
    SPSS_UNROLL for (int l = 0; l < L; ++l) store(y + v * outputs + l * kLanes, sums[v][l]);
  if (moments == nullptr) return;
  SPSS_UNROLL for (int l = 0; l < L; ++l) {
    Moments of_tile;
    SPSS_UNROLL for (int v = 0; v < V; ++v)
      if (v >= fresh) of_tile.add(sums[v][l]);
    of_tile.add_to(moments + l * kLanes, width);
  }
}

// Eight values of each of a group, `value(group, lane)`, as Factors.
template <class Value>
SPSS_HOT_INLINE void store_factors(Factor* to, Value value) {
  Vector group[kGroup];
  for (int i = 0; i < kGroup; ++i)
    for (int lane = 0; lane < kLanes; ++lane) group[i][lane] = value(i, lane);
  store_group(to, group);
}

// 2 x 2 x 2 transposed convolution of stride 2: every voxel becomes eight. Of a row come four, in which the two voxels
// of each lie side by side: four products of (voxels, I) and (I, 2 O).

// The (I, O, 2, 2, 2) filter as four matrices, one for each row: (I / kGroup, 2 O, kGroup) Factors.
SPSS_HOT std::unique_ptr<Factor[]> four_matrices(const at::Tensor& weight) {
  const at::Tensor rows = weight.permute({2, 3, 0, 4, 1}).contiguous();
  const int64_t inputs = 4 * weight.size(0), columns = 2 * weight.size(1);  // of all matrices
  auto matrices = std::make_unique_for_overwrite<Factor[]>(weight.numel());
  const float* from = rows.const_data_ptr<float>();
  for (int64_t i = 0; i < inputs; i += kGroup)
    for (int64_t column = 0; column < columns; column += kLanes) {
      Vector group[kGroup];
      for (int g = 0; g < kGroup; ++g) group[g] = load(from + (i + g) * columns + column);
      store_group(matrices.get() + i * columns + column * kGroup, group);
    }
  return matrices;
}

// V voxels times L vectors of a matrix's columns; the moments as in store_tile.
template <int V, int L>
SPSS_HOT void product(const Element* x, int64_t inputs, const Factor* matrix, int64_t columns, Element* y,
                      int64_t fresh, float* moments) {
  Vector sums[V][L] = {};
  for (int64_t i = 0; i < inputs; i += kGroup, matrix += columns * kGroup) {
    Row rows[L];
    SPSS_UNROLL for (int l = 0; l < L; ++l) rows[l] = load_row(matrix + l * kLanes * kGroup);
    SPSS_UNROLL for (int v = 0; v < V; ++v)
      SPSS_UNROLL for (int l = 0; l < L; ++l) add_multiple(sums[v][l], x + v * inputs + i, rows[l]);
  }
  store_tile(sums, columns, y, fresh, moments, columns);
}

template <int L>
void row_product(const Element* x, int64_t voxels, int64_t inputs, const Factor* matrix, int64_t columns, Element* y,
                 float* moments) {
  const int64_t size = tile_size(voxels, kSums / L);
  const auto tile = size == 1 ? product<1, L> : size == 3 ? product<3, L> : product<kSums / L, L>;
  for (int64_t column = 0; column < columns; column += L * kLanes, matrix += L * kLanes * kGroup)
    each_tile(voxels, size, [&](int64_t v, int64_t fresh) {
      tile(x + v * inputs, inputs, matrix, columns, y + v * columns + column, fresh,
           moments == nullptr ? nullptr : moments + column);
    });
}

inline at::Tensor upsampled(const at::Tensor& x_, const at::Tensor& weight, ChannelSums* sums = nullptr) {
  const at::Tensor x = in_order(x_);
  const int64_t h = x.size(2), w = x.size(3), d = x.size(4), inputs = x.size(1), columns = 2 * weight.size(1);
  const at::Tensor y = empty_maps(x, {x.size(0), weight.size(1), 2 * h, 2 * w, 2 * d});
  const auto matrices = four_matrices(weight);
  const auto* from = static_cast<const Element*>(x.const_data_ptr());
  auto* to = static_cast<Element*>(y.mutable_data_ptr());
  const auto multiply = columns % (4 * kLanes) == 0   ? row_product<4>
                        : columns % (2 * kLanes) == 0 ? row_product<2>
                                                      : row_product<1>;
  const int64_t grain = std::max<int64_t>(1, kGrain / (4 * d * inputs * columns));
  at::parallel_for(0, x.size(0) * h * w, grain, [&](int64_t begin, int64_t end) {
    SumsOfChunk moments(sums, begin, 2);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t target = (2 * (row / w) + i / 2) * 2 * w + 2 * (row % w) + i % 2;
        multiply(from + row * d * inputs, d, inputs, matrices.get() + i * inputs * columns, columns,
                 to + target * d * columns, moments.first());
      }
      moments.fold();
    }
  });
  return y;
}

// 3 x 3 x 3 convolution of one channel: a row is the sum of nine products, of three neighbours on each of nine rows of
// the image and three taps. Where pairs are multiplied, the third tap's partner is zero: what is not finite reaches one
// voxel further then.

constexpr int64_t kGroups = (3 + kGroup - 1) / kGroup;  // of a row's taps
constexpr int kSumsOfTaps = std::min(16, kSums);        // fewer, as what a voxel reads its neighbours read again

// The (O, 1, 3, 3, 3) filter: (9, kGroups, O, kGroup) Factors.
SPSS_HOT std::unique_ptr<Factor[]> nine_rows(const at::Tensor& weight) {
  const int64_t outputs = weight.size(0);
  auto rows = std::make_unique_for_overwrite<Factor[]>(9 * kGroups * outputs * kGroup);
  const float* from = weight.const_data_ptr<float>();
  const auto strides = weight.strides();
  Factor* to = rows.get();
  for (int row = 0; row < 9; ++row)
    for (int k = 0; k < 3; k += kGroup)
      for (int64_t o = 0; o < outputs; o += kLanes, to += kLanes * kGroup) {
        const float* taps = from + row / 3 * strides[2] + row % 3 * strides[3];
        store_factors(to, [&](int i, int lane) {
          return k + i < 3 ? taps[(o + lane) * strides[0] + (k + i) * strides[4]] : 0.0f;
        });
      }
  return rows;
}

// V voxels by L vectors of outputs; `x` at the first tap of the first voxel, its rows and planes so many values apart.
template <int V, int L>
SPSS_HOT void taps_product(const Element* x, int64_t row, int64_t plane, const Factor* filter, int64_t outputs,
                           Element* y, int64_t fresh, float* moments) {
  Vector sums[V][L] = {};
  for (int i = 0; i < 9; ++i)
    for (int64_t k = 0; k < kGroups; ++k, filter += outputs * kGroup) {
      const Element* first = x + i / 3 * plane + i % 3 * row + k * kGroup;
      Row rows[L];
      SPSS_UNROLL for (int l = 0; l < L; ++l) rows[l] = load_row(filter + l * kLanes * kGroup);
      SPSS_UNROLL for (int v = 0; v < V; ++v)
        SPSS_UNROLL for (int l = 0; l < L; ++l) add_multiple(sums[v][l], first + v, rows[l]);
    }
  store_tile(sums, outputs, y, fresh, moments, outputs);
}

template <int L>
void convolved_row(const Element* x, int64_t voxels, int64_t row, int64_t plane, const Factor* filter, int64_t outputs,
                   Element* y, float* moments) {
  const int64_t size = tile_size(voxels, kSumsOfTaps / L);
  const auto tile = size == 1 ? taps_product<1, L> : size == 3 ? taps_product<3, L> : taps_product<kSumsOfTaps / L, L>;
  for (int64_t o = 0; o < outputs; o += L * kLanes, filter += L * kLanes * kGroup)
    each_tile(voxels, size, [&](int64_t v, int64_t fresh) {
      tile(x + v, row, plane, filter, outputs, y + v * outputs + o, fresh, moments == nullptr ? nullptr : moments + o);
    });
}

inline at::Tensor convolved_channel(const at::Tensor& x, const at::Tensor& weight, ChannelSums* sums = nullptr) {
  const int64_t h = x.size(2), w = x.size(3), d = x.size(4), outputs = weight.size(0);
  const at::Tensor padded = at::constant_pad_nd(x, {1, kGroup, 1, 1, 1, 1}).contiguous();
  const int64_t row = padded.size(4), plane = padded.size(3) * row;
  const at::Tensor y = empty_maps(x, {x.size(0), outputs, h, w, d});
  const auto filter = nine_rows(weight);
  const auto* from = static_cast<const Element*>(padded.const_data_ptr());
  auto* to = static_cast<Element*>(y.mutable_data_ptr());
  const auto convolve = outputs % (2 * kLanes) == 0 ? convolved_row<2> : convolved_row<1>;
  at::parallel_for(0, x.size(0) * h * w, std::max<int64_t>(1, kGrain / (27 * d * outputs)),
                   [&](int64_t begin, int64_t end) {
    SumsOfChunk moments(sums, begin);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (i / w / h * padded.size(2) + i / w % h) * plane + i % w * row;
      convolve(from + first, d, row, plane, filter.get(), outputs, to + i * d * outputs, moments.first());
      moments.fold();
    }
  });
  return y;
}

}  // namespace
}  // namespace spss
