// propagate on the GPU: one launch for a batch, one block for each chain (volume and direction), slices as bits in
// shared memory, components by union-find within the block. csrc/math/propagate.h does the work.
#include <algorithm>

#include "cuda/launch.h"
#include "math/propagate.h"

namespace spss {
namespace {

constexpr int kThreads = 1024;

struct Block {
  int rank, size;

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ int minimum(int* value, int other) const { return atomicMin(value, other); }
  __device__ __forceinline__ void add(int* value, int other) const { atomicAdd(value, other); }
  __device__ __forceinline__ void maximum(unsigned long long* value, unsigned long long other) const {
    atomicMax(value, other);
  }
};

// Two slices of bits, and the union-find's two numbers a name.
struct Needs {
  size_t bits, numbers;

  explicit Needs(const Plane& plane)
      : bits(2 * sizeof(Word) * static_cast<size_t>(plane.size())),
        numbers(2 * sizeof(int) * static_cast<size_t>(plane.names())) {}
};

struct Placement {
  bool bits_shared, numbers_shared;
  size_t shared, scratch;  // bytes a block

  Placement(const Plane& plane, int device) {
    int most = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const size_t room = most > 1024 ? static_cast<size_t>(most) - 1024 : 0;  // the kernel's own variables
    const Needs needs(plane);
    bits_shared = needs.bits <= room;
    numbers_shared = bits_shared && needs.bits + needs.numbers <= room;
    shared = (bits_shared ? needs.bits : 0) + (numbers_shared ? needs.numbers : 0);
    scratch = needs.bits + needs.numbers - shared;
  }
};

// The slice z in bits: of the annotation, or moved from `bits` by `flow`. Returns whether this thread saw a set voxel.
template <typename Set>
__device__ bool pack(const Plane& plane, Word* out, const Set& set) {
  const int lane = threadIdx.x % kWordBits;
  Word any = 0;
  for (int i = threadIdx.x / kWordBits; i < plane.size(); i += kThreads / kWordBits) {
    const int y = i / plane.words, x = i % plane.words * kWordBits + lane;
    const Word packed = __ballot_sync(0xffffffffu, x < plane.width && set(y, x));
    if (lane == 0) out[i] = packed;
    any |= packed;
  }
  return any != 0;
}

template <typename Flow, typename T>
__global__ void __launch_bounds__(kThreads) chains(
    PropagateGeometry geometry, PostSettings settings, const uint8_t* labels, const int64_t* index, const Flow* flow_up,
    const Flow* flow_down, uint8_t* out, uint8_t* scratch, bool bits_shared, bool numbers_shared,
    size_t scratch_per_block) {
  extern __shared__ unsigned long long shared[];
  __shared__ unsigned long long best;
  const int64_t b = blockIdx.x / 2;
  const bool up = blockIdx.x % 2 == 0;
  const Plane plane(static_cast<int>(geometry.height), static_cast<int>(geometry.width));
  const int64_t voxels = geometry.height * geometry.width, depth = geometry.depth;
  const Axis<T, int> rows(geometry.height, 1), columns(geometry.width, 1);
  const Block team{static_cast<int>(threadIdx.x), kThreads};
  Word* const fast = reinterpret_cast<Word*>(shared);
  Word* const slow = reinterpret_cast<Word*>(scratch + blockIdx.x * scratch_per_block);
  Word* const bits = bits_shared ? fast : slow;
  int* const numbers = reinterpret_cast<int*>(
      numbers_shared ? fast + 2 * plane.size() : (bits_shared ? slow : slow + 2 * plane.size()));
  Workspace work{bits, bits + plane.size(), numbers, numbers + plane.names(), &best};

  const int64_t start = index[b];
  if (start < 0 || start >= depth) return;  // the host did not look, so as not to wait
  uint8_t* const volume = out + b * voxels * depth;
  const auto store = [&](int64_t z) {
    for (int i = threadIdx.x; i < plane.size(); i += kThreads) {
      const int64_t first = static_cast<int64_t>(i / plane.words) * plane.width + i % plane.words * kWordBits;
      for (Word rest = work.bits[i]; rest != 0; rest &= rest - 1) volume[(first + lowest_bit(rest)) * depth + z] = 1;
    }
  };
  const uint8_t* const given = labels + b * voxels;
  const auto annotated = [&](int y, int x) { return given[static_cast<int64_t>(y) * plane.width + x] > 0; };
  bool some = pack(plane, work.bits, annotated);
  some = __syncthreads_or(some);
  if (up) store(start);
  const int64_t step = up ? 1 : -1;
  for (int64_t z = start + step; some && (up ? z < depth : z >= 0); z += step) {
    const Flow* down_rows = (up ? flow_up : flow_down) + (b * (depth - 1) + (up ? z - 1 : z)) * 2 * voxels;
    const Flow* across = down_rows + voxels;
    const Word* from = work.bits;
    some = pack(plane, work.spare, [&](int y, int x) {
      const int64_t at = static_cast<int64_t>(y) * plane.width + x;
      return nearest_bit<T>(
                 from, plane, rows, columns, static_cast<T>(y) + convert<T>(down_rows[at]),
                 static_cast<T>(x) + convert<T>(across[at])) != 0;
    });
    some = __syncthreads_or(some);  // an empty slice stays empty, and the output is zeroed
    exchange(work);
    if (!some) break;
    const int64_t distance = up ? z - start : start - z;
    post(team, plane, Band{0, plane.height}, work, static_cast<int>(distance), settings);
    store(z);
  }
}

template <typename Flow, typename T>
cudaError_t launch(
    const PropagateGeometry& geometry, const PostSettings& settings, const Placement& place, const uint8_t* labels,
    const int64_t* index, const void* flow_up, const void* flow_down, uint8_t* out, void* scratch,
    cudaStream_t stream) {
  const auto kernel = chains<Flow, T>;
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(place.shared));
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(2 * geometry.batch), kThreads, place.shared, stream>>>(
      geometry, settings, labels, index, static_cast<const Flow*>(flow_up), static_cast<const Flow*>(flow_down), out,
      static_cast<uint8_t*>(scratch), place.bits_shared, place.numbers_shared, place.scratch);
  return cudaGetLastError();
}

Plane plane_of(const PropagateGeometry& geometry) {
  return Plane(static_cast<int>(geometry.height), static_cast<int>(geometry.width));
}

}  // namespace

size_t propagate_scratch(const PropagateGeometry& geometry, int device) {
  return Placement(plane_of(geometry), device).scratch * 2 * static_cast<size_t>(geometry.batch);
}

cudaError_t launch_propagate(
    const PropagateGeometry& geometry, const PostSettings& settings, Dtype dtype, const uint8_t* labels,
    const int64_t* index, const void* flow_up, const void* flow_down, uint8_t* out, void* scratch, int device,
    cudaStream_t stream) {
  const Placement place(plane_of(geometry), device);
  const auto run = [&](auto flow, auto zero) {
    return launch<decltype(flow), decltype(zero)>(
        geometry, settings, place, labels, index, flow_up, flow_down, out, scratch, stream);
  };
  switch (dtype) {
    case Dtype::float64: return run(double(), double());
    case Dtype::float16: return run(__half(), float());
    case Dtype::bfloat16: return run(__nv_bfloat16(), float());
    case Dtype::float32: break;
  }
  return run(float(), float());
}

}  // namespace spss
