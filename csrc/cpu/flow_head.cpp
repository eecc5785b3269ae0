// flow_head: 3 x 3 convolution of 16 channels to two, the displacement along either axis. What computes eight or 16
// outputs at once multiplies most of them with nothing; here a vector holds channels of the input, and what it sums up
// is added across it at the end. Bands of rows are read as float32, with zeros around them; all sums are float32.
#include "cpu/multiarch.h"

#if SPSS_HAS_FMA

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "checks.h"
#include "cpu/memory.h"
#include "cpu/operators.h"
#include "cpu/vectors.h"

#pragma GCC optimize("fp-contract=fast")  // products need not be rounded before they are added

namespace spss {
namespace {

constexpr int kChannels = 16, kHalves = kChannels / kLanes;
constexpr int kFlow = 2;             // outputs
constexpr int kPixels = 4;           // at once: the sums of both outputs, added across, fill a vector
constexpr int64_t kRows = 8;         // of a band, which a second-level cache holds
constexpr int64_t kGrain = 1 << 12;  // pixels that are worth a thread

using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halfwords = uint16_t __attribute__((vector_size(2 * kLanes)));
using UnalignedHalfwords = uint16_t __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

SPSS_INLINE Vector load(const at::BFloat16* from) {
  const Halfwords bits = *reinterpret_cast<const UnalignedHalfwords*>(from);
  return reinterpret_cast<Vector>(__builtin_convertvector(bits, Words) << 16);
}

SPSS_INLINE void store(at::BFloat16* to, const Vector& value) {  // the nearest, of two the even one
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words not_a_number = reinterpret_cast<Words>(value != value);
  const Words result = (rounded & ~not_a_number) | (not_a_number & 0x7fc0);
  *reinterpret_cast<UnalignedHalfwords*>(to) = __builtin_convertvector(result, Halfwords);
}

// The lanes of eight vectors, each summed up.
SPSS_INLINE Vector add_across(const Vector (&v)[8]) {
  Vector pairs[4], fours[2];
  SPSS_UNROLL for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  SPSS_UNROLL for (int i = 0; i < 2; ++i)
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// Slices of a map, cut into bands of rows; a line of a band is a row with a pixel of zeros before it and enough of them
// after it for whole tiles.
struct Bands {
  int64_t batch, height, width, of_a_slice, line;

  explicit Bands(const at::Tensor& x) : batch(x.size(0)), height(x.size(2)), width(x.size(3)) {
    of_a_slice = (height + kRows - 1) / kRows;
    line = (width + kPixels - 1) / kPixels * kPixels + 2;
  }

  // body(slice, first row, row after the last, memory for lines of so many values a pixel), by several threads
  template <class Body>
  void each(int64_t values, Body body) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kRows * width));
    at::parallel_for(0, batch * of_a_slice, grain, [&](int64_t begin, int64_t end) {
      const auto lines = std::make_unique_for_overwrite<float[]>((kRows + 2) * line * values);
      for (int64_t band = begin; band < end; ++band) {
        const int64_t first = band % of_a_slice * kRows;
        body(band / of_a_slice, first, std::min(first + kRows, height), lines.get());
      }
    });
  }
};

// Rows `first` - 1 to `last` of a slice (H, W, 16).
template <class Element>
SPSS_MULTIARCH void read_rows(const Element* slice, const Bands& bands, int64_t first, int64_t last, float* lines) {
  for (int64_t h = first - 1; h <= last; ++h, lines += bands.line * kChannels) {
    if (h < 0 || h >= bands.height) {
      std::fill_n(lines, bands.line * kChannels, 0.f);
      continue;
    }
    const Element* row = slice + h * bands.width * kChannels;
    std::fill_n(lines, kChannels, 0.f);
    for (int64_t i = 0; i < bands.width * kChannels; i += kLanes) store(lines + kChannels + i, load(row + i));
    std::fill_n(lines + (bands.width + 1) * kChannels, (bands.line - bands.width - 1) * kChannels, 0.f);
  }
}

