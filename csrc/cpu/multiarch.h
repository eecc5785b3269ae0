// SPSS_MULTIARCH before a hot function compiles it for baseline x86-64, AVX2 and AVX-512, and the loader picks the best
// the machine has: one build is fast everywhere and crashes nowhere, which -march=native cannot offer.
// SPSS_SIMD before a loop says its iterations are independent; SPSS_SCALAR in a loop's body keeps it from being
// vectorised, where that would mean slow gather instructions.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SPSS_MULTIARCH __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define SPSS_HAS_FMA 1
#else
#define SPSS_MULTIARCH __attribute__((target_clones("default", "avx2")))  // no levels yet: neither FMA nor AVX-512
#define SPSS_HAS_FMA 0
#endif
#else
#define SPSS_MULTIARCH
#define SPSS_HAS_FMA 0
#endif

#define SPSS_SIMD _Pragma("omp simd")

#if defined(__GNUC__)
#define SPSS_SCALAR __asm__ volatile("")
#else
#define SPSS_SCALAR
#endif
