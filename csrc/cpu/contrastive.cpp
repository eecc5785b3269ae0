// Prototype selection and the bidirectional prototype contrastive loss with its gradients, on the CPU.
//
// Anchors are put in the order of their class; each class is then two matrix products against its own bank of k
// prototypes (scores, and their gradients), with the row softmax between them. Memory is O(N (k + channels)).
#include <torch/library.h>

#include <numeric>

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

// best = the largest p of each voxel (NaN where p is), where = its class, the first of equals.
SPSS_MULTIARCH void argmax_rows(const float* p, int64_t channels, int64_t count, float* best, int32_t* where) {
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) best[i] = p[i], where[i] = 0;
  for (int32_t c = 1; c < channels; ++c) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const bool better = p[c * kTile + i] > best[i];
      where[i] = better ? c : where[i];
      best[i] = better ? p[c * kTile + i] : best[i];
    }
  }
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
      argmax_rows(p.data(), channels, count, confidence + offset, predicted + offset);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> select_prototypes(const at::Tensor& logits, int64_t k) {
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

// (B, C, *spatial) as one row a voxel: no copy where channels come last in memory already.
at::Tensor as_rows(const at::Tensor& x, at::ScalarType type) {
  return x.movedim(1, -1).reshape({x.numel() / x.size(1), x.size(1)}).to(type);
}

template <class T>
SPSS_HD T dot(const T* a, const T* b, int64_t count) {
  T sum = 0;
  SPSS_SIMD_SUM(sum)
  for (int64_t f = 0; f < count; ++f) sum += a[f] * b[f];
  return sum;
}

// unit = rows[order[i]] / max(|row|, eps) for `count` anchors or prototypes; length: the divisor, negative where it is
// the constant eps.
template <class T>
SPSS_MULTIARCH void normalise(const T* rows, const int64_t* order, int64_t count, int64_t width, T* unit, T* length) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows + order[i] * width;
    const T norm = std::sqrt(dot(row, row, width)), divisor = norm < T(kNormEpsilon) ? T(kNormEpsilon) : norm;
    SPSS_SIMD
    for (int64_t f = 0; f < width; ++f) unit[i * width + f] = row[f] / divisor;
    length[i] = norm < T(kNormEpsilon) ? -divisor : divisor;
  }
}

