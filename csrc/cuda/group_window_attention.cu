// block_diagonal_attention and group_window_attention for CUDA tensors. The two differ only in where
// a token's row lies: in the row-major order of the visible tokens, or in its slot of its group.
#include "../checks.h"
#include "attention.h"
#include "primitives.cuh"
#include "stream.h"
#include "table_gradient.cuh"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>

namespace greenmim::cuda {

namespace {

constexpr int64_t kAlignment = 16;  // bytes of an access

// PyTorch is not asked for what is contiguous already: a call through the stable interface takes time.
Tensor to_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Contiguous, and starting where 16 bytes can be read at once: a view may start anywhere.
Tensor ready(const Tensor& any) {
  const Tensor x = to_contiguous(any);
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0) return x;
  Tensor copy = torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  torch::stable::copy_(copy, x);
  return copy;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  STD_TORCH_CHECK(error == cudaSuccess, "cannot ask the device: ", cudaGetErrorString(error));
  return value;
}

struct Problem {
  Tensor qkv;
  std::optional<Tensor> table;
  PartitionTensors part;
  AttentionShape shape;
  Attention a{};

  Problem(
      const Tensor& qkv_any, const std::optional<Tensor>& table_any, PartitionTensors part_any,
      int64_t heads, double scale)
      : qkv(ready(qkv_any)), part(std::move(part_any)) {
    if (table_any) table = to_contiguous(*table_any);
    if (part.token_index) part.token_index = to_contiguous(*part.token_index);
    for (Tensor* x : {&part.window_id, &part.query_row, &part.key_row}) *x = to_contiguous(*x);
    shape = check_attention(qkv, table, ScalarType::Float, part, heads);
    STD_TORCH_CHECK(
        shape.head_dim == 16 || shape.head_dim == 32 || shape.head_dim == 64,
        "the CUDA kernels take head dims 16, 32 and 64, got ", shape.head_dim);
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    STD_TORCH_CHECK(
        shape.batch < kMost && shape.groups * shape.slots < kMost,
        "a batch must have fewer than 2^31 images, and a partition fewer slots");
    // Kernels count bytes within an image in 32 bits.
    STD_TORCH_CHECK(
        shape.rows * 3 * shape.channels * int64_t(qkv.element_size()) < int64_t(1) << 32,
        "q, k and v of an image must be smaller than 4 GB");
    a.qkv = qkv.const_data_ptr();
    a.table = table ? table->const_data_ptr<float>() : nullptr;
    a.token_index = part.token_index ? part.token_index->const_data_ptr<int>() : nullptr;
    a.window_id = part.window_id.const_data_ptr<int>();
    a.query_row = part.query_row.const_data_ptr<int>();
    a.key_row = part.key_row.const_data_ptr<int>();
    a.batch = int(shape.batch);
    a.rows = int(shape.rows);
    a.groups = int(shape.groups);
    a.slots = int(shape.slots);
    a.heads = int(heads);
    a.table_rows = int(shape.table_rows);
    a.per_image = shape.partitions > 1;
    a.scale = float(scale);
    for (const Tensor* x : {&part.window_id, &part.query_row, &part.key_row,
                            part.token_index ? &*part.token_index : &part.window_id,
                            table ? &*table : &part.window_id})
      STD_TORCH_CHECK(
          on_one_device(*x, qkv), "qkv, the table and the partition must be on one device");
  }

  bool empty() const { return a.batch == 0 || a.rows == 0 || a.groups == 0 || a.slots == 0; }

  std::vector<int64_t> sizes(int64_t last) const {
    std::vector<int64_t> result(qkv.sizes().begin(), qkv.sizes().end());
    result.back() = last;
    return result;
  }

