// Copies of whole rows in the widest accesses that row length and alignment allow. Bound by memory:
// every element is read once and written once.
#pragma once

#include "primitives.cuh"

#include <algorithm>

namespace greenmim::cuda {

constexpr int kCopyThreads = 256;
// Blocks beyond this wait for a free place anyway; the loops below take the rest.
constexpr int64_t kMostCopyBlocks = 1 << 16;

// A copy between tokens [batch, tokens, row_units] and slots [batch, slots, row_units].
struct RowCopy {
  const void* from;
  void* to;
  const int* token_index;  // [P, slots]
  int64_t batch, slots, tokens;
  int row_units;
  int lanes;               // threads that share a row: a power of two
  bool per_image;          // P = batch instead of 1
};

// kGather: tokens into slots, zeros in padding; otherwise slots back into tokens. Every token is in
// one slot, so each row is written once.
template <class Unit, bool kGather>
__global__ void __launch_bounds__(kCopyThreads) row_copy_kernel(const RowCopy c) {
  const int lane = int(threadIdx.x) % c.lanes;
  const int64_t rows_per_block = kCopyThreads / c.lanes;
  const int64_t stride = int64_t(gridDim.x) * rows_per_block;
  for (int64_t row = blockIdx.x * rows_per_block + int(threadIdx.x) / c.lanes;
       row < c.batch * c.slots; row += stride) {
    const int64_t image = row / c.slots;
    const int token = c.token_index[c.per_image ? row : row - image * c.slots];
    const int64_t slot_row = row * c.row_units;
    const int64_t token_row = (image * c.tokens + token) * c.row_units;
    const Unit* from = static_cast<const Unit*>(c.from) + (kGather ? token_row : slot_row);
    Unit* to = static_cast<Unit*>(c.to) + (kGather ? slot_row : token_row);
    if (token >= 0)
      for (int i = lane; i < c.row_units; i += c.lanes) to[i] = from[i];
    else if (kGather)
      for (int i = lane; i < c.row_units; i += c.lanes) to[i] = Unit{};
  }
}

template <class Unit>
void copy_rows_of(RowCopy c, bool gather, int64_t row_bytes, cudaStream_t stream) {
  c.row_units = int(row_bytes / int64_t(sizeof(Unit)));
  c.lanes = 1;
  while (c.lanes < c.row_units && c.lanes < 32) c.lanes *= 2;
  const int64_t rows_per_block = kCopyThreads / c.lanes;
  const int64_t blocks = (c.batch * c.slots + rows_per_block - 1) / rows_per_block;
  launch(gather ? row_copy_kernel<Unit, true> : row_copy_kernel<Unit, false>,
         unsigned(std::min(blocks, kMostCopyBlocks)), kCopyThreads, 0, stream, c);
}

// Rows of `row_bytes`, a multiple of 2.
inline void copy_rows(const RowCopy& c, bool gather, int64_t row_bytes, cudaStream_t stream) {
  const uint64_t alignment =
      reinterpret_cast<uintptr_t>(c.from) | reinterpret_cast<uintptr_t>(c.to) | uint64_t(row_bytes);
  if (alignment % 16 == 0)
    copy_rows_of<uint4>(c, gather, row_bytes, stream);
  else if (alignment % 4 == 0)
    copy_rows_of<uint32_t>(c, gather, row_bytes, stream);
  else
    copy_rows_of<uint16_t>(c, gather, row_bytes, stream);
}

}  // namespace greenmim::cuda
