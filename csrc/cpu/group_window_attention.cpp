// block_diagonal_attention and group_window_attention for CPU tensors: exact work per window.
//
// The two operators differ only in where a token's row lies: in the row-major order of the visible
// tokens, or in its slot of the gathered groups. A task is one head, a few windows and, where one
// mask serves the batch, a few images. How tasks are cut depends on the problem alone, and the sums
// of the tasks for the bias table are added in a fixed order, so the result does not depend on the
// number of threads.
#include "../checks.h"
#include "../library.h"
#include "capability.h"
#include "storage.h"
#include "windows.h"

#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

namespace greenmim::cpu {

namespace {

// Enough tasks to balance many threads. No more: a bias tile of up to 64 tokens is made, and its
// gradient added to the table, once per task, so that a task should hold as many images of a window as
// it can. The number does not depend on the threads, so that the sums do not either.
constexpr int64_t kTasks = 128;
// Multiply-adds worth a thread of its own.
constexpr int64_t kWorkPerThread = 1 << 15;

struct Deleter {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

struct Problem {
  QueryKeyValue x;
  std::optional<Tensor> table, pad_value;
  AttentionShape shape;
  double scale;
  bool grouped;
  int64_t column_rows;  // of the table as kernels read it
  Windows windows;

  Problem(
      QueryKeyValue any, const std::optional<Tensor>& table_any,
      const std::optional<Tensor>& pad_any, PartitionTensors part, int64_t heads, double factor)
      : x(std::move(any)), scale(factor), grouped(!part.token_index) {
    // Before anything is copied: a view of one element may say that it has billions.
    shape = check_attention(x, table_any, arithmetic_type(x.q), pad_any, part, heads);
    constexpr int64_t kMost = INT32_MAX;  // kernels count rows, slots and channels in 32 bits
    STD_TORCH_CHECK(
        shape.rows < kMost && shape.groups * shape.slots < kMost && 3 * shape.channels < kMost,
        "an image must have fewer than 2^31 tokens and slots, and a token fewer values");
    x.q = x.is_packed() ? torch::stable::contiguous(x.q) : with_rows(x.q);
    for (std::optional<Tensor>* one : {&x.k, &x.v})
      if (*one) *one = with_rows(**one);
    if (table_any) table = torch::stable::contiguous(*table_any);
    if (pad_any) pad_value = torch::stable::contiguous(*pad_any);
    if (part.token_index) part.token_index = torch::stable::contiguous(*part.token_index);
    for (Tensor* indices : {&part.window_id, &part.query_row, &part.key_row})
      *indices = torch::stable::contiguous(*indices);
    windows = find_windows(
        {part.token_index ? part.token_index->const_data_ptr<int32_t>() : nullptr,
         part.window_id.const_data_ptr<int32_t>(), part.query_row.const_data_ptr<int32_t>(),
         part.key_row.const_data_ptr<int32_t>(), shape.partitions, shape.groups, shape.slots},
        shape.rows, shape.table_rows);
    if (!pad_value) zeros.assign(size_t(3 * shape.channels * x.q.element_size()), 0);
    column_rows = shape.table_rows + kPiece;
    if (table && table->scalar_type() == ScalarType::Double)
      make_columns(table->const_data_ptr<double>());
    else if (table)
      make_columns(table->const_data_ptr<float>());
    cut();
  }

  // The sizes of the output.
  std::vector<int64_t> sizes() const {
    if (grouped) return {shape.batch, shape.groups, shape.slots, shape.channels};
    return {shape.batch, shape.rows, shape.channels};
  }

  // Blocks of windows times blocks of images; every head of such a block is a task.
  void cut() {
    const int64_t wanted = std::max<int64_t>(1, kTasks / shape.heads);
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
    const int64_t images = shape.partitions == 1 ? shape.batch : 1;
    image_blocks = std::clamp<int64_t>((wanted + blocks - 1) / std::max<int64_t>(1, blocks), 1,
                                       std::max<int64_t>(1, images));
    images_per_partition = images;
    work.assign(1, 0);
    for (int64_t i = 0; i < blocks; i++) {
      int64_t pairs = 0;
      for (int64_t w = window_blocks[i]; w < window_blocks[i + 1]; w++)
        pairs += int64_t(windows.list[w].size) * (windows.list[w].size + 8);
      for (int64_t b = 0; b < image_blocks * shape.heads; b++)
        work.push_back(
            work.back() + std::max<int64_t>(1, pairs * shape.head_dim * images / image_blocks));
    }
  }

  int64_t blocks() const { return (int64_t(window_blocks.size()) - 1) * image_blocks; }

