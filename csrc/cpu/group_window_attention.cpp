// block_diagonal_attention and group_window_attention for CPU tensors: exact work per window.
//
// The two operators differ only in where a token's row lies: in the row-major order of the visible
// tokens, or in its slot of the gathered groups. A task is one head, a few windows and, where one
// mask serves the batch, a few images. How tasks are cut depends on the problem alone, and the sums
// of the tasks for the bias table are added in a fixed order, so the result does not depend on the
// number of threads.
#include "../checks.h"
#include "capability.h"
#include "windows.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

namespace greenmim::cpu {

namespace {

// Enough tasks to balance many threads. No more: a bias tile is made, and its gradient added to the
// table, once per task, so that a task should hold as many images of a window as it can. The number
// does not depend on the threads, so that the sums do not either.
constexpr int64_t kTasks = 128;
// Multiply-adds worth a thread of its own.
constexpr int64_t kWorkPerThread = 1 << 15;

StorageType storage_type(const Tensor& qkv) {
  switch (qkv.scalar_type()) {
    case ScalarType::Float: return StorageType::Float32;
    case ScalarType::Double: return StorageType::Float64;
    case ScalarType::BFloat16: return StorageType::BFloat16;
    default:
      STD_TORCH_CHECK(false, "the CPU kernels compute in float64, float32 and bfloat16 only");
  }
}

ScalarType arithmetic_type(const Tensor& qkv) {
  return qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct Deleter {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// The rows of qkv, whatever its form: [B, rows_per_image, 3C].
struct Problem {
  Tensor qkv;
  std::optional<Tensor> table;
  int64_t batch, partitions, rows_per_image, channels, num_heads, head_dim, table_rows;
  double scale;
  Windows windows;

  Problem(
      const Tensor& qkv_any, const std::optional<Tensor>& table_any, PartitionTensors part,
      int64_t heads, double factor)
      : qkv(torch::stable::contiguous(qkv_any)), num_heads(heads), scale(factor) {
    if (table_any) table = torch::stable::contiguous(*table_any);
    if (part.token_index) part.token_index = torch::stable::contiguous(*part.token_index);
    for (Tensor* x : {&part.window_id, &part.query_row, &part.key_row})
      *x = torch::stable::contiguous(*x);
    const AttentionShape shape = check_attention(qkv, table, arithmetic_type(qkv), part, heads);
    batch = shape.batch;
    partitions = shape.partitions;
    rows_per_image = shape.rows;
    channels = shape.channels;
    head_dim = shape.head_dim;
    table_rows = shape.table_rows;
    windows = find_windows(
        {part.token_index ? part.token_index->const_data_ptr<int32_t>() : nullptr,
         part.window_id.const_data_ptr<int32_t>(), part.query_row.const_data_ptr<int32_t>(),
         part.key_row.const_data_ptr<int32_t>(), shape.partitions, shape.groups, shape.slots},
        rows_per_image, table_rows);
    cut();
  }

  // Blocks of windows times blocks of images; every head of such a block is a task.
  void cut() {
    const int64_t wanted = std::max<int64_t>(1, kTasks / num_heads);
    int64_t total = 0;
    for (const Window& window : windows.list) total += window.size;
    const int64_t tokens = std::max<int64_t>(1, total / wanted);
    int64_t block_tokens = 0;
    window_blocks = {0};
    for (int64_t i = 0; i < int64_t(windows.list.size()); i++) {
      block_tokens += windows.list[i].size;
      if (block_tokens >= tokens || i + 1 == int64_t(windows.list.size())) {
        window_blocks.push_back(i + 1);
        block_tokens = 0;
      }
    }
    const int64_t blocks = int64_t(window_blocks.size()) - 1;
    const int64_t images = partitions == 1 ? batch : 1;
    image_blocks = std::clamp<int64_t>((wanted + blocks - 1) / std::max<int64_t>(1, blocks), 1,
                                       std::max<int64_t>(1, images));
    images_per_partition = images;
    work.assign(1, 0);
    for (int64_t i = 0; i < blocks; i++) {
      int64_t pairs = 0;
      for (int64_t w = window_blocks[i]; w < window_blocks[i + 1]; w++)
        pairs += int64_t(windows.list[w].size) * (windows.list[w].size + 8);
      for (int64_t b = 0; b < image_blocks * num_heads; b++)
        work.push_back(work.back() + std::max<int64_t>(1, pairs * head_dim * images / image_blocks));
    }
  }

  int64_t blocks() const { return (int64_t(window_blocks.size()) - 1) * image_blocks; }

  // Runs `kernel` for every window, head and image. `partial` [blocks, heads, table_rows] or null.
  template <class Configure>
  void run(void (*kernel)(const WindowTask&, void*), void* partial, Configure configure) const {
    if (windows.list.empty() || batch == 0) return;
    const StorageType storage = storage_type(qkv);
    const int64_t element = int64_t(storage == StorageType::Float64 ? 8 : 4);
    const int64_t scratch_bytes = kernels().scratch_bytes(storage, windows.largest, head_dim);
    // A thread takes the tasks that start in its share of the work.
    torch::stable::parallel_for(0, work.back(), kWorkPerThread, [&](int64_t begin, int64_t end) {
      const int64_t first = std::lower_bound(work.begin(), work.end() - 1, begin) - work.begin();
      const int64_t last = std::lower_bound(work.begin(), work.end() - 1, end) - work.begin();
      if (first == last) return;
      std::unique_ptr<void, Deleter> scratch(
          ::operator new(scratch_bytes, std::align_val_t(64)));
      for (int64_t i = first; i < last; i++) {
        const int64_t block = i / num_heads, head = i % num_heads;
        const int64_t window_block = block / image_blocks, image_block = block % image_blocks;
        WindowTask task{};
        task.storage = storage;
        task.qkv = qkv.const_data_ptr();
        if (table) task.table = static_cast<const char*>(table->const_data_ptr()) + head * element;
        if (partial != nullptr)
          task.grad_table = static_cast<char*>(partial) + i * table_rows * element;
        task.head = int32_t(head);
        task.num_heads = int32_t(num_heads);
        task.head_dim = int32_t(head_dim);
        task.rows_per_image = rows_per_image;
        task.scale = scale;
        configure(task);
        for (int64_t w = window_blocks[window_block]; w < window_blocks[window_block + 1]; w++) {
          const Window& window = windows.list[w];
          task.rows = windows.rows.data() + window.start;
          task.query_row = windows.query_row.data() + window.start;
          task.key_row = windows.key_row.data() + window.start;
          task.size = window.size;
          task.first_image =
              window.partition + images_per_partition * image_block / image_blocks;
          task.last_image =
              window.partition + images_per_partition * (image_block + 1) / image_blocks;
          kernel(task, scratch.get());
        }
      }
    });
  }

  // Rows outside of windows, such as the padding of gathered groups: zero, and never anything else.
  // `tensor` [B, rows, ..], or with a number of rows per image in front, as of lse, [B, heads, rows].
  void zero_outside(Tensor& tensor, int64_t repeats = 1) const {
    if (windows.outside.empty() || batch == 0) return;
    const int64_t rows = batch * repeats * rows_per_image;
    const int64_t row_bytes = tensor.numel() / rows * int64_t(tensor.element_size());
    char* data = static_cast<char*>(tensor.mutable_data_ptr());
    for (int64_t i = 0; i < batch * repeats; i++, data += rows_per_image * row_bytes) {
      const int64_t p = partitions == 1 ? 0 : i / repeats;
      for (int64_t k = windows.first_outside[p]; k < windows.first_outside[p + 1]; k++)
        std::memset(data + windows.outside[k] * row_bytes, 0, row_bytes);
    }
  }

 private:
  std::vector<int64_t> window_blocks, work;  // first window of a block; work before a task
  int64_t image_blocks, images_per_partition;
};

std::tuple<Tensor, Tensor> forward(const Problem& problem) {
  const Tensor& qkv = problem.qkv;
  std::vector<int64_t> sizes(qkv.sizes().begin(), qkv.sizes().end());
  sizes.back() = problem.channels;
  Tensor out = torch::stable::new_empty(qkv, sizes);
  Tensor lse = torch::stable::new_empty(
      qkv, {problem.batch, problem.num_heads, problem.rows_per_image}, arithmetic_type(qkv));
  problem.zero_outside(out);
  // Never used, but an output must not hold what memory held before.
  problem.zero_outside(lse, problem.num_heads);
  problem.run(kernels().forward, nullptr, [&](WindowTask& task) {
    task.out = out.mutable_data_ptr();
    task.lse = lse.mutable_data_ptr();
  });
  return {out, lse};
}

// grad_table[row, head] = sum over blocks of partial[block, head, row], in the order of blocks.
template <class A>
void reduce(const A* partial, A* grad_table, int64_t blocks, int64_t heads, int64_t rows) {
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; head++)
      for (int64_t row = 0; row < rows; row++) {
        A sum = 0;
        for (int64_t block = 0; block < blocks; block++)
          sum += partial[(block * heads + head) * rows + row];
        grad_table[row * heads + head] = sum;
      }
  });
}

std::tuple<Tensor, Tensor> backward(
    const Problem& problem, const Tensor& grad_out_any, const Tensor& lse_any, bool need_qkv,
    bool need_table) {
  const Tensor& qkv = problem.qkv;
  check_rows(grad_out_any, qkv, problem.channels, "grad_out");
  check_lse(lse_any, qkv, arithmetic_type(qkv), problem.batch, problem.num_heads,
            problem.rows_per_image);
  const Tensor grad_out = torch::stable::contiguous(grad_out_any);
  const Tensor lse = torch::stable::contiguous(lse_any);
  need_table = need_table && problem.table.has_value();
  const std::vector<int64_t> none{0};
  std::vector<int64_t> sizes(qkv.sizes().begin(), qkv.sizes().end());
  Tensor grad_qkv = torch::stable::new_empty(qkv, need_qkv ? sizes : none);
  if (need_qkv) problem.zero_outside(grad_qkv);
  Tensor partial = torch::stable::new_zeros(
      lse,
      need_table ? std::vector<int64_t>{problem.blocks(), problem.num_heads, problem.table_rows}
                 : none);
  problem.run(
      kernels().backward, need_table ? partial.mutable_data_ptr() : nullptr,
      [&](WindowTask& task) {
        task.grad_out = grad_out.const_data_ptr();
        task.lse = lse.mutable_data_ptr();
        task.out = need_qkv ? grad_qkv.mutable_data_ptr() : nullptr;
      });
  if (!need_table) return {grad_qkv, partial};
  Tensor grad_table = torch::stable::new_empty(lse, {problem.table_rows, problem.num_heads});
  if (lse.scalar_type() == ScalarType::Double)
    reduce(partial.const_data_ptr<double>(), grad_table.mutable_data_ptr<double>(),
           problem.blocks(), problem.num_heads, problem.table_rows);
  else
    reduce(partial.const_data_ptr<float>(), grad_table.mutable_data_ptr<float>(),
           problem.blocks(), problem.num_heads, problem.table_rows);
  return {grad_qkv, grad_table};
}

}  // namespace

