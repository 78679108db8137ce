// The kernels as operators of PyTorch, through LibTorch's stable ABI: one library serves every torch from 2.10 on.
// Python defines the schemas and the fakes (cuda_ops.py); this file registers what runs on CUDA, or on the CPU with
// emulated kernels.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "entry_points.h"
#include "launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t PIECE = 16;  // bytes that move at once
constexpr int64_t MOST = std::numeric_limits<int32_t>::max() / 2;

#ifdef VLMEFF_HOST_EMULATION
#define VLMEFF_DISPATCH_KEY CPU
struct Current {
  explicit Current(const Tensor&) {}
  void* stream = nullptr;
};
bool is_ours(const Tensor& t) { return t.is_cpu(); }
#else
#define VLMEFF_DISPATCH_KEY CUDA
// Makes the tensor's device the current one.
struct Current {
  explicit Current(const Tensor& t) : guard(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "no current CUDA stream");
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
bool is_ours(const Tensor& t) { return t.is_cuda(); }
#endif

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

void check_device(const char* op, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(is_ours(t) && t.get_device_index() == first.get_device_index(), op,
                  ": all tensors must be on one CUDA device");
}

bool unit_stride(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; }

// A stride in units of `unit` elements; 0 where the dimension has one entry and the stride means nothing.
int32_t stride_of(const char* op, const Tensor& t, int64_t dim, int64_t unit) {
  if (t.size(dim) <= 1) return 0;
  const int64_t stride = t.stride(dim);
  STD_TORCH_CHECK(stride % unit == 0 && stride / unit <= MOST, op, ": dimension ", dim, " has stride ", stride,
                  ", expected a multiple of ", unit, " elements");
  return static_cast<int32_t>(stride / unit);
}

// Pieces of a row of states [B, H, S, D].
int32_t pieces_of(const char* op, const Tensor& t) {
  const int64_t bytes = t.size(3) * static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(bytes % PIECE == 0 && bytes / PIECE <= MOST && unit_stride(t), op, ": rows of ", bytes,
                  " adjacent bytes, expected a multiple of 16");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % PIECE == 0 || t.numel() == 0, op,
                  ": a tensor does not start at a multiple of 16 bytes");
  return static_cast<int32_t>(bytes / PIECE);
}

bool same_rows(const Tensor& a, const Tensor& b) {
  return a.size(0) == b.size(0) && a.size(1) == b.size(1) &&
         a.size(3) * a.element_size() == b.size(3) * b.element_size();
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> gather_kv(
    std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<Tensor> index) {
  constexpr const char* OP = "gather_kv_cuda";
  const size_t count = keys.size();
  STD_TORCH_CHECK(values.size() == count && index.size() == count, OP, ": keys, values and index must be as many");
  std::vector<Tensor> keys_out, values_out;
  if (count == 0) return {keys_out, values_out};
  const Current current(keys[0]);

  std::vector<VlmeffGatherLayer> layers;
  for (size_t l = 0; l < count; l++) {
    const Tensor &k = keys[l], &v = values[l], &i = index[l];
    for (const Tensor* t : {&k, &v, &i}) check_device(OP, *t, keys[0]);
    STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && i.dim() == 3, OP, ": expected 4, 4 and 3 dimensions");
    const int64_t batch = k.size(0), heads = k.size(1), kept = i.size(2);
    STD_TORCH_CHECK(v.size(0) == batch && v.size(1) == heads && v.size(2) == k.size(2), OP,
                    ": keys and values of a layer differ in B, Hk or S");
    STD_TORCH_CHECK(i.size(0) == batch && (i.size(1) == 1 || i.size(1) == heads), OP,
                    ": index must be [B, 1 or Hk, K]");
    STD_TORCH_CHECK(i.scalar_type() == ScalarType::Long && unit_stride(i), OP, ": index must be int64, rows adjacent");
    STD_TORCH_CHECK(batch * heads <= MOST && kept <= MOST, OP, ": too many rows");

    const int32_t key_width = pieces_of(OP, k), value_width = pieces_of(OP, v);
    const int64_t key_unit = PIECE / k.element_size(), value_unit = PIECE / v.element_size();
    keys_out.push_back(torch::stable::new_empty(k, {batch, heads, kept, k.size(3)}));
    values_out.push_back(torch::stable::new_empty(v, {batch, heads, kept, v.size(3)}));
    layers.push_back({
        k.data_ptr(), v.data_ptr(), static_cast<const int64_t*>(i.data_ptr()), keys_out[l].data_ptr(),
        values_out[l].data_ptr(), static_cast<int32_t>(kept),
        stride_of(OP, k, 0, key_unit), stride_of(OP, k, 1, key_unit), stride_of(OP, k, 2, key_unit),
        stride_of(OP, v, 0, value_unit), stride_of(OP, v, 1, value_unit), stride_of(OP, v, 2, value_unit),
        stride_of(OP, i, 0, 1), stride_of(OP, i, 1, 1),
    });
    // Neighbours with rows of the same size share a launch: in a model, all layers.
    if (l + 1 < count && same_rows(k, keys[l + 1]) && same_rows(v, values[l + 1])) continue;
    const int error = vlmeff_gather_kv(
        layers.data(), static_cast<int32_t>(layers.size()), static_cast<int32_t>(batch), static_cast<int32_t>(heads),
        key_width, value_width, current.stream);
    check_launch(OP, error);
    layers.clear();
  }
  return {keys_out, values_out};
}

int32_t type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return VLMEFF_FLOAT32;
    case ScalarType::Half: return VLMEFF_FLOAT16;
    case ScalarType::BFloat16: return VLMEFF_BFLOAT16;
    default: STD_TORCH_CHECK(false, "act_quant_int8_cuda: x must be float32, float16 or bfloat16");
  }
  return -1;
}

std::tuple<Tensor, Tensor> act_quant_int8(Tensor x, std::optional<Tensor> smooth, int64_t bits) {
  constexpr const char* OP = "act_quant_int8_cuda";
  STD_TORCH_CHECK(x.dim() == 2 && unit_stride(x), OP, ": x must be [M, K], rows adjacent");
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, OP, ": bits must be 2 to 8");
  const int64_t rows = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(channels <= MOST, OP, ": too many channels");
  const float* divisor = nullptr;
  if (smooth.has_value()) {
    check_device(OP, *smooth, x);
    STD_TORCH_CHECK(smooth->scalar_type() == ScalarType::Float && smooth->is_contiguous() &&
                        smooth->dim() == 1 && smooth->size(0) == channels,
                    OP, ": smooth must be [K] float32, contiguous");
    divisor = static_cast<const float*>(smooth->data_ptr());
  }
  const Current current(x);
  Tensor codes = torch::stable::new_empty(x, {rows, channels}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {rows, 1}, ScalarType::Float);
  const int error = vlmeff_act_quant_int8(
      x.data_ptr(), divisor, static_cast<int8_t*>(codes.data_ptr()), static_cast<float*>(scales.data_ptr()), rows,
      rows > 1 ? x.stride(0) : 0, static_cast<int32_t>(channels), type_of(x), (1 << (bits - 1)) - 1, current.stream);
  check_launch(OP, error);
  return {codes, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlmeff_kernels, VLMEFF_DISPATCH_KEY, m) {
  m.impl("gather_kv_cuda", TORCH_BOX(&gather_kv));
  m.impl("act_quant_int8_cuda", TORCH_BOX(&act_quant_int8));
}
