// Prototype selection and the bidirectional prototype contrastive loss with its gradients, on the CPU.
//
// Anchors come in blocks small enough for the cache, sorted by class within a block; each class is then a few matrix
// products with its own bank of k prototypes (scores, and their gradients), with the row softmax between them. Nothing
// of size N is stored but the gradients.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <numeric>

#include "checks.h"
#include "cpu/operators.h"
#include "cpu/planes.h"

namespace spss {
namespace {

constexpr int64_t kChunk = 4096;
constexpr double kNormEpsilon = 1e-12;  // F.normalize's

struct Candidate {
  float confidence;
  int64_t voxel;
  int32_t predicted;
  bool operator<(const Candidate& other) const {  // better first, ties by index
    return confidence != other.confidence ? confidence > other.confidence : voxel < other.voxel;
  }
};

// best = the largest value of each voxel, where = its class: the first of equals, and NaN before any number.
template <class T>
SPSS_MULTIARCH void argmax_rows(Rows<T> x, int64_t channels, int64_t count, T* best, int32_t* where) {
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) best[i] = x.data[i], where[i] = 0;
  for (int32_t c = 1; c < channels; ++c) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const T value = x.data[c * x.stride + i];
      const bool better = value > best[i] || (value != value && best[i] == best[i]);
      where[i] = better ? c : where[i];
      best[i] = better ? value : best[i];
    }
  }
}

template <class scalar_t>
void predictions(const Planes& logits, int32_t* predicted) {
  using T = compute_t<scalar_t>;
  Chunks(logits.batch, logits.voxels, kTile).run([&](int64_t, int64_t b, int64_t begin, int64_t end) {
    std::vector<T> scratch(logits.channels * kTile), best(kTile);
    const Rows<T> in = read_rows<T, scalar_t>(logits, b, begin, end - begin, scratch.data());
    argmax_rows(in, logits.channels, end - begin, best.data(), predicted + b * logits.voxels + begin);
  });
}

