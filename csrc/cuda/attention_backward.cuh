// Backward attention of groups that fit into one block. A warp owns a strip of 16 slots, first as
// queries (gradients of q and of the bias), then as keys (gradients of k and v). Between the two the
// probabilities and their gradients change hands through shared memory, rounded to the element type
// as the products take them; sums stay in registers. delta, the sum over keys of P dP, is taken from
// the strip itself and needs neither the output nor its rounding.
#pragma once

#include "slots.cuh"

namespace greenmim::cuda {

template <class T, int D>
struct BackwardMemory {
  static constexpr int kStages = 2;
  enum Tile { kQuery, kKey, kValue, kGradOut, kTiles };

  int tile, rows;
  int bias_stride, exchange_stride;  // such that what a warp touches lies in different banks
  T* stages;        // [kStages][kTiles][rows][kStride]; at the end the warps' copies of the table
  float* lse;       // [kStages][rows]
  float* bias;      // [rows][bias_stride]; at the end its gradient
  T* p;             // [rows][exchange_stride]
  T* ds;            // the same
  Slots slots;
  size_t bytes;

  __host__ __device__ BackwardMemory(char* start, const Attention& a)
      : BackwardMemory(Carver{start}, a) {}

  __device__ T* at(int stage, Tile which, int strip = 0) const {
    return stages + (stage * kTiles + which) * tile + strip * kStrip * kStride<T, D>;
  }

