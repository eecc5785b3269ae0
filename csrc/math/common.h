// What every per-voxel function needs to be compiled for the host and for the device.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#if defined(__CUDACC__)
#define SPSS_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define SPSS_HD __forceinline
#else
#define SPSS_HD inline __attribute__((always_inline))
#endif

namespace spss {

// Between a stored dtype and the one that is computed in. Spelt out for CUDA's half types, as torch's build switches
// their implicit conversions off.
template <typename To, typename From>
SPSS_HD To convert(From value) {
  return static_cast<To>(value);
}

#if defined(__CUDACC__)
template <>
SPSS_HD float convert<float, __half>(__half value) { return __half2float(value); }
template <>
SPSS_HD float convert<float, __nv_bfloat16>(__nv_bfloat16 value) { return __bfloat162float(value); }
template <>
SPSS_HD __half convert<__half, float>(float value) { return __float2half_rn(value); }
template <>
SPSS_HD __nv_bfloat16 convert<__nv_bfloat16, float>(float value) { return __float2bfloat16_rn(value); }
#endif

}  // namespace spss
