// A 3 x 3 convolution of slices twice as large, by nearest neighbours, beside a skip connection; bias and leaky ReLU.
//
// Along one axis the taps t of an enlarged row x meet two neighbours of x: four products for the two outputs of a pixel.
// By the differences D[i] = x[i] - x[i - 1] and the sum s of the taps it takes three:
//   y[2 i] = s x[i] - t[0] D[i],   y[2 i + 1] = s x[i] + t[2] D[i + 1].
// So nine products a pair of channels make four outputs, where the convolution takes 36, and neither the enlarged slice
// nor the two side by side are ever made. The skip connection is convolved directly.
//
// For the gradients the differences are taken of what is sent back: of nine sums of it a pixel, T, the gradient of x is
// the product with the filter, and that of the filter the product with x.
//
// Who includes this file says what maps hold and what is multiplied, as for cpu/minimal_filtering.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "cpu/direct_convolution.h"

namespace spss {
namespace {

constexpr int kNine = 9;            // products, three along each axis
constexpr int kPixels = kSums / 6;  // whose sums and outputs fit into registers
constexpr int64_t kBand = 8;        // rows whose maps stay in a cache

struct Upsampled {
  int64_t h, w, inputs, skips, outputs;  // pixels of the small slice; channels
};

SPSS_INLINE void transform_taps(Vector& a, Vector& b, Vector& c) {  // to the factors of x, D[i] and D[i + 1]
  const Vector sum = a + b + c;
  b = -a, a = sum;
}

SPSS_INLINE void transform_taps_adjoint(Vector& a, Vector& b, Vector& c) {
  const Vector sum = a;
  a = sum - b, b = sum, c += sum;
}

// To (nine, inputs / kGroup, outputs, kGroup).
SPSS_HOT Buffer<Factor> nine_filters(const Taps& taps, int64_t inputs, int64_t outputs) {
  auto filters = buffer<Factor>(kNine * inputs * outputs);
  for (int64_t i = 0; i < inputs; i += kGroup)
    for (int64_t o = 0; o < outputs; o += kLanes) {
      Vector nine[kNine][kGroup];
      for (int g = 0; g < kGroup; ++g) {
        Vector v[kNine];
        for (int q = 0; q < kNine; ++q) v[q] = taps.load(i + g, q, o);
        for (int q = 0; q < 3; ++q) transform_taps(v[3 * q], v[3 * q + 1], v[3 * q + 2]);
        for (int q = 0; q < 3; ++q) transform_taps(v[q], v[3 + q], v[6 + q]);
        for (int q = 0; q < kNine; ++q) nine[q][g] = v[q];
      }
      for (int q = 0; q < kNine; ++q)
        store_group(filters.get() + (q * inputs + i) * outputs + o * kGroup, nine[q]);
    }
  return filters;
}

// Of the taps themselves, (9 inputs / kGroup, outputs, kGroup).
SPSS_HOT Buffer<Factor> direct_filter(const Taps& taps, int64_t inputs, int64_t outputs) {
  auto filter = buffer<Factor>(9 * inputs * outputs);
  Factor* to = filter.get();
  for (int q = 0; q < 9; ++q)
    for (int64_t i = 0; i < inputs; i += kGroup)
      for (int64_t o = 0; o < outputs; o += kLanes, to += kLanes * kGroup) {
        Vector group[kGroup];
        for (int g = 0; g < kGroup; ++g) group[g] = taps.load(i + g, q, o);
        store_group(to, group);
      }
  return filter;
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

// Four maps, (rows + 1, w + 1) pixels of each: x, its differences along the rows, along the columns, along both; of
// padded_rows, one row and one pixel more.
SPSS_HOT void differences(const Element* rows, int64_t count, int64_t w, int64_t channels, Element* out) {
  const int64_t padded = (w + 2) * channels, size = (w + 1) * channels, map = (count + 1) * size;
  for (int64_t i = 0; i <= count; ++i, rows += padded, out += size)
    for (int64_t at = 0; at < size; at += kLanes) {
      const Element *before = rows + at, *here = before + padded;
      const Vector x = load(here + channels), along = x - load(here);
      const Vector above = load(before + channels), along_above = above - load(before);
      store(out + at, x), store(out + map + at, along);
      store(out + 2 * map + at, x - above), store(out + 3 * map + at, along - along_above);
    }
}

// To the sums of V pixels, `step` elements apart, the products of the `count` elements from each on.
template <int V>
SPSS_HOT_INLINE void add_neighbours(
    const Element* x, int64_t step, int64_t count, const Factor* filter, int64_t outputs, Vector (&sums)[V]) {
  for (int64_t i = 0; i < count; i += kGroup, filter += outputs * kGroup) {
    const Row row = load_row(filter);
    SPSS_UNROLL for (int v = 0; v < V; ++v) add_multiple(sums[v], x + v * step + i, row);
  }
}

// What a band of rows is computed of.
struct UpsampledBand {
  const Element *maps, *skip;      // as of differences, and of padded_rows, at the band's first row
  int64_t map;                     // elements of one of the four
  const Factor *filters, *beside;  // the nine, and the direct one of the skip connection
  const float* bias;
  float slope;
};

// V pixels of the small slice from (i, j) on, kLanes outputs from `o` on: two rows and columns of each.
template <int V>
SPSS_HOT void upsampled_pixels(
    const UpsampledBand& band, const Upsampled& sizes, int64_t i, int64_t j, int64_t o, Element* y) {
  const int64_t inputs = sizes.inputs, skips = sizes.skips, outputs = sizes.outputs, width = sizes.w + 1;
  Vector out[2][2 * V];
  SPSS_UNROLL for (int row = 0; row < 2; ++row) {
    SPSS_UNROLL for (int v = 0; v < 2 * V; ++v) out[row][v] = load(band.bias + o);
    for (int64_t k = 0; k < 3; ++k)
      add_neighbours<2 * V>(band.skip + ((2 * i + row + k) * 2 * width + 2 * j) * skips, skips, 3 * skips,
                            band.beside + k * 3 * skips * outputs + o * kGroup, outputs, out[row]);
  }
  SPSS_UNROLL for (int a = 0; a < 3; ++a) {
    const Element* plain = band.maps + (a == 0 ? 0 : 2) * band.map + ((i + a / 2) * width + j) * inputs;
    const Element* along = plain + band.map;
    const Factor* filter = band.filters + 3 * a * inputs * outputs + o * kGroup;
    Vector sums[3][V] = {};
    for (int64_t c = 0; c < inputs; c += kGroup, filter += outputs * kGroup) {
      Row rows[3];
      SPSS_UNROLL for (int b = 0; b < 3; ++b) rows[b] = load_row(filter + b * inputs * outputs);
      SPSS_UNROLL for (int v = 0; v < V; ++v) {
        add_multiple(sums[0][v], plain + v * inputs + c, rows[0]);
        add_multiple(sums[1][v], along + v * inputs + c, rows[1]);
        add_multiple(sums[2][v], along + (v + 1) * inputs + c, rows[2]);
      }
    }
    SPSS_UNROLL for (int v = 0; v < V; ++v)
      SPSS_UNROLL for (int column = 0; column < 2; ++column) {
        const Vector both = sums[0][v] + sums[1 + column][v];
        if (a != 2) out[0][2 * v + column] += both;
        if (a != 1) out[1][2 * v + column] += both;
      }
  }
  SPSS_UNROLL for (int row = 0; row < 2; ++row)
    SPSS_UNROLL for (int v = 0; v < 2 * V; ++v) {
      const Vector z = out[row][v];
      store(y + (((2 * i + row) * sizes.w + j) * 2 + v) * outputs + o, z > 0 ? z : band.slope * z);
    }
}

// How many bands there are of a slice, and how many of all slices are worth a thread.
struct Bands {
  int64_t of_slice, grain;

  explicit Bands(const Upsampled& sizes) : of_slice((sizes.h + kBand - 1) / kBand) {
    const int64_t products = (kNine * sizes.inputs + 36 * sizes.skips) * sizes.outputs;
    grain = std::max<int64_t>(1, kGrain / (std::min(sizes.h, kBand) * sizes.w * products));
  }
};

inline at::Tensor convolved_upsampled(
    const at::Tensor& x_, const at::Tensor& skip_, const at::Tensor& weight, const at::Tensor& bias_, double slope) {
  const at::Tensor x = in_order(x_), skip = in_order(skip_), bias = bias_.contiguous();
  const Upsampled sizes{x.size(2), x.size(3), x.size(1), skip.size(1), weight.size(0)};
  const auto [h, w, inputs, skips, outputs] = sizes;
  const at::Tensor y = empty_maps(x, {x.size(0), outputs, 2 * h, 2 * w});
  const auto filters = nine_filters(Taps(weight.narrow(1, 0, inputs)), inputs, outputs);
  const auto beside = direct_filter(Taps(weight.narrow(1, inputs, skips)), skips, outputs);
  const auto *from = static_cast<const Element*>(x.const_data_ptr()),
             *of_skip = static_cast<const Element*>(skip.const_data_ptr());
  auto* to = static_cast<Element*>(y.mutable_data_ptr());
  const int64_t size = tile_size(w, kPixels);
  const auto pixels = size == 1 ? upsampled_pixels<1> : size == 3 ? upsampled_pixels<3> : upsampled_pixels<kPixels>;
  const Bands bands(sizes);
  at::parallel_for(0, x.size(0) * bands.of_slice, bands.grain, [&](int64_t begin, int64_t end) {
    const auto small = buffer<Element>((kBand + 2) * (w + 2) * inputs);
    const auto large = buffer<Element>((2 * kBand + 2) * (2 * w + 2) * skips);
    const auto maps = buffer<Element>(4 * (kBand + 1) * (w + 1) * inputs);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t slice = n / bands.of_slice, first = n % bands.of_slice * kBand, rows = std::min(kBand, h - first);
      padded_rows(from + slice * h * w * inputs, h, w, inputs, first - 1, rows + 2, small.get());
      padded_rows(of_skip + slice * 4 * h * w * skips, 2 * h, 2 * w, skips, 2 * first - 1, 2 * rows + 2, large.get());
      differences(small.get(), rows, w, inputs, maps.get());
      const UpsampledBand band{maps.get(), large.get(), (rows + 1) * (w + 1) * inputs, filters.get(), beside.get(),
                               bias.const_data_ptr<float>(), static_cast<float>(slope)};
      Element* rows_to = to + (slice * h + first) * 4 * w * outputs;
      for (int64_t o = 0; o < outputs; o += kLanes)
        for (int64_t i = 0; i < rows; ++i)
          each_tile(w, size, [&](int64_t j, int64_t) { pixels(band, sizes, i, j, o, rows_to); });
    }
  });
  return y;
}

// Of a row of pixels the nine sums T of what is sent back, of `rows` as of padded_rows, the four from 2 i - 1 on: to
// (pixels, nine, outputs), and to groups of pixels, (pixels / kGroup, nine, outputs, kGroup). `along` is scratch.
SPSS_HOT void nine_sums(const Element* rows, int64_t w, int64_t outputs, float* along, Factor* out, Factor* groups) {
  const int64_t size = (2 * w + 2) * outputs;
  for (int64_t at = 0; at < size; at += kLanes) {
    const Vector a = load(rows + at), b = load(rows + size + at), c = load(rows + 2 * size + at),
                 d = load(rows + 3 * size + at);
    store(along + at, b + c), store(along + size + at, b - d), store(along + 2 * size + at, a - c);
  }
  const int64_t columns = kNine * outputs;
  for (int64_t j = 0; j < w; j += kGroup)
    for (int q = 0; q < 3; ++q)
      for (int64_t o = 0; o < outputs; o += kLanes) {
        Vector nine[3][kGroup] = {};
        SPSS_UNROLL for (int g = 0; g < kGroup; ++g) {
          if (j + g >= w) continue;
          const float* from = along + q * size + 2 * (j + g) * outputs + o;
          const Vector a = load(from), b = load(from + outputs), c = load(from + 2 * outputs),
                       d = load(from + 3 * outputs);
          nine[0][g] = b + c, nine[1][g] = b - d, nine[2][g] = a - c;
          SPSS_UNROLL for (int k = 0; k < 3; ++k)
            store(out + (j + g) * columns + (3 * q + k) * outputs + o, nine[k][g]);
        }
        SPSS_UNROLL for (int k = 0; k < 3; ++k)
          store_group(groups + j * columns + ((3 * q + k) * outputs + o) * kGroup, nine[k]);
      }
}

// A row's pixels in groups, (pixels / kGroup, channels, kGroup).
SPSS_HOT void grouped(const Element* x, int64_t w, int64_t channels, Factor* out) {
  for (int64_t j = 0; j < w; j += kGroup)
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vector group[kGroup] = {};
      SPSS_UNROLL for (int g = 0; g < kGroup; ++g)
        if (j + g < w) group[g] = load(x + (j + g) * channels + c);
      store_group(out + j * channels + c * kGroup, group);
    }
}

// R inputs by three vectors of columns of the sum over `pixels`, whole groups, of x times T.
template <int R>
SPSS_HOT void add_outer_product(
    const Factor* x, int64_t inputs, const Factor* t, int64_t columns, int64_t pixels, float* sum) {
  Vector sums[R][3] = {};
  for (int64_t p = 0; p < pixels; p += kGroup, x += inputs * kGroup, t += columns * kGroup) {
    Row rows[3];
    SPSS_UNROLL for (int l = 0; l < 3; ++l) rows[l] = load_row(t + l * kLanes * kGroup);
    SPSS_UNROLL for (int r = 0; r < R; ++r)
      SPSS_UNROLL for (int l = 0; l < 3; ++l) add_multiple(sums[r][l], x + r * kGroup, rows[l]);
  }
  SPSS_UNROLL for (int r = 0; r < R; ++r)
    SPSS_UNROLL for (int l = 0; l < 3; ++l) {
      float* to = sum + r * columns + l * kLanes;
      store(to, load(to) + sums[r][l]);
    }
}

// The gradients of x and, into `dweight` (O, I, 3, 3), of its share of the weight; `grad` is what comes back through the
// leaky ReLU. Every thread sums up its own bands.
inline at::Tensor upsampled_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight, const at::Tensor& dweight) {
  constexpr int kInputs = kSums / 3;
  const at::Tensor grad = in_order(grad_), x = in_order(x_), dx = empty_maps(x, x.sizes());
  const Upsampled sizes{x.size(2), x.size(3), x.size(1), 0, weight.size(0)};
  const int64_t h = sizes.h, w = sizes.w, inputs = sizes.inputs, outputs = sizes.outputs, columns = kNine * outputs;
  Taps transposed(weight);
  std::swap(transposed.input, transposed.output);
  const auto filters = nine_filters(transposed, outputs, inputs);
  const auto *upstream = static_cast<const Element*>(grad.const_data_ptr()),
             *values = static_cast<const Element*>(x.const_data_ptr());
  auto* to = static_cast<Element*>(dx.mutable_data_ptr());
  const auto multiply = inputs % (2 * kLanes) == 0 ? row_product<2> : row_product<1>;
  const Bands bands(sizes);
  const int64_t count = x.size(0) * bands.of_slice;
  const int64_t threads = std::clamp<int64_t>(count / bands.grain, 1, at::get_num_threads());
  const at::Tensor sums = at::zeros({threads, inputs, columns}, x.options().dtype(at::kFloat));
  float* of_threads = sums.data_ptr<float>();
  at::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
    const int64_t pixels = in_groups(w);
    const auto rows = buffer<Element>((2 * kBand + 2) * (2 * w + 2) * outputs);
    const auto along = buffer<float>(3 * (2 * w + 2) * outputs);
    const auto t = buffer<Factor>(kBand * w * columns), groups = buffer<Factor>(kBand * pixels * columns);
    const auto data = buffer<Factor>(kBand * pixels * inputs);
    for (int64_t thread = first_thread; thread < last_thread; ++thread) {
      for (int64_t n = thread * count / threads; n < (thread + 1) * count / threads; ++n) {
        const int64_t slice = n / bands.of_slice, first = n % bands.of_slice * kBand, band = std::min(kBand, h - first);
        const int64_t start = (slice * h + first) * w * inputs;
        padded_rows(upstream + slice * 4 * h * w * outputs, 2 * h, 2 * w, outputs, 2 * first - 1, 2 * band + 2,
                    rows.get());
        for (int64_t i = 0; i < band; ++i) {
          nine_sums(rows.get() + 2 * i * (2 * w + 2) * outputs, w, outputs, along.get(), t.get() + i * w * columns,
                    groups.get() + i * pixels * columns);
          grouped(values + start + i * w * inputs, w, inputs, data.get() + i * pixels * inputs);
        }
        multiply(t.get(), band * w, columns, filters.get(), inputs, to + start, nullptr);
        float* sum = of_threads + thread * inputs * columns;
        for (int64_t column = 0; column < columns; column += 3 * kLanes)
          for (int64_t i = 0; i < inputs; i += kInputs)
            add_outer_product<kInputs>(data.get() + i * kGroup, inputs, groups.get() + column * kGroup, columns,
                                       band * pixels, sum + i * columns + column);
      }
    }
  });
  const at::Tensor total = sums.sum(0);
  const float* nine = total.const_data_ptr<float>();
  const Taps taps(dweight);
  for (int64_t i = 0; i < inputs; ++i)
    for (int64_t o = 0; o < outputs; o += kLanes) {
      Vector v[kNine];
      for (int q = 0; q < kNine; ++q) v[q] = load(nine + (i * kNine + q) * outputs + o);
      for (int q = 0; q < 3; ++q) transform_taps_adjoint(v[q], v[3 + q], v[6 + q]);
      for (int q = 0; q < 3; ++q) transform_taps_adjoint(v[3 * q], v[3 * q + 1], v[3 * q + 2]);
      for (int q = 0; q < kNine; ++q) taps.store(i, q, o, v[q]);
    }
  return dx;
}

}  // namespace
}  // namespace spss