// The gradient of rows[order[i]], added to it, from that of its normalised self: the part along the row is lost.
template <class T>
SPSS_MULTIARCH void denormalise(const T* grads, const T* units, const T* length, const int64_t* order, int64_t count,
                                int64_t width, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    const T *grad = grads + i * width, *unit = units + i * width;
    const T along = length[i] > 0 ? dot(grad, unit, width) : T(0), scale = T(1) / std::abs(length[i]);
    T* out = to + order[i] * width;
    SPSS_SIMD
    for (int64_t f = 0; f < width; ++f) out[f] += (grad[f] - along * unit[f]) * scale;
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

template <class T>
struct Loss {
  at::Tensor a, b, n;  // rows, compute type
  int64_t voxels, width;
  T temperature;
  bool bidirectional, with_grad;
  at::Tensor grad_a, grad_b, grad_n;

  // Anchors `order[0..count)` of one class against the prototypes `bank[0..banked)`.
  double one_class(const int64_t* order, int64_t count, const int64_t* bank, int64_t banked) {
    const auto options = a.options();
    const at::Tensor unit_a = at::empty({count, width}, options), unit_b = at::empty({count, width}, options);
    const at::Tensor unit_n = at::empty({banked, width}, options);
    std::vector<T> length_a(count), length_b(count), length_n(banked), positive(count), slope(count);
    T *ua = unit_a.data_ptr<T>(), *ub = unit_b.data_ptr<T>(), *un = unit_n.data_ptr<T>();
    const T scale = T(1) / T(voxels);
    const Chunks chunks(1, count, 256);
    std::vector<double> loss(chunks.count);

    normalise(n.data_ptr<T>(), bank, banked, width, un, length_n.data());
    chunks.run([&](int64_t, int64_t, int64_t begin, int64_t end) {
      const int64_t at = begin * width, rows = end - begin;
      normalise(a.data_ptr<T>(), order + begin, rows, width, ua + at, length_a.data() + begin);
      normalise(b.data_ptr<T>(), order + begin, rows, width, ub + at, length_b.data() + begin);
      positives(ua + at, ub + at, rows, width, temperature, positive.data() + begin);
    });
    const auto scores_of = [&](const at::Tensor& unit) {
      at::Tensor scores = at::mm(unit, unit_n.t());
      chunks.run([&](int64_t chunk, int64_t, int64_t begin, int64_t end) {
        loss[chunk] += through_scores(end - begin, banked, temperature, scale, positive.data() + begin,
                                      scores.data_ptr<T>() + begin * banked, slope.data() + begin);
      });
      return scores;
    };
    const at::Tensor scores_a = scores_of(unit_a), scores_b = bidirectional ? scores_of(unit_b) : at::Tensor();
    const double total = std::accumulate(loss.begin(), loss.end(), 0.0);
    if (!with_grad) return total;

    const at::Tensor to_a = at::mm(scores_a, unit_n), to_n = at::mm(scores_a.t(), unit_a);
    const at::Tensor to_b = bidirectional ? at::mm(scores_b, unit_n) : at::zeros_like(unit_b);
    if (bidirectional) to_n.addmm_(scores_b.t(), unit_b);
    chunks.run([&](int64_t, int64_t, int64_t begin, int64_t end) {
      const int64_t at = begin * width, rows = end - begin;
      T *ga = to_a.data_ptr<T>() + at, *gb = to_b.data_ptr<T>() + at;
      add_positive(slope.data() + begin, ua + at, ub + at, rows, width, ga, gb);
      denormalise(ga, ua + at, length_a.data() + begin, order + begin, rows, width, grad_a.data_ptr<T>());
      denormalise(gb, ub + at, length_b.data() + begin, order + begin, rows, width, grad_b.data_ptr<T>());
    });
    // In one thread: a voxel may serve several classes.
    denormalise(to_n.data_ptr<T>(), un, length_n.data(), bank, banked, width, grad_n.data_ptr<T>());
    return total;
  }
};

// Gradients of the features are those of the loss itself (upstream 1), of the compute type and in the features' shape.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& n, const at::Tensor& logits_a,
    const at::Tensor& logits_n, int64_t k, double temperature, bool bidirectional, bool with_grad) {
  const at::ScalarType type = compute_type(a);
  const auto [indices, counts] = select_prototypes(logits_n, k);
  const at::Tensor classes = logits_a.argmax(1).flatten();
  const int64_t channels = logits_a.size(1), voxels = classes.numel();

  std::vector<int64_t> start(channels + 1), order(voxels);  // anchors by class, in voxel order
  const int64_t* of = classes.data_ptr<int64_t>();
  for (int64_t v = 0; v < voxels; ++v) ++start[of[v] + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t v = 0; v < voxels; ++v) order[next[of[v]]++] = v;

  at::Tensor loss = at::zeros({}, a.options().dtype(type)), grad_a, grad_b, grad_n;
  AT_DISPATCH_FLOATING_TYPES(type, "contrastive_loss", [&] {
    Loss<scalar_t> job{as_rows(a, type), as_rows(b, type), as_rows(n, type), voxels, a.size(1),
                       static_cast<scalar_t>(temperature), bidirectional, with_grad, {}, {}, {}};
    const auto options = job.a.options();
    job.grad_a = at::zeros({with_grad ? voxels : 0, job.width}, options);
    job.grad_b = at::zeros_like(job.grad_a);
    job.grad_n = at::zeros_like(job.grad_a);
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t anchors = start[c + 1] - start[c], banked = counts.data_ptr<int64_t>()[c];
      if (anchors > 0 && banked > 0)
        sum += job.one_class(order.data() + start[c], anchors, indices.data_ptr<int64_t>() + c * k, banked);
    }
    loss.fill_(sum / voxels);
    const auto shaped = [&](const at::Tensor& rows, const at::Tensor& like) {
      if (!with_grad) return at::empty({0}, options);
      auto shape = like.sizes().vec();
      shape.push_back(shape[1]);
      shape.erase(shape.begin() + 1);
      return rows.view(shape).movedim(-1, 1);
    };
    grad_a = shaped(job.grad_a, a);
    grad_b = shaped(job.grad_b, b);
    grad_n = shaped(job.grad_n, n);
  });
  return {loss, grad_a, grad_b, grad_n};
}

}  // namespace

TORCH_LIBRARY_IMPL(spss_fast, CPU, m) {
  m.impl("select_prototypes", &select_prototypes);
  m.impl("contrastive_loss", &contrastive_loss);
}

}  // namespace spss
