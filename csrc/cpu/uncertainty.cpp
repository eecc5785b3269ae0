// Running mean of softmax, voxel-wise entropy, and the mask of the K least uncertain voxels, on the CPU.
#include <torch/library.h>

#include <bit>
#include <cstring>

#include "cpu/planes.h"

namespace spss {
namespace {

constexpr int64_t kChunk = 16384;

template <class T, class scalar_t>
void accumulate(const Planes& total, const Planes& logits) {
  const int64_t channels = logits.channels;
  Chunks(logits.batch, logits.voxels, kChunk).run([&](int64_t, int64_t b, int64_t begin, int64_t end) {
    std::vector<T> scratch(channels * kTile), p(channels * kTile), top(kTile), sum(kTile);
    for (; begin < end; begin += kTile) {
      const int64_t count = std::min(kTile, end - begin);
      const Rows<T> in = read_rows<T, scalar_t>(logits, b, begin, count, scratch.data());
      softmax_rows(in, channels, count, p.data(), top.data(), sum.data());
      scatter_rows<true>(total.at_voxel<T>(b, begin), total.channel_stride, total.voxel_stride, channels, count,
                         p.data());
    }
  });
}

void accumulate_softmax(at::Tensor& total, const at::Tensor& logits) {
  if (logits.numel() == 0) return;
  // Spatial axes that do not merge leave no way to write in place but through a copy.
  at::Tensor merged = spatial_axes_merge(total) ? total : total.contiguous();
  const Planes sum = planes(merged), in = planes(logits);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "accumulate_softmax",
                                  [&] { accumulate<compute_t<scalar_t>, scalar_t>(sum, in); });
  if (!merged.is_same(total)) total.copy_(merged);
}

// Bits that sort as the numbers do; NaN comes last, and -0 equals 0.
template <class T>
inline auto order_key(T value) {
  using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr int sign = sizeof(T) * 8 - 1;
  value += T(0);
  Key bits;
  std::memcpy(&bits, &value, sizeof(T));
  bits ^= (bits >> sign) ? ~Key(0) : Key(1) << sign;
  return value == value ? bits : ~Key(0);
}

template <class T, class Key>
inline T value_of_key(Key bits) {
  constexpr int sign = sizeof(T) * 8 - 1;
  bits ^= (bits >> sign) ? Key(1) << sign : ~Key(0);
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

constexpr int kDigit = 16;
constexpr int64_t kBins = int64_t(1) << kDigit;

// One histogram a thread, then their sum: counts are integers, so the order of threads cannot show.
struct Histogram {
  std::vector<uint32_t> bins;
  Histogram() : bins(at::get_num_threads() * kBins) {}
  uint32_t* mine() { return bins.data() + at::get_thread_num() * kBins; }
  int64_t total(int64_t bin) const {
    int64_t sum = 0;
    for (size_t at = bin; at < bins.size(); at += kBins) sum += bins[at];
    return sum;
  }
};

template <class T>
SPSS_MULTIARCH void entropy_rows(Rows<T> total, int64_t channels, int64_t count, T passes, T* result) {
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) result[i] = entropy_term(total.data[i] / passes);
  for (int64_t c = 1; c < channels; ++c) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) result[i] += entropy_term(total.data[c * total.stride + i] / passes);
  }
}

template <class T>
void entropy(const Planes& total, T passes, T* result, Histogram& histogram) {
  constexpr int shift = sizeof(T) * 8 - kDigit;
  Chunks(total.batch, total.voxels, kChunk).run([&](int64_t, int64_t b, int64_t begin, int64_t end) {
    uint32_t* bins = histogram.mine();
    std::vector<T> scratch(total.channels * kTile);
    for (; begin < end; begin += kTile) {
      const int64_t count = std::min(kTile, end - begin);
      const Rows<T> in = read_rows<T, T>(total, b, begin, count, scratch.data());
      T* out = result + b * total.voxels + begin;
      entropy_rows(in, total.channels, count, passes, out);
      for (int64_t i = 0; i < count; ++i) ++bins[order_key(out[i]) >> shift];
    }
  });
}