  // Runs `kernel` for every window, head and image. `grad_table` [blocks, heads, column_rows] and
  // `grad_pad` [blocks, heads, 2 head_dim], or null.
  template <class Configure>
  void run(
      void (*kernel)(const WindowTask&, void*), void* grad_table, void* grad_pad,
      Configure configure) const {
    if (windows.list.empty() || shape.batch == 0) return;
    const StorageType storage = storage_type(x.q);
    const int64_t element = storage == StorageType::Float64 ? 8 : 4, heads = shape.heads;
    const int64_t stored = int64_t(x.q.element_size());
    const auto* pad =
        pad_value ? static_cast<const char*>(pad_value->const_data_ptr()) : zeros.data();
    const int64_t scratch_bytes =
        kernels().scratch_bytes(storage, windows.largest, shape.head_dim);
    // A thread takes the tasks that start in its share of the work.
    torch::stable::parallel_for(0, work.back(), kWorkPerThread, [&](int64_t begin, int64_t end) {
      const int64_t first = std::lower_bound(work.begin(), work.end() - 1, begin) - work.begin();
      const int64_t last = std::lower_bound(work.begin(), work.end() - 1, end) - work.begin();
      if (first == last) return;
      std::unique_ptr<void, Deleter> scratch(
          ::operator new(scratch_bytes, std::align_val_t(64), std::nothrow));
      STD_TORCH_CHECK(
          scratch != nullptr, "no memory for ", scratch_bytes, " bytes of scratch: windows have up to ",
          windows.largest, " slots");
      for (int64_t i = first; i < last; i++) {
        const int64_t block = i / heads, head = i % heads;
        const int64_t window_block = block / image_blocks, image_block = block % image_blocks;
        WindowTask task{};
        task.storage = storage;
        task.q = rows_of(x, 0), task.k = rows_of(x, 1), task.v = rows_of(x, 2);
        if (table) task.table = columns.data() + head * column_rows * element;
        if (grad_table != nullptr)
          task.grad_table = static_cast<char*>(grad_table) + i * column_rows * element;
        if (grad_pad != nullptr)
          task.grad_pad = static_cast<char*>(grad_pad) + i * 2 * shape.head_dim * element;
        task.pad_k = pad + (shape.channels + head * shape.head_dim) * stored;
        task.pad_v = pad + (2 * shape.channels + head * shape.head_dim) * stored;
        task.head = int32_t(head);
        task.num_heads = int32_t(heads);
        task.head_dim = int32_t(shape.head_dim);
        task.rows_per_image = shape.rows;
        task.scale = scale;
        configure(task);
        for (int64_t w = window_blocks[window_block]; w < window_blocks[window_block + 1]; w++) {
          const Window& window = windows.list[w];
          task.rows = windows.rows.data() + window.start;
          task.query_place = windows.query_place.data() + window.start;
          task.key_place = windows.key_place.data() + window.start;
          task.runs = window.num_runs > 0 ? windows.runs.data() + window.first_run : nullptr;
          task.num_runs = window.num_runs;
          task.size = window.size;
          task.tokens = window.tokens;
          task.first_image =
              window.partition + images_per_partition * image_block / image_blocks;
          task.last_image =
              window.partition + images_per_partition * (image_block + 1) / image_blocks;
          kernel(task, scratch.get());
        }
      }
    });
  }

  Rows rows_of(const QueryKeyValue& tensors, int which) const {
    const Strides s = strides_of(tensors, which, shape);
    char* data = static_cast<char*>(const_cast<void*>(s.tensor->const_data_ptr()));
    return {data + s.first * int64_t(s.tensor->element_size()), s.image, s.row, s.head};
  }

  // Rows outside of windows, such as the padding of gathered groups: zero, and never anything else.
  // Of the three of `tensors`; of a tensor [B, rows, ..]; or, repeated in every image, of lse [B, heads,
  // rows].
  void zero_outside(const QueryKeyValue& tensors) const {
    for (int which = 0; which < 3; which++) {
      const Rows rows = rows_of(tensors, which);
      const int64_t element = int64_t(tensors.q.element_size());
      const bool dense = rows.head == shape.head_dim;
      const int64_t pieces = dense ? 1 : shape.heads;
      const int64_t bytes = (dense ? shape.channels : shape.head_dim) * element;
      for_each_outside([&](int64_t b, int64_t row) {
        char* first = static_cast<char*>(rows.data) + (b * rows.image + row * rows.row) * element;
        for (int64_t i = 0; i < pieces; i++)
          std::memset(first + i * rows.head * element, 0, bytes);
      });
    }
  }
  void zero_outside(Tensor& tensor, int64_t repeats = 1) const {
    const int64_t all = std::max<int64_t>(1, shape.batch * repeats * shape.rows);
    const int64_t row_bytes = tensor.numel() / all * int64_t(tensor.element_size());
    char* data = static_cast<char*>(tensor.mutable_data_ptr());
    for_each_outside([&](int64_t b, int64_t row) {
      for (int64_t i = 0; i < repeats; i++)
        std::memset(data + ((b * repeats + i) * shape.rows + row) * row_bytes, 0, row_bytes);
    });
  }

