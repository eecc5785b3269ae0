// Running mean of softmax, voxel-wise entropy, and the mask of the K least uncertain voxels, on the CPU.
#include <ATen/ops/empty.h>

#include <bit>
#include <cstring>

#include "checks.h"
#include "cpu/memory.h"
#include "cpu/operators.h"
#include "cpu/planes.h"

namespace spss {
namespace {

constexpr int64_t kChunk = 16384;

// Two channels, each in one piece on both sides: nothing is staged.
template <class T, class scalar_t>
SPSS_MULTIARCH void accumulate_two(const scalar_t* a, const scalar_t* b, int64_t count, T* to_a, T* to_b) {
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) {
    T p, q, top, sum;
    softmax_of_two(static_cast<T>(a[i]), static_cast<T>(b[i]), p, q, top, sum);
    to_a[i] += p;
    to_b[i] += q;
  }
}

template <class T, class scalar_t>
void accumulate(const Planes& total, const Planes& logits) {
  const int64_t channels = logits.channels;
  const bool two_pieces = channels == 2 && logits.voxel_stride == 1 && total.voxel_stride == 1;
  Chunks(logits.batch, logits.voxels, kChunk).run([&](int64_t, int64_t b, int64_t begin, int64_t end) {
    if (two_pieces) {
      const scalar_t* from = logits.at_voxel<const scalar_t>(b, begin);
      T* to = total.at_voxel<T>(b, begin);
      accumulate_two(from, from + logits.channel_stride, end - begin, to, to + total.channel_stride);
      return;
    }
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

}  // namespace

void accumulate_softmax(at::Tensor& total, const at::Tensor& logits) {
  check_accumulate_softmax(total, logits);
  if (logits.numel() == 0) return;
  const Planes in = planes(logits);
  write_planes(total, [&](const Planes& sum) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "accumulate_softmax",
                                    [&] { accumulate<compute_t<scalar_t>, scalar_t>(sum, in); });
  });
}

namespace {

constexpr int kDigit = 16;
constexpr int64_t kBins = int64_t(1) << kDigit;

// One 16-bit digit of the bits that sort as the numbers do; NaN comes last, and -0 equals 0.
template <class T>
SPSS_HD uint32_t digit(T value, int shift) {
  using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr int sign = sizeof(T) * 8 - 1;
  const Key bits = std::bit_cast<Key>(value + T(0)), flip = (Key(0) - (bits >> sign)) | Key(1) << sign;
  return static_cast<uint32_t>((value == value ? bits ^ flip : ~Key(0)) >> shift) & uint32_t(kBins - 1);
}

// One histogram a share, then their sum: counts are integers, so the number of shares cannot show.
struct Histogram {
  std::vector<uint32_t> bins;
  explicit Histogram(const Chunks& chunks) : bins(chunks.shares() * kBins) {}
  uint32_t* of(int64_t share) { return bins.data() + share * kBins; }
  int64_t total(int64_t bin) const {
    int64_t sum = 0;
    for (size_t at = bin; at < bins.size(); at += kBins) sum += bins[at];
    return sum;
  }
  // The bin of the keep-th lowest value; `keep` becomes its rank within that bin.
  uint32_t find(int64_t& keep) const {
    int64_t bin = 0;
    for (int64_t here = total(0); here < keep; here = total(++bin)) keep -= here;
    return static_cast<uint32_t>(bin);
  }
};

template <class T>
constexpr int kTopDigit = sizeof(T) * 8 - kDigit;

template <class T>
SPSS_MULTIARCH void entropy_rows(Rows<T> total, int64_t channels, int64_t count, T per_pass, T* result,
                                 uint16_t* digits) {
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) result[i] = entropy_term(total.data[i] * per_pass);
  for (int64_t c = 1; c < channels; ++c) {
    SPSS_SIMD
    for (int64_t i = 0; i < count; ++i) result[i] += entropy_term(total.data[c * total.stride + i] * per_pass);
  }
  SPSS_SIMD
  for (int64_t i = 0; i < count; ++i) digits[i] = static_cast<uint16_t>(digit(result[i], kTopDigit<T>));
}

template <class T>
Histogram entropy(const Planes& total, int64_t passes, T* result) {
  const Chunks chunks(total.batch, total.voxels, kChunk);
  Histogram histogram(chunks);
  chunks.run_in_shares([&](int64_t share, int64_t, int64_t b, int64_t begin, int64_t end) {
    uint32_t* bins = histogram.of(share);
    std::vector<T> scratch(total.channels * kTile);
    uint16_t digits[kTile];
    for (; begin < end; begin += kTile) {
      const int64_t count = std::min(kTile, end - begin);
      const Rows<T> in = read_rows<T, T>(total, b, begin, count, scratch.data());
      entropy_rows(in, total.channels, count, T(1) / T(passes), result + b * total.voxels + begin, digits);
      for (int64_t i = 0; i < count; ++i) ++bins[digits[i]];
    }
  });
  return histogram;
}

// mask = digit below `bin`; returns how many are equal to it.
template <class T>
SPSS_MULTIARCH int32_t take_below(const T* values, int64_t count, uint32_t bin, bool* mask) {
  int32_t equal = 0;
  SPSS_SIMD_SUM(equal)
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t here = digit(values[i], kTopDigit<T>);
    mask[i] = here < bin;
    equal += here == bin;
  }
  return equal;
}

