// Symmetric integer codes of activations, one scale per token.
//
//     v = x / smooth,  s = max|v| / P,  q = clamp(rne(v / s), -P, P)      P = 2^(bits-1) - 1
//
// Bit-equal to the reference: IEEE divisions, rounding half to even. A row of zeros has the scale 1; a row with a NaN
// or an infinity has the scale NaN and the codes 0. One block per row. Up to LONGEST channels a thread keeps its share
// of the row in registers and memory is read once; longer rows are read twice.
//
// Memory is read 16 bytes at a time where the row starts at a multiple of 16, else element by element.

#include <cstring>

#include "entry_points.h"
#include "launch.h"

namespace {

constexpr int THREADS = 512;
constexpr int WARP = 32;
constexpr int LONGEST = 16384;  // THREADS x 32 elements in registers
constexpr unsigned INFINITE = 0x7f800000u, NOT_A_NUMBER = 0x7fc00000u;

struct Float32 {
  using Raw = float;
  static __device__ float widen(Raw raw) { return raw; }
};

struct Float16 {
  using Raw = uint16_t;
  static __device__ float widen(Raw raw) { return __half2float(__ushort_as_half(raw)); }
};

struct BFloat16 {
  using Raw = uint16_t;
  static __device__ float widen(Raw raw) { return __uint_as_float(static_cast<unsigned>(raw) << 16); }
};

template <typename Float>
constexpr int VECTOR = 16 / sizeof(typename Float::Raw);  // elements of a 16-byte access

template <typename Float>
struct Row {
  const typename Float::Raw* x;
  const float* smooth;  // or null
  int32_t channels;
  bool x_aligned, smooth_aligned;

  // Elements first ... first + VECTOR - 1, smoothed, in float32; zeros behind the end.
  __device__ void load(int32_t first, float (&v)[VECTOR<Float>]) const {
    constexpr int N = VECTOR<Float>;
    const bool whole = first + N <= channels;
    if (x_aligned && whole) {
      typename Float::Raw raw[N];
      const uint4 packed = *reinterpret_cast<const uint4*>(x + first);
      memcpy(raw, &packed, sizeof(raw));
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = Float::widen(raw[j]);
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = first + j < channels ? Float::widen(x[first + j]) : 0.0f;
    }
    if (smooth == nullptr) return;
    if (smooth_aligned && whole) {
#pragma unroll
      for (int j = 0; j < N; j += 4) {
        const float4 s = *reinterpret_cast<const float4*>(smooth + first + j);
        v[j] = __fdiv_rn(v[j], s.x);
        v[j + 1] = __fdiv_rn(v[j + 1], s.y);
        v[j + 2] = __fdiv_rn(v[j + 2], s.z);
        v[j + 3] = __fdiv_rn(v[j + 3], s.w);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) {
        if (first + j < channels) v[j] = __fdiv_rn(v[j], smooth[first + j]);
      }
    }
  }
};

struct Scale {
  float value, reciprocal;
  bool finite, regular;  // regular: neither so small nor so large that a product of quotient() leaves the normal range
};

// |v| as an integer: ordered like the magnitudes, with every NaN above infinity, so that a maximum keeps it.
__device__ unsigned magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

__device__ Scale scale_of(unsigned greatest, int32_t largest) {
  if (greatest >= INFINITE) return {__uint_as_float(NOT_A_NUMBER), 0.0f, false, false};
  const float scale = __fdiv_rn(__uint_as_float(greatest), static_cast<float>(largest));
  if (scale == 0.0f) return {1.0f, 1.0f, true, true};
  return {scale, __frcp_rn(scale), true, scale > 0x1p-100f && scale < 0x1p100f};
}

// v / scale as rounded by a division, in five instructions: the divisor is that of a whole row. The first line is
// within 1.5 ulp, the second makes that 1, and from there a correctly rounded reciprocal gives the correctly rounded
// quotient (Markstein 1990). The residuals are exact where they matter: for |v / scale| < 0.4, which has the code 0
// anyway, they may underflow.
__device__ float quotient(float v, const Scale& scale) {
  float q = __fmul_rn(v, scale.reciprocal);
  q = __fmaf_rn(__fmaf_rn(-scale.value, q, v), scale.reciprocal, q);
  return __fmaf_rn(__fmaf_rn(-scale.value, q, v), scale.reciprocal, q);
}

// In a byte. The clamp matters where the scale is subnormal and far from max|v| / P.
__device__ unsigned code_of(float quotient, int32_t largest) {
  const int32_t code = __float2int_rn(quotient);
  return (code > largest ? largest : code < -largest ? -largest : code) & 0xff;
}

// codes[0 ... N - 1]; only the first `count` where they do not fill an aligned piece.
template <int N>
__device__ void store(
    int8_t* codes, const float (&v)[N], int32_t count, bool aligned, const Scale& scale, int32_t largest) {
  unsigned words[N / 4] = {};
  if (scale.regular) {
#pragma unroll
    for (int j = 0; j < N; j++) words[j / 4] |= code_of(quotient(v[j], scale), largest) << (8 * (j % 4));
  } else if (scale.finite) {
#pragma unroll
    for (int j = 0; j < N; j++) words[j / 4] |= code_of(__fdiv_rn(v[j], scale.value), largest) << (8 * (j % 4));
  }
  if (aligned) {
    if constexpr (N == 4) *reinterpret_cast<unsigned*>(codes) = words[0];
    if constexpr (N == 8) *reinterpret_cast<uint2*>(codes) = make_uint2(words[0], words[N / 4 - 1]);
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) {
      if (j < count) codes[j] = static_cast<int8_t>(words[j / 4] >> (8 * (j % 4)));
    }
  }
}

