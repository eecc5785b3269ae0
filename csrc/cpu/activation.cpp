// A bias, another map's addition and leaky ReLU in one pass over memory forward, and in one backward with the bias's sums
// in it.
#include "checks.h"
#include "cpu/memory.h"
#include "cpu/operators.h"
#include "cpu/segments.h"

namespace spss {
namespace {

template <class T>
SPSS_HD T leaky(T sign, T value, T slope) {
  return sign > 0 ? value : slope * value;  // NaN stays NaN
}

template <class T, class scalar_t>
SPSS_MULTIARCH void activate(const scalar_t* x, const scalar_t* added, int64_t count, int64_t pattern, const T* bias,
                             T slope, scalar_t* y) {
  for (int64_t at = 0; at < count; at += pattern) {
    const int64_t n = std::min(pattern, count - at);
    if (added == nullptr) {
      SPSS_SIMD
      for (int64_t i = 0; i < n; ++i) {
        const T z = load<T>(x[at + i]) + bias[i];
        store(y[at + i], leaky(z, z, slope));
      }
    } else {
      SPSS_SIMD
      for (int64_t i = 0; i < n; ++i) {
        const T z = load<T>(x[at + i]) + bias[i] + load<T>(added[at + i]);
        store(y[at + i], leaky(z, z, slope));
      }
    }
  }
}

// The gradient of x, and its sum for each place in the pattern.
template <class T, class scalar_t>
SPSS_MULTIARCH void activate_backward(const scalar_t* grad, const scalar_t* y, int64_t count, int64_t pattern, T slope,
                                      scalar_t* dx, T* sums) {
  const auto step = [slope](const scalar_t& upstream, const scalar_t& result, scalar_t& out, T& sum) {
    const T g = leaky(load<T>(result), load<T>(upstream), slope);
    sum += g;
    store(out, g);
  };
  int64_t at = 0;
  if (pattern == kPattern) {  // the sums stay in registers
    T sum[kPattern] = {};
    for (; at + kPattern <= count; at += kPattern) {
      SPSS_SIMD
      for (int64_t i = 0; i < kPattern; ++i) step(grad[at + i], y[at + i], dx[at + i], sum[i]);
    }
    for (int64_t i = 0; i < kPattern; ++i) sums[i] += sum[i];
  }
  for (; at < count; at += pattern) {
    const int64_t n = std::min(pattern, count - at);
    SPSS_SIMD
    for (int64_t i = 0; i < n; ++i) step(grad[at + i], y[at + i], dx[at + i], sums[i]);
  }
}

}  // namespace

at::Tensor bias_leaky_relu(
    const at::Tensor& input, const at::Tensor& bias, const std::optional<at::Tensor>& added_, double slope) {
  check_bias_leaky_relu("x", input, bias, slope);
  if (added_) check_like("added", *added_, "x", input);
  const bool last = channels_last(input);
  const at::Tensor x = in_order(input, last), added = added_ ? in_order(*added_, last) : at::Tensor();
  at::Tensor y = with_huge_pages(empty_in_order(x, last));
  if (x.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "bias_leaky_relu", [&] {
    using T = compute_t<scalar_t>;
    const Segments segments(x, last);
    const std::vector<double> wide = numbers(bias);
    const std::vector<T> shift(wide.begin(), wide.end());
    const scalar_t *from = x.data_ptr<scalar_t>(), *add = added_ ? added.data_ptr<scalar_t>() : nullptr;
    scalar_t* to = y.data_ptr<scalar_t>();
    segments.run([&](int64_t, const Segment& s) {
      const std::vector<T> row = segments.lay_out(s, {&shift});
      activate(from + s.begin, add ? add + s.begin : nullptr, s.count, segments.pattern, row.data(),
               static_cast<T>(slope), to + s.begin);
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> bias_leaky_relu_backward(
    const at::Tensor& grad_, const at::Tensor& result, const at::Tensor& bias, double slope) {
  check_bias_leaky_relu("y", result, bias, slope);
  check_like("grad", grad_, "y", result);
  const bool last = channels_last(result);
  const at::Tensor y = in_order(result, last), grad = in_order(grad_, last);
  at::Tensor dx = with_huge_pages(empty_in_order(y, last));
  std::vector<double> dbias(y.size(1));
  if (y.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "bias_leaky_relu_backward", [&] {
      using T = compute_t<scalar_t>;
      const Segments segments(y, last);
      const scalar_t *from = y.data_ptr<scalar_t>(), *upstream = grad.data_ptr<scalar_t>();
      scalar_t* to = dx.data_ptr<scalar_t>();
      std::vector<double> partial(segments.count * segments.channels);
      segments.run([&](int64_t i, const Segment& s) {
        std::vector<T> sums(segments.pattern);
        activate_backward(upstream + s.begin, from + s.begin, s.count, segments.pattern, static_cast<T>(slope),
                          to + s.begin, sums.data());
        segments.fold(s, sums.data(), &partial[i * segments.channels]);
      });
      dbias = segments.add_up(partial, 1);
    });
  }
  return {dx, tensor_of(dbias, bias.options())};
}

}  // namespace spss
