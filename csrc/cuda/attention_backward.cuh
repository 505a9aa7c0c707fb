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
  using Row = TileRow<T, D>;
  static constexpr int kStages = 2;
  enum Tile { kQuery, kKey, kValue, kGradOut, kTiles };
  // Elements from row to row of what is as wide as a group, such that what a warp touches lies in
  // different banks.
  static constexpr int kWide = kMostStrips * kStrip + 8;

  int strips, rows, tile;
  T* stages;        // [kStages][kTiles][rows][row]; at the end the warps' copies of the table
  float* lse;       // [kStages][rows]
  T* p;             // [rows][kWide]; at the end, with ds, the bias' gradient
  T* ds;            // the same
  float* padding;   // [strips][2][D] sums for k and v of the padding, or nothing
  Slots slots;
  size_t bytes;

  __host__ __device__ BackwardMemory(char* start, const Attention& a)
      : BackwardMemory(Carver{start}, a) {}

  __device__ T* at(int stage, Tile which, int strip = 0) const {
    return stages + (stage * kTiles + which) * tile + strip * kStrip * Row::kStride;
  }
  // [16][kWide] of a warp, where the probabilities were.
  __device__ float* bias_gradient(int warp) const {
    return reinterpret_cast<float*>(p) + warp * kStrip * kWide;
  }
  // [kTableCopies][rows of the table] of a warp, where the tiles were.
  __device__ float* table_copies(int warp, const Attention& a) const {
    return reinterpret_cast<float*>(stages) + warp * kTableCopies * a.table_rows;
  }
  __device__ float* pad_sums(int warp) const { return padding + warp * 2 * D; }

 private:
  __host__ __device__ BackwardMemory(Carver carver, const Attention& a)
      : strips(a.strips),
        rows(a.strips * kStrip),
        tile(rows * Row::kStride),
        stages(carver.take<T>(std::max<int64_t>(
            int64_t(kStages) * kTiles * tile,
            int64_t(strips) * kTableCopies * a.table_rows * 4 / int64_t(sizeof(T))))),
        lse(carver.take<float>(kStages * rows)),
        p(carver.take<T>(int64_t(rows) * kWide * 4 / int64_t(sizeof(T)))),
        ds(p + rows * kWide),
        padding(carver.take<float>(a.partial_pad == nullptr ? 0 : strips * 2 * D)),
        slots(carver, a),
        bytes(carver.bytes) {}
};

