// group_gather and group_scatter for CUDA tensors: copies of whole rows in the widest accesses that
// row length and alignment allow. Bound by memory: every element is read once and written once.
#include "../checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#include <algorithm>

namespace greenmim::cuda {

namespace {

constexpr int kThreads = 256;
// Blocks beyond this wait for a free place anyway; the loop below takes the rest.
constexpr int64_t kMostBlocks = 1 << 16;

// x [B, N, C] -> out [B, G * S, C]; `row_units` units of type Unit make up a row of C elements.
template <class Unit>
__global__ void __launch_bounds__(kThreads) group_gather_kernel(
    const Unit* __restrict__ x, const int* __restrict__ token_index, Unit* __restrict__ out,
    int64_t total_units, int64_t row_units, int64_t slots, int64_t num_tokens, int64_t partitions) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total_units;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t slot = i / row_units, unit = i - slot * row_units;
    const int64_t image = slot / slots;
    const int row = token_index[partitions == 1 ? slot - image * slots : slot];
    out[i] = row < 0 ? Unit{} : x[(image * num_tokens + row) * row_units + unit];
  }
}

// x [B, G * S, C] -> out [B, N, C]. Every token lies in one slot, so each row is written once.
template <class Unit>
__global__ void __launch_bounds__(kThreads) group_scatter_kernel(
    const Unit* __restrict__ x, const int* __restrict__ token_index, Unit* __restrict__ out,
    int64_t total_units, int64_t row_units, int64_t slots, int64_t num_tokens, int64_t partitions) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total_units;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t slot = i / row_units, unit = i - slot * row_units;
    const int64_t image = slot / slots;
    const int row = token_index[partitions == 1 ? slot - image * slots : slot];
    if (row >= 0) out[(image * num_tokens + row) * row_units + unit] = x[i];
  }
}

template <class Unit>
void launch(
    bool gather, const Tensor& x, const Tensor& token_index, Tensor& out, int64_t row_bytes,
    int64_t num_tokens, cudaStream_t stream) {
  const int64_t slots = token_index.size(1) * token_index.size(2);
  const int64_t row_units = row_bytes / int64_t(sizeof(Unit));
  const int64_t total_units = x.size(0) * slots * row_units;
  const int64_t blocks = std::min((total_units + kThreads - 1) / kThreads, kMostBlocks);
  const auto kernel = gather ? group_gather_kernel<Unit> : group_scatter_kernel<Unit>;
  kernel<<<unsigned(blocks), kThreads, 0, stream>>>(
      static_cast<const Unit*>(x.const_data_ptr()), token_index.const_data_ptr<int>(),
      static_cast<Unit*>(out.mutable_data_ptr()), total_units, row_units, slots, num_tokens,
      token_index.size(0));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void copy_rows(
    bool gather, const Tensor& x, const Tensor& token_index, Tensor& out, int64_t row_bytes,
    int64_t num_tokens) {
  if (x.numel() == 0 || out.numel() == 0) return;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const auto s = static_cast<cudaStream_t>(stream);
  const uint64_t alignment = reinterpret_cast<uintptr_t>(x.const_data_ptr()) |
                             reinterpret_cast<uintptr_t>(out.const_data_ptr()) |
                             uint64_t(row_bytes);
  if (alignment % 16 == 0)
    launch<uint4>(gather, x, token_index, out, row_bytes, num_tokens, s);
  else if (alignment % 4 == 0)
    launch<uint32_t>(gather, x, token_index, out, row_bytes, num_tokens, s);
  else
    launch<uint16_t>(gather, x, token_index, out, row_bytes, num_tokens, s);
}

Tensor checked_index(const Tensor& token_index, const Tensor& x) {
  STD_TORCH_CHECK(
      token_index.is_cuda() && token_index.get_device_index() == x.get_device_index(),
      "token_index must be on the device of x");
  STD_TORCH_CHECK(x.element_size() % 2 == 0, "x must have elements of 2, 4 or 8 bytes");
  return torch::stable::contiguous(token_index);
}

}  // namespace

Tensor group_gather(const Tensor& x_any, const Tensor& token_index_any) {
  check_gather(x_any, token_index_any);
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor token_index = checked_index(token_index_any, x);
  Tensor out = torch::stable::new_empty(
      x, {x.size(0), token_index.size(1), token_index.size(2), x.size(2)});
  copy_rows(true, x, token_index, out, x.size(2) * int64_t(x.element_size()), x.size(1));
  return out;
}

Tensor group_scatter(const Tensor& x_any, const Tensor& token_index_any, int64_t num_tokens) {
  check_scatter(x_any, token_index_any, num_tokens);
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor token_index = checked_index(token_index_any, x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), num_tokens, x.size(3)});
  copy_rows(false, x, token_index, out, x.size(3) * int64_t(x.element_size()), num_tokens);
  return out;
}

}  // namespace greenmim::cuda

STABLE_TORCH_LIBRARY_IMPL(greenmim, CUDA, m) {
  m.impl("group_gather", TORCH_BOX(&greenmim::cuda::group_gather));
  m.impl("group_scatter", TORCH_BOX(&greenmim::cuda::group_scatter));
}