std::tuple<Tensor, Tensor> block_diagonal_attention(
    const Tensor& qkv, std::optional<Tensor> table, const Tensor& window_id,
    const Tensor& query_row, const Tensor& key_row, int64_t num_heads, double scale) {
  return forward({qkv, table, {std::nullopt, window_id, query_row, key_row}, num_heads, scale});
}

std::tuple<Tensor, Tensor> block_diagonal_attention_backward(
    const Tensor& grad_out, const Tensor& qkv, std::optional<Tensor> table, const Tensor&,
    const Tensor& lse, const Tensor& window_id, const Tensor& query_row, const Tensor& key_row,
    int64_t num_heads, double scale, bool need_qkv, bool need_table) {
  return backward({qkv, table, {std::nullopt, window_id, query_row, key_row}, num_heads, scale},
                  grad_out, lse, need_qkv, need_table);
}

std::tuple<Tensor, Tensor> group_window_attention(
    const Tensor& qkv, std::optional<Tensor> table, const Tensor& token_index,
    const Tensor& window_id, const Tensor& query_row, const Tensor& key_row, int64_t num_heads,
    double scale) {
  return forward({qkv, table, {token_index, window_id, query_row, key_row}, num_heads, scale});
}

std::tuple<Tensor, Tensor> group_window_attention_backward(
    const Tensor& grad_out, const Tensor& qkv, std::optional<Tensor> table, const Tensor&,
    const Tensor& lse, const Tensor& token_index, const Tensor& window_id, const Tensor& query_row,
    const Tensor& key_row, int64_t num_heads, double scale, bool need_qkv, bool need_table) {
  return backward({qkv, table, {token_index, window_id, query_row, key_row}, num_heads, scale},
                  grad_out, lse, need_qkv, need_table);
}

}  // namespace greenmim::cpu

STABLE_TORCH_LIBRARY_IMPL(greenmim, CPU, m) {
  m.impl("block_diagonal_attention", TORCH_BOX(&greenmim::cpu::block_diagonal_attention));
  m.impl("block_diagonal_attention_backward",
         TORCH_BOX(&greenmim::cpu::block_diagonal_attention_backward));
  m.impl("group_window_attention", TORCH_BOX(&greenmim::cpu::group_window_attention));
  m.impl("group_window_attention_backward",
         TORCH_BOX(&greenmim::cpu::group_window_attention_backward));
}
