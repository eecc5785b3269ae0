// How the CPU loops over channels read (B, C, *spatial) tensors: in segments whose channels follow a pattern. Channels
// last, that is a row of channels repeated; contiguous, one channel throughout. One set of loops over patterns serves
// both. Sums are of the compute type within a segment and of float64 beyond it, in an order that the number of threads
// does not change.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "cpu/planes.h"

namespace spss {
namespace {

constexpr int64_t kSegment = 16384;  // elements, about
constexpr int64_t kPattern = 64;     // shortest pattern: four registers of AVX-512

// Channels last in any number of dimensions, slices among them; what else there is, is contiguous or will be.
bool channels_last(const at::Tensor& t) { return !t.is_contiguous() && t.stride(1) == 1; }

// The axes as they are gone through, and back.
at::Tensor forth(const at::Tensor& t, bool last) { return last ? t.movedim(1, -1) : t; }
at::Tensor back(const at::Tensor& t, bool last) { return last ? t.movedim(-1, 1) : t; }

at::Tensor in_order(const at::Tensor& t, bool last) { return back(forth(t, last).contiguous(), last); }

at::Tensor empty_in_order(const at::Tensor& t, bool last) {
  const at::Tensor ordered = forth(t, last);
  return ordered.is_contiguous() ? at::empty_like(t) : back(at::empty(ordered.sizes(), t.options()), last);
}

struct Segment {
  int64_t begin, count, channel;  // the channel of a contiguous segment; 0 where all channels take turns
};

class Segments {
 public:
  int64_t channels, pattern, count;  // of x; elements a pattern; segments
  bool last;                         // whether channels take turns

  Segments(const at::Tensor& x, bool channels_last) : channels(x.size(1)), last(channels_last) {
    total_ = x.numel();
    run_ = last ? total_ : total_ / (x.size(0) * channels);
    pattern = last ? channels * std::max<int64_t>(1, kPattern / channels) : kPattern;
    size_ = std::max<int64_t>(1, kSegment / pattern) * pattern;
    per_run_ = (run_ + size_ - 1) / size_;
    count = total_ / run_ * per_run_;
  }

  Segment operator[](int64_t i) const {
    const int64_t run = i / per_run_, begin = i % per_run_ * size_;
    return {run * run_ + begin, std::min(size_, run_ - begin), last ? 0 : run % channels};
  }

  // Per-channel numbers laid out as the segment's pattern, one row after the other, then `zeros` rows of 0.
  template <class T>
  std::vector<T> lay_out(const Segment& segment, std::initializer_list<const std::vector<T>*> rows,
                         int64_t zeros = 0) const {
    std::vector<T> out((rows.size() + zeros) * pattern);
    T* to = out.data();
    for (const std::vector<T>* values : rows)
      for (int64_t i = 0; i < pattern; ++i) *to++ = (*values)[last ? i % channels : segment.channel];
    return out;
  }

  template <class T>
  void fold(const Segment& segment, const T* sums, double* out) const {
    for (int64_t i = 0; i < pattern; ++i) out[last ? i % channels : segment.channel] += sums[i];
  }

  template <class Body>
  void run(Body body) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i, (*this)[i]);
    });
  }

  // What a body leaves in its segment's slot of `width` sums per channel, added up in order.
  std::vector<double> add_up(const std::vector<double>& partial, int64_t width) const {
    std::vector<double> sums(width * channels);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < width * channels; ++j) sums[j] += partial[i * width * channels + j];
    return sums;
  }

 private:
  int64_t total_, run_, size_, per_run_;
};

// bfloat16 by its bits: the conversions of c10 branch on NaN, and a branch keeps the loop from being vectorised.
template <class T, class scalar_t>
SPSS_HD T load(const scalar_t& value) {
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) return std::bit_cast<float>(uint32_t(value.x) << 16);
  else return static_cast<T>(value);
}

template <class scalar_t, class T>
SPSS_HD void store(scalar_t& to, T value) {
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    to.x = static_cast<uint16_t>(value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
  } else {
    to = static_cast<scalar_t>(value);
  }
}

// Vectors of channels, of any floating dtype, to numbers and back. Here, as torch's conversions take longer than all else
// does on a small feature map.
std::vector<double> numbers(const at::Tensor& t) {
  std::vector<double> out(t.numel());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t.scalar_type(), "numbers", [&] {
    const scalar_t* from = t.data_ptr<scalar_t>();
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<double>(from[i * t.stride(0)]);
  });
  return out;
}

at::Tensor tensor_of(const std::vector<double>& values, const at::TensorOptions& options) {
  at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, options.memory_format(std::nullopt));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "tensor_of", [&] {
    std::transform(values.begin(), values.end(), out.data_ptr<scalar_t>(),
                   [](double value) { return static_cast<scalar_t>(value); });
  });
  return out;
}

}  // namespace
}  // namespace spss