 private:
  template <class Call>
  void for_each_outside(Call call) const {
    if (windows.outside.empty()) return;
    for (int64_t b = 0; b < shape.batch; b++) {
      const int64_t p = shape.partitions == 1 ? 0 : b;
      for (int64_t i = windows.first_outside[p]; i < windows.first_outside[p + 1]; i++)
        call(b, windows.outside[i]);
    }
  }

  // columns[head, row] = table[last - row, head], and kPiece rows to be read beyond it.
  template <class A>
  void make_columns(const A* from) {
    columns.assign(size_t(shape.heads * column_rows) * sizeof(A), 0);
    A* to = reinterpret_cast<A*>(columns.data());
    for (int64_t row = 0; row < shape.table_rows; row++)
      for (int64_t head = 0; head < shape.heads; head++)
        to[head * column_rows + shape.table_rows - 1 - row] = from[row * shape.heads + head];
  }

  std::vector<char> columns;  // the table as kernels read it
  std::vector<char> zeros;    // in the place of pad_value
  std::vector<int64_t> window_blocks, work;  // first window of a block; work before a task
  int64_t image_blocks, images_per_partition;
};

std::tuple<Tensor, Tensor> forward(const Problem& problem) {
  const Tensor& q = problem.x.q;
  const AttentionShape& shape = problem.shape;
  Tensor out = torch::stable::new_empty(q, problem.sizes());
  Tensor lse = torch::stable::new_empty(
      q, {shape.batch, shape.heads, shape.rows}, arithmetic_type(q));
  problem.zero_outside(out);
  // Never used, but an output must not hold what memory held before.
  problem.zero_outside(lse, shape.heads);
  void *out_data = out.mutable_data_ptr(), *lse_data = lse.mutable_data_ptr();
  problem.run(kernels().forward, nullptr, nullptr, [&](WindowTask& task) {
    task.out = out_data;
    task.lse = lse_data;
  });
  return {out, lse};
}

// sums[row, head] = sum over blocks of partial[block, head, row], in the order of blocks; or, of columns
// as kernels read them, partial[block, head, rows - 1 - row].
template <class A>
void reduce(const Tensor& partial, int64_t rows, bool last_first, A* sums) {
  const int64_t blocks = partial.size(0), heads = partial.size(1), stride = partial.size(2);
  const A* from = partial.const_data_ptr<A>();
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> column(rows);
    for (int64_t head = begin; head < end; head++) {
      std::fill(column.begin(), column.end(), A(0));
      for (int64_t block = 0; block < blocks; block++)
        for (int64_t row = 0; row < rows; row++)
          column[row] += from[(block * heads + head) * stride + row];
      for (int64_t row = 0; row < rows; row++)
        sums[row * heads + head] = column[last_first ? rows - 1 - row : row];
    }
  });
}

Tensor reduced(const Tensor& partial, int64_t rows, bool last_first) {
  Tensor sums = torch::stable::new_empty(partial, {rows, partial.size(1)});
  if (partial.scalar_type() == ScalarType::Double)
    reduce(partial, rows, last_first, sums.mutable_data_ptr<double>());
  else
    reduce(partial, rows, last_first, sums.mutable_data_ptr<float>());
  return sums;
}

struct Gradients {
  QueryKeyValue x;
  Tensor table, pad;
};

Gradients backward(
    const Problem& problem, const Tensor& grad_out_any, const Tensor& lse_any, bool need_qkv,
    bool need_table, bool need_pad) {
  const QueryKeyValue& x = problem.x;
  const AttentionShape& shape = problem.shape;
  check_rows(grad_out_any, x, shape, problem.grouped, "grad_out");
  check_lse(lse_any, x.q, arithmetic_type(x.q), shape.batch, shape.heads, shape.rows);
  const Tensor grad_out = torch::stable::contiguous(grad_out_any);
  const Tensor lse = torch::stable::contiguous(lse_any);
  need_table = need_table && problem.table.has_value();
  need_pad = need_pad && problem.pad_value.has_value();
  const std::vector<int64_t> none{0};
  const auto like = [&](const Tensor& tensor) {
    return need_qkv ? torch::stable::empty_like(tensor) : torch::stable::new_empty(tensor, none);
  };
  Gradients grads{{like(x.q), std::nullopt, std::nullopt}, none_like(lse), none_like(lse)};
  if (!x.is_packed()) grads.x.k = like(*x.k), grads.x.v = like(*x.v);
  if (need_qkv) problem.zero_outside(grads.x);
  const auto partial = [&](bool needed, int64_t rows) {
    return torch::stable::new_zeros(
        lse, needed ? std::vector<int64_t>{problem.blocks(), shape.heads, rows} : none);
  };
  Tensor table = partial(need_table, problem.column_rows);
  Tensor pad = partial(need_pad, 2 * shape.head_dim);
  // Read only: asked for as mutable, a copy-on-write tensor would be copied, which no thread may do.
  void* lse_data = const_cast<void*>(lse.const_data_ptr());
  problem.run(
      kernels().backward, need_table ? table.mutable_data_ptr() : nullptr,
      need_pad ? pad.mutable_data_ptr() : nullptr, [&](WindowTask& task) {
        task.grad_out = grad_out.const_data_ptr();
        task.lse = lse_data;
        if (!need_qkv) return;
        task.grad_q = problem.rows_of(grads.x, 0);
        task.grad_k = problem.rows_of(grads.x, 1);
        task.grad_v = problem.rows_of(grads.x, 2);
      });
  if (need_table) grads.table = reduced(table, shape.table_rows, true);
  if (need_pad) grads.pad = reduced(pad, 2 * shape.head_dim, false);
  return grads;
}

}  // namespace

