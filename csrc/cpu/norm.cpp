// Batch norm, ReLU and the addition of a skip connection in two passes over memory forward, and in two backward.
//
// The loops are those of cpu/segments.h. Of a slice of a channels-last tensor they see one run of neighbours after the
// other. Sums of x are about a mean of a few of the channel's own values, so that no digits cancel.
#include <algorithm>
#include <cmath>

#include "checks.h"
#include "cpu/memory.h"
#include "cpu/operators.h"
#include "cpu/segments.h"

namespace spss {
namespace {

constexpr int64_t kRun = 256;  // shortest run of neighbours that is worth a call

// The elements of a tensor in order, wherever they lie: runs of neighbours, along axes of constant stride.
class Runs {
 public:
  Runs(const at::Tensor& t, bool last) {
    const at::Tensor ordered = forth(t, last);
    for (int64_t d = ordered.dim() - 1; d >= 0; --d) {
      const int64_t size = ordered.size(d), stride = ordered.stride(d);
      if (size == 1) continue;
      if (axes_.empty() && stride == length_) length_ *= size;
      else if (!axes_.empty() && stride == axes_.back().stride * axes_.back().size) axes_.back().size *= size;
      else axes_.push_back({size, stride});
    }
  }

  bool are_long() const { return axes_.empty() || length_ >= kRun; }

  // body(offset, elements, place in memory) of each run, or part of one, of the `count` elements from `begin` on.
  template <class Body>
  void each(int64_t begin, int64_t count, Body body) const {
    for (int64_t offset = 0, n; offset < count; offset += n) {
      const int64_t skipped = (begin + offset) % length_;
      int64_t run = (begin + offset) / length_, place = skipped;
      for (const Axis& axis : axes_) place += run % axis.size * axis.stride, run /= axis.size;
      n = std::min(length_ - skipped, count - offset);
      body(offset, n, place);
    }
  }

