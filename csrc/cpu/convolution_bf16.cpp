// convolve of bfloat16 maps of one channel or eight, by registers of eight lanes; the rest: convolution_bf16_wide.cpp.
// The transforms are float32, and so is the filter until it is transformed.
#include "cpu/multiarch.h"

#if SPSS_HAS_FMA

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>

#include "cpu/operators.h"
#include "cpu/vectors_bf16.h"

#include "cpu/minimal_filtering.h"
#include "cpu/direct_convolution.h"

namespace spss {
namespace {

// Eight channels: minimal filtering of planes, F(2 x 2, 3 x 3), and directly along the third axis. That takes twelve
// products an output and pair of channels, where three axes of cpu/minimal_filtering.h take eight. But with so few
// channels the transforms outweigh the products, here there are half as many points, and a column of tiles stays in the
// first-level cache from its data to its outputs.

constexpr int kFew = 8;
constexpr int kPlanePoints = 16;                         // 4 along each of the first two axes
constexpr int64_t kLongest = 64;                         // voxels of a column: the tiles of a part are of one
constexpr int64_t kColumn = (kLongest + 2) * kFew + 32;  // from point to point, a little apart
constexpr int64_t kTapsOfPoint = 3 * kFew * kFew;        // along the third axis, inputs, outputs
constexpr int kAbreast = kSums / 4;                      // voxels whose sums at four points fit into registers
constexpr __mmask16 kBoth = 0xffff;                      // voxels of two

using Wide = float __attribute__((vector_size(8 * kLanes)));  // two voxels

// Of two voxels, or of the first alone by `mask`, `place` elements from where the lines begin; `next` further on are
// those that the next column will read.
SPSS_HOT_INLINE void plane_data_of_two(
    const BFloat16* const* lines, int64_t place, int64_t next, __mmask16 mask, BFloat16* out) {
  Wide v[kPlanePoints];
  SPSS_UNROLL for (int q = 0; q < kPlanePoints; ++q) {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, lines[q] + place);
    v[q] = reinterpret_cast<Wide>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // as in data_of
  SPSS_UNROLL for (int q = 2; q < kPlanePoints; q += q % 4 == 3 ? 3 : 1) __builtin_prefetch(lines[q] + place + next);
  SPSS_UNROLL for (int i = 0; i < 4; ++i) transform_data(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  SPSS_UNROLL for (int j = 0; j < 4; ++j) transform_data(v[j], v[4 + j], v[8 + j], v[12 + j]);
  SPSS_UNROLL for (int q = 0; q < kPlanePoints; ++q) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v[q]));
    _mm256_mask_storeu_epi16(out + q * kColumn, mask, reinterpret_cast<__m256i>(rounded));
  }
}

// (points, a voxel more on either side than the part has, channels).
SPSS_HOT void plane_data_of(
    const BFloat16* x, const Tiles& tiles, const Part& part, const BFloat16* outside, BFloat16* out) {
  const BFloat16* lines[kPlanePoints];
  lines_of<kFew, 4>(x, tiles, part, outside, lines);
  const int64_t first = part.k - 1, end = part.k + part.count + 1;
  for (int64_t k : {first, end - 1})
    if (k < 0 || k == tiles.d)
      for (int q = 0; q < kPlanePoints; ++q) std::fill_n(out + q * kColumn + (k - first) * kFew, kFew, BFloat16{0});
  for (int64_t k = std::max<int64_t>(first, 0), last = std::min(end, tiles.d); k < last; k += 2) {
    BFloat16* to = out + (k - first) * kFew;
    const int64_t next = 2 * tiles.d * kFew;
    if (k + 1 < last) plane_data_of_two(lines, k * kFew, next, kBoth, to);
    else plane_data_of_two(lines, k * kFew, next, kBoth >> kFew, to);
  }
}

// V voxels of a column, from `voxel` on; a line is null outside. The moments as in store_tile, which a template spares
// the others.
template <int V, bool WithMoments>
SPSS_HOT void plane_outputs(const BFloat16* data, const BFloat16* filter, BFloat16* const* lines, int64_t voxel,
                            int64_t fresh, float* moments) {
  Vector out[2][2][V];  // along the first axis, the second and the third
  SPSS_UNROLL for (int i = 0; i < 4; ++i, data += 4 * kColumn, filter += 4 * kTapsOfPoint) {
    Vector sums[4][V] = {};
    for (int64_t t = 0; t < 3 * kFew; t += kGroup) {  // the taps of a voxel and their channels lie in a row
      SPSS_UNROLL for (int j = 0; j < 4; ++j) {
        const Row row = load_row(filter + j * kTapsOfPoint + t * kFew);
        SPSS_UNROLL for (int v = 0; v < V; ++v) add_multiple(sums[j][v], data + j * kColumn + v * kFew + t, row);
      }
    }
    SPSS_UNROLL for (int v = 0; v < V; ++v) {
      transform_outputs(sums[0][v], sums[1][v], sums[2][v], sums[3][v]);
      SPSS_UNROLL for (int j = 0; j < 2; ++j) {  // and along the first axis, as transform_outputs
        if (i == 0) out[0][j][v] = sums[j][v];
        else if (i < 3) out[0][j][v] += sums[j][v];
        if (i == 1) out[1][j][v] = sums[j][v];
        else if (i > 1) out[1][j][v] -= sums[j][v];
      }
    }
  }
  SPSS_UNROLL for (int q = 0; q < 4; ++q) {
    if (lines[q] == nullptr) continue;
    Moments of_tile;
    SPSS_UNROLL for (int v = 0; v < V; ++v) {
      store(lines[q] + (voxel + v) * kFew, out[q / 2][q % 2][v]);
      if (WithMoments && v >= fresh) of_tile.add(out[q / 2][q % 2][v]);
    }
    if constexpr (WithMoments) of_tile.add_to(moments, kFew);
  }
}