__device__ unsigned warp_max(unsigned v) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, v, lane);
    v = other > v ? other : v;
  }
  return v;
}

// For one use in a kernel: a second would need a barrier before it.
__device__ unsigned block_max(unsigned v) {
  __shared__ unsigned of_warp[THREADS / WARP];
  const unsigned lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  v = warp_max(v);
  if (lane == 0) of_warp[threadIdx.x / WARP] = v;
  __syncthreads();
  return warp_max(lane < warps ? of_warp[lane] : 0u);
}

// PIECES: 16-byte pieces of the row that a thread keeps; 0 for a row that is read twice. At least two blocks of a
// multiprocessor, because ptxas otherwise aims at 40 registers and spills one.
template <typename Float, int PIECES>
__global__ void __launch_bounds__(THREADS, PIECES * VECTOR<Float> < 32 ? 2 : 1) quantize_rows(
    Row<Float> row, int8_t* __restrict__ codes, float* __restrict__ scales, int64_t row_stride, bool codes_aligned,
    int32_t largest) {
  constexpr int N = VECTOR<Float>;
  const int64_t at = blockIdx.x;
  const int32_t channels = row.channels, mine = threadIdx.x * N, step = blockDim.x * N;
  row.x += at * row_stride;
  codes += at * channels;

  unsigned greatest = 0;
  float v[PIECES > 0 ? PIECES : 1][N];
  if constexpr (PIECES > 0) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      if (mine + p * step < channels) row.load(mine + p * step, v[p]);
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      if (mine + p * step >= channels) continue;
#pragma unroll
      for (int j = 0; j < N; j++) greatest = magnitude(v[p][j]) > greatest ? magnitude(v[p][j]) : greatest;
    }
  } else {
    for (int32_t first = mine; first < channels; first += step) {
      row.load(first, v[0]);
#pragma unroll
      for (int j = 0; j < N; j++) greatest = magnitude(v[0][j]) > greatest ? magnitude(v[0][j]) : greatest;
    }
  }

  const Scale scale = scale_of(block_max(greatest), largest);
  if (threadIdx.x == 0) scales[at] = scale.value;
  if constexpr (PIECES > 0) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int32_t first = mine + p * step;
      if (first < channels) store(codes + first, v[p], channels - first, codes_aligned, scale, largest);
    }
  } else {
    for (int32_t first = mine; first < channels; first += step) {
      row.load(first, v[0]);
      store(codes + first, v[0], channels - first, codes_aligned, scale, largest);
    }
  }
}

bool multiple(const void* pointer, uintptr_t of) { return reinterpret_cast<uintptr_t>(pointer) % of == 0; }

template <typename Float, int ELEMENTS>
int launch(
    const Row<Float>& row, int8_t* codes, float* scales, int64_t rows, int64_t row_stride, int32_t largest,
    void* stream) {
  constexpr int N = VECTOR<Float>;
  const int32_t wanted = ELEMENTS > 0 ? (row.channels + ELEMENTS - 1) / (ELEMENTS > 0 ? ELEMENTS : 1) : THREADS;
  const int32_t threads = wanted < 1 ? WARP : (wanted + WARP - 1) / WARP * WARP;
  const bool codes_aligned = row.channels % N == 0 && multiple(codes, N);
  const auto kernel = quantize_rows<Float, ELEMENTS / N>;
  VLMEFF_LAUNCH_TOGETHER(
      kernel, dim3(static_cast<unsigned>(rows)), dim3(threads), stream, row, codes, scales, row_stride, codes_aligned,
      largest);
  return cudaGetLastError();
}

template <typename Float>
int quantize(
    const void* x, const float* smooth, int8_t* codes, float* scales, int64_t rows, int64_t row_stride,
    int32_t channels, int32_t largest, void* stream) {
  using Raw = typename Float::Raw;
  const bool aligned = multiple(x, 16) && row_stride * sizeof(Raw) % 16 == 0;
  const Row<Float> row{static_cast<const Raw*>(x), smooth, channels, aligned, multiple(smooth, 16)};
  if (channels <= 2048) return launch<Float, 8>(row, codes, scales, rows, row_stride, largest, stream);
  if (channels <= 8192) return launch<Float, 16>(row, codes, scales, rows, row_stride, largest, stream);
  if (channels <= LONGEST) return launch<Float, 32>(row, codes, scales, rows, row_stride, largest, stream);
  return launch<Float, 0>(row, codes, scales, rows, row_stride, largest, stream);
}

}  // namespace

VLMEFF_EXPORT int vlmeff_act_quant_int8(
    const void* x, const float* smooth, int8_t* codes, float* scales, int64_t rows, int64_t row_stride,
    int32_t channels, int32_t type, int32_t largest, void* stream) {
  if (rows == 0) return cudaSuccess;
  if (rows > INT32_MAX || channels > INT32_MAX / 2) return cudaErrorInvalidValue;
  switch (type) {
    case VLMEFF_FLOAT32:
      return quantize<Float32>(x, smooth, codes, scales, rows, row_stride, channels, largest, stream);
    case VLMEFF_FLOAT16:
      return quantize<Float16>(x, smooth, codes, scales, rows, row_stride, channels, largest, stream);
    case VLMEFF_BFLOAT16:
      return quantize<BFloat16>(x, smooth, codes, scales, rows, row_stride, channels, largest, stream);
    default:
      return cudaErrorInvalidValue;
  }
}
