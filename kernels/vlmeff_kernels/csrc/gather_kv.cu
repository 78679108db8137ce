// Copies of chosen cache entries, of all layers and of keys and values, in one launch.
//
//     keys_out[l][b, h, i, :] = keys[l][b, h, index[l][b, h', i], :]      h' = h, or 0 where heads share an index
//
// Rows are moved as pieces of 16 bytes: whatever the dtype, no bit changes. The table of layers is a kernel parameter,
// so there is no copy to the device and nothing to keep alive. Layers may differ in their number of tokens and of
// rows taken, blocks beyond a layer's last row leave at once.
//
// grid (tiles of rows, batch x head, 2 x layers), block (pieces of a row, rows); a thread moves ROWS rows.
// Offsets are 64-bit: an index is multiplied by a stride.

#include "entry_points.h"
#include "launch.h"

namespace {

constexpr int LAYERS = 50;  // of a launch: what keeps the parameters under the 4096 bytes that every launch may have
constexpr int THREADS = 256;
constexpr int ROWS = 4;
constexpr int MOST_PLANES = 65535;  // of gridDim.y

struct Table {
  VlmeffGatherLayer layers[LAYERS];
};
static_assert(sizeof(Table) + 4 * sizeof(int32_t) <= 4096, "kernel parameters");

__global__ void __launch_bounds__(THREADS)
    gather_rows(const __grid_constant__ Table table, int32_t planes, int32_t heads, int32_t key_width,
                int32_t value_width) {
  const VlmeffGatherLayer& layer = table.layers[blockIdx.z / 2];
  const bool keys = blockIdx.z % 2 == 0;
  const int32_t kept = layer.kept;
  const int32_t first = blockIdx.x * blockDim.y * ROWS + threadIdx.y;
  if (first >= kept) return;

  const int32_t width = keys ? key_width : value_width;
  const int64_t batch_stride = keys ? layer.key_batch : layer.value_batch;
  const int64_t head_stride = keys ? layer.key_head : layer.value_head;
  const int64_t token_stride = keys ? layer.key_token : layer.value_token;
  for (int32_t plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const int64_t batch = plane / heads, head = plane % heads;
    const uint4* source = static_cast<const uint4*>(keys ? layer.keys : layer.values);
    uint4* out = static_cast<uint4*>(keys ? layer.keys_out : layer.values_out);
    source += batch * batch_stride + head * head_stride;
    out += static_cast<int64_t>(plane) * kept * width;
    const int64_t* index = layer.index + batch * layer.index_batch + head * layer.index_head;

    int64_t taken[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int32_t i = first + r * blockDim.y;
      taken[r] = i < kept ? index[i] : 0;
    }
    for (int32_t column = threadIdx.x; column < width; column += blockDim.x) {
      // All loads before the first store: they are in flight together.
      uint4 piece[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (first + r * static_cast<int32_t>(blockDim.y) < kept) piece[r] = source[taken[r] * token_stride + column];
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int32_t i = first + r * blockDim.y;
        if (i < kept) out[static_cast<int64_t>(i) * width + column] = piece[r];
      }
    }
  }
}

int32_t most_kept(const Table& table, int32_t count) {
  int32_t most = 0;
  for (int32_t l = 0; l < count; l++) most = table.layers[l].kept > most ? table.layers[l].kept : most;
  return most;
}

}  // namespace

VLMEFF_EXPORT int vlmeff_gather_kv(
    const VlmeffGatherLayer* layers, int32_t count, int32_t batch, int32_t heads, int32_t key_width,
    int32_t value_width, void* stream) {
  const int32_t planes = batch * heads;
  const int32_t widest = key_width > value_width ? key_width : value_width;
  if (planes == 0 || widest == 0) return cudaSuccess;
  const int32_t columns = widest < THREADS ? widest : THREADS;
  const dim3 block(columns, THREADS / columns);
  const int32_t tile = ROWS * block.y;

  Table table;
  int32_t filled = 0;
  for (int32_t l = 0; l < count; l++) {
    if (layers[l].kept > 0) table.layers[filled++] = layers[l];
    if (filled == 0 || (filled < LAYERS && l + 1 < count)) continue;
    const dim3 grid((most_kept(table, filled) - 1) / tile + 1, planes < MOST_PLANES ? planes : MOST_PLANES, 2 * filled);
    VLMEFF_LAUNCH(gather_rows, grid, block, stream, table, planes, heads, key_width, value_width);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    filled = 0;
  }
  return cudaSuccess;
}
