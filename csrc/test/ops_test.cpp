// The operators from C++, through the dispatcher: values worked out by hand, and errors that name arguments.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <cstdio>
#include <string>
#include <tuple>

using at::Tensor;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "FAILED: %s\n", what);
    ++failures;
  }
}

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Warp = Tensor(const Tensor&, const Tensor&, c10::string_view, c10::string_view);
using WarpBackward = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, c10::string_view, c10::string_view, bool, bool);
using Propagate =
    Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t, int64_t);

using AccumulateSoftmax = void(Tensor&, const Tensor&);
using UncertaintyMask = std::tuple<Tensor, Tensor>(const Tensor&, int64_t, const Tensor&);
using ContrastiveLoss = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double, bool, bool);
using MaskedCeDice = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool);
using Convolve = Tensor(const Tensor&, const Tensor&);
using WeightedCeDice = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&);

bool near(const Tensor& value, double expected) { return std::abs(value.item<double>() - expected) < 1e-4; }

void test_warp(const at::Device& device) {
  const auto warp = find<Warp>("spss_fast::warp");
  const Tensor image = at::arange(24, at::kFloat).view({1, 1, 2, 3, 4}).to(device);
  const Tensor still = at::zeros({1, 3, 2, 3, 4}, image.options());
  expect(at::equal(warp.call(image, still, "bilinear", "zeros"), image), "zero displacement is the identity");
  Tensor half = still.clone();
  half.select(1, 2).fill_(0.5);
  const Tensor shifted = warp.call(image, half, "bilinear", "border");
  expect(at::allclose(shifted.narrow(4, 0, 3), image.narrow(4, 0, 3) + 0.5), "half a voxel is the mean of two");
  expect(at::equal(shifted.select(4, 3), image.select(4, 3)), "the border stays");
  const Tensor ones = at::ones_like(image);
  const auto [for_image, for_shift] =
      find<WarpBackward>("spss_fast::warp_backward").call(ones, image, half, "bilinear", "border", true, true);
  expect(at::allclose(for_image.sum(), ones.sum()), "the image's gradient keeps the sum");
  expect(at::allclose(for_shift.select(1, 2).narrow(3, 0, 3), ones.select(1, 0).narrow(3, 0, 3)), "the slope is 1");
  bool named = false;
  try {
    warp.call(image, still.narrow(1, 0, 2), "bilinear", "zeros");
  } catch (const c10::Error& error) {
    named = std::string(error.what()).find("displacement") != std::string::npos;
  }
  expect(named, "a wrong displacement is named");
}

void test_propagate(const at::Device& device) {
  Tensor labels = at::zeros({1, 12, 40}, at::kByte);
  labels.narrow(1, 3, 6).narrow(2, 29, 6).fill_(1);  // across a word boundary
  labels.select(1, 0).select(1, 0).fill_(1);         // a speck to be dropped
  labels = labels.to(device);
  const Tensor index = at::full({1}, 1, at::kLong).to(device);
  const Tensor up = at::zeros({1, 3, 2, 12, 40}, labels.options().dtype(at::kFloat));
  Tensor down = up.clone();
  down.select(2, 1).fill_(2);  // moving down, content comes from two voxels to the right
  const Tensor out = find<Propagate>("spss_fast::propagate").call(labels, index, up, down, 3, 3, 1, 1);
  Tensor block = labels.clone();
  block.select(1, 0).zero_();
  expect(at::equal(out.select(3, 1), labels), "the annotated slice is returned as given");
  expect(at::equal(out.select(3, 0), block.roll(-2, 2) * out.select(3, 0)), "the label moved left, opened");
  expect(out.select(3, 0).sum().item<int64_t>() == 32, "a 6 x 6 block opened by a cross loses its corners");
  expect(out.select(3, 3).sum().item<int64_t>() == 32, "and is then stable");
}

void test_uncertainty() {
  const Tensor logits = at::zeros({1, 2, 4});
  logits.select(1, 0).copy_(at::tensor({0.f, 3.f, 1.f, 2.f}));  // the larger, the more certain
  Tensor total = at::zeros_like(logits);
  find<AccumulateSoftmax>("spss_fast::accumulate_softmax").call(total, logits);
  expect(at::allclose(total, logits.softmax(1)), "softmax is added to the total");
  const auto [entropy, mask] =
      find<UncertaintyMask>("spss_fast::uncertainty_mask").call(total, 1, at::full({}, 2, at::kLong));
  expect(near(entropy.select(1, 0), std::log(2.0)), "the entropy of two equal chances is log 2");
  expect(at::equal(mask, at::tensor({0, 1, 0, 1}).to(at::kBool).view({1, 4})), "the two most certain voxels are kept");
}

void test_losses() {
  const Tensor logits = at::zeros({1, 2, 4}), target = at::tensor({0, 1, 0, 1}, at::kLong).view({1, 4});
  const auto [masked, sums] = find<MaskedCeDice>("spss_fast::masked_ce_dice")
                                  .call(logits, target, at::ones({1, 4}, at::kBool), false);
  const auto [weighted, others] =
      find<WeightedCeDice>("spss_fast::weighted_ce_dice").call(logits, target, at::ones({1, 4}));
  expect(near(masked[0], std::log(2.0)) && near(weighted[0], std::log(2.0)), "the cross entropy of no idea is log 2");
  for (const Tensor& dice : {masked[1], masked[2], weighted[1]}) expect(near(dice, 1.0 / 3), "its Dice is two thirds");
}

void test_contrastive() {
  // Anchors equal to their positives and at right angles to the one negative of their class.
  const Tensor along = at::tensor({1.f, 0.f}).view({1, 2, 1}).expand({1, 2, 3});
  const Tensor across = at::tensor({0.f, 5.f}).view({1, 2, 1}).expand({1, 2, 3});
  const auto [loss, to_a, to_b, to_n] = find<ContrastiveLoss>("spss_fast::contrastive_loss")
                                            .call(along, along, across, along, across, 1, 1.0, true, true);
  expect(near(loss, 2 * std::log1p(std::exp(-1.0))), "both directions of the contrastive loss");
  expect(near(to_n.select(2, 1).abs().sum(), 0) && !near(to_n.select(2, 0).abs().sum(), 0), "one prototype is pushed");
}

void test_convolution() {  // where the compiler can make it for several instruction sets
  const auto schema = c10::Dispatcher::singleton().findSchemaOrThrow("spss_fast::convolve", "");
  if (!schema.hasKernelForDispatchKey(c10::DispatchKey::CPU)) return;
  const Tensor x = at::ones({1, 8, 3, 4, 5}), weight = at::ones({8, 8, 3, 3, 3});
  const Tensor y = find<Convolve>("spss_fast::convolve").call(x, weight);
  expect(near(y.select(2, 1).select(2, 1).select(2, 1).sum(), 8 * 8 * 27), "27 taps of 8 channels each");
  expect(near(y.select(2, 2).select(2, 3).select(2, 4).sum(), 8 * 8 * 8), "8 of them in a corner");
}

}  // namespace

int main() {
  test_convolution();
  test_uncertainty();
  test_losses();
  test_contrastive();
  test_warp(at::kCPU);
  test_propagate(at::kCPU);
  if (at::hasCUDA()) {
    test_warp(at::Device(at::kCUDA, 0));
    test_propagate(at::Device(at::kCUDA, 0));
  }
  if (failures == 0) std::puts("all operators agree");
  return failures == 0 ? 0 : 1;
}
