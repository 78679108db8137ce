// Runs the kernels of this folder on the CPU, for tests: the words of CUDA that they use, and two ways to launch.
//
// VLMEFF_LAUNCH runs the threads of a grid one after the other. VLMEFF_LAUNCH_TOGETHER gives each thread of a block a
// thread of the CPU, with true barriers, so that a sanitizer sees a race or a missing barrier; blocks follow each
// other. Shuffles want every lane of every warp. Not covered: memory ordering weaker than the CPU's, and what ptxas
// makes of the source.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// Arithmetic: that of the CPU is IEEE, provided that nothing is contracted and the rounding mode is the default.
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

inline int __float2int_rn(float v) {
  if (std::isnan(v)) return 0;
  const float rounded = std::nearbyintf(v);
  if (rounded >= 2147483648.0f) return std::numeric_limits<int>::max();
  return rounded < -2147483648.0f ? std::numeric_limits<int>::min() : static_cast<int>(rounded);
}

template <typename To, typename From>
To emulated_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float sign = h.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

// A block whose threads run together.
struct EmulatedBlock {
  explicit EmulatedBlock(unsigned threads) : warps(threads / 32), exchanged(threads) {
    if (threads % 32) std::fprintf(stderr, "a block of %u threads has an incomplete warp\n", threads), std::abort();
    pthread_barrier_init(&all, nullptr, threads);
    for (pthread_barrier_t& warp : warps) pthread_barrier_init(&warp, nullptr, 32);
  }
  pthread_barrier_t all;
  std::vector<pthread_barrier_t> warps;
  std::vector<unsigned> exchanged;
};
inline thread_local EmulatedBlock* emulated_block = nullptr;

inline void __syncthreads() { pthread_barrier_wait(&emulated_block->all); }

inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, int lanes) {
  if (mask != 0xffffffffu) std::fprintf(stderr, "only whole warps are emulated\n"), std::abort();
  const unsigned me = threadIdx.x;
  emulated_block->exchanged[me] = value;
  pthread_barrier_wait(&emulated_block->warps[me / 32]);
  const unsigned other = emulated_block->exchanged[me ^ static_cast<unsigned>(lanes)];
  pthread_barrier_wait(&emulated_block->warps[me / 32]);
  return other;
}

template <typename Function>
void emulated_each(dim3 size, Function function) {
  for (unsigned z = 0; z < size.z; z++)
    for (unsigned y = 0; y < size.y; y++)
      for (unsigned x = 0; x < size.x; x++) function(dim3(x, y, z));
}

template <typename Kernel>
void emulated_alone(dim3 grid, dim3 block, Kernel kernel) {
  gridDim = grid, blockDim = block;
  emulated_each(grid, [&](dim3 b) {
    blockIdx = b;
    emulated_each(block, [&](dim3 t) { threadIdx = t, kernel(); });
  });
}

template <typename Kernel>
void emulated_together(dim3 grid, dim3 block, Kernel kernel) {
  EmulatedBlock state(block.x);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < block.x; t++) {
    threads.emplace_back([&, t] {
      gridDim = grid, blockDim = block, threadIdx = dim3(t), emulated_block = &state;
      emulated_each(grid, [&](dim3 b) {
        blockIdx = b;
        kernel();
        __syncthreads();  // shared memory passes to the next block
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#define VLMEFF_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), emulated_alone(grid, block, [&] { kernel(__VA_ARGS__); }))
#define VLMEFF_LAUNCH_TOGETHER(kernel, grid, block, stream, ...) \
  ((void)(stream), emulated_together(grid, block, [&] { kernel(__VA_ARGS__); }))
