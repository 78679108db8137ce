// What the kernels offer to C: raw device pointers and a stream, nothing of PyTorch. All return a cudaError_t (0 is
// success) of the launch; nothing waits for the device.

#pragma once

#include <cstdint>

#define VLMEFF_EXPORT extern "C" __attribute__((visibility("default")))

// One layer of a gather. Strides are in units of 16 bytes, those of the index in elements; 0 for a dimension of size 1.
struct VlmeffGatherLayer {
  const void* keys;
  const void* values;
  const int64_t* index;  // [B, 1 or Hk, kept], last stride 1
  void* keys_out;        // [B, Hk, kept, D], contiguous
  void* values_out;
  int32_t kept;
  int32_t key_batch, key_head, key_token;
  int32_t value_batch, value_head, value_token;
  int32_t index_batch, index_head;
};

enum VlmeffFloat : int { VLMEFF_FLOAT32 = 0, VLMEFF_FLOAT16 = 1, VLMEFF_BFLOAT16 = 2 };

// keys_out[b, h, i] = keys[b, h, index[b, h, i]] and values likewise, for `count` layers, all of `batch` x `heads` rows
// of `key_width` and `value_width` pieces of 16 bytes. All pointers but those of the index are multiples of 16.
VLMEFF_EXPORT int vlmeff_gather_kv(
    const VlmeffGatherLayer* layers, int32_t count, int32_t batch, int32_t heads, int32_t key_width,
    int32_t value_width, void* stream);

// Symmetric codes of each row of x [rows, channels] (`row_stride` elements apart), divided by smooth [channels] unless
// that is null: scales [rows] = max|x| / largest, codes [rows, channels] = rne(x / scale) in [-largest, largest].
VLMEFF_EXPORT int vlmeff_act_quant_int8(
    const void* x, const float* smooth, int8_t* codes, float* scales, int64_t rows, int64_t row_stride,
    int32_t channels, int32_t type, int32_t largest, void* stream);
