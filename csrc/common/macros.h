// What every operation's C++ file shares: host-device markers and function multiversioning.
#pragma once

#include <cstdint>

// Formulas and index arithmetic that the CPU and the GPU share are written once, as COVR_HD functions.
#ifdef __CUDACC__
#define COVR_HD __host__ __device__ __forceinline__
#else
#define COVR_HD inline __attribute__((always_inline))
#endif

// One binary, the best vector instructions of the machine it runs on: the loader picks the clone.
// Sanitizers cannot instrument ifunc resolvers, so they build the plain function.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__CUDACC__) && !defined(COVR_NO_CLONES)
#if __GNUC__ >= 12
#define COVR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
// GCC 11 takes single features, no sets. Its AVX-512F fuses multiply and add in whole vectors alone, so that
// a result would depend on where a thread's part begins.
#define COVR_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define COVR_CLONES
#endif
