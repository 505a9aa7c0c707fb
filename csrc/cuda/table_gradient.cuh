// The gradient of the bias table from the blocks' partial sums, added in a fixed order. Launched while
// the kernel before ends, which leaves the sums.
#pragma once

#include "primitives.cuh"

#include <algorithm>

namespace greenmim::cuda {

constexpr int kEntries = 32;  // of the table, that a block adds up
constexpr int kSlices = 8;    // of the sums that a block adds: side by side, and then in order
// The least sums of a run: runs have 64 to 127 of them, or all where there is one run.
constexpr int64_t kRun = 64;

// Where many blocks leave sums they are added in two levels: runs of them, and then the runs. One run:
// a single level.
inline int64_t table_runs(int64_t programs) { return std::max<int64_t>(1, programs / kRun); }

// from [count, heads, rows] -> the sum of every run of them: to [runs, heads, rows] in float64, or, as
// the gradient, [rows, heads] in float32 of the only run.
template <class From, class To>
__global__ void __launch_bounds__(kEntries* kSlices) table_gradient_kernel(
    const From* from, To* to, int64_t count, int runs, int heads, int rows) {
  using Sums = double[kSlices][kEntries];
  STATIC_SHARED(Sums, sums);
  const int column = int(threadIdx.x) % kEntries, slice = int(threadIdx.x) / kEntries;
  const int64_t entries = int64_t(heads) * rows;
  const int64_t run = blockIdx.x % runs;
  const int64_t entry = blockIdx.x / runs * kEntries + column;
  const int64_t first = count * run / runs, last = count * (run + 1) / runs;
  allow_next_kernel();
  wait_for_last_kernel();
  double sum = 0;
  if (entry < entries)
    for (int64_t i = first + slice; i < last; i += kSlices)
      sum += double(from[i * entries + entry]);
  sums[slice][column] = sum;
  __syncthreads();
  if (slice != 0 || entry >= entries) return;
  for (int i = 1; i < kSlices; ++i) sum += sums[i][column];
  to[runs > 1 ? run * entries + entry : entry % rows * heads + entry / rows] = To(sum);
}

// partial [programs, heads, rows] -> gradient [rows, heads]; `sums` is memory for table_runs(programs)
// times heads x rows, or null where that is one run.
inline void run_table_gradient(
    const float* partial, double* sums, float* gradient, int64_t programs, int heads, int rows,
    cudaStream_t stream) {
  const int runs = int(table_runs(programs));
  const auto blocks = unsigned((int64_t(heads) * rows + kEntries - 1) / kEntries);
  const int threads = kEntries * kSlices;
  if (runs == 1) {
    launch_early(table_gradient_kernel<float, float>, blocks, threads, stream, partial, gradient,
                 programs, 1, heads, rows);
    return;
  }
  launch_early(table_gradient_kernel<float, double>, blocks * runs, threads, stream, partial, sums,
               programs, runs, heads, rows);
  launch_early(table_gradient_kernel<double, float>, blocks, threads, stream, sums, gradient, runs, 1,
               heads, rows);
}

}  // namespace greenmim::cuda
