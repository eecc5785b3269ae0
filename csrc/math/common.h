// What every per-voxel function needs to be compiled for the host and for the device.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SPSS_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define SPSS_HD __forceinline
#else
#define SPSS_HD inline __attribute__((always_inline))
#endif