// Radix selection from the top: values with a lower digit than the keep-th one's are in, those with a higher one out,
// and only its equals look at their next digit. What is equal to the last digit goes by index.
template <class T>
void select_lowest(const T* values, int64_t count, const Histogram& top, int64_t keep, bool* mask) {
  const Chunks chunks(1, count, kChunk);
  std::vector<std::vector<int64_t>> undecided(chunks.count);
  uint32_t bin = top.find(keep);
  chunks.run([&](int64_t chunk, int64_t, int64_t begin, int64_t end) {
    for (; begin < end; begin += kTile) {
      const int64_t here = std::min(kTile, end - begin);
      if (!take_below(values + begin, here, bin, mask + begin)) continue;
      for (int64_t i = begin; i < begin + here; ++i)
        if (digit(values[i], kTopDigit<T>) == bin) undecided[chunk].push_back(i);
    }
  });
  for (int shift = kTopDigit<T> - kDigit; shift >= 0; shift -= kDigit) {
    Histogram next(chunks);
    chunks.run_in_shares([&](int64_t share, int64_t chunk, int64_t, int64_t, int64_t) {
      uint32_t* bins = next.of(share);
      for (const int64_t i : undecided[chunk]) ++bins[digit(values[i], shift)];
    });
    bin = next.find(keep);
    chunks.run([&](int64_t chunk, int64_t, int64_t, int64_t) {
      auto& mine = undecided[chunk];
      const auto decided = [&](int64_t i) {
        const uint32_t here = digit(values[i], shift);
        if (here < bin) mask[i] = true;
        return here != bin;
      };
      mine.erase(std::remove_if(mine.begin(), mine.end(), decided), mine.end());
    });
  }
  for (int64_t chunk = 0; keep > 0 && chunk < chunks.count; ++chunk)
    for (const int64_t i : undecided[chunk])
      if (keep-- > 0) mask[i] = true;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> uncertainty_mask(const at::Tensor& total, int64_t passes, const at::Tensor& keep) {
  check_uncertainty_mask(total, passes, keep);
  auto shape = total.sizes().vec();
  shape.erase(shape.begin() + 1);
  at::Tensor result = with_huge_pages(at::empty(shape, total.options()));
  at::Tensor mask = with_huge_pages(at::empty(shape, result.options().dtype(at::kBool)));
  if (result.numel() == 0) return {result, mask};
  const Planes in = planes(total);
  AT_DISPATCH_FLOATING_TYPES(total.scalar_type(), "uncertainty_mask", [&] {
    scalar_t* values = result.data_ptr<scalar_t>();
    const Histogram histogram = entropy(in, passes, values);
    const int64_t numbers = result.numel() - histogram.total(kBins - 1);  // the last bin holds NaN and nothing else
    const int64_t chosen = std::min(keep.item<int64_t>(), numbers);
    if (chosen > 0) select_lowest(values, result.numel(), histogram, chosen, mask.data_ptr<bool>());
    else mask.zero_();
  });
  return {result, mask};
}

}  // namespace spss
