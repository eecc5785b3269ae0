// A stand-in for CUDA's header, for a host compiler: a block of 256 threads of the CPU runs all blocks of a kernel in
// turn. No more of CUDA is here than the kernels that are tested this way need.
#pragma once

#include <array>
#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

struct Warp {
  std::barrier<> together{32};
  std::atomic<unsigned> bits{0};
};
constexpr unsigned kBlock = 256;
inline std::array<Warp, kBlock / 32> warps;

inline unsigned __ballot_sync(unsigned, bool set) {
  Warp& warp = warps[threadIdx.x / 32];
  warp.together.arrive_and_wait();  // all have read the last ballot
  if (threadIdx.x % 32 == 0) warp.bits = 0;
  warp.together.arrive_and_wait();
  if (set) warp.bits |= 1u << (threadIdx.x % 32);
  warp.together.arrive_and_wait();
  return warp.bits;
}

inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

inline int atomicMin(int* value, int other) {
  int old = __atomic_load_n(value, __ATOMIC_SEQ_CST);
  while (old > other &&
         !__atomic_compare_exchange_n(value, &old, other, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
inline int atomicAdd(int* value, int other) { return __atomic_fetch_add(value, other, __ATOMIC_SEQ_CST); }

// What kernel<<<blocks, threads, 0, stream>>>(...) is rewritten to.
template <typename Kernel>
void run_blocks(unsigned blocks, unsigned threads, const Kernel& kernel) {
  std::vector<std::thread> block;
  for (unsigned thread = 0; thread < threads; ++thread)
    block.emplace_back([=] {
      threadIdx.x = thread;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) kernel();
    });
  for (std::thread& thread : block) thread.join();
}
