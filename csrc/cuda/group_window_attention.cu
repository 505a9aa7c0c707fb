// block_diagonal_attention and group_window_attention for CUDA tensors. The two differ only in where
// a token's row lies: in the row-major order of the visible tokens, or in its slot of its group.
#include "../checks.h"
#include "../library.h"
#include "attention.h"
#include "primitives.cuh"
#include "stream.h"
#include "table_gradient.cuh"
#include "tensors.h"

#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace greenmim::cuda {

Tensor summed(const Tensor& partial) {
  const int64_t programs = partial.size(0), heads = partial.size(1), rows = partial.size(2);
  const int64_t runs = table_runs(programs);
  Tensor sums = torch::stable::new_empty(
      partial, {runs > 1 ? runs : 0, heads, rows}, ScalarType::Double);
  Tensor result = torch::stable::new_empty(partial, {rows, heads});
  run_table_gradient(partial.const_data_ptr<float>(), sums.mutable_data_ptr<double>(),
                     result.mutable_data_ptr<float>(), programs, int(heads), int(rows),
                     current_stream(partial.get_device_index()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

namespace {

// Bytes of an access: 16 where a head fills its tile (16, 32 or 64 elements) or is float32, else 8.
int64_t alignment_of(const Tensor& x, int64_t head_dim) {
  const bool is_whole = head_dim == 16 || head_dim == 32 || head_dim == 64;
  return is_whole || x.element_size() == 4 ? 16 : 8;
}

// x itself if every head starts at a multiple of `bytes`, else a copy; a view may start anywhere.
Tensor ready(const Tensor& x, int64_t bytes, bool any_strides = false) {
  const int64_t element = int64_t(x.element_size());
  const int64_t last = x.dim() - 1;
  bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes == 0;
  if (any_strides) {
    fits = fits && (x.size(last) == 1 || x.stride(last) == 1);
    for (int64_t axis = 0; fits && axis < last; ++axis) {
      const int64_t step = x.stride(axis) * element;
      fits = x.size(axis) == 1 || (step % bytes == 0 && step >= 0 && step < int64_t(1) << 32);
    }
  } else {
    fits = fits && x.is_contiguous();
  }
  if (fits) return x;
  Tensor copy = torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  torch::stable::copy_(copy, x);
  return copy;
}

Device device_of(int index) {
  return {attribute(cudaDevAttrMultiProcessorCount, index),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
}

struct Problem {
  QueryKeyValue x;
  QueryKeyValue own_layout;  // as it was given: gradients are laid out like it
  std::optional<Tensor> table, pad_value;
  PartitionTensors part;
  AttentionShape shape;
  Attention a{};

  Problem(
      QueryKeyValue any, const std::optional<Tensor>& table_any,
      const std::optional<Tensor>& pad_any, PartitionTensors part_any, int64_t heads, int64_t window_slots,
      double scale)
      : x(any), own_layout(std::move(any)), part(std::move(part_any)) {
    if (table_any) table = to_contiguous(*table_any);
    if (part.token_index) part.token_index = to_contiguous(*part.token_index);
    for (Tensor* indices : {&part.window_id, &part.query_row, &part.key_row})
      *indices = to_contiguous(*indices);
    shape = check_attention(x, table, ScalarType::Float, pad_any, part, heads);
    STD_TORCH_CHECK(
        shape.head_dim % 4 == 0 && shape.head_dim <= 64,
        "the CUDA kernels take head dims that are multiples of 4 up to 64, got ", shape.head_dim);
    const int64_t bytes = alignment_of(x.q, shape.head_dim);
    x.q = ready(x.q, bytes, !x.is_packed());
    for (std::optional<Tensor>* one : {&x.k, &x.v})
      if (*one) *one = ready(**one, bytes, true);
    if (pad_any) pad_value = ready(*pad_any, bytes);
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    STD_TORCH_CHECK(
        shape.batch < kMost && shape.groups * shape.slots < kMost,
        "a batch must have fewer than 2^31 images, and a partition fewer slots");
    for (int which = 0; which < 3; ++which) *own(which) = rows_of(x, which);
    if (pad_value) a.pad_value = pad_value->const_data_ptr();
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
    a.head_dim = int(shape.head_dim);
    a.window_slots = int(std::clamp<int64_t>(window_slots, 1, std::max(a.slots, 1)));
    a.table_rows = int(shape.table_rows);
    a.per_image = shape.partitions > 1;
    a.scale = float(scale);
    for (const Tensor* other : {&part.window_id, &part.query_row, &part.key_row,
                                part.token_index ? &*part.token_index : &part.window_id,
                                table ? &*table : &part.window_id})
      STD_TORCH_CHECK(
          on_one_device(*other, x.q), "qkv, the table and the partition must be on one device");
  }

  Rows* own(int which) { return which == 0 ? &a.q : which == 1 ? &a.k : &a.v; }

  // Kernels count the bytes between heads, rows and images in 32 bits. An axis of one has no next element.
  Rows rows_of(const QueryKeyValue& tensors, int which) const {
    const Strides s = strides_of(tensors, which, shape);
    return rows_of(*s.tensor, s.first, s.image, s.row, s.head);
  }
  Rows rows_of(
      const Tensor& tensor, int64_t first, int64_t image, int64_t row, int64_t head) const {
    const int64_t element = int64_t(tensor.element_size());
    image = shape.batch > 1 ? image : 0;
    row = shape.rows > 1 ? row : 0;
    head = shape.heads > 1 ? head : 0;
    for (const int64_t step : {image, row, head})
      STD_TORCH_CHECK(
          step * element < int64_t(1) << 32, "an image of q, k, v or the output must span less than 4 GB");
    char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
    return {data + first * element, unsigned(image), unsigned(row), unsigned(head)};
  }
  // The output, or its gradient.
  Rows rows_of(const Tensor& tensor) const {
    return rows_of(tensor, 0, shape.rows * shape.channels, shape.channels, shape.head_dim);
  }

  bool grouped() const { return !part.token_index; }
  bool empty() const { return a.batch == 0 || a.rows == 0 || a.groups == 0 || a.slots == 0; }

  std::vector<int64_t> sizes() const {
    if (grouped()) return {shape.batch, shape.groups, shape.slots, shape.channels};
    return {shape.batch, shape.rows, shape.channels};
  }

  template <class T>
  void plan_of(Pass pass) {
    const Device facts = device_of(x.q.get_device_index());
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
    switch (x.q.scalar_type()) {
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
    const cudaStream_t stream = current_stream(x.q.get_device_index());
    for_type([&](auto zero) {
      run_attention<decltype(zero)>(a, int(shape.head_dim), pass, stream);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

std::tuple<Tensor, Tensor> forward(Problem problem) {
  const Tensor& q = problem.x.q;
  Tensor out = torch::stable::new_empty(q, problem.sizes());
  Tensor lse = torch::stable::new_empty(
      q, {problem.a.batch, problem.a.heads, problem.a.rows}, ScalarType::Float);
  if (!problem.empty()) {
    problem.a.out = problem.rows_of(out);
    problem.a.lse = lse.mutable_data_ptr<float>();
    problem.plan(Pass::Forward);
    problem.run(Pass::Forward);
  }
  return {out, lse};
}

struct Gradients {
  QueryKeyValue x;
  Tensor table, pad;
};

Gradients backward(
    Problem problem, const Tensor& grad_out_any, const Tensor& out_any, const Tensor& lse_any,
    bool need_qkv, bool need_table, bool need_pad) {
  const QueryKeyValue& x = problem.x;
  const AttentionShape& shape = problem.shape;
  Attention& a = problem.a;
  check_rows(grad_out_any, x, shape, problem.grouped(), "grad_out");
  check_rows(out_any, x, shape, problem.grouped(), "out");
  check_lse(lse_any, x.q, ScalarType::Float, a.batch, a.heads, a.rows);
  const int64_t bytes = alignment_of(x.q, shape.head_dim);
  const Tensor grad_out = ready(grad_out_any, bytes), out = ready(out_any, bytes);
  const Tensor lse = to_contiguous(lse_any);
  need_table = need_table && problem.table.has_value();
  need_pad = need_pad && problem.pad_value.has_value();
  // The gradients of padding are summed from those of k and v.
  const bool computes = need_qkv || need_pad;
  const auto like = [&](const Tensor& tensor) {
    return computes ? torch::stable::empty_like(tensor) : none_like(tensor);
  };
  const QueryKeyValue& given = problem.own_layout;
  Gradients grads{
      {like(x.is_packed() ? x.q : with_rows(given.q)), std::nullopt, std::nullopt}, none_like(lse),
      none_like(lse)};
  if (!x.is_packed())
    grads.x.k = like(with_rows(*given.k)), grads.x.v = like(with_rows(*given.v));
  const auto sums = [&](bool needed, int64_t programs, int64_t rows) {
    return needed ? torch::stable::new_empty(lse, {programs, a.heads, rows}) : none_like(lse);
  };
  if (problem.empty()) {
    if (need_table) grads.table = torch::stable::new_zeros(lse, {a.table_rows, a.heads});
    if (need_pad) grads.pad = torch::stable::new_zeros(lse, {2 * a.head_dim, a.heads});
  } else if (computes || need_table) {
    a.grad_out = problem.rows_of(grad_out);
    a.out = problem.rows_of(out);  // long groups read it; nothing writes it
    a.lse = const_cast<float*>(lse.const_data_ptr<float>());
    if (computes) {
      a.grad_q = problem.rows_of(grads.x, 0);
      a.grad_k = problem.rows_of(grads.x, 1);
      a.grad_v = problem.rows_of(grads.x, 2);
    }
    // The plan depends on whether there are sums, their size on the plan.
    if (need_table) a.partial = a.lse;
    if (need_pad) a.partial_pad = a.lse;
    problem.plan(Pass::Backward);
    Tensor table = sums(need_table, a.programs(), a.table_rows);
    Tensor pad = sums(need_pad, a.programs(), 2 * a.head_dim);
    if (need_table) a.partial = table.mutable_data_ptr<float>();
    if (need_pad) a.partial_pad = pad.mutable_data_ptr<float>();
    problem.run(Pass::Backward);
    if (need_table) grads.table = summed(table);
    if (need_pad) grads.pad = summed(pad);
  }
  if (computes && !need_qkv) {
    grads.x.q = none_like(x.q);
    if (!x.is_packed()) grads.x.k = none_like(x.q), grads.x.v = none_like(x.q);
  }
  return grads;
}

}  // namespace

std::tuple<Tensor, Tensor> block_diagonal_attention(
    const Tensor& qkv, std::optional<Tensor> table, const Tensor& window_id,
    const Tensor& query_row, const Tensor& key_row, int64_t num_heads, int64_t window_slots, double scale) {
  const Guard guard(qkv.get_device_index());
  return forward(
      {{qkv, {}, {}}, table, {}, {{}, window_id, query_row, key_row}, num_heads, window_slots,
       scale});
}

std::tuple<Tensor, Tensor> block_diagonal_attention_backward(
    const Tensor& grad_out, const Tensor& qkv, std::optional<Tensor> table, const Tensor& out,
    const Tensor& lse, const Tensor& window_id, const Tensor& query_row, const Tensor& key_row,
    int64_t num_heads, int64_t window_slots, double scale, bool need_qkv, bool need_table) {
  const Guard guard(qkv.get_device_index());
  const Gradients grads = backward(
      {{qkv, {}, {}}, table, {}, {{}, window_id, query_row, key_row}, num_heads, window_slots,
       scale}, grad_out,
      out, lse, need_qkv, need_table, false);
  return {grads.x.q, grads.table};
}

std::tuple<Tensor, Tensor> group_window_attention(
    const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> v, std::optional<Tensor> table,
    std::optional<Tensor> pad_value, const Tensor& token_index, const Tensor& window_id,
    const Tensor& query_row, const Tensor& key_row, int64_t num_heads, int64_t window_slots, double scale) {
  const Guard guard(q.get_device_index());
  return forward({{q, k, v}, table, pad_value, {token_index, window_id, query_row, key_row},
                  num_heads, window_slots,
       scale});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_window_attention_backward(
    const Tensor& grad_out, const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> v,
    std::optional<Tensor> table, std::optional<Tensor> pad_value, const Tensor& out,
    const Tensor& lse, const Tensor& token_index, const Tensor& window_id, const Tensor& query_row,
    const Tensor& key_row, int64_t num_heads, int64_t window_slots, double scale, bool need_qkv, bool need_table,
    bool need_pad) {
  const Guard guard(q.get_device_index());
  const Gradients grads = backward(
      {{q, k, v}, table, pad_value, {token_index, window_id, query_row, key_row}, num_heads, window_slots,
       scale},
      grad_out, out, lse, need_qkv, need_table, need_pad);
  return {grads.x.q, grads.x.k.value_or(none_like(q)), grads.x.v.value_or(none_like(q)),
          grads.table, grads.pad};
}

// Whether both passes of such a problem fit the device's shared memory and registers.
bool fits(int device, ScalarType type, int64_t head_dim, int64_t slots, int64_t table_rows) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (slots < 1 || slots > kMost || table_rows > kMost) return false;
  const Guard guard(device);
  const Device facts = device_of(device);
  float something = 0;
  int token = 0;
  Attention a{};
  a.batch = 1, a.heads = 1, a.groups = 1, a.rows = a.slots = int(slots);
  a.head_dim = int(head_dim), a.window_slots = a.slots, a.table_rows = int(table_rows);
  a.table = table_rows > 0 ? &something : nullptr;
  a.token_index = &token;
  a.scale = 1;
  const auto plans = [&](Pass pass) {
    switch (type) {
      case ScalarType::Float: return plan_attention<float>(a, int(head_dim), pass, facts);
      case ScalarType::BFloat16: return plan_attention<bfloat16>(a, int(head_dim), pass, facts);
      default: return plan_attention<float16>(a, int(head_dim), pass, facts);
    }
  };
  if (!plans(Pass::Forward)) return false;
  a.partial = table_rows > 0 ? &something : nullptr;
  a.partial_pad = &something;
  return plans(Pass::Backward);
}

}  // namespace greenmim::cuda

GREENMIM_LIBRARY_IMPL(CUDA, m) {
  m.impl("block_diagonal_attention", TORCH_BOX(&greenmim::cuda::block_diagonal_attention));
  m.impl("block_diagonal_attention_backward",
         TORCH_BOX(&greenmim::cuda::block_diagonal_attention_backward));
  m.impl("group_window_attention", TORCH_BOX(&greenmim::cuda::group_window_attention));
  m.impl("group_window_attention_backward",
         TORCH_BOX(&greenmim::cuda::group_window_attention_backward));
}

// For Python, through ctypes, which no exception may reach. `element`: 0 float32, 1 bfloat16, 2 float16.
// Below zero if the device could not be asked: greenmim_cuda_fits_problem says why.
static thread_local std::string problem_of_fits;
extern "C" __attribute__((visibility("default"))) int greenmim_cuda_fits(
    int device, int element, int64_t head_dim, int64_t slots, int64_t table_rows) {
  using greenmim::ScalarType;
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  try {
    return greenmim::cuda::fits(device, types[element], head_dim, slots, table_rows);
  } catch (const std::exception& error) {
    problem_of_fits = error.what();
    return -1;
  }
}
extern "C" __attribute__((visibility("default"))) const char* greenmim_cuda_fits_problem() {
  return problem_of_fits.c_str();
}

// What the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST; empty where another build keeps it.
#ifndef GREENMIM_ARCHITECTURES
#define GREENMIM_ARCHITECTURES ""
#endif
extern "C" __attribute__((visibility("default"))) const char* greenmim_cuda_architectures() {
  return GREENMIM_ARCHITECTURES;
}
