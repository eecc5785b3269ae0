// The segmentation losses of a step, one pass over the voxels forward and one backward, on the CPU.
//
// A forward pass leaves its sums (float64) behind; they are all the backward pass needs besides the inputs.
// Sums are of the compute type within a tile of 256 voxels, of float64 beyond it.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>

#include <atomic>

#include "checks.h"
#include "cpu/memory.h"
#include "cpu/operators.h"
#include "cpu/planes.h"

namespace spss {
namespace {

constexpr int64_t kChunk = 8192;

// One tile's rows besides its logits.
template <class T>
struct Scratch {
  std::vector<T> logits, p, q, slope, weight, top, sum, mean;
  std::vector<int32_t> target;

  explicit Scratch(int64_t channels)
      : logits(channels * kTile), p(channels * kTile), q(channels * kTile), slope(channels * kTile), weight(kTile),
        top(kTile), sum(kTile), mean(kTile), target(kTile) {}
};

// Labels as 32-bit numbers and weights in the compute type. Returns whether every label is a class.
template <class T, class weight_t>
SPSS_MULTIARCH bool read_labels(const int64_t* targets, const weight_t* weights, int64_t channels, int64_t count,
                                int32_t* target, T* weight) {
  int32_t wrong = 0;
  SPSS_SIMD_SUM(wrong)
  for (int64_t i = 0; i < count; ++i) {
    const bool fits = targets[i] >= 0 && targets[i] < channels;
    wrong += !fits;
    target[i] = fits ? static_cast<int32_t>(targets[i]) : 0;
    weight[i] = static_cast<T>(weights[i]);
  }
  return wrong == 0;
}

struct Pair {
  double first, second;
};

// (sum of weight * cross entropy, sum of weights); the cross entropy's logits are `x`, its log-sum-exp top + log(sum).
template <class T>
SPSS_MULTIARCH Pair cross_entropy(Rows<T> x, const int32_t* target, const T* weight, int64_t count, const T* top,
                                  const T* sum) {
  T ce = 0, total = 0;
  SPSS_SIMD_SUM(ce, total)
  for (int64_t i = 0; i < count; ++i) {
    ce += weight[i] * (top[i] + fast_log(sum[i]) - x.data[target[i] * x.stride + i]);
    total += weight[i];
  }
  return {ce, total};
}

// (sum of p where the voxel is of the class, sum of p^2 + [voxel is of the class]), under a weight and without one.
template <bool masked, class T>
SPSS_MULTIARCH void add_class(const T* p, int32_t c, const int32_t* target, const T* weight, int64_t count,
                              double* sums) {
  T hit = 0, size = 0, hit_masked = 0, size_masked = 0;
  SPSS_SIMD_SUM(hit, size, hit_masked, size_masked)
  for (int64_t i = 0; i < count; ++i) {
    const T here = target[i] == c ? T(1) : T(0), hit_i = here * p[i], size_i = p[i] * p[i] + here;
    hit += hit_i;
    size += size_i;
    if constexpr (masked) {
      hit_masked += weight[i] * hit_i;
      size_masked += weight[i] * size_i;
    }
  }
  sums[0] += hit_masked;
  sums[1] += size_masked;
  sums[2] += hit;
  sums[3] += size;
}

// Both losses have the same shape: CE under a weight, and Dice sums, under the weight too where it is a mask.
// Returns per volume (sum of weighted CE, sum of weights), then per class (hit, size) masked and unmasked.
template <bool masked, class T, class scalar_t, class weight_t>
std::vector<double> forward_sums(const Planes& logits, const int64_t* target, const weight_t* weight,
                                 bool on_probabilities) {
  const int64_t channels = logits.channels, width = 2 + 4 * channels;
  const Chunks chunks(logits.batch, logits.voxels, kChunk);
  std::vector<double> partial(chunks.count * width);
  std::atomic<bool> labels_fit{true};
  chunks.run([&](int64_t chunk, int64_t b, int64_t begin, int64_t end) {
    double* out = partial.data() + chunk * width;
    Scratch<T> s(channels);
    for (; begin < end; begin += kTile) {
      const int64_t count = std::min(kTile, end - begin), offset = b * logits.voxels + begin;
      if (!read_labels(target + offset, weight + offset, channels, count, s.target.data(), s.weight.data()))
        labels_fit = false;
      const Rows<T> x = read_rows<T, scalar_t>(logits, b, begin, count, s.logits.data());
      softmax_rows(x, channels, count, s.p.data(), s.top.data(), s.sum.data());
      const Rows<T> p{s.p.data(), kTile};
      if (on_probabilities) softmax_rows(p, channels, count, s.q.data(), s.top.data(), s.sum.data());
      const Pair ce = cross_entropy(on_probabilities ? p : x, s.target.data(), s.weight.data(), count, s.top.data(),
                                    s.sum.data());
      out[0] += ce.first;
      out[1] += ce.second;
      for (int64_t c = 0; c < channels; ++c)
        add_class<masked>(s.p.data() + c * kTile, c, s.target.data(), s.weight.data(), count, out + 2 + 4 * c);
    }
  });
  TORCH_CHECK_VALUE(labels_fit, "target: every label must be in [0, ", channels, "), the number of channels of logits");
  std::vector<double> total(2 * logits.batch + 4 * channels);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const double* from = partial.data() + chunk * width;
    double* of_volume = total.data() + 2 * (chunk / chunks.per_volume);
    for (int64_t i = 0; i < 2; ++i) of_volume[i] += from[i];
    for (int64_t i = 0; i < 4 * channels; ++i) total[2 * logits.batch + i] += from[2 + i];
  }
  return total;
}

// What a voxel's gradient is made of: the slopes of CE (per volume) and of Dice (per class).
struct Slopes {
  std::vector<double> ce;
  std::vector<DiceSlope> masked, all;
};

// slope = dL/dp_c; mean += p_c slope. `q` is the softmax that CE on probabilities compares with the target.
template <bool masked, bool on_probabilities, class T>
SPSS_MULTIARCH void add_slope(const T* p, const T* q, int32_t c, const int32_t* target, const T* weight, int64_t count,
                              T ce, DiceSlope all, DiceSlope under_mask, T* slope, T* mean) {
  const T hit_all = all.hit, size_all = all.size, hit_mask = under_mask.hit, size_mask = under_mask.size;
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const T here = target[i] == c ? T(1) : T(0);
    T s = masked ? here * (hit_all + weight[i] * hit_mask) + p[i] * (size_all + weight[i] * size_mask)
                 : here * hit_all + p[i] * size_all;
    if constexpr (on_probabilities) s += ce * weight[i] * (q[i] - here);
    slope[i] = s;
    mean[i] = c == 0 ? p[i] * s : mean[i] + p[i] * s;
  }
}