// kGeneral: heads may have fewer columns than D, and padding a value.
template <class T, int D, bool kGeneral>
__global__ void __launch_bounds__(32 * kMostStrips, 1)
    attention_backward_kernel(const Attention a) {
  using P = Products<T, D>;
  static_assert(P::kKept == 0, "left operands have to be in registers");
  using Memory = BackwardMemory<T, D>;
  DYNAMIC_SHARED(shared);
  const Memory memory(shared, a);
  const Place place = memory.slots.find_place(a, true);
  const int strip = int(threadIdx.x) / 32, lane = lane_index();
  constexpr float kLog2E = 1.4426950408889634f;

  allow_next_kernel();
  __syncthreads();
  if (!place.has_images() || memory.slots.nothing_from(0, a.grad_q.data != nullptr)) {
    store_padding<D>(nullptr, 0, a);
    return store_partial(nullptr, 0, a);
  }
  if (kGeneral && a.partial_pad != nullptr) clear_padding<D>(memory.pad_sums(strip));
  const auto start_load = [&](int stage, int image) {
    if (image < place.last_image) {
      const int* row = memory.slots.row;
      const HeadRows<T> query(a.q, place.head, image);
      const HeadRows<T> key(a.k, place.head, image, padding_of<T>(a, 1, place.head));
      const HeadRows<T> value(a.v, place.head, image, padding_of<T>(a, 2, place.head));
      load_tiles<T, D, kGeneral>(memory.at(stage, Memory::kQuery), {query, key, value}, row, a.head_dim,
                       memory.tile);
      load_tiles<T, D, kGeneral>(memory.at(stage, Memory::kGradOut),
                       {HeadRows<T>(a.grad_out, place.head, image)}, row, a.head_dim);
      load_numbers(
          memory.lse + stage * memory.rows,
          nth<const float>(a.lse + int64_t(place.head) * a.rows, image, a.heads * a.rows), row);
    }
    copy_async_commit();
  };

  start_load(0, place.first_image);
  // While the first image is on its way.
  memory.slots.read_table(a, place);
  const Band band = band_of(memory.slots, place, strip, a.reach());
  __syncthreads();  // the table is there
  float bias[kMostStrips][2][4];
  make_bias(bias, memory.slots, strip, band);

  const float scale = a.scale * kLog2E;
  constexpr int kWide = Memory::kWide;
  float grad_bias[kMostStrips][2][4];
#pragma unroll
  for (int j = 0; j < kMostStrips; ++j) clear(grad_bias[j]);

  int stage = 0;
  for (int image = place.first_image; image < place.last_image; ++image, stage ^= 1) {
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
      const typename P::ScoresRight key(memory.at(stage, Memory::kKey));
      const typename P::ScoresRight value(memory.at(stage, Memory::kValue));
      const typename P::ApplyRight applied_key(memory.at(stage, Memory::kKey));
      Square p[kMostStrips], dp[kMostStrips];
      float own_delta[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < kMostStrips; ++j) {
        if (!band.holds(j)) continue;
        clear(p[j]);
        P::scores(p[j], query, key, j);
        clear(dp[j]);
        P::scores(dp[j], grad_out, value, j);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            p[j][n][e] = exp2_fast(fmaf(p[j][n][e], scale, bias[j][n][e]) - own_lse[e / 2]);
            own_delta[e / 2] = fmaf(p[j][n][e], dp[j][n][e], own_delta[e / 2]);
          }
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
            const int at = (strip * kStrip + g + 8 * half) * kWide + j * kStrip + 8 * n + 2 * q;
            grad[0] = two[0] * (grad[0] - own_delta[half]);
            grad[1] = two[1] * (grad[1] - own_delta[half]);
            grad_bias[j][n][2 * half] += grad[0];
            grad_bias[j][n][2 * half + 1] += grad[1];
            store_pair(memory.p + at, two[0], two[1]);
            store_pair(memory.ds + at, grad[0], grad[1]);
          }
        P::apply(grad_query, dp[j], applied_key, j);
      }
    }
    if (a.grad_q.data == nullptr) continue;

    __syncthreads();  // all probabilities are there; nobody needs k and v any more
    // Their strips serve the results: that of k first for the gradient of q, which frees registers.
    T* staging = memory.at(stage, Memory::kKey, strip);
    const int* row = memory.slots.row + strip * kStrip;
    stage_strip<T, D>(grad_query, a.scale, a.scale, staging);
    const typename P::ApplyRight query(memory.at(stage, Memory::kQuery));
    const typename P::ApplyRight grad_out(memory.at(stage, Memory::kGradOut));
    Wide<D> grad_key, grad_value;  // The strip as keys.
    clear<D>(grad_key);
    clear<D>(grad_value);
#pragma unroll
    for (int j = 0; j < kMostStrips; ++j) {
      if (!band.holds(j)) continue;
      const int at = j * kStrip * kWide + strip * kStrip;
      P::apply_transposed(grad_value, memory.p + at, kWide, grad_out, j);
      P::apply_transposed(grad_key, memory.ds + at, kWide, query, j);
    }
    __syncwarp();
    write_strips<T, D, kGeneral>(staging, {HeadRows<T>(a.grad_q, place.head, image)}, row, a.head_dim);
    __syncwarp();
    stage_strip<T, D>(grad_key, a.scale, a.scale, staging);
    stage_strip<T, D>(grad_value, 1, 1, staging + memory.tile);
    __syncwarp();
    write_strips<T, D, kGeneral>(
        staging, {HeadRows<T>(a.grad_k, place.head, image), HeadRows<T>(a.grad_v, place.head, image)},
        row, a.head_dim, memory.tile);
    if (kGeneral && a.partial_pad != nullptr) {
      add_padding<T, D>(memory.pad_sums(strip), staging, row);
      add_padding<T, D>(memory.pad_sums(strip) + D, staging + memory.tile, row);
    }
  }
  copy_async_wait<0>();
  if (a.partial == nullptr && a.partial_pad == nullptr) return;

  __syncthreads();  // nobody reads tiles or probabilities any more
  store_padding<D>(memory.pad_sums(0), memory.strips, a);
  if (a.partial == nullptr) return;
  const int g = lane / 4, q = lane % 4;
  float* own = memory.bias_gradient(strip);
#pragma unroll
  for (int j = 0; j < kMostStrips; ++j) {
    if (!band.holds(j)) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(own + (g + 8 * half) * kWide + j * kStrip + 8 * n + 2 * q,
                   grad_bias[j][n][2 * half], grad_bias[j][n][2 * half + 1]);
  }
  __syncwarp();
  add_to_table(memory.table_copies(strip, a), own + band.first * kStrip, kWide, a, memory.slots,
               strip, band);
  __syncthreads();
  store_partial(memory.table_copies(0, a), memory.strips * kTableCopies, a);
}

}  // namespace greenmim::cuda
