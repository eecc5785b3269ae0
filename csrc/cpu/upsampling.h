// 2 x 2 x 2 transposed convolution of stride 2: every voxel becomes eight. Of a row of voxels along the last axis come
// four rows, in which the two voxels of each lie side by side, channels last: four products of matrices, of (voxels, I)
// and (I, 2 O), each of which writes its row where it belongs.
//
// Who includes this file says what maps hold and what is multiplied, as for cpu/minimal_filtering.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <memory>

#include "cpu/memory.h"

namespace spss {
namespace {

// The (I, O, 2, 2, 2) filter as four matrices, one for each row: (I / kGroup, 2 O, kGroup) Factors.
SPSS_HOT std::unique_ptr<Factor[]> four_matrices(const at::Tensor& weight) {
  const int64_t inputs = weight.size(0), outputs = weight.size(1);
  auto matrices = std::make_unique_for_overwrite<Factor[]>(weight.numel());
  const float* from = weight.const_data_ptr<float>();
  const auto strides = weight.strides();
  Factor* to = matrices.get();
  for (int row = 0; row < 4; ++row)
    for (int64_t i = 0; i < inputs; i += kGroup)
      for (int k = 0; k < 2; ++k)
        for (int64_t o = 0; o < outputs; o += kLanes, to += kLanes * kGroup) {
          const float* tap = from + row / 2 * strides[2] + row % 2 * strides[3] + k * strides[4];
          Vector group[kGroup];
          for (int j = 0; j < kGroup; ++j)
            for (int lane = 0; lane < kLanes; ++lane)
              group[j][lane] = tap[(i + j) * strides[0] + (o + lane) * strides[1]];
          store_group(to, group);
        }
  return matrices;
}

// V voxels times L vectors of a matrix's columns.
template <int V, int L>
SPSS_HOT void tile_product(const Element* x, int64_t inputs, const Factor* matrix, int64_t columns, Element* y) {
  Vector sums[V][L] = {};
  for (int64_t i = 0; i < inputs; i += kGroup, matrix += columns * kGroup) {
    Row rows[L];
    for (int l = 0; l < L; ++l) rows[l] = load_row(matrix + l * kLanes * kGroup);
    for (int v = 0; v < V; ++v)
      for (int l = 0; l < L; ++l) add_multiple(sums[v][l], x + v * inputs + i, rows[l]);
  }
  for (int v = 0; v < V; ++v)
    for (int l = 0; l < L; ++l) store(y + v * columns + l * kLanes, sums[v][l]);
}

template <int L>
SPSS_HOT void row_product(
    const Element* x, int64_t voxels, int64_t inputs, const Factor* matrix, int64_t columns, Element* y) {
  constexpr int kMany = kSums / L, kFew = 3;
  const auto tile = voxels >= kMany ? tile_product<kMany, L> : voxels >= kFew ? tile_product<kFew, L> : tile_product<1, L>;
  const int64_t size = voxels >= kMany ? kMany : voxels >= kFew ? kFew : 1;
  for (int64_t column = 0; column < columns; column += L * kLanes, matrix += L * kLanes * kGroup)
    for (int64_t v = 0; v < voxels; v += size) {
      const int64_t first = std::min(v, voxels - size);  // the last tile may overlap the one before
      tile(x + first * inputs, inputs, matrix, columns, y + first * columns + column);
    }
}

at::Tensor upsampled(const at::Tensor& x_, const at::Tensor& weight) {
  const at::Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast3d);
  const int64_t h = x.size(2), w = x.size(3), d = x.size(4), inputs = x.size(1), columns = 2 * weight.size(1);
  const at::Tensor y = with_huge_pages(at::empty(
      {x.size(0), weight.size(1), 2 * h, 2 * w, 2 * d}, x.options().memory_format(at::MemoryFormat::ChannelsLast3d)));
  const auto matrices = four_matrices(weight);
  const auto* from = static_cast<const Element*>(x.const_data_ptr());
  auto* to = static_cast<Element*>(y.mutable_data_ptr());
  const auto multiply = columns % (4 * kLanes) == 0 ? row_product<4> : row_product<2>;
  const int64_t products = d * inputs * columns * 4;  // of a row of x
  at::parallel_for(0, x.size(0) * h * w, std::max<int64_t>(1, (1 << 20) / products), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t target = (2 * (row / w) + i / 2) * 2 * w + 2 * (row % w) + i % 2;
        multiply(from + row * d * inputs, d, inputs, matrices.get() + i * inputs * columns, columns,
                 to + target * d * columns);
      }
  });
  return y;
}

}  // namespace
}  // namespace spss
