// propagate on the CPU: the two directions of every volume in parallel, each slice as bits in the first-level cache.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/multiarch.h"
#include "cpu/operators.h"
#include "math/propagate.h"

namespace spss {
namespace {

struct Alone {
  static constexpr int rank = 0, size = 1;

  SPSS_HD void sync() const {}
  SPSS_HD int minimum(int* value, int other) const {
    const int old = *value;
    *value = std::min(old, other);
    return old;
  }
  SPSS_HD void add(int* value, int other) const { *value += other; }
  SPSS_HD void maximum(unsigned long long* value, unsigned long long other) const { *value = std::max(*value, other); }
};

template <typename Flow, typename T>
SPSS_HD void warp_slice(
    const Plane& plane, const Word* __restrict bits, Word* __restrict out, const Flow* __restrict flow) {
  const Axis<T, int> rows(plane.height, 1), columns(plane.width, 1);
  const Flow* __restrict across = flow + static_cast<int64_t>(plane.height) * plane.width;
  for (int y = 0; y < plane.height; ++y)
    for (int word = 0; word < plane.words; ++word) {
      const int start = word * kWordBits, count = std::min(kWordBits, plane.width - start);
      const Flow* dy = flow + static_cast<int64_t>(y) * plane.width + start;
      const Flow* dx = across + static_cast<int64_t>(y) * plane.width + start;
      Word packed = 0;
      _Pragma("omp simd reduction(| : packed)")
      for (int j = 0; j < count; ++j)
        packed |= nearest_bit<T>(
                      bits, plane, rows, columns, static_cast<T>(y) + static_cast<T>(dy[j]),
                      static_cast<T>(start + j) + static_cast<T>(dx[j]))
            << j;
      out[y * plane.words + word] = packed;
    }
}

SPSS_HD Band occupied(const Plane& plane, const Word* bits) {
  int first = 0, last = plane.size();
  while (first < last && bits[first] == 0) ++first;
  while (last > first && bits[last - 1] == 0) --last;
  return {first / plane.words, (last + plane.words - 1) / plane.words};
}

// Carries the slice at `index` to one end of the volume; slice z is stored at slices + z * plane.size().
template <typename Flow, typename T>
SPSS_MULTIARCH void chain(
    const Plane& plane, Word* slices, const Flow* flows, int64_t index, int64_t depth, bool up,
    const PostSettings& settings, Workspace work) {
  const int64_t voxels = static_cast<int64_t>(plane.height) * plane.width;
  const Word* current = slices + index * plane.size();
  const int64_t step = up ? 1 : -1;
  for (int64_t z = index + step; up ? z < depth : z >= 0; z += step) {
    warp_slice<Flow, T>(plane, current, work.bits, flows + (up ? z - 1 : z) * 2 * voxels);
    const Band band = occupied(plane, work.bits);
    if (band.begin == band.end) return;  // an empty slice stays empty, and slices start out so
    std::fill(work.spare, work.spare + plane.size(), 0);
    post(Alone(), plane, band, work, static_cast<int>(std::abs(z - index)), settings);
    Word* const stored = slices + z * plane.size();
    std::copy(work.bits, work.bits + plane.size(), stored);
    current = stored;
  }
}

template <typename Flow, typename T>
void run_chains(
    const Plane& plane, std::vector<Word>& slices, const Tensor& index, const Tensor& flow_up, const Tensor& flow_down,
    int64_t depth, const PostSettings& settings) {
  const int64_t per_volume = flow_up.numel() / std::max<int64_t>(flow_up.size(0), 1);
  at::parallel_for(0, 2 * index.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<Word> words(2 * plane.size());
    std::vector<int> numbers(2 * plane.names());
    unsigned long long best = 0;
    const Workspace work{
        words.data(), words.data() + plane.size(), numbers.data(), numbers.data() + plane.names(), &best};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / 2;
      const bool up = i % 2 == 0;
      const Flow* flows = (up ? flow_up : flow_down).const_data_ptr<Flow>() + b * per_volume;
      chain<Flow, T>(
          plane, slices.data() + b * depth * plane.size(), flows, index.const_data_ptr<int64_t>()[b], depth, up,
          settings, work);
    }
  });
}

}  // namespace

Tensor propagate(
    const Tensor& labels, const Tensor& index, const Tensor& flow_up, const Tensor& flow_down, int64_t opening,
    int64_t closing, int64_t far_distance, int64_t far_iterations) {
  const std::array<int64_t, 4> sides =  // clang before 16 lets no lambda capture structured bindings
      check_propagate(labels, index, flow_up, flow_down, opening, closing, far_distance, far_iterations);
  const int64_t batch = sides[0], height = sides[1], width = sides[2], depth = sides[3];
  Tensor out = at::zeros({batch, height, width, depth}, labels.options().dtype(at::kByte));
  if (out.numel() == 0) return out;
  const Tensor starts = index.contiguous();
  const int64_t* z = starts.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b)
    TORCH_CHECK_VALUE(z[b] >= 0 && z[b] < depth, "index must lie in [0, ", depth, "), not ", z[b]);

  const Plane plane(static_cast<int>(height), static_cast<int>(width));
  std::vector<Word> slices(batch * depth * plane.size());
  const Tensor given = labels.gt(0).contiguous();
  const bool* set = given.const_data_ptr<bool>();
  for (int64_t b = 0; b < batch; ++b) {
    Word* const slice = slices.data() + (b * depth + z[b]) * plane.size();
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        slice[y * plane.words + x / kWordBits] |= Word(set[(b * height + y) * width + x]) << x % kWordBits;
  }
  const PostSettings settings = post_settings(height, width, depth, opening, closing, far_distance, far_iterations);
  const auto ready = [](const Tensor& flow) {
    return (flow.scalar_type() == at::kHalf ? flow.to(at::kFloat) : flow).contiguous();
  };
  const Tensor up = ready(flow_up), down = ready(flow_down);
  if (up.scalar_type() == at::kDouble)
    run_chains<double, double>(plane, slices, starts, up, down, depth, settings);
  else if (up.scalar_type() == at::kBFloat16)
    run_chains<at::BFloat16, float>(plane, slices, starts, up, down, depth, settings);
  else
    run_chains<float, float>(plane, slices, starts, up, down, depth, settings);

  // Slices are bits and D is the output's last axis: one row of all slices at a time stays in the cache.
  uint8_t* const result = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, batch * height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Word* row = slices.data() + (i / height) * depth * plane.size() + (i % height) * plane.words;
      uint8_t* const to = result + i * width * depth;
      for (int64_t s = 0; s < depth; ++s, row += plane.size())
        for (int word = 0; word < plane.words; ++word)
          for (Word rest = row[word]; rest != 0; rest &= rest - 1)
            to[(word * kWordBits + lowest_bit(rest)) * depth + s] = 1;
    }
  });
  return out;
}

}  // namespace spss
