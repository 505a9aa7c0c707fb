// The gradient of the bias table from the blocks' partial sums, added in a fixed order.
#pragma once

#include "primitives.cuh"

namespace greenmim::cuda {

constexpr int kEntries = 32;  // of the table, that a block adds up
constexpr int kSlices = 8;    // runs of programs, added side by side and then in order

// partial [programs, heads, rows] -> gradient [rows, heads].
__global__ void __launch_bounds__(kEntries* kSlices) table_gradient_kernel(
    const float* partial, float* gradient, int64_t programs, int heads, int rows) {
  using Sums = double[kSlices][kEntries];
  STATIC_SHARED(Sums, sums);
  const int column = int(threadIdx.x) % kEntries, slice = int(threadIdx.x) / kEntries;
  const int64_t entries = int64_t(heads) * rows;
  const int64_t entry = int64_t(blockIdx.x) * kEntries + column;
  double sum = 0;
  if (entry < entries)
    for (int64_t program = slice; program < programs; program += kSlices)
      sum += double(partial[program * entries + entry]);
  sums[slice][column] = sum;
  __syncthreads();
  if (slice != 0 || entry >= entries) return;
  for (int i = 1; i < kSlices; ++i) sum += sums[i][column];
  gradient[entry % rows * heads + entry / rows] = float(sum);
}

inline void run_table_gradient(
    const float* partial, float* gradient, int64_t programs, int heads, int rows,
    cudaStream_t stream) {
  const int64_t entries = int64_t(heads) * rows;
  launch(table_gradient_kernel, unsigned((entries + kEntries - 1) / kEntries), kEntries * kSlices,
         0, stream, partial, gradient, programs, heads, rows);
}

}  // namespace greenmim::cuda
