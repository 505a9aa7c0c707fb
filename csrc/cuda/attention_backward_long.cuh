// Backward attention of groups of any length. A block owns up to four strips of a group and goes
// over the rest of it in pieces, for every image in four kinds of step:
//
//   OwnQueries  the block's q, grad_out and out: left operands, and delta = sum of grad_out * out
//   Keys        a piece of k and v: gradients of q and of the bias
//   OwnKeys     the block's k and v: left operands
//   Queries     a piece of q, grad_out and out: gradients of k and v
//
// No sum crosses warps. The bias gradient of a warp's strip is kept in shared memory over all
// images, each element with the lane that computes it.
#pragma once

#include "slots.cuh"

namespace greenmim::cuda {

template <class T, int D>
struct LongBackwardMemory {
  static constexpr int kStages = 2;
  static constexpr int kTiles = 3;

  int tile, rows;
  int gradient_stride;
  T* stages;        // [kStages][kTiles][rows][kStride]; at the end the warps' copies of the table
  float* lse;       // [kStages][rows]
  T* staging;       // [strips][16][kStride]
  T* kept;          // [2][strips][Products::kKept]
  float* gradient;  // [strips][16][gradient_stride], or nothing
  Slots slots;
  Band* bands;
  size_t bytes;

  __host__ __device__ LongBackwardMemory(char* start, const Attention& a)
      : LongBackwardMemory(Carver{start}, a) {}

  __device__ T* at(int stage, int which, int strip = 0) const {
    return stages + (stage * kTiles + which) * tile + strip * kStrip * kStride<T, D>;
  }

 private:
  __host__ __device__ LongBackwardMemory(Carver carver, const Attention& a)
      : tile(a.strips * kStrip * kStride<T, D>),
        rows(a.strips * kStrip),
        gradient_stride(a.strips_of_strip() * kStrip + 8),
        stages(carver.take<T>(std::max<int64_t>(
            int64_t(kStages) * kTiles * tile,
            (int64_t(a.strips) * a.table_rows() * 4 + int64_t(sizeof(T)) - 1) / int64_t(sizeof(T))))),
        lse(carver.take<float>(kStages * rows)),
        staging(carver.take<T>(tile)),
        kept(carver.take<T>(2 * a.strips * Products<T, D>::kKept)),
        gradient(carver.take<float>(a.partial == nullptr ? 0 : int64_t(rows) * gradient_stride)),
        slots(carver, a),
        bands(carver.take<Band>(kMostStrips)),
        bytes(carver.bytes) {}
};

// Sums of grad_out * out for the rows of a strip, two lanes a row; then `of` gives any row's.
template <class T, int D>
struct RowDelta {
  float value;

