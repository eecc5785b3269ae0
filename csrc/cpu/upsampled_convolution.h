// A 3 x 3 convolution of slices twice as large, by nearest neighbours, beside a skip connection; bias and leaky ReLU.
//
// The nine taps of an output read four pixels of the small slice, and which taps fall together depends on whether the
// output's row and column are even. So there are four filters, of sums of taps, and neither the large slice nor the two
// side by side are ever made.
//
// Who includes this file says what maps hold and what is multiplied, as for cpu/minimal_filtering.h.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "cpu/direct_convolution.h"

namespace spss {
namespace {

constexpr int64_t kBand = 8;  // rows of the small slice whose surroundings, with zeros about them, stay in a cache

struct Upsampled {
  int64_t h, w, inputs, skips, outputs;  // pixels of the small slice; channels

  int64_t factors() const { return 4 * inputs + 9 * skips; }  // of an output
};

// Which taps of an axis read the first and the second of the pixels that an output in an even or odd place reads.
struct Range {
  int64_t begin, end;
};

constexpr Range taps_reading(int64_t odd, int64_t second) { return second ? Range{1 + odd, 3} : Range{0, 1 + odd}; }

// Sums of the taps, (3, 3, channels, O), in these rows and columns, of `count` channels; returns where they end.
SPSS_HOT Factor* summed(
    const float* taps, Range rows, Range columns, int64_t channels, int64_t count, int64_t outputs, Factor* to) {
  for (int64_t c = 0; c < count; c += kGroup)
    for (int64_t o = 0; o < outputs; o += kLanes, to += kLanes * kGroup) {
      Vector group[kGroup] = {};
      for (int64_t i = rows.begin; i < rows.end; ++i)
        for (int64_t j = columns.begin; j < columns.end; ++j)
          for (int g = 0; g < kGroup; ++g) group[g] += load(taps + ((3 * i + j) * channels + c + g) * outputs + o);
      store_group(to, group);
    }
  return to;
}

// (O, I + S, 3, 3) to the filters of outputs in even and odd rows, and of each in even and odd columns: (2, 2, factors /
// kGroup, O, kGroup), the factors being (2, 2, I) of the small slice and (3, 3, S) of the skip connection.
inline Buffer<Factor> four_filters(const at::Tensor& weight, const Upsampled& sizes) {
  const at::Tensor ordered = weight.permute({2, 3, 1, 0}).contiguous();
  const float* taps = ordered.const_data_ptr<float>();
  const float* beside = taps + sizes.inputs * sizes.outputs;
  const int64_t channels = sizes.inputs + sizes.skips;
  auto filters = buffer<Factor>(4 * sizes.factors() * sizes.outputs);
  Factor* to = filters.get();
  for (int64_t odd = 0; odd < 4; ++odd) {
    for (int64_t q = 0; q < 4; ++q)
      to = summed(taps, taps_reading(odd / 2, q / 2), taps_reading(odd % 2, q % 2), channels, sizes.inputs, sizes.outputs, to);
    for (int64_t i = 0; i < 3; ++i)
      for (int64_t j = 0; j < 3; ++j)
        to = summed(beside, {i, i + 1}, {j, j + 1}, channels, sizes.skips, sizes.outputs, to);
  }
  return filters;
}

// Rows from `first` on, with a pixel of zeros on either side; those outside are zeros.
void padded_rows(
    const Element* x, int64_t h, int64_t w, int64_t channels, int64_t first, int64_t count, Element* out) {
  for (int64_t i = first; i < first + count; ++i, out += (w + 2) * channels) {
    if (i < 0 || i >= h) {
      std::fill_n(out, (w + 2) * channels, Element{});
      continue;
    }
    std::fill_n(out, channels, Element{});
    std::copy_n(x + i * w * channels, w * channels, out + channels);
    std::fill_n(out + (w + 1) * channels, channels, Element{});
  }
}

// To the sums of V pixels, `step` elements apart, the products of `count` elements from each on.
template <int V, int L>
SPSS_HOT_INLINE void add_neighbours(
    const Element* x, int64_t step, int64_t count, const Factor* filter, int64_t outputs, Vector (&sums)[V][L]) {
  for (int64_t i = 0; i < count; i += kGroup, filter += outputs * kGroup) {
    Row rows[L];
    SPSS_UNROLL for (int l = 0; l < L; ++l) rows[l] = load_row(filter + l * kLanes * kGroup);
    SPSS_UNROLL for (int v = 0; v < V; ++v)
      SPSS_UNROLL for (int l = 0; l < L; ++l) add_multiple(sums[v][l], x + v * step + i, rows[l]);
  }
}

// V pixels of every second column by L vectors of outputs; both maps at what the first pixel reads first.
template <int V, int L>
SPSS_HOT void upsampled_pixels(
    const Element* x, const Element* skip, const Upsampled& sizes, const Factor* filter, const float* bias, float slope,
    Element* y) {
  const int64_t inputs = sizes.inputs, skips = sizes.skips, outputs = sizes.outputs;
  Vector sums[V][L];
  SPSS_UNROLL for (int v = 0; v < V; ++v)
    SPSS_UNROLL for (int l = 0; l < L; ++l) sums[v][l] = load(bias + l * kLanes);
  for (int i = 0; i < 2; ++i, x += (sizes.w + 2) * inputs, filter += 2 * inputs * outputs)
    add_neighbours(x, inputs, 2 * inputs, filter, outputs, sums);
  for (int i = 0; i < 3; ++i, skip += (2 * sizes.w + 2) * skips, filter += 3 * skips * outputs)
    add_neighbours(skip, 2 * skips, 3 * skips, filter, outputs, sums);
  SPSS_UNROLL for (int v = 0; v < V; ++v)
    SPSS_UNROLL for (int l = 0; l < L; ++l) {
      const Vector z = sums[v][l];
      store(y + 2 * v * outputs + l * kLanes, z > 0 ? z : slope * z);
    }
}

// Of one band, whose rows and the next ones on either side are `x`, and `skip`, in padded_rows.
template <int L>
void upsampled_band(const Element* x, const Element* skip, int64_t rows, const Upsampled& sizes, const Factor* filters,
                    const float* bias, float slope, Element* y) {
  const auto [h, w, inputs, skips, outputs] = sizes;
  const int64_t size = tile_size(w, kSumsOfTaps / L);
  const auto pixels = size == 1   ? upsampled_pixels<1, L>
                      : size == 3 ? upsampled_pixels<3, L>
                                  : upsampled_pixels<kSumsOfTaps / L, L>;
  for (int64_t odd = 0; odd < 4; ++odd, filters += sizes.factors() * outputs)
    for (int64_t o = 0; o < outputs; o += L * kLanes)
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t i = row + odd / 2, large = 2 * row + odd / 2, j = odd % 2;
        each_tile(w, size, [&](int64_t v, int64_t) {
          pixels(x + (i * (w + 2) + j + v) * inputs, skip + (large * (2 * w + 2) + j + 2 * v) * skips, sizes,
                 filters + o * kGroup, bias + o, slope, y + (large * 2 * w + j + 2 * v) * outputs + o);
        });
      }
}

inline at::Tensor convolved_upsampled(
    const at::Tensor& x_, const at::Tensor& skip_, const at::Tensor& weight, const at::Tensor& bias_, double slope) {
  const at::Tensor x = in_order(x_), skip = in_order(skip_), bias = bias_.contiguous();
  const Upsampled sizes{x.size(2), x.size(3), x.size(1), skip.size(1), weight.size(0)};
  const auto [h, w, inputs, skips, outputs] = sizes;
  const at::Tensor y = empty_maps(x, {x.size(0), outputs, 2 * h, 2 * w});
  const auto filters = four_filters(weight, sizes);
  const auto *from = static_cast<const Element*>(x.const_data_ptr()),
             *beside = static_cast<const Element*>(skip.const_data_ptr());
  auto* to = static_cast<Element*>(y.mutable_data_ptr());
  const float* shift = bias.const_data_ptr<float>();
  const auto convolve = outputs % (2 * kLanes) == 0 ? upsampled_band<2> : upsampled_band<1>;
  const int64_t bands = (h + kBand - 1) / kBand;
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(h, kBand) * 4 * w * sizes.factors() * outputs));
  at::parallel_for(0, x.size(0) * bands, grain, [&](int64_t begin, int64_t end) {
    const auto small = buffer<Element>((kBand + 2) * (w + 2) * inputs);
    const auto large = buffer<Element>((2 * kBand + 2) * (2 * w + 2) * skips);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t sample = n / bands, first = n % bands * kBand, rows = std::min(kBand, h - first);
      padded_rows(from + sample * h * w * inputs, h, w, inputs, first - 1, rows + 2, small.get());
      padded_rows(beside + sample * 4 * h * w * skips, 2 * h, 2 * w, skips, 2 * first - 1, 2 * rows + 2, large.get());
      convolve(small.get(), large.get(), rows, sizes, filters.get(), shift, static_cast<float>(slope),
               to + (sample * h + first) * 4 * w * outputs);
    }
  });
  return y;
}

}  // namespace
}  // namespace spss
