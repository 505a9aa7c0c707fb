// group_gather and group_scatter for CPU tensors: copies of whole rows, of any element type.
#include "../checks.h"
#include "../library.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace greenmim::cpu {

namespace {

constexpr int64_t kBytesPerThread = 1 << 15;

int64_t row_bytes_of(const Tensor& x) {
  const int64_t channels = x.size(x.dim() - 1), element = int64_t(x.element_size());
  STD_TORCH_CHECK(channels <= INT64_MAX / element, "x has rows of ", channels, " elements");
  return channels * element;
}

// The kernel trusts the partition with raw memory, so look at it once: rows within the image, and as
// many of them as the image has tokens, so that a scatter leaves no row unwritten.
void check_token_index(const int32_t* index, int64_t partitions, int64_t slots, int64_t num_tokens) {
  std::vector<char> seen(partitions == 0 ? 0 : num_tokens);
  for (int64_t p = 0; p < partitions; p++) {
    std::fill(seen.begin(), seen.end(), 0);
    int64_t found = 0;
    for (int64_t s = 0; s < slots; s++) {
      const int32_t row = index[p * slots + s];
      if (row < 0) continue;
      STD_TORCH_CHECK(
          row < num_tokens && !seen[row], "token_index names token ", row, " ",
          row < num_tokens ? "twice" : "which the image does not have");
      seen[row] = 1;
      found++;
    }
    STD_TORCH_CHECK(
        found == num_tokens, "token_index holds ", found, " tokens, the image ", num_tokens);
  }
}

// Calls copy(row of the tokens, row of the slots, or -1 for padding) for every slot, in parallel.
template <class Copy>
void for_each_slot(
    const Tensor& token_index, int64_t batch, int64_t num_tokens, int64_t row_bytes, Copy copy) {
  const int64_t partitions = token_index.size(0);
  const int64_t slots = token_index.size(1) * token_index.size(2);
  const int32_t* index = token_index.const_data_ptr<int32_t>();
  check_token_index(index, partitions, slots, num_tokens);
  if (row_bytes == 0) return;  // there is no memory to point to
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, batch * slots, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t image = i / slots;
      const int32_t row = index[(partitions == 1 ? 0 : image * slots) + i % slots];
      copy(row < 0 ? -1 : image * num_tokens + row, i);
    }
  });
}

}  // namespace

Tensor group_gather(const Tensor& x_any, const Tensor& token_index_any) {
  check_gather(x_any, token_index_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor token_index = torch::stable::contiguous(token_index_any);
  const int64_t row_bytes = row_bytes_of(x);
  Tensor out = torch::stable::new_empty(
      x, {x.size(0), token_index.size(1), token_index.size(2), x.size(2)});
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for_each_slot(token_index, x.size(0), x.size(1), row_bytes, [&](int64_t row, int64_t slot) {
    if (row < 0)
      std::memset(to + slot * row_bytes, 0, row_bytes);
    else
      std::memcpy(to + slot * row_bytes, from + row * row_bytes, row_bytes);
  });
  return out;
}

Tensor group_scatter(const Tensor& x_any, const Tensor& token_index_any, int64_t num_tokens) {
  check_scatter(x_any, token_index_any, num_tokens);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor token_index = torch::stable::contiguous(token_index_any);
  const int64_t row_bytes = row_bytes_of(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), num_tokens, x.size(3)});
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for_each_slot(token_index, x.size(0), num_tokens, row_bytes, [&](int64_t row, int64_t slot) {
    if (row >= 0) std::memcpy(to + row * row_bytes, from + slot * row_bytes, row_bytes);
  });
  return out;
}

}  // namespace greenmim::cpu

GREENMIM_LIBRARY_IMPL(CPU, m) {
  m.impl("group_gather", TORCH_BOX(&greenmim::cpu::group_gather));
  m.impl("group_scatter", TORCH_BOX(&greenmim::cpu::group_scatter));
}