// The same of a slice (2, H, W) of float32, one output beside the other in a line.
void read_gradient(const float* slice, const Bands& bands, int64_t first, int64_t last, float* lines) {
  for (int64_t h = first - 1; h <= last; ++h, lines += bands.line * kFlow) {
    std::fill_n(lines, bands.line * kFlow, 0.f);
    if (h < 0 || h >= bands.height) continue;
    for (int o = 0; o < kFlow; ++o)
      std::copy_n(slice + (o * bands.height + h) * bands.width, bands.width, lines + o * bands.line + 1);
  }
}

struct Taps {
  alignas(64) float values[kFlow][3][3][kChannels];
};

Taps taps_of(const at::Tensor& weight) {
  Taps taps;
  const at::Tensor ordered = weight.permute({0, 2, 3, 1}).contiguous();
  std::copy_n(ordered.const_data_ptr<float>(), ordered.numel(), &taps.values[0][0][0][0]);
  return taps;
}

// One row of both outputs; `lines` begin with the row above.
SPSS_MULTIARCH void flow_row(
    const float* lines, const Taps& taps, const float* bias, const Bands& bands, float* y0, float* y1) {
  const Vector biases{bias[0], bias[0], bias[0], bias[0], bias[1], bias[1], bias[1], bias[1]};
  for (int64_t p = 0; p < bands.width; p += kPixels) {
    Vector sums[kFlow * kPixels] = {};
    for (int i = 0; i < 3; ++i)
      SPSS_UNROLL for (int j = 0; j < 3; ++j) SPSS_UNROLL for (int half = 0; half < kHalves; ++half) {
        const float* x = lines + (i * bands.line + p + j) * kChannels + half * kLanes;
        const Vector w0 = load(&taps.values[0][i][j][half * kLanes]), w1 = load(&taps.values[1][i][j][half * kLanes]);
        SPSS_UNROLL for (int k = 0; k < kPixels; ++k) {
          const Vector value = load(x + k * kChannels);
          sums[k] += value * w0, sums[kPixels + k] += value * w1;
        }
      }
    const Vector both = add_across(sums) + biases;
    for (int64_t k = 0; k < std::min<int64_t>(kPixels, bands.width - p); ++k)
      y0[p + k] = both[k], y1[p + k] = both[kPixels + k];
  }
}

// One row of the gradient of x: what the outputs around a pixel send back.
template <class Element>
SPSS_MULTIARCH void input_gradient_row(const float* lines, const Taps& taps, const Bands& bands, Element* dx) {
  for (int64_t p = 0; p < bands.width; p += kPixels) {
    Vector sums[kPixels][kHalves] = {};
    for (int i = 0; i < 3; ++i)
      SPSS_UNROLL for (int o = 0; o < kFlow; ++o) SPSS_UNROLL for (int j = 0; j < 3; ++j) {
        const float* grad = lines + (i * kFlow + o) * bands.line + p + j;
        Vector w[kHalves];
        SPSS_UNROLL for (int half = 0; half < kHalves; ++half)
          w[half] = load(&taps.values[o][2 - i][2 - j][half * kLanes]);
        SPSS_UNROLL for (int k = 0; k < kPixels; ++k)
          SPSS_UNROLL for (int half = 0; half < kHalves; ++half) sums[k][half] += grad[k] * w[half];
      }
    for (int64_t k = 0; k < std::min<int64_t>(kPixels, bands.width - p); ++k)
      for (int half = 0; half < kHalves; ++half) store(dx + (p + k) * kChannels + half * kLanes, sums[k][half]);
  }
}

// A row's share of the gradient of the taps, those of one line of x at a time: what they sum fits into registers.
SPSS_MULTIARCH void add_taps_gradient(
    const float* lines, const float* grad0, const float* grad1, const Bands& bands, Taps& sum) {
  for (int i = 0; i < 3; ++i) {
    Vector sums[kFlow][3][kHalves] = {};
    const float* x = lines + i * bands.line * kChannels;
    for (int64_t p = 0; p < bands.width; ++p, x += kChannels)
      SPSS_UNROLL for (int j = 0; j < 3; ++j) SPSS_UNROLL for (int half = 0; half < kHalves; ++half) {
        const Vector value = load(x + j * kChannels + half * kLanes);
        sums[0][j][half] += grad0[p] * value, sums[1][j][half] += grad1[p] * value;
      }
    for (int o = 0; o < kFlow; ++o)
      for (int j = 0; j < 3; ++j)
        for (int half = 0; half < kHalves; ++half) {
          float* to = &sum.values[o][i][j][half * kLanes];
          store(to, load(to) + sums[o][j][half]);
        }
  }
}