 private:
  struct Axis {
    int64_t size, stride;
  };
  int64_t length_ = 1;
  std::vector<Axis> axes_;  // the innermost first
};

// `t` itself, if it can be gone through in place.
at::Tensor readable(const at::Tensor& t, bool last) { return Runs(t, last).are_long() ? t : in_order(t, last); }

// Sums of x about `center` and of its square, for each place in the pattern.
template <class T, class scalar_t>
SPSS_MULTIARCH void add_moments(const scalar_t* x, int64_t count, int64_t pattern, const T* center, T* first,
                                T* second) {
  const auto add = [](const scalar_t& value, T about, T& sum, T& squares) {
    const T d = load<T>(value) - about;
    sum += d;
    squares += d * d;
  };
  int64_t at = 0;
  if (pattern == kPattern) {  // the sums stay in registers
    T about[kPattern], sum[kPattern] = {}, squares[kPattern] = {};
    for (int64_t i = 0; i < kPattern; ++i) about[i] = center[i];
    for (; at + kPattern <= count; at += kPattern) {
      SPSS_SIMD
      for (int64_t i = 0; i < kPattern; ++i) add(x[at + i], about[i], sum[i], squares[i]);
    }
    for (int64_t i = 0; i < kPattern; ++i) first[i] += sum[i], second[i] += squares[i];
  }
  for (; at < count; at += pattern) {
    const int64_t n = std::min(pattern, count - at);
    SPSS_SIMD
    for (int64_t i = 0; i < n; ++i) add(x[at + i], center[i], first[i], second[i]);
  }
}

template <class T, class scalar_t>
SPSS_MULTIARCH void scale_relu(const scalar_t* x, const scalar_t* skip, int64_t count, int64_t pattern, const T* scale,
                               const T* shift, scalar_t* y) {
  for (int64_t at = 0; at < count; at += pattern) {
    const int64_t n = std::min(pattern, count - at);
    if (skip == nullptr) {
      SPSS_SIMD
      for (int64_t i = 0; i < n; ++i) {
        const T z = load<T>(x[at + i]) * scale[i] + shift[i];
        store(y[at + i], z < 0 ? T(0) : z);
      }
    } else {
      SPSS_SIMD
      for (int64_t i = 0; i < n; ++i) {
        const T z = load<T>(x[at + i]) * scale[i] + shift[i];
        store(y[at + i], (z < 0 ? T(0) : z) + load<T>(skip[at + i]));
      }
    }
  }
}

// What of a gradient gets through the ReLU.
template <class T>
SPSS_HD T behind_relu(T value, T scale, T shift, T grad) {
  return value * scale + shift > 0 ? grad : T(0);
}

// Sums of the gradient behind the ReLU, and of its product with x about the mean, for each place in the pattern.
template <class T, class scalar_t>
SPSS_MULTIARCH void add_gradients(const scalar_t* grad, const scalar_t* x, int64_t count, int64_t pattern,
                                  const T* scale, const T* shift, const T* mean, T* first, T* second) {
  const auto add = [](const scalar_t& gradient, const scalar_t& input, T slope, T offset, T about, T& sum,
                      T& products) {
    const T value = load<T>(input);
    const T g = behind_relu(value, slope, offset, load<T>(gradient));
    sum += g;
    products += g * (value - about);
  };
  int64_t at = 0;
  if (pattern == kPattern) {  // as above
    T slope[kPattern], offset[kPattern], about[kPattern], sum[kPattern] = {}, products[kPattern] = {};
    for (int64_t i = 0; i < kPattern; ++i) slope[i] = scale[i], offset[i] = shift[i], about[i] = mean[i];
    for (; at + kPattern <= count; at += kPattern) {
      SPSS_SIMD
      for (int64_t i = 0; i < kPattern; ++i)
        add(grad[at + i], x[at + i], slope[i], offset[i], about[i], sum[i], products[i]);
    }
    for (int64_t i = 0; i < kPattern; ++i) first[i] += sum[i], second[i] += products[i];
  }
  for (; at < count; at += pattern) {
    const int64_t n = std::min(pattern, count - at);
    SPSS_SIMD
    for (int64_t i = 0; i < n; ++i)
      add(grad[at + i], x[at + i], scale[i], shift[i], mean[i], first[i], second[i]);
  }
}

// dx = scale * (g - a - b * (x - mean)).
template <class T, class scalar_t>
SPSS_MULTIARCH void input_gradient(const scalar_t* grad, const scalar_t* x, int64_t count, int64_t pattern,
                                   const T* scale, const T* shift, const T* mean, const T* a, const T* b,
                                   scalar_t* out) {
  for (int64_t at = 0; at < count; at += pattern) {
    const int64_t n = std::min(pattern, count - at);
    SPSS_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const T value = load<T>(x[at + i]);
      const T g = behind_relu(value, scale[i], shift[i], load<T>(grad[at + i]));
      store(out[at + i], scale[i] * (g - a[i] - b[i] * (value - mean[i])));
    }
  }
}

// The mean of a few of each channel's values, those along the tensor's diagonal: one alone may be far off all others.
template <class T, class scalar_t>
std::vector<T> centers(const at::Tensor& x) {
  constexpr int64_t kFew = 16;
  const scalar_t* data = x.data_ptr<scalar_t>();
  std::vector<T> out(x.size(1));
  for (int64_t i = 0; i < kFew; ++i) {
    int64_t at = 0;
    for (int64_t d = 0; d < x.dim(); ++d)
      if (d != 1) at += (2 * i + 1) * x.size(d) / (2 * kFew) * x.stride(d);
    for (int64_t c = 0; c < x.size(1); ++c) out[c] += load<T>(data[at + c * x.stride(1)]) / kFew;
  }
  return out;
}

// Mean and biased variance per channel.
template <class T, class scalar_t>
void moments(const at::Tensor& x, const Segments& segments, std::vector<double>& mean,
             std::vector<double>& variance) {
  const int64_t channels = segments.channels;
  const Runs runs(x, segments.last);
  const scalar_t* data = x.data_ptr<scalar_t>();
  const std::vector<T> center = centers<T, scalar_t>(x);
  std::vector<double> partial(segments.count * 2 * channels);
  segments.run([&](int64_t i, const Segment& segment) {
    std::vector<T> work = segments.lay_out(segment, {&center}, 2);
    T *about = work.data(), *first = about + segments.pattern, *second = first + segments.pattern;
    runs.each(segment.begin, segment.count, [&](int64_t, int64_t n, int64_t place) {
      add_moments(data + place, n, segments.pattern, about, first, second);
    });
    segments.fold(segment, first, &partial[i * 2 * channels]);
    segments.fold(segment, second, &partial[(i * 2 + 1) * channels]);
  });
  const std::vector<double> sums = segments.add_up(partial, 2);
  const double count = static_cast<double>(x.numel() / channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double shift = sums[c] / count;
    mean[c] = center[c] + shift;
    variance[c] = std::max(0.0, sums[channels + c] / count - shift * shift);
  }
}

// z = scale * x + shift.
template <class T>
struct Affine {
  std::vector<T> scale, shift, mean;
  std::vector<double> inverse_deviation;

