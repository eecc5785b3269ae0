// Eight float32 in a register, or as many as SPSS_LANES says, for code that names its vectors.
#pragma once

#ifndef SPSS_LANES
#define SPSS_LANES 8
#endif

#define SPSS_INLINE inline __attribute__((always_inline))
#define SPSS_UNROLL _Pragma("GCC unroll 64")

// how a vector would be returned is another matter with AVX than without, but these are inlined
#pragma GCC diagnostic ignored "-Wpsabi"

namespace spss {
namespace {

constexpr int kLanes = SPSS_LANES;

using Vector = float __attribute__((vector_size(4 * kLanes)));
using Unaligned = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

SPSS_INLINE Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
SPSS_INLINE void store(float* to, const Vector& value) { *reinterpret_cast<Unaligned*>(to) = value; }

}  // namespace
}  // namespace spss