  template <class T>
  void plan_of(Pass pass) {
    const int device = qkv.get_device_index();
    const Device facts{attribute(cudaDevAttrMultiProcessorCount, device),
                       attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
    STD_TORCH_CHECK(
        plan_attention<T>(a, int(shape.head_dim), pass, facts), "groups of ", a.slots, " slots and a"
        " bias table of ", a.table_rows, " rows do not fit a multiprocessor of this GPU, of which a"
        " block may have ", facts.shared_bytes, " bytes of shared memory; use another backend");
    STD_TORCH_CHECK(
        a.blocks() < int64_t(std::numeric_limits<int>::max()),
        "the batch needs 2^31 blocks or more; split it");
  }

  template <class Call>
  void for_type(Call call) const {
    switch (qkv.scalar_type()) {
      case ScalarType::Float: return call(float{});
      case ScalarType::BFloat16: return call(bfloat16{});
      case ScalarType::Half: return call(float16{});
      default:
        STD_TORCH_CHECK(false, "the CUDA kernels compute in float32, bfloat16 and float16 only");
    }
  }

  void plan(Pass pass) {
    for_type([&](auto zero) { plan_of<decltype(zero)>(pass); });
  }

  void run(Pass pass) const {
    const cudaStream_t stream = current_stream(qkv.get_device_index());
    for_type([&](auto zero) {
      run_attention<decltype(zero)>(a, int(shape.head_dim), pass, stream);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

using Guard = torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> forward(Problem problem) {
  const Tensor& qkv = problem.qkv;
  Tensor out = torch::stable::new_empty(qkv, problem.sizes(problem.shape.channels));
  Tensor lse = torch::stable::new_empty(
      qkv, {problem.a.batch, problem.a.heads, problem.a.rows}, ScalarType::Float);
  if (!problem.empty()) {
    problem.a.out = out.mutable_data_ptr();
    problem.a.lse = lse.mutable_data_ptr<float>();
    problem.plan(Pass::Forward);
    problem.run(Pass::Forward);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> backward(
    Problem problem, const Tensor& grad_out_any, const Tensor& out_any, const Tensor& lse_any,
    bool need_qkv, bool need_table) {
  const Tensor& qkv = problem.qkv;
  Attention& a = problem.a;
  check_rows(grad_out_any, qkv, problem.shape.channels, "grad_out");
  check_rows(out_any, qkv, problem.shape.channels, "out");
  check_lse(lse_any, qkv, ScalarType::Float, a.batch, a.heads, a.rows);
  const Tensor grad_out = ready(grad_out_any), out = ready(out_any), lse = to_contiguous(lse_any);
  need_table = need_table && problem.table.has_value();
  const std::vector<int64_t> none{0};
  Tensor grad_qkv =
      torch::stable::new_empty(qkv, need_qkv ? problem.sizes(3 * problem.shape.channels) : none);
  if (problem.empty() || !(need_qkv || need_table)) {
    Tensor grad_table = torch::stable::new_zeros(
        lse, need_table ? std::vector<int64_t>{a.table_rows, a.heads} : none);
    return {grad_qkv, grad_table};
  }
  Tensor grad_table = torch::stable::new_empty(
      lse, need_table ? std::vector<int64_t>{a.table_rows, a.heads} : none);
  a.grad_out = grad_out.const_data_ptr();
  // Long groups read it; nothing writes it.
  a.out = const_cast<void*>(out.const_data_ptr());
  a.lse = const_cast<float*>(lse.const_data_ptr<float>());
  a.grad_qkv = need_qkv ? grad_qkv.mutable_data_ptr() : nullptr;
  // The plan depends on whether there are sums, their size on the plan.
  a.partial = need_table ? grad_table.mutable_data_ptr<float>() : nullptr;
  problem.plan(Pass::Backward);
  Tensor partial = torch::stable::new_empty(
      lse, need_table ? std::vector<int64_t>{a.programs(), a.heads, a.table_rows} : none);
  if (need_table) a.partial = partial.mutable_data_ptr<float>();
  problem.run(Pass::Backward);
  if (need_table) {
    const int64_t runs = table_runs(a.programs());
    Tensor sums = torch::stable::new_empty(
        lse, {runs > 1 ? runs : 0, a.heads, a.table_rows}, ScalarType::Double);
    run_table_gradient(a.partial, sums.mutable_data_ptr<double>(),
                       grad_table.mutable_data_ptr<float>(), a.programs(), a.heads, a.table_rows,
                       current_stream(qkv.get_device_index()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {grad_qkv, grad_table};
}

}  // namespace

std::tuple<Tensor, Tensor> block_diagonal_attention(
    const Tensor& qkv, std::optional<Tensor> table, const Tensor& window_id,
    const Tensor& query_row, const Tensor& key_row, int64_t num_heads, double scale) {
  const Guard guard(qkv.get_device_index());
  return forward({qkv, table, {std::nullopt, window_id, query_row, key_row}, num_heads, scale});
}

std::tuple<Tensor, Tensor> block_diagonal_attention_backward(
    const Tensor& grad_out, const Tensor& qkv, std::optional<Tensor> table, const Tensor& out,
    const Tensor& lse, const Tensor& window_id, const Tensor& query_row, const Tensor& key_row,
    int64_t num_heads, double scale, bool need_qkv, bool need_table) {
  const Guard guard(qkv.get_device_index());
  return backward({qkv, table, {std::nullopt, window_id, query_row, key_row}, num_heads, scale},
                  grad_out, out, lse, need_qkv, need_table);
}

std::tuple<Tensor, Tensor> group_window_attention(
    const Tensor& qkv, std::optional<Tensor> table, const Tensor& token_index,
    const Tensor& window_id, const Tensor& query_row, const Tensor& key_row, int64_t num_heads,
    double scale) {
  const Guard guard(qkv.get_device_index());
  return forward({qkv, table, {token_index, window_id, query_row, key_row}, num_heads, scale});
}

std::tuple<Tensor, Tensor> group_window_attention_backward(
    const Tensor& grad_out, const Tensor& qkv, std::optional<Tensor> table, const Tensor& out,
    const Tensor& lse, const Tensor& token_index, const Tensor& window_id, const Tensor& query_row,
    const Tensor& key_row, int64_t num_heads, double scale, bool need_qkv, bool need_table) {
  const Guard guard(qkv.get_device_index());
  return backward({qkv, table, {token_index, window_id, query_row, key_row}, num_heads, scale},
                  grad_out, out, lse, need_qkv, need_table);
}

}  // namespace greenmim::cuda

STABLE_TORCH_LIBRARY_IMPL(greenmim, CUDA, m) {
  m.impl("block_diagonal_attention", TORCH_BOX(&greenmim::cuda::block_diagonal_attention));
  m.impl("block_diagonal_attention_backward",
         TORCH_BOX(&greenmim::cuda::block_diagonal_attention_backward));
  m.impl("group_window_attention", TORCH_BOX(&greenmim::cuda::group_window_attention));
  m.impl("group_window_attention_backward",
         TORCH_BOX(&greenmim::cuda::group_window_attention_backward));
}

// What the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST.
extern "C" __attribute__((visibility("default"))) const char* greenmim_cuda_architectures() {
  return GREENMIM_ARCHITECTURES;
}