 private:
  __host__ __device__ BackwardMemory(Carver carver, const Attention& a)
      : tile(a.strips * kStrip * kStride<T, D>),
        rows(a.strips * kStrip),
        bias_stride(rows + 8),
        exchange_stride(rows + 8),
        stages(carver.take<T>(std::max<int64_t>(
            int64_t(kStages) * kTiles * tile,
            (int64_t(a.strips) * a.table_rows() * 4 + int64_t(sizeof(T)) - 1) / int64_t(sizeof(T))))),
        lse(carver.take<float>(kStages * rows)),
        bias(carver.take<float>(int64_t(rows) * bias_stride)),
        p(carver.take<T>(int64_t(rows) * exchange_stride)),
        ds(carver.take<T>(int64_t(rows) * exchange_stride)),
        slots(carver, a),
        bytes(carver.bytes) {}
};

template <class T, int D>
__global__ void __launch_bounds__(32 * kMostStrips, 1)
    attention_backward_kernel(const Attention a) {
  using P = Products<T, D>;
  static_assert(P::kKept == 0, "left operands have to be in registers");
  using Memory = BackwardMemory<T, D>;
  DYNAMIC_SHARED(shared);
  const Memory memory(shared, a);
  const Place place(a);
  const int strip = int(threadIdx.x) / 32, lane = lane_index();
  const int channels = a.heads * D, centre = table_centre(a);
  constexpr float kLog2E = 1.4426950408889634f;

  memory.slots.read_partition(a, place);
  __syncthreads();
  const bool empty = memory.slots.cell[0].x < 0;
  if (empty && (a.token_index != nullptr || a.grad_qkv == nullptr)) {
    if (a.partial != nullptr)
      for (int i = int(threadIdx.x); i < a.table_rows(); i += int(blockDim.x))
        a.partial[int64_t(blockIdx.x) * a.table_rows() + i] = 0;
    return;
  }
  const auto start_load = [&](int stage, int64_t image) {
    if (image < place.last_image) {
      const T* qkv =
          static_cast<const T*>(a.qkv) + image * a.rows * (3 * channels) + place.head * D;
      const T* grad_out =
          static_cast<const T*>(a.grad_out) + image * a.rows * channels + place.head * D;
      const int* row = memory.slots.row;
      load_tiles<T, D, 3>(
          memory.at(stage, Memory::kQuery), qkv, 3 * channels, row, memory.tile, channels);
      load_tiles<T, D>(memory.at(stage, Memory::kGradOut), grad_out, channels, row);
      load_numbers(memory.lse + stage * memory.rows,
                   a.lse + (image * a.heads + place.head) * a.rows, row);
    }
    copy_async_commit();
  };

  start_load(0, place.first_image);
  // While the first image is on its way.
  memory.slots.read_table(a, place);
  const Band band = band_of(memory.slots, place, strip, a.reach());
  __syncthreads();  // the table is there
  // A warp makes the bias of its own queries, which no other warp reads.
  for (int i = strip * kStrip; i < (strip + 1) * kStrip; ++i) {
    const int2 query = memory.slots.cell[i];
    for (int key = band.first * kStrip + lane; key < band.last * kStrip; key += 32)
      memory.bias[i * memory.bias_stride + key] =
          bias_of(query, memory.slots.cell[key], memory.slots.table, centre);
  }

  const float scale = a.scale * kLog2E;
  const int exchange = memory.exchange_stride;
  float grad_bias[kMostStrips][2][4];
#pragma unroll
  for (int j = 0; j < kMostStrips; ++j) clear(grad_bias[j]);

  int stage = 0;
  for (int64_t image = place.first_image; image < place.last_image; ++image, stage ^= 1) {
    copy_async_wait<0>();
    // Also: no warp still works on the stage that is filled next.
    __syncthreads();
    start_load(stage ^ 1, image + 1);
    const float* lse = memory.lse + stage * memory.rows;
    Wide<D> grad_query;
    clear<D>(grad_query);

    {  // The strip as queries.
      const int g = computed_here(lane / 4), q = computed_here(lane % 4);
      typename P::Left query, grad_out;
      query.load(memory.at(stage, Memory::kQuery, strip), nullptr);
      grad_out.load(memory.at(stage, Memory::kGradOut, strip), nullptr);
      const float own_lse[2] = {
          lse[strip * kStrip + g] * kLog2E, lse[strip * kStrip + g + 8] * kLog2E};
      Square p[kMostStrips], dp[kMostStrips];
      float own_delta[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < kMostStrips; ++j) {
        if (!band.holds(j)) continue;
        clear(p[j]);
        P::scores(p[j], query, memory.at(stage, Memory::kKey, j));
        clear(dp[j]);
        P::scores(dp[j], grad_out, memory.at(stage, Memory::kValue, j));
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 bias = *reinterpret_cast<const float2*>(
                memory.bias + (strip * kStrip + g + 8 * half) * memory.bias_stride + j * kStrip +
                8 * n + 2 * q);
            float* two = p[j][n] + 2 * half;
            two[0] = exp2_fast(fmaf(two[0], scale, bias.x) - own_lse[half]);
            two[1] = exp2_fast(fmaf(two[1], scale, bias.y) - own_lse[half]);
            own_delta[half] = fmaf(two[0], dp[j][n][2 * half], own_delta[half]);
            own_delta[half] = fmaf(two[1], dp[j][n][2 * half + 1], own_delta[half]);
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) own_delta[half] = quad_sum(own_delta[half]);
#pragma unroll
      for (int j = 0; j < kMostStrips; ++j) {
        if (!band.holds(j)) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float *two = p[j][n] + 2 * half, *grad = dp[j][n] + 2 * half;
            const int at = (strip * kStrip + g + 8 * half) * exchange + j * kStrip + 8 * n + 2 * q;
            grad[0] = two[0] * (grad[0] - own_delta[half]);
            grad[1] = two[1] * (grad[1] - own_delta[half]);
            grad_bias[j][n][2 * half] += grad[0];
            grad_bias[j][n][2 * half + 1] += grad[1];
            store_pair(memory.p + at, two[0], two[1]);
            store_pair(memory.ds + at, grad[0], grad[1]);
          }
        P::apply(grad_query, dp[j], memory.at(stage, Memory::kKey, j));
      }
    }
    if (a.grad_qkv == nullptr) continue;

    __syncthreads();  // all probabilities are there; nobody needs k and v any more
    {  // The strip as keys.
      Wide<D> grad_key, grad_value;
      clear<D>(grad_key);
      clear<D>(grad_value);
      for (int j = band.first; j < band.last; ++j) {
        const int at = j * kStrip * exchange + strip * kStrip;
        P::apply_transposed(
            grad_value, memory.p + at, exchange, memory.at(stage, Memory::kGradOut, j));
        P::apply_transposed(
            grad_key, memory.ds + at, exchange, memory.at(stage, Memory::kQuery, j));
      }
      T* grad_qkv = static_cast<T*>(a.grad_qkv) + image * a.rows * (3 * channels) + place.head * D;
      const auto store = [&](const Wide<D>& x, float factor, int which) {
        store_strip<T, D>(x, factor, factor, memory.at(stage, Memory::kKey, strip),
                          grad_qkv + which * channels, 3 * channels, a, place, strip,
                          memory.slots.row);
      };
      store(grad_query, a.scale, 0);
      store(grad_key, a.scale, 1);
      store(grad_value, 1, 2);
    }
  }
  copy_async_wait<0>();
  if (a.partial == nullptr) return;

  __syncthreads();  // nobody reads tiles or bias any more
  float* copies = reinterpret_cast<float*>(memory.stages);
  float* copy = copies + strip * a.table_rows();
  for (int i = lane; i < a.table_rows(); i += 32) copy[i] = 0;
  const int g = lane / 4, q = lane % 4;
  float* own = memory.bias + strip * kStrip * memory.bias_stride;
#pragma unroll
  for (int j = 0; j < kMostStrips; ++j) {
    if (!band.holds(j)) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(own + (g + 8 * half) * memory.bias_stride + j * kStrip + 8 * n + 2 * q,
                   grad_bias[j][n][2 * half], grad_bias[j][n][2 * half + 1]);
  }
  __syncwarp();
  add_to_table(copy, own + band.first * kStrip, memory.bias_stride, memory.slots, strip, band,
               centre);
  __syncthreads();
  store_partial(copies, a);
}

}  // namespace greenmim::cuda