// To (points, 3, inputs / kGroup, outputs, kGroup).
SPSS_HOT void plane_filter_of(const Taps& taps, BFloat16* out) {
  for (int64_t c = 0; c < kFew; c += kGroup)
    for (int k = 0; k < 3; ++k) {
      Vector points[kPlanePoints][kGroup];
      for (int g = 0; g < kGroup; ++g) {
        Vector v[kPlanePoints];
        SPSS_UNROLL for (int i = 0; i < 3; ++i) {
          SPSS_UNROLL for (int j = 0; j < 3; ++j) v[4 * i + j] = taps.load(c + g, 9 * i + 3 * j + k, 0);
          transform_filter(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
        }
        SPSS_UNROLL for (int j = 0; j < 4; ++j) transform_filter(v[j], v[4 + j], v[8 + j], v[12 + j]);
        SPSS_UNROLL for (int q = 0; q < kPlanePoints; ++q) points[q][g] = v[q];
      }
      for (int q = 0; q < kPlanePoints; ++q) store_group(out + q * kTapsOfPoint + (k * kFew + c) * kFew, points[q]);
    }
}

template <bool WithMoments>
at::Tensor filtered_by_planes(const at::Tensor& x, const Taps& taps, ChannelSums* sums = nullptr) {
  const at::Tensor y = empty_maps(x, x.sizes());
  const auto filter = std::make_unique_for_overwrite<BFloat16[]>(kPlanePoints * kTapsOfPoint);
  plane_filter_of(taps, filter.get());
  const Tiles tiles(x, 1, kLongest);
  const auto* from = static_cast<const BFloat16*>(x.const_data_ptr());
  auto* to = static_cast<BFloat16*>(y.mutable_data_ptr());
  at::parallel_for(0, tiles.count(), 16, [&](int64_t begin, int64_t end) {
    const auto data = std::make_unique_for_overwrite<BFloat16[]>(kPlanePoints * kColumn);
    const auto outside = std::make_unique<BFloat16[]>(tiles.d * kFew);
    SumsOfChunk moments(sums, begin);
    for (int64_t i = begin; i < end; ++i) {
      const Part part = tiles[i];
      plane_data_of(from, tiles, part, outside.get(), data.get());
      BFloat16* lines[4];
      for (int q = 0; q < 4; ++q) {
        const int64_t line = tiles.line(part.volume, 2 * part.i + q / 2, 2 * part.j + q % 2);
        lines[q] = line < 0 ? nullptr : to + (line + part.k) * kFew;
      }
      const int64_t size = tile_size(part.count, kAbreast);
      const auto outputs = size == 1   ? plane_outputs<1, WithMoments>
                           : size == 3 ? plane_outputs<3, WithMoments>
                                       : plane_outputs<kAbreast, WithMoments>;
      each_tile(part.count, size, [&](int64_t v, int64_t fresh) {
        outputs(data.get() + v * kFew, filter.get(), lines, v, fresh, moments.first());
      });
      moments.fold();
    }
  });
  return y;
}

}  // namespace

at::Tensor convolve_bf16(const at::Tensor& x, const at::Tensor& weight, ChannelSums* sums) {
  if (x.size(1) == 1) return convolved_channel(x, weight, sums);
  if (x.size(1) != kFew) return convolve_bf16_wide(x, weight, sums);
  return sums != nullptr ? filtered_by_planes<true>(in_order(x), Taps(weight), sums)
                         : filtered_by_planes<false>(in_order(x), Taps(weight));
}

std::tuple<at::Tensor, at::Tensor> convolve_bf16_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool x_grad, bool weight_grad) {
  if (x.size(1) != kFew) return convolve_bf16_wide_backward(grad, x, weight, x_grad, weight_grad);
  const at::Tensor upstream = in_order(grad);
  return {x_grad ? filtered_by_planes<false>(upstream, Taps(weight, true)) : at::empty({0}, x.options()),
          weight_grad ? filter_gradient<kFew, 4>(upstream, in_order(x), weight) : at::empty({0}, weight.options())};
}

}  // namespace spss

#endif