at::Tensor in_order(const at::Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

template <class Element>
at::Tensor flow_of(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const Bands bands(x);
  const at::Tensor y = at::empty({bands.batch, kFlow, bands.height, bands.width}, bias.options());
  const Taps taps = taps_of(weight);
  const at::Tensor biases = bias.contiguous();
  const Element* from = x.const_data_ptr<Element>();
  float* to = y.mutable_data_ptr<float>();
  const int64_t pixels = bands.height * bands.width;
  bands.each(kChannels, [&](int64_t slice, int64_t first, int64_t last, float* lines) {
    read_rows(from + slice * pixels * kChannels, bands, first, last, lines);
    for (int64_t h = first; h < last; ++h) {
      float* row = to + slice * kFlow * pixels + h * bands.width;
      flow_row(lines + (h - first) * bands.line * kChannels, taps, biases.const_data_ptr<float>(), bands, row,
               row + pixels);
    }
  });
  return y;
}

template <class Element>
at::Tensor input_gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight) {
  const Bands bands(x);
  const at::Tensor dx = with_huge_pages(at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast)));
  const Taps taps = taps_of(weight);
  const float* from = grad.const_data_ptr<float>();
  Element* to = dx.mutable_data_ptr<Element>();
  const int64_t pixels = bands.height * bands.width;
  bands.each(kFlow, [&](int64_t slice, int64_t first, int64_t last, float* lines) {
    read_gradient(from + slice * kFlow * pixels, bands, first, last, lines);
    for (int64_t h = first; h < last; ++h)
      input_gradient_row(lines + (h - first) * bands.line * kFlow, taps, bands,
                         to + (slice * pixels + h * bands.width) * kChannels);
  });
  return dx;
}

// Every band has sums of its own, so that the number of threads changes nothing.
template <class Element>
at::Tensor weight_gradient(const at::Tensor& grad, const at::Tensor& x) {
  const Bands bands(x);
  const at::Tensor sums = at::empty({bands.batch * bands.of_a_slice, kFlow, 3, 3, kChannels}, grad.options());
  const Element* values = x.const_data_ptr<Element>();
  const float* upstream = grad.const_data_ptr<float>();
  float* to = sums.mutable_data_ptr<float>();
  const int64_t pixels = bands.height * bands.width;
  bands.each(kChannels, [&](int64_t slice, int64_t first, int64_t last, float* lines) {
    read_rows(values + slice * pixels * kChannels, bands, first, last, lines);
    Taps sum = {};
    for (int64_t h = first; h < last; ++h) {
      const float* row = upstream + slice * kFlow * pixels + h * bands.width;
      add_taps_gradient(lines + (h - first) * bands.line * kChannels, row, row + pixels, bands, sum);
    }
    std::copy_n(&sum.values[0][0][0][0], sizeof sum / sizeof(float),
                to + (slice * bands.of_a_slice + first / kRows) * sizeof sum / sizeof(float));
  });
  return sums.sum(0).permute({0, 3, 1, 2});
}

template <class Element>
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor dweight = at::empty_like(weight).copy_(weight_gradient<Element>(grad, x));
  return {input_gradient<Element>(grad, x, weight), dweight, grad.sum({0, 2, 3})};
}

}  // namespace

at::Tensor flow_head(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_flow_head(x, weight, bias);
  return x.scalar_type() == at::kFloat ? flow_of<float>(in_order(x), weight, bias)
                                       : flow_of<at::BFloat16>(in_order(x), weight, bias);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flow_head_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight) {
  check_flow_head_backward(grad_, x_, weight);
  const at::Tensor grad = grad_.contiguous(), x = in_order(x_);
  return x.scalar_type() == at::kFloat ? gradients<float>(grad, x, weight) : gradients<at::BFloat16>(grad, x, weight);
}

}  // namespace spss

#endif
