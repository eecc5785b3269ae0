// Hole filling: a flood from outside through all that is not of a class leaves what the class encloses.
#include <ATen/Parallel.h>

#include <cstring>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/operators.h"

namespace spss {
namespace {

// A volume with one voxel of margin on every side, so that no neighbour has to be looked for.
struct Margin {
  int64_t height, width, depth;

  int64_t row() const { return depth + 2; }
  int64_t plane() const { return (width + 2) * row(); }
  int64_t size() const { return (height + 2) * plane(); }
  int64_t at(int64_t y, int64_t x) const { return (y + 1) * plane() + (x + 1) * row() + 1; }
};

// Closes `open` at every voxel joined to `seed` by face neighbours, whole runs along the last axis at a time, and calls
// `visit(begin, end)` for each run.
template <typename Visit>
void flood(uint8_t* open, const Margin& margin, int64_t seed, std::vector<int64_t>& waiting, const Visit& visit) {
  waiting.assign(1, seed);
  while (!waiting.empty()) {
    int64_t begin = waiting.back(), end = begin;
    waiting.pop_back();
    if (!open[begin]) continue;
    while (open[begin - 1]) --begin;
    while (open[end]) open[end++] = 0;
    for (int64_t i = begin; open[i]; ++i) open[i] = 0;
    for (const int64_t step : {-margin.plane(), -margin.row(), margin.row(), margin.plane()})
      for (int64_t i = begin + step; i < end + step; ++i)
        if (open[i] && (i == begin + step || !open[i - 1])) waiting.push_back(i);
    visit(begin, end);
  }
}

void fill(const uint8_t* label, uint8_t* filled, const Margin& margin, int64_t classes) {
  const int64_t height = margin.height, width = margin.width, depth = margin.depth;
  std::vector<uint8_t> open(margin.size());
  std::vector<int64_t> waiting, runs, tightest;
  // of a voxel with its margin, the same voxel without
  const auto place = [&](int64_t i) {
    const int64_t y = i / margin.plane() - 1, x = i % margin.plane() / margin.row() - 1;
    return (y * width + x) * depth + i % margin.row() - 1;
  };
  for (int64_t c = 1; c < classes; ++c) {
    if (std::memchr(label, static_cast<int>(c), height * width * depth) == nullptr) continue;
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t z = 0; z < depth; ++z)
          open[margin.at(y, x) + z] = label[(y * width + x) * depth + z] != c;
    const auto border = [&](int64_t i) {
      if (open[i]) flood(open.data(), margin, i, waiting, [](int64_t, int64_t) {});
    };
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x) {
        const bool side = y == 0 || y == height - 1 || x == 0 || x == width - 1;
        const int64_t step = side || depth == 1 ? 1 : depth - 1;
        for (int64_t z = 0; z < depth; z += step) border(margin.at(y, x) + z);
      }
    for (int64_t y = 1; y + 1 < height; ++y)
      for (int64_t x = 1; x + 1 < width; ++x)
        for (int64_t i = margin.at(y, x) + 1, last = i + depth - 2; i < last; ++i) {
          if (!open[i]) continue;
          runs.clear();
          int64_t size = 0;
          flood(open.data(), margin, i, waiting, [&](int64_t begin, int64_t end) {
            runs.insert(runs.end(), {begin, end});
            size += end - begin;
          });
          if (tightest.empty()) tightest.assign(height * width * depth, std::numeric_limits<int64_t>::max());
          for (size_t r = 0; r < runs.size(); r += 2)
            for (int64_t voxel = runs[r]; voxel < runs[r + 1]; ++voxel) {
              const int64_t at = place(voxel);
              if (label[at] == 0 && size < tightest[at]) filled[at] = static_cast<uint8_t>(c), tightest[at] = size;
            }
        }
  }
}

}  // namespace

Tensor fill_holes(const Tensor& labels, int64_t classes) {
  check_fill_holes(labels, classes);
  const Tensor given = labels.contiguous();
  Tensor filled = given.clone();
  if (filled.numel() == 0) return filled;
  const Margin margin{given.size(1), given.size(2), given.size(3)};
  const int64_t voxels = margin.height * margin.width * margin.depth;
  at::parallel_for(0, given.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      fill(given.const_data_ptr<uint8_t>() + i * voxels, filled.mutable_data_ptr<uint8_t>() + i * voxels, margin,
           classes);
  });
  return filled;
}

}  // namespace spss
