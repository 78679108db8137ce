// Compiled for a GPU, or with VLMEFF_HOST_EMULATION to run the kernels on the CPU (host_emulation.h) and test them.
//
// VLMEFF_LAUNCH is for kernels whose threads do not speak to each other, VLMEFF_LAUNCH_TOGETHER for those with barriers
// or shuffles. On a GPU both are the same.

#pragma once

#ifndef VLMEFF_HOST_EMULATION
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define VLMEFF_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define VLMEFF_LAUNCH_TOGETHER VLMEFF_LAUNCH
#else
#include "host_emulation.h"
#endif