// slope = dL/dlogit_c, from dL/dp_c.
template <bool on_probabilities, class T>
SPSS_MULTIARCH void through_softmax(const T* p, int32_t c, const int32_t* target, const T* weight, int64_t count, T ce,
                                    const T* mean, T* slope) {
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) {
    T gradient = p[i] * (slope[i] - mean[i]);
    if constexpr (!on_probabilities) gradient += ce * weight[i] * (p[i] - (target[i] == c ? T(1) : T(0)));
    slope[i] = gradient;
  }
}

template <bool masked, bool on_probabilities, class T, class scalar_t, class weight_t>
void backward_pass(const Planes& logits, const int64_t* target, const weight_t* weight, const Slopes& slopes,
                   const Planes& grad) {
  const int64_t channels = logits.channels;
  Chunks(logits.batch, logits.voxels, kChunk).run([&](int64_t, int64_t b, int64_t begin, int64_t end) {
    const T ce = slopes.ce[b];
    Scratch<T> s(channels);
    for (; begin < end; begin += kTile) {
      const int64_t count = std::min(kTile, end - begin), offset = b * logits.voxels + begin;
      read_labels(target + offset, weight + offset, channels, count, s.target.data(), s.weight.data());
      const Rows<T> x = read_rows<T, scalar_t>(logits, b, begin, count, s.logits.data());
      softmax_rows(x, channels, count, s.p.data(), s.top.data(), s.sum.data());
      if (on_probabilities)
        softmax_rows(Rows<T>{s.p.data(), kTile}, channels, count, s.q.data(), s.top.data(), s.sum.data());
      for (int64_t c = 0; c < channels; ++c)
        add_slope<masked, on_probabilities>(s.p.data() + c * kTile, s.q.data() + c * kTile, c, s.target.data(),
                                            s.weight.data(), count, ce, slopes.all[c], slopes.masked[c],
                                            s.slope.data() + c * kTile, s.mean.data());
      for (int64_t c = 0; c < channels; ++c)
        through_softmax<on_probabilities>(s.p.data() + c * kTile, c, s.target.data(), s.weight.data(), count, ce,
                                          s.mean.data(), s.slope.data() + c * kTile);
      scatter_rows<false>(grad.at_voxel<scalar_t>(b, begin), grad.channel_stride, grad.voxel_stride, channels, count,
                          s.slope.data());
    }
  });
}

template <bool masked, class weight_t>
at::Tensor forward(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weight,
                   bool on_probabilities) {
  const at::Tensor labels = target.contiguous(), weights = weight.contiguous();
  const Planes in = planes(logits);
  std::vector<double> sums;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "ce_dice", [&] {
    sums = forward_sums<masked, compute_t<scalar_t>, scalar_t>(in, labels.data_ptr<int64_t>(),
                                                               weights.data_ptr<weight_t>(), on_probabilities);
  });
  return at::tensor(sums, at::kDouble);
}