// The key of the keep-th smallest value, found 16 bits at a time; `keep` becomes how many of its equals to take.
template <class T>
auto find_threshold(const T* values, int64_t count, const Histogram& first, int64_t& keep) {
  using Key = decltype(order_key(T()));
  Key prefix = 0;
  for (int shift = sizeof(T) * 8 - kDigit; shift >= 0; shift -= kDigit) {
    Histogram next;
    const bool is_first = shift == int(sizeof(T)) * 8 - kDigit;
    if (!is_first) {
      Chunks(1, count, kChunk).run([&](int64_t, int64_t, int64_t begin, int64_t end) {
        uint32_t* bins = next.mine();
        for (int64_t i = begin; i < end; ++i) {
          const Key key = order_key(values[i]) >> shift;
          if (key >> kDigit == prefix) ++bins[key & (kBins - 1)];
        }
      });
    }
    const Histogram& histogram = is_first ? first : next;
    int64_t bin = 0;
    for (int64_t here = histogram.total(0); here < keep; here = histogram.total(++bin)) keep -= here;
    prefix = prefix << kDigit | Key(bin);
  }
  return prefix;
}

// mask = value < threshold; returns how many are equal to it.
template <class T>
SPSS_MULTIARCH int64_t below(const T* values, int64_t count, T threshold, bool* mask) {
  int32_t equal = 0;
  for (int64_t i = 0; i < count; ++i) {
    mask[i] = values[i] < threshold;
    equal += values[i] == threshold;
  }
  return equal;
}

template <class T>
void select_lowest(const T* values, int64_t count, const Histogram& histogram, int64_t keep, bool* mask) {
  const T threshold = value_of_key<T>(find_threshold(values, count, histogram, keep));
  const Chunks chunks(1, count, kChunk);
  std::vector<int64_t> equals(chunks.count);
  chunks.run([&](int64_t chunk, int64_t, int64_t begin, int64_t end) {
    equals[chunk] = below(values + begin, end - begin, threshold, mask + begin);
  });
  for (int64_t chunk = 0; keep > 0 && chunk < chunks.count; ++chunk) {
    if (!equals[chunk]) continue;
    for (int64_t i = chunk * kChunk; keep > 0 && equals[chunk] > 0; ++i)
      if (values[i] == threshold) mask[i] = true, --keep, --equals[chunk];
  }
}

std::tuple<at::Tensor, at::Tensor> uncertainty_mask(const at::Tensor& total, int64_t passes, const at::Tensor& keep) {
  auto shape = total.sizes().vec();
  shape.erase(shape.begin() + 1);
  at::Tensor result = at::empty(shape, total.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor mask = at::zeros(shape, result.options().dtype(at::kBool));
  if (result.numel() == 0) return {result, mask};
  const Planes in = planes(total);
  AT_DISPATCH_FLOATING_TYPES(total.scalar_type(), "uncertainty_mask", [&] {
    Histogram histogram;
    scalar_t* values = result.data_ptr<scalar_t>();
    entropy(in, static_cast<scalar_t>(passes), values, histogram);
    // Every NaN has the largest key, which no number has.
    int64_t missing = 0;
    if (histogram.total(kBins - 1)) {
      for (int64_t i = 0; i < result.numel(); ++i) missing += values[i] != values[i];
    }
    const int64_t chosen = std::min(keep.item<int64_t>(), result.numel() - missing);
    if (chosen > 0) select_lowest(values, result.numel(), histogram, chosen, mask.data_ptr<bool>());
  });
  return {result, mask};
}

}  // namespace

TORCH_LIBRARY_IMPL(spss_fast, CPU, m) {
  m.impl("accumulate_softmax", &accumulate_softmax);
  m.impl("uncertainty_mask", &uncertainty_mask);
}

}  // namespace spss
