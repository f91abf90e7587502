// CUDA C++ as C++: what nvcc includes in every file.
#pragma once

#include "cuda_runtime_api.h"
#include "device_functions.h"
#include "emulator.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// Instructions of the GPU mean nothing here: guard them, with the same in C++ for `#ifndef __CUDA_ARCH__`.
#define asm inline_ptx_cannot_run_on_a_cpu