template <bool masked, class weight_t>
at::Tensor backward(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weight,
                    const Slopes& slopes, bool on_probabilities) {
  const at::Tensor labels = target.contiguous(), weights = weight.contiguous();
  const Planes in = planes(logits);
  at::Tensor grad = with_huge_pages(at::empty_like(logits));
  write_planes(grad, [&](const Planes& out) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "ce_dice_backward", [&] {
      const auto run = on_probabilities ? &backward_pass<masked, true, compute_t<scalar_t>, scalar_t, weight_t>
                                        : &backward_pass<masked, false, compute_t<scalar_t>, scalar_t, weight_t>;
      run(in, labels.data_ptr<int64_t>(), weights.data_ptr<weight_t>(), slopes, out);
    });
  });
  return grad;
}

}  // namespace

// CE runs over the mask of the whole batch.
std::tuple<at::Tensor, at::Tensor> masked_ce_dice(const at::Tensor& logits, const at::Tensor& target,
                                                  const at::Tensor& mask, bool on_probabilities) {
  check_ce_dice(logits, target, mask, true);
  const at::Tensor sums = forward<true, bool>(logits, target, mask, on_probabilities);
  const int64_t batch = logits.size(0), channels = logits.size(1);
  const double* s = sums.data_ptr<double>();
  double ce = 0, count = 0, masked = 0, all = 0;
  for (int64_t b = 0; b < batch; ++b) ce += s[2 * b], count += s[2 * b + 1];
  for (int64_t c = 0; c < channels; ++c) {
    const double* of_class = s + 2 * batch + 4 * c;
    masked += dice_loss(of_class[0], of_class[1]) / channels;
    all += dice_loss(of_class[2], of_class[3]) / channels;
  }
  return {at::tensor({ce / std::max(count, 1.0), masked, all}, compute_type(logits)), sums};
}

at::Tensor masked_ce_dice_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& target,
                                   const at::Tensor& mask, const at::Tensor& sums, bool on_probabilities) {
  check_ce_dice_backward(grad, logits, target, mask, sums, true);
  const at::Tensor g = grad.to(at::kDouble).contiguous();
  const double *upstream = g.data_ptr<double>(), *s = sums.data_ptr<double>();
  const int64_t batch = logits.size(0), channels = logits.size(1);
  double count = 0;
  for (int64_t b = 0; b < batch; ++b) count += s[2 * b + 1];
  Slopes slopes{std::vector<double>(batch, upstream[0] / std::max(count, 1.0)), {}, {}};
  for (int64_t c = 0; c < channels; ++c) {
    const double* of_class = s + 2 * batch + 4 * c;
    slopes.masked.push_back(dice_slope(of_class[0], of_class[1], upstream[1] / channels));
    slopes.all.push_back(dice_slope(of_class[2], of_class[3], upstream[2] / channels));
  }
  return backward<true, bool>(logits, target, mask, slopes, on_probabilities);
}

namespace {

template <class Body>
auto with_weight_type(const at::Tensor& logits, const at::Tensor& weight, Body body) {
  return compute_type(logits) == at::kDouble ? body(weight.to(at::kDouble), double())
                                             : body(weight.to(at::kFloat), float());
}

}  // namespace

// The weighted Dice columns of the sums are unused.
std::tuple<at::Tensor, at::Tensor> weighted_ce_dice(const at::Tensor& logits, const at::Tensor& target,
                                                    const at::Tensor& weight) {
  check_ce_dice(logits, target, weight, false);
  const at::Tensor sums = with_weight_type(logits, weight, [&](const at::Tensor& w, auto kind) {
    return forward<false, decltype(kind)>(logits, target, w, false);
  });
  const int64_t batch = logits.size(0), channels = logits.size(1);
  const double* s = sums.data_ptr<double>();
  double ce = 0, dice = 0;
  for (int64_t b = 0; b < batch; ++b) ce += s[2 * b] / s[2 * b + 1];
  for (int64_t c = 1; c < channels; ++c) dice += dice_loss(s[2 * batch + 4 * c + 2], s[2 * batch + 4 * c + 3]);
  return {at::tensor({ce / batch, dice / (channels - 1)}, compute_type(logits)), sums};
}

at::Tensor weighted_ce_dice_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& target,
                                     const at::Tensor& weight, const at::Tensor& sums) {
  check_ce_dice_backward(grad, logits, target, weight, sums, false);
  const at::Tensor g = grad.to(at::kDouble).contiguous();
  const double *upstream = g.data_ptr<double>(), *s = sums.data_ptr<double>();
  const int64_t batch = logits.size(0), channels = logits.size(1);
  Slopes slopes;
  for (int64_t b = 0; b < batch; ++b) slopes.ce.push_back(upstream[0] / (s[2 * b + 1] * batch));
  slopes.masked.resize(channels, {0, 0});
  slopes.all.push_back({0, 0});  // the background has no part in this Dice
  for (int64_t c = 1; c < channels; ++c) {
    const double* of_class = s + 2 * batch + 4 * c;
    slopes.all.push_back(dice_slope(of_class[2], of_class[3], upstream[1] / (channels - 1)));
  }
  return with_weight_type(logits, weight, [&](const at::Tensor& w, auto kind) {
    return backward<false, decltype(kind)>(logits, target, w, slopes, false);
  });
}

}  // namespace spss
