// fill_holes on the GPU: for each class the components of all that is not of it, by union-find over the runs along the
// last axis; what is joined to the border is united with a name of its own, 0, and voxel i of a volume has the name i + 1.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "math/union_find.h"

namespace spss {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;

struct Atomics {
  __device__ __forceinline__ int minimum(int* value, int other) const { return atomicMin(value, other); }
};

// A batch of label volumes, one class of which is looked at, and this thread's voxel in it.
struct Voxel {
  int64_t i;     // in the batch
  int64_t base;  // of its volume's names
  int at, x, y, z;
  bool exists;

  __device__ Voxel(const HolesGeometry& g)
      : i(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) {
    const int64_t voxels = static_cast<int64_t>(g.height) * g.width * g.depth;
    const int64_t volume = i / voxels;
    exists = volume < g.batch;
    base = volume * (voxels + 1);
    at = static_cast<int>(i - volume * voxels);
    z = at % g.depth;
    x = at / g.depth % g.width;
    y = at / g.depth / g.width;
  }
  __device__ int name() const { return at + 1; }
};

// Every open voxel gets the first of its run among the 32 voxels of its warp for a parent; that one, where the run began
// before, the voxel before it.
__global__ void __launch_bounds__(kThreads)
    link_runs(HolesGeometry g, int c, const uint8_t* __restrict__ labels, int* parent, int* count) {
  const Voxel v(g);
  const bool open = v.exists && labels[v.i] != c;
  const int lane = threadIdx.x % 32;
  const unsigned opened = __ballot_sync(kAll, open), row_starts = __ballot_sync(kAll, v.exists && v.z == 0);
  if (!v.exists) return;
  if (v.at == 0) parent[v.base] = 0;
  if (!open) return;
  const unsigned starts = opened & (~(opened << 1) | row_starts), up_to_here = kAll >> (31 - lane);
  const int first = 31 - __clz(static_cast<int>(starts & up_to_here));
  const bool goes_on = lane == 0 && v.z > 0 && labels[v.i - 1] != c;
  parent[v.base + v.name()] = goes_on ? v.name() - 1 : v.name() - (lane - first);
  count[v.base + v.name()] = 0;
}

// Runs at the border with 0, and runs side by side with each other, where the first of either begins.
__global__ void __launch_bounds__(kThreads)
    unite_runs(HolesGeometry g, int c, const uint8_t* __restrict__ labels, int* parent) {
  const Voxel v(g);
  if (!v.exists || labels[v.i] == c) return;
  int* const own = parent + v.base;
  const bool goes_on = v.z > 0 && labels[v.i - 1] != c;
  const bool side = v.y == 0 || v.y == g.height - 1 || v.x == 0 || v.x == g.width - 1;
  if (v.z == 0 || v.z == g.depth - 1 || (side && !goes_on)) unite(Atomics(), own, v.name(), 0);
  const auto unite_with = [&](int step) {
    if (labels[v.i - step] == c || (goes_on && labels[v.i - step - 1] != c)) return;
    unite(Atomics(), own, v.name(), v.name() - step);
  };
  if (v.x > 0) unite_with(g.depth);
  if (v.y > 0) unite_with(g.depth * g.width);
}

__global__ void __launch_bounds__(kThreads)
    count_enclosed(HolesGeometry g, int c, const uint8_t* __restrict__ labels, int* parent, int* count) {
  const Voxel v(g);
  if (!v.exists || labels[v.i] == c) return;
  const int root = find_root(parent + v.base, v.name());
  if (root != 0) atomicAdd(count + v.base + root, 1);
}

__global__ void __launch_bounds__(kThreads) fill_enclosed(
    HolesGeometry g, int c, const uint8_t* __restrict__ labels, int* parent, const int* __restrict__ count,
    int* __restrict__ tightest, uint8_t* __restrict__ filled) {
  const Voxel v(g);
  if (!v.exists || labels[v.i] != 0) return;
  const int root = find_root(parent + v.base, v.name());
  if (root == 0) return;
  const int size = count[v.base + root];
  if (size >= tightest[v.i]) return;
  tightest[v.i] = size;
  filled[v.i] = static_cast<uint8_t>(c);
}

}  // namespace

cudaError_t launch_fill_holes(
    const HolesGeometry& geometry, int classes, const uint8_t* labels, uint8_t* filled, int* parent, int* count,
    int* tightest, cudaStream_t stream) {
  const int64_t all = geometry.batch * geometry.height * geometry.width * geometry.depth;
  const auto blocks = static_cast<unsigned>((all + kThreads - 1) / kThreads);
  for (int c = 1; c < classes; ++c) {
    link_runs<<<blocks, kThreads, 0, stream>>>(geometry, c, labels, parent, count);
    unite_runs<<<blocks, kThreads, 0, stream>>>(geometry, c, labels, parent);
    count_enclosed<<<blocks, kThreads, 0, stream>>>(geometry, c, labels, parent, count);
    fill_enclosed<<<blocks, kThreads, 0, stream>>>(geometry, c, labels, parent, count, tightest, filled);
  }
  return cudaGetLastError();
}

}  // namespace spss