// Confidence (the largest softmax value) and predicted class of every voxel; NaN confidence where a logit is NaN.
template <class scalar_t>
void confidences(const Planes& logits, float* confidence, int32_t* predicted) {
  const int64_t channels = logits.channels;
  Chunks(logits.batch, logits.voxels, kChunk).run([&](int64_t, int64_t b, int64_t begin, int64_t end) {
    std::vector<float> scratch(channels * kTile), p(channels * kTile), top(kTile), sum(kTile);
    for (; begin < end; begin += kTile) {
      const int64_t count = std::min(kTile, end - begin), offset = b * logits.voxels + begin;
      const Rows<float> in = read_rows<float, scalar_t>(logits, b, begin, count, scratch.data());
      softmax_rows(in, channels, count, p.data(), top.data(), sum.data());
      argmax_rows(Rows<float>{p.data(), kTile}, channels, count, confidence + offset, predicted + offset);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> select_prototypes(const at::Tensor& logits, int64_t k) {
  check_select_prototypes(logits, k);
  const Planes in = planes(logits);
  const int64_t channels = in.channels, voxels = in.batch * in.voxels;
  at::Tensor indices = at::full({channels, k}, -1, logits.options().dtype(at::kLong));
  at::Tensor counts = at::zeros({channels}, indices.options());
  if (voxels == 0 || k == 0) return {indices, counts};
  std::vector<float> confidence(voxels);
  std::vector<int32_t> predicted(voxels);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "select_prototypes",
                                  [&] { confidences<scalar_t>(in, confidence.data(), predicted.data()); });
  // The k best of each predicted class are enough: every bank is chosen among them.
  std::vector<std::vector<Candidate>> by_class(channels);
  for (int64_t v = 0; v < voxels; ++v)
    if (confidence[v] == confidence[v]) by_class[predicted[v]].push_back({confidence[v], v, predicted[v]});
  std::vector<Candidate> best;
  for (auto& of_class : by_class) {
    const auto end = of_class.begin() + std::min<int64_t>(k, of_class.size());
    if (end != of_class.end()) std::nth_element(of_class.begin(), end, of_class.end());
    best.insert(best.end(), of_class.begin(), end);
  }
  std::sort(best.begin(), best.end());
  int64_t *to = indices.data_ptr<int64_t>(), *count = counts.data_ptr<int64_t>();
  for (int64_t c = 0; c < channels; ++c)
    for (const Candidate& candidate : best) {
      if (count[c] == k) break;
      if (candidate.predicted != c) to[c * k + count[c]++] = candidate.voxel;
    }
  return {indices, counts};
}

namespace {

// rows[place[i]] = features of voxel i: sixteen features at a time, so that either layout moves whole cache lines.
template <class T, class scalar_t>
SPSS_MULTIARCH void read_features(const scalar_t* from, int64_t channel_stride, int64_t voxel_stride, int64_t count,
                                  int64_t width, const int32_t* place, T* rows) {
  for (int64_t first = 0; first < width; first += 16)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t f = first; f < std::min(first + 16, width); ++f)
        rows[place[i] * width + f] = static_cast<T>(from[f * channel_stride + i * voxel_stride]);
}

template <class T>
SPSS_MULTIARCH void write_features(const T* rows, const int32_t* place, int64_t count, int64_t width,
                                   int64_t channel_stride, int64_t voxel_stride, T* to) {
  for (int64_t first = 0; first < width; first += 16)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t f = first; f < std::min(first + 16, width); ++f)
        to[f * channel_stride + i * voxel_stride] = rows[place[i] * width + f];
}

template <class T>
SPSS_HD T dot(const T* a, const T* b, int64_t count) {
  T sum = 0;
  SPSS_SIMD_SUM(sum)
  for (int64_t f = 0; f < count; ++f) sum += a[f] * b[f];
  return sum;
}

// Rows become row / max(|row|, eps); length: the divisor, negative where it is the constant eps.
template <class T>
SPSS_MULTIARCH void normalise(int64_t count, int64_t width, T* rows, T* length) {
  for (int64_t i = 0; i < count; ++i) {
    T* row = rows + i * width;
    const T norm = std::sqrt(dot(row, row, width)), divisor = norm < T(kNormEpsilon) ? T(kNormEpsilon) : norm;
    SPSS_SIMD
    for (int64_t f = 0; f < width; ++f) row[f] /= divisor;
    length[i] = norm < T(kNormEpsilon) ? -divisor : divisor;
  }
}

// Gradients of normalised rows become those of the rows themselves: the part along the row is lost.
template <class T>
SPSS_MULTIARCH void denormalise(const T* units, const T* length, int64_t count, int64_t width, T* grads) {
  for (int64_t i = 0; i < count; ++i) {
    T* grad = grads + i * width;
    const T* unit = units + i * width;
    const T along = length[i] > 0 ? dot(grad, unit, width) : T(0), scale = T(1) / std::abs(length[i]);
    SPSS_SIMD
    for (int64_t f = 0; f < width; ++f) grad[f] = (grad[f] - along * unit[f]) * scale;
  }
}

template <class T>
SPSS_MULTIARCH void positives(const T* a, const T* b, int64_t count, int64_t width, T temperature, T* positive) {
  for (int64_t i = 0; i < count; ++i) positive[i] = dot(a + i * width, b + i * width, width) / temperature;
}

// ga += slope ub, gb += slope ua: the pull of the positives.
template <class T>
SPSS_MULTIARCH void add_positive(const T* slope, const T* ua, const T* ub, int64_t count, int64_t width, T* ga, T* gb) {
  for (int64_t i = 0; i < count; ++i) {
    SPSS_SIMD
    for (int64_t f = i * width; f < (i + 1) * width; ++f) {
      ga[f] += slope[i] * ub[f];
      gb[f] += slope[i] * ua[f];
    }
  }
}

// Cosines with the bank become dL/d(cosine); `slope` takes dL/d(cosine with the positive). Returns the sum of losses.
template <class T>
SPSS_MULTIARCH double through_scores(int64_t count, int64_t banked, T temperature, T scale, const T* positive,
                                     T* scores, T* slope) {
  double loss = 0;
  for (int64_t i = 0; i < count; ++i) {
    T* row = scores + i * banked;
    T top = positive[i];
    for (int64_t j = 0; j < banked; ++j) {
      row[j] /= temperature;
      top = row[j] > top ? row[j] : top;
    }
    T sum = 0;
    SPSS_SIMD_SUM(sum)
    for (int64_t j = 0; j < banked; ++j) {
      row[j] = fast_exp(row[j] - top);
      sum += row[j];
    }
    const T of_positive = fast_exp(positive[i] - top);
    sum += of_positive;
    loss += double(top - positive[i]) + double(fast_log(sum));
    const T each = scale / temperature / sum;
    SPSS_SIMD
    for (int64_t j = 0; j < banked; ++j) row[j] *= each;
    slope[i] += of_positive * each - scale / temperature;
  }
  return loss;
}

constexpr int64_t kSlots = 32;  // blocks are dealt to so many slots, whatever the number of threads

// What a slot works with, rows of its block in the order of their classes.
template <class T>
struct Slot {
  at::Tensor unit_a, unit_b, to_a, to_b, scores, to_bank;  // to_bank: (classes, k, width)
  std::vector<T> length_a, length_b, positive, slope;
  std::vector<int32_t> place;   // the row of each voxel of the block
  std::vector<int64_t> starts;  // the first row of each class
  double loss = 0;

  Slot(const at::TensorOptions& options, int64_t classes, int64_t k, int64_t width, bool with_grad)
      : length_a(kTile), length_b(kTile), positive(kTile), slope(kTile), place(kTile), starts(classes + 1) {
    unit_a = at::empty({kTile, width}, options);
    unit_b = at::empty_like(unit_a);
    scores = at::empty({kTile * k}, options);
    if (!with_grad) return;
    to_a = at::empty_like(unit_a);
    to_b = at::empty_like(unit_a);
    to_bank = at::zeros({classes, k, width}, options);
  }

  void sort(const int32_t* classes, int64_t count) {
    std::fill(starts.begin(), starts.end(), 0);
    for (int64_t i = 0; i < count; ++i) ++starts[classes[i] + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i) place[i] = static_cast<int32_t>(next[classes[i]]++);
  }
};

template <class T, class scalar_t>
struct Loss {
  const Planes &a, &b, &n;
  const int32_t* anchor_class;
  const int64_t *indices, *counts;  // the prototypes
  int64_t classes, k;
  T temperature;
  bool bidirectional, with_grad;
  at::Tensor bank = {};         // (classes, k, width), normalised
  std::vector<T> lengths = {};  // (classes, k)

  T scale() const { return T(1) / (T(a.batch) * T(a.voxels)); }
  at::Tensor bank_of(const at::Tensor& all, int64_t c) const { return all.select(0, c).narrow(0, 0, counts[c]); }

  // One class's rows of a block against its bank.
  void run_class(Slot<T>& s, int64_t c) const {
    const int64_t begin = s.starts[c], count = s.starts[c + 1] - begin, banked = counts[c];
    const at::Tensor prototypes = bank_of(bank, c);
    at::Tensor scores = s.scores.narrow(0, 0, count * banked).view({count, banked});
    const auto direction = [&](const at::Tensor& units, const at::Tensor& to) {
      const at::Tensor unit = units.narrow(0, begin, count);
      at::mm_out(scores, unit, prototypes.t());
      s.loss += through_scores(count, banked, temperature, scale(), s.positive.data() + begin, scores.data_ptr<T>(),
                               s.slope.data() + begin);
      if (!with_grad) return;
      at::Tensor grad = to.narrow(0, begin, count);
      at::mm_out(grad, scores, prototypes);
      bank_of(s.to_bank, c).addmm_(scores.t(), unit);
    };
    direction(s.unit_a, s.to_a);
    if (bidirectional) direction(s.unit_b, s.to_b);
  }

  void run_block(Slot<T>& s, int64_t volume, int64_t begin, int64_t count, const Planes* grad_a,
                 const Planes* grad_b) const {
    const int64_t width = a.channels;
    T *unit_a = s.unit_a.template data_ptr<T>(), *unit_b = s.unit_b.template data_ptr<T>();
    s.sort(anchor_class + volume * a.voxels + begin, count);
    read_features(a.at_voxel<const scalar_t>(volume, begin), a.channel_stride, a.voxel_stride, count, width,
                  s.place.data(), unit_a);
    read_features(b.at_voxel<const scalar_t>(volume, begin), b.channel_stride, b.voxel_stride, count, width,
                  s.place.data(), unit_b);
    normalise(count, width, unit_a, s.length_a.data());
    normalise(count, width, unit_b, s.length_b.data());
    positives(unit_a, unit_b, count, width, temperature, s.positive.data());
    std::fill(s.slope.begin(), s.slope.end(), T(0));
    if (with_grad) s.to_a.zero_(), s.to_b.zero_();
    for (int64_t c = 0; c < classes; ++c)
      if (counts[c] > 0 && s.starts[c + 1] > s.starts[c]) run_class(s, c);
    if (!with_grad) return;
    T *to_a = s.to_a.template data_ptr<T>(), *to_b = s.to_b.template data_ptr<T>();
    add_positive(s.slope.data(), unit_a, unit_b, count, width, to_a, to_b);
    denormalise(unit_a, s.length_a.data(), count, width, to_a);
    denormalise(unit_b, s.length_b.data(), count, width, to_b);
    write_features(to_a, s.place.data(), count, width, grad_a->channel_stride, grad_a->voxel_stride,
                   grad_a->at_voxel<T>(volume, begin));
    write_features(to_b, s.place.data(), count, width, grad_b->channel_stride, grad_b->voxel_stride,
                   grad_b->at_voxel<T>(volume, begin));
  }

  void read_bank() {
    bank = at::zeros({classes, k, n.channels}, a.tensor.options().dtype(c10::CppTypeToScalarType<T>::value));
    lengths.resize(classes * k);
    const int32_t first = 0;
    for (int64_t i = 0; i < classes * k; ++i) {
      if (indices[i] < 0) continue;
      T* row = bank.template data_ptr<T>() + i * n.channels;
      read_features(n.at_voxel<const scalar_t>(indices[i] / n.voxels, indices[i] % n.voxels), n.channel_stride,
                    n.voxel_stride, 1, n.channels, &first, row);
      normalise(1, n.channels, row, lengths.data() + i);
    }
  }

  // The gradients of the prototypes, added up voxel by voxel: one voxel may serve several classes.
  void write_bank(const at::Tensor& to_bank, const Planes& grad_n) const {
    const T* unit = bank.template data_ptr<T>();
    T* grad = to_bank.template data_ptr<T>();
    for (int64_t i = 0; i < classes * k; ++i, unit += n.channels, grad += n.channels) {
      if (indices[i] < 0) continue;
      denormalise(unit, lengths.data() + i, 1, n.channels, grad);
      T* to = grad_n.at_voxel<T>(indices[i] / n.voxels, indices[i] % n.voxels);
      for (int64_t f = 0; f < n.channels; ++f) to[f * grad_n.channel_stride] += grad[f];
    }
  }

  double run(const Planes* grad_a, const Planes* grad_b, const Planes* grad_n) {
    read_bank();
    const Chunks blocks(a.batch, a.voxels, kTile);
    const int64_t slots = std::min(kSlots, blocks.count);
    std::vector<double> loss(slots);
    std::vector<at::Tensor> to_bank(slots);
    at::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
      const at::AutoDispatchBelowAutograd below_autograd;
      for (int64_t slot = first; slot < last; ++slot) {
        Slot<T> s(bank.options(), classes, k, a.channels, with_grad);
        for (int64_t block = slot * blocks.count / slots; block < (slot + 1) * blocks.count / slots; ++block) {
          const int64_t begin = block % blocks.per_volume * kTile;
          run_block(s, block / blocks.per_volume, begin, std::min(kTile, a.voxels - begin), grad_a, grad_b);
        }
        loss[slot] = s.loss;
        to_bank[slot] = s.to_bank;
      }
    });
    if (with_grad) {
      for (int64_t slot = 1; slot < slots; ++slot) to_bank[0].add_(to_bank[slot]);
      write_bank(to_bank[0], *grad_n);
    }
    return std::accumulate(loss.begin(), loss.end(), 0.0);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& n, const at::Tensor& logits_a,
    const at::Tensor& logits_n, int64_t k, double temperature, bool bidirectional, bool with_grad) {
  check_contrastive_loss(a, b, n, logits_a, logits_n, k, temperature);
  const auto options = a.options().dtype(compute_type(a));
  const auto gradient = [&](const at::Tensor& x) {
    return with_grad ? at::empty_like(x, options) : at::empty({0}, options);
  };
  const at::Tensor loss = at::full({}, std::numeric_limits<double>::quiet_NaN(), options);
  const at::Tensor grad_a = gradient(a), grad_b = gradient(b), grad_n = gradient(n);
  grad_n.zero_();  // of the others every voxel is written, of this only prototypes
  if (a.numel() == 0) return {loss, grad_a, grad_b, grad_n};

  const auto prototypes = select_prototypes(logits_n, k);
  const Planes classes = planes(logits_a), of_a = planes(a), of_b = planes(b), of_n = planes(n);
  std::vector<int32_t> anchor_class(classes.batch * classes.voxels);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits_a.scalar_type(), "contrastive_loss",
                                  [&] { predictions<scalar_t>(classes, anchor_class.data()); });
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.scalar_type(), "contrastive_loss", [&] {
    using T = compute_t<scalar_t>;
    const auto& [indices, counts] = prototypes;  // here: clang before 16 lets no lambda capture them
    Loss<T, scalar_t> job{of_a, of_b, of_n, anchor_class.data(), indices.template data_ptr<int64_t>(),
                          counts.template data_ptr<int64_t>(), classes.channels, k, static_cast<T>(temperature),
                          bidirectional, with_grad};
    double sum = 0;
    if (with_grad) {
      write_planes(grad_a, [&](const Planes& to_a) {
        write_planes(grad_b, [&](const Planes& to_b) {
          write_planes(grad_n, [&](const Planes& to_n) { sum = job.run(&to_a, &to_b, &to_n); });
        });
      });
    } else {
      sum = job.run(nullptr, nullptr, nullptr);
    }
    loss.fill_(sum / (of_a.batch * of_a.voxels));
  });
  return {loss, grad_a, grad_b, grad_n};
}

}  // namespace spss
