// Sums of a convolution's outputs and of their squares, a channel, taken while they are in registers: batch norm's
// moments without its pass over them.
//
// They are about zero. The maps are bfloat16, and what their rounding adds to a variance outweighs what cancels in
// float32 sums of some hundred values; beyond that sums are float64.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

namespace spss {

class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels) : channels_(channels) {}

  // Mean and biased variance of each channel's `count` values, (C,) float32; NaN of none.
  std::tuple<at::Tensor, at::Tensor> moments(int64_t count) const {
    const at::Tensor mean = at::empty({channels_}, at::kFloat), variance = at::empty_like(mean);
    for (int64_t c = 0; c < channels_; ++c) {
      double first = 0, second = 0;
      for (const auto& [begin, sums] : chunks_) first += sums[c], second += sums[channels_ + c];
      first /= count, second /= count;
      mean.data_ptr<float>()[c] = static_cast<float>(first);
      variance.data_ptr<float>()[c] = static_cast<float>(std::max(second - first * first, 0.0));  // NaN stays NaN
    }
    return {mean, variance};
  }

 private:
  friend class SumsOfChunk;
  int64_t channels_;
  std::mutex mutex_;
  std::map<int64_t, std::vector<double>> chunks_;  // of a parallel loop, by where they begin: added up in that order
};

// What one chunk of a parallel loop adds to; nothing where `sums` is null. Of `copies` voxels side by side the sums are
// taken apart, as vectors hold them.
class SumsOfChunk {
 public:
  SumsOfChunk(ChannelSums* sums, int64_t begin, int64_t copies = 1)
      : sums_(sums), begin_(begin), copies_(copies), values_(sums == nullptr ? 0 : 2 * copies * sums->channels_),
        total_(values_.size() / copies) {}
  SumsOfChunk(const SumsOfChunk&) = delete;

  ~SumsOfChunk() {
    if (sums_ == nullptr) return;
    const std::lock_guard lock(sums_->mutex_);
    sums_->chunks_[begin_] = std::move(total_);
  }

  float* first() { return values_.empty() ? nullptr : values_.data(); }  // and of the squares, behind them

  // After some hundred values a channel.
  void fold() {
    if (sums_ == nullptr) return;
    const int64_t channels = sums_->channels_;
    for (int64_t i = 0; i < 2 * copies_ * channels; ++i)
      total_[i / (copies_ * channels) * channels + i % channels] += values_[i];
    std::fill(values_.begin(), values_.end(), 0.f);
  }

 private:
  ChannelSums* sums_;
  int64_t begin_, copies_;
  std::vector<float> values_;
  std::vector<double> total_;
};

}  // namespace spss