  __device__ __forceinline__ RowDelta(const T* grad_out, const T* out) {
    const int offset = lane_index() / 2 * kStride<T, D> + lane_index() % 2 * (D / 2);
    value = dot<T, D / 2>(grad_out + offset, out + offset);
    value += __shfl_xor_sync(0xFFFFFFFF, value, 1);
  }
  __device__ __forceinline__ float of(int row) const {
    return __shfl_sync(0xFFFFFFFF, value, 2 * row);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(32 * kMostStrips, 1)
    attention_backward_long_kernel(const Attention a) {
  using P = Products<T, D>;
  using Memory = LongBackwardMemory<T, D>;
  DYNAMIC_SHARED(shared);
  const Memory memory(shared, a);
  const Place place(a);
  const int warp = int(threadIdx.x) / 32, lane = lane_index(), g = lane / 4, q = lane % 4;
  const int channels = a.heads * D, centre = table_centre(a);
  const int first_own = place.own - place.base, strip = first_own + warp;
  const float* table = memory.slots.table;
  const int2* cell = memory.slots.cell;
  constexpr float kLog2E = 1.4426950408889634f;

  memory.slots.read_partition(a, place);
  __syncthreads();
  const Band band = band_of(memory.slots, place, strip, a.reach());
  const Band whole = union_of(band, memory.bands);
  const bool empty = cell[first_own * kStrip].x < 0;
  if (empty && (a.token_index != nullptr || a.grad_qkv == nullptr)) {
    if (a.partial != nullptr)
      for (int i = int(threadIdx.x); i < a.table_rows(); i += int(blockDim.x))
        a.partial[int64_t(blockIdx.x) * a.table_rows() + i] = 0;
    return;
  }
  const int pieces = (whole.last - whole.first + a.strips - 1) / a.strips;
  const int own_keys = 1 + pieces;  // the number of the step OwnKeys
  const int steps = a.grad_qkv == nullptr ? own_keys : 2 * own_keys;
  const int2 upper = cell[strip * kStrip + g], lower = cell[strip * kStrip + g + 8];
  float* gradient = memory.gradient + warp * kStrip * memory.gradient_stride;
  if (a.partial != nullptr)
    for (int i = lane; i < kStrip * memory.gradient_stride; i += 32) gradient[i] = 0;
  __syncwarp();

  struct Cursor {
    int64_t image;
    int step;
  };
  const auto advance = [&](Cursor& cursor) {
    if (++cursor.step == steps) {
      cursor.step = 0;
      ++cursor.image;
    }
  };
  const auto start_load = [&](int stage, const Cursor& cursor) {
    if (cursor.image < place.last_image) {
      const int64_t first_row = cursor.image * a.rows;
      const T* qkv = static_cast<const T*>(a.qkv) + first_row * (3 * channels) + place.head * D;
      const bool queries = cursor.step == 0 || cursor.step > own_keys;
      const bool own = cursor.step == 0 || cursor.step == own_keys;
      const int piece = (cursor.step < own_keys ? cursor.step : cursor.step - own_keys) - 1;
      const int first = own ? first_own : whole.first + piece * a.strips;
      const int* row = memory.slots.row + first * kStrip;
      if (queries) {
        const int64_t offset = first_row * channels + place.head * D;
        load_tiles<T, D>(memory.at(stage, 0), qkv, 3 * channels, row);
        load_tiles<T, D>(
            memory.at(stage, 1), static_cast<const T*>(a.grad_out) + offset, channels, row);
        load_tiles<T, D>(
            memory.at(stage, 2), static_cast<const T*>(a.out) + offset, channels, row);
        load_numbers(memory.lse + stage * memory.rows,
                     a.lse + (cursor.image * a.heads + place.head) * a.rows, row);
      } else {
        load_tiles<T, D, 2>(
            memory.at(stage, 0), qkv + channels, 3 * channels, row, memory.tile, channels);
      }
    }
    copy_async_commit();
  };

  const float scale = a.scale * kLog2E;
  T* staging = memory.staging + warp * kStrip * kStride<T, D>;
  typename P::Left first_left, second_left;  // q and grad_out, then k and v
  Wide<D> first_grad, second_grad;           // of q; then of k and of v
  float own_lse[2] = {0, 0}, own_delta[2] = {0, 0};

  Cursor now{place.first_image, 0}, next = now;
  start_load(0, next);
  advance(next);
  memory.slots.read_table(a, place);  // while the first strips are on their way
  int stage = 0;
  for (; now.image < place.last_image; advance(now), stage ^= 1) {
    copy_async_wait<0>();
    // Also: no warp still works on the stage that is filled next.
    __syncthreads();
    start_load(stage ^ 1, next);
    advance(next);
    T* grad_qkv =
        static_cast<T*>(a.grad_qkv) + now.image * a.rows * (3 * channels) + place.head * D;
    const auto store = [&](const Wide<D>& x, float factor, int which) {
      store_strip<T, D>(x, factor, factor, staging, grad_qkv + which * channels, 3 * channels, a,
                        place, strip, memory.slots.row);
    };
    if (now.step == 0 || now.step == own_keys) {
      T* kept = memory.kept + 2 * warp * P::kKept;
      first_left.load(memory.at(stage, 0, warp), kept);
      second_left.load(memory.at(stage, 1, warp), kept + P::kKept);
      clear<D>(first_grad);
      if (now.step == 0) {
        const RowDelta<T, D> delta(memory.at(stage, 1, warp), memory.at(stage, 2, warp));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          own_delta[half] = delta.of(g + 8 * half);
          own_lse[half] =
              memory.lse[stage * memory.rows + warp * kStrip + g + 8 * half] * kLog2E;
        }
      } else {
        clear<D>(second_grad);
      }
      if (pieces == 0 && a.grad_qkv != nullptr) {  // padding only: zeros
        store(first_grad, 0, now.step == 0 ? 0 : 1);
        if (now.step != 0) store(first_grad, 0, 2);
      }
      continue;
    }
    const bool as_queries = now.step < own_keys;
    const int piece = now.step - (as_queries ? 1 : own_keys + 1);
    const int first = whole.first + piece * a.strips;
    for (int j = 0; j < a.strips; ++j) {
      if (!band.holds(first + j)) continue;
      const T* first_right = memory.at(stage, 0, j);  // k, or q
      const T* second_right = memory.at(stage, 1, j);  // v, or grad_out
      const int2* other = cell + (first + j) * kStrip;
      Square p, dp;
      clear(p);
      P::scores(p, first_left, first_right);
      clear(dp);
      P::scores(dp, second_left, second_right);
      if (as_queries) {
        float* into = gradient + (first + j - band.first) * kStrip;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              const float bias = bias_of(
                  half == 0 ? upper : lower, other[8 * n + 2 * q + e % 2], table, centre);
              p[n][e] = exp2_fast(fmaf(p[n][e], scale, bias) - own_lse[half]);
              dp[n][e] = p[n][e] * (dp[n][e] - own_delta[half]);
            }
            if (a.partial != nullptr) {
              float2* two = reinterpret_cast<float2*>(
                  into + (g + 8 * half) * memory.gradient_stride + 8 * n + 2 * q);
              *two = float2{two->x + dp[n][2 * half], two->y + dp[n][2 * half + 1]};
            }
          }
        if (a.grad_qkv != nullptr) P::apply(first_grad, dp, first_right);
      } else {
        const RowDelta<T, D> delta(second_right, memory.at(stage, 2, j));
        const float* lse = memory.lse + stage * memory.rows + j * kStrip;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            const int query = 8 * n + 2 * q + column;
            const float query_delta = delta.of(query), query_lse = lse[query] * kLog2E;
            const int2 query_cell = other[query];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int e = 2 * half + column;
              const float bias = bias_of(query_cell, half == 0 ? upper : lower, table, centre);
              p[n][e] = exp2_fast(fmaf(p[n][e], scale, bias) - query_lse);
              dp[n][e] = p[n][e] * (dp[n][e] - query_delta);
            }
          }
        P::apply(second_grad, p, second_right);
        P::apply(first_grad, dp, first_right);
      }
    }
    if (piece == pieces - 1 && a.grad_qkv != nullptr) {
      store(first_grad, a.scale, as_queries ? 0 : 1);
      if (!as_queries) store(second_grad, 1, 2);
    }
  }
  copy_async_wait<0>();
  if (a.partial == nullptr) return;

  __syncthreads();  // nobody reads tiles any more
  float* copies = reinterpret_cast<float*>(memory.stages);
  float* copy = copies + warp * a.table_rows();
  for (int i = lane; i < a.table_rows(); i += 32) copy[i] = 0;
  __syncwarp();
  add_to_table(copy, gradient, memory.gradient_stride, memory.slots, strip, band, centre);
  __syncthreads();
  store_partial(copies, a);
}

}  // namespace greenmim::cuda
