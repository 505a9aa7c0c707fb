// group_gather and group_scatter for CUDA tensors.
#include "../checks.h"
#include "../library.h"
#include "group_gather.cuh"
#include "stream.h"

namespace greenmim::cuda {

namespace {

void run(
    bool gather, const Tensor& x, const Tensor& token_index_any, Tensor& out, int64_t num_tokens) {
  if (out.numel() == 0) return;  // without tokens there is still padding to write
  STD_TORCH_CHECK(
      token_index_any.is_cuda() && token_index_any.get_device_index() == x.get_device_index(),
      "token_index must be on the device of x");
  STD_TORCH_CHECK(x.element_size() % 2 == 0, "x must have elements of an even number of bytes");
  const Tensor token_index = torch::stable::contiguous(token_index_any);
  RowCopy c{};
  c.from = x.const_data_ptr();
  c.to = out.mutable_data_ptr();
  c.token_index = token_index.const_data_ptr<int>();
  c.batch = x.size(0);
  c.slots = token_index.size(1) * token_index.size(2);
  c.tokens = num_tokens;
  c.per_image = token_index.size(0) > 1;
  copy_rows(c, gather, x.size(x.dim() - 1) * int64_t(x.element_size()),
            current_stream(x.get_device_index()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

Tensor group_gather(const Tensor& x_any, const Tensor& token_index) {
  check_gather(x_any, token_index);
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = torch::stable::contiguous(x_any);
  Tensor out = torch::stable::new_empty(
      x, {x.size(0), token_index.size(1), token_index.size(2), x.size(2)});
  run(true, x, token_index, out, x.size(1));
  return out;
}

Tensor group_scatter(const Tensor& x_any, const Tensor& token_index, int64_t num_tokens) {
  check_scatter(x_any, token_index, num_tokens);
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = torch::stable::contiguous(x_any);
  Tensor out = torch::stable::new_empty(x, {x.size(0), num_tokens, x.size(3)});
  run(false, x, token_index, out, num_tokens);
  return out;
}

}  // namespace greenmim::cuda

GREENMIM_LIBRARY_IMPL(CUDA, m) {
  m.impl("group_gather", TORCH_BOX(&greenmim::cuda::group_gather));
  m.impl("group_scatter", TORCH_BOX(&greenmim::cuda::group_scatter));
}