std::tuple<Tensor, Tensor> block_diagonal_attention(
    const Tensor& qkv, std::optional<Tensor> table, const Tensor& window_id,
    const Tensor& query_row, const Tensor& key_row, int64_t num_heads, int64_t, double scale) {
  return forward(
      {{qkv, {}, {}}, table, {}, {{}, window_id, query_row, key_row}, num_heads, scale});
}

std::tuple<Tensor, Tensor> block_diagonal_attention_backward(
    const Tensor& grad_out, const Tensor& qkv, std::optional<Tensor> table, const Tensor&,
    const Tensor& lse, const Tensor& window_id, const Tensor& query_row, const Tensor& key_row,
    int64_t num_heads, int64_t, double scale, bool need_qkv, bool need_table) {
  const Gradients grads = backward(
      {{qkv, {}, {}}, table, {}, {{}, window_id, query_row, key_row}, num_heads, scale}, grad_out,
      lse, need_qkv, need_table, false);
  return {grads.x.q, grads.table};
}

std::tuple<Tensor, Tensor> group_window_attention(
    const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> v, std::optional<Tensor> table,
    std::optional<Tensor> pad_value, const Tensor& token_index, const Tensor& window_id,
    const Tensor& query_row, const Tensor& key_row, int64_t num_heads, int64_t, double scale) {
  return forward({{q, k, v}, table, pad_value, {token_index, window_id, query_row, key_row},
                  num_heads, scale});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_window_attention_backward(
    const Tensor& grad_out, const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> v,
    std::optional<Tensor> table, std::optional<Tensor> pad_value, const Tensor&, const Tensor& lse,
    const Tensor& token_index, const Tensor& window_id, const Tensor& query_row,
    const Tensor& key_row, int64_t num_heads, int64_t, double scale, bool need_qkv, bool need_table,
    bool need_pad) {
  const Gradients grads = backward(
      {{q, k, v}, table, pad_value, {token_index, window_id, query_row, key_row}, num_heads, scale},
      grad_out, lse, need_qkv, need_table, need_pad);
  return {grads.x.q, grads.x.k.value_or(none_like(q)), grads.x.v.value_or(none_like(q)),
          grads.table, grads.pad};
}

}  // namespace greenmim::cpu

GREENMIM_LIBRARY_IMPL(CPU, m) {
  m.impl("block_diagonal_attention", TORCH_BOX(&greenmim::cpu::block_diagonal_attention));
  m.impl("block_diagonal_attention_backward",
         TORCH_BOX(&greenmim::cpu::block_diagonal_attention_backward));
  m.impl("group_window_attention", TORCH_BOX(&greenmim::cpu::group_window_attention));
  m.impl("group_window_attention_backward",
         TORCH_BOX(&greenmim::cpu::group_window_attention_backward));
}
