// Sums of a convolution's outputs and of their squares, a channel, taken while they are in registers: batch norm's
// moments without its pass over them.
//
// They are about zero. The maps are bfloat16, and what their rounding adds to a variance outweighs what cancels in
// float32 sums of some hundred values; beyond that sums are float64.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace spss {

class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels) : channels_(channels), totals_(at::get_num_threads() * 2 * channels) {}

  // Mean and biased variance of each channel's `count` values, (C,) float32.
  std::tuple<at::Tensor, at::Tensor> moments(int64_t count) const {
    const at::Tensor mean = at::empty({channels_}, at::kFloat), variance = at::empty_like(mean);
    for (int64_t c = 0; c < channels_; ++c) {
      double first = 0, second = 0;
      for (size_t at = c; at < totals_.size(); at += 2 * channels_)
        first += totals_[at] / count, second += totals_[at + channels_] / count;
      mean.data_ptr<float>()[c] = static_cast<float>(first);
      variance.data_ptr<float>()[c] = static_cast<float>(std::max(0.0, second - first * first));
    }
    return {mean, variance};
  }

 private:
  friend class SumsOfThread;
  int64_t channels_;
  std::vector<double> totals_;  // (threads, 2, channels)
};

// What one thread adds to; nothing where `sums` is null. Of `copies` voxels side by side the sums are taken apart, as
// vectors hold them.
class SumsOfThread {
 public:
  SumsOfThread(ChannelSums* sums, int64_t copies = 1)
      : sums_(sums), copies_(copies), values_(sums == nullptr ? 0 : 2 * copies * sums->channels_) {}

  float* first() { return values_.empty() ? nullptr : values_.data(); }  // and of the squares, behind them

  // After some hundred values a channel.
  void fold() {
    if (values_.empty()) return;
    const int64_t channels = sums_->channels_;
    double* total = sums_->totals_.data() + at::get_thread_num() * 2 * channels;
    for (int64_t i = 0; i < 2 * copies_ * channels; ++i)
      total[i / (copies_ * channels) * channels + i % channels] += values_[i];
    std::fill(values_.begin(), values_.end(), 0.f);
  }

 private:
  ChannelSums* sums_;
  int64_t copies_;
  std::vector<float> values_;
};

}  // namespace spss