  Affine(const at::Tensor& weight, const at::Tensor& bias, const std::vector<double>& m,
         const std::vector<double>& variance, double eps)
      : mean(m.begin(), m.end()), inverse_deviation(variance) {
    const auto w = numbers(weight), b = numbers(bias);
    for (size_t c = 0; c < w.size(); ++c) {
      inverse_deviation[c] = 1 / std::sqrt(inverse_deviation[c] + eps);
      scale.push_back(static_cast<T>(w[c] * inverse_deviation[c]));
      shift.push_back(static_cast<T>(b[c] - m[c] * w[c] * inverse_deviation[c]));
    }
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_relu(
    const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& added, const std::optional<at::Tensor>& mean_,
    const std::optional<at::Tensor>& variance_, double eps) {
  check_batch_norm_relu(input, weight, bias, added, mean_, variance_);
  const bool last = channels_last(input);
  const at::Tensor x = readable(input, last), skip = added ? in_order(*added, last) : at::Tensor();
  std::vector<double> mean(x.size(1)), variance(x.size(1));
  if (mean_) mean = numbers(*mean_), variance = numbers(*variance_);
  at::Tensor y = with_huge_pages(empty_in_order(x, last));
  if (x.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_relu", [&] {
      using T = compute_t<scalar_t>;
      const Segments segments(x, last);
      const Runs runs(x, last);
      if (!mean_) moments<T, scalar_t>(x, segments, mean, variance);
      const Affine<T> affine(weight, bias, mean, variance, eps);
      const scalar_t *from = x.data_ptr<scalar_t>(), *add = added ? skip.data_ptr<scalar_t>() : nullptr;
      scalar_t* to = y.data_ptr<scalar_t>();
      segments.run([&](int64_t, const Segment& s) {
        const std::vector<T> work = segments.lay_out(s, {&affine.scale, &affine.shift});
        runs.each(s.begin, s.count, [&](int64_t offset, int64_t n, int64_t place) {
          const int64_t at = s.begin + offset;
          scale_relu(from + place, add ? add + at : nullptr, n, segments.pattern, work.data(),
                     work.data() + segments.pattern, to + at);
        });
      });
    });
  }
  const auto wide = x.options().dtype(compute_type(x));
  return {y, tensor_of(mean, wide), tensor_of(variance, wide)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_relu_backward(
    const at::Tensor& grad_, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& variance, double eps, bool batch_statistics) {
  check_batch_norm_relu(input, weight, bias, {}, mean, variance);
  TORCH_CHECK_VALUE(grad_.sizes() == input.sizes() && grad_.scalar_type() == input.scalar_type(),
                    "grad must be of x's shape and dtype");
  const bool last = channels_last(input);
  const at::Tensor x = readable(input, last), grad = in_order(grad_, last);
  const int64_t channels = x.size(1);
  at::Tensor dx = with_huge_pages(empty_in_order(x, last));
  std::vector<double> dweight(channels), dbias(channels);
  if (x.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_relu_backward", [&] {
      using T = compute_t<scalar_t>;
      const Segments segments(x, last);
      const Runs runs(x, last);
      const int64_t pattern = segments.pattern;
      const Affine<T> affine(weight, bias, numbers(mean), numbers(variance), eps);
      const scalar_t *from = x.data_ptr<scalar_t>(), *g = grad.data_ptr<scalar_t>();
      std::vector<double> partial(segments.count * 2 * channels);
      segments.run([&](int64_t i, const Segment& s) {
        std::vector<T> work = segments.lay_out(s, {&affine.scale, &affine.shift, &affine.mean}, 2);
        T *row = work.data(), *first = row + 3 * pattern, *second = first + pattern;
        runs.each(s.begin, s.count, [&](int64_t offset, int64_t n, int64_t place) {
          add_gradients(g + s.begin + offset, from + place, n, pattern, row, row + pattern, row + 2 * pattern, first,
                        second);
        });
        segments.fold(s, first, &partial[i * 2 * channels]);
        segments.fold(s, second, &partial[(i * 2 + 1) * channels]);
      });
      const std::vector<double> sums = segments.add_up(partial, 2);
      const double count = static_cast<double>(x.numel() / channels);
      std::vector<T> a(channels), b(channels);
      for (int64_t c = 0; c < channels; ++c) {
        const double inverse = affine.inverse_deviation[c];
        dbias[c] = sums[c];
        dweight[c] = sums[channels + c] * inverse;
        if (!batch_statistics) continue;
        a[c] = static_cast<T>(sums[c] / count);
        b[c] = static_cast<T>(sums[channels + c] * inverse * inverse / count);
      }
      scalar_t* to = dx.data_ptr<scalar_t>();
      segments.run([&](int64_t, const Segment& s) {
        const std::vector<T> work = segments.lay_out(s, {&affine.scale, &affine.shift, &affine.mean, &a, &b});
        const T* row = work.data();
        runs.each(s.begin, s.count, [&](int64_t offset, int64_t n, int64_t place) {
          const int64_t at = s.begin + offset;
          input_gradient(g + at, from + place, n, pattern, row, row + pattern, row + 2 * pattern, row + 3 * pattern,
                         row + 4 * pattern, to + at);
        });
      });
    });
  }
  return {dx, tensor_of(dweight, weight.options()), tensor_of(dbias, bias.options())};
}

}  // namespace spss
