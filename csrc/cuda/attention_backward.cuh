// Backward attention of groups that fit into one block. Two warps own a strip of 16 slots, first as
// queries (gradients of q and of the bias), then as keys (gradients of k and v). As queries they share
// the strips of keys, every other one each; as keys the one gives the gradient of v, the other that of k,
// and both half of the columns of q's. Between the two the probabilities and their gradients change
// hands through shared memory, rounded to the element type as the products take them; sums stay in
// registers. delta, the sum over keys of P dP, is taken from the strip itself and needs neither the
// output nor its rounding.
//
// One warp for a strip would hold twice as much in registers, and half as many run at the same time:
// too few to hide what a product, a shuffle or a read of shared memory takes.
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
  float* delta;     // [2][rows], of either warp's keys
  T* p;             // [rows][kWide]; at the end, with ds, the bias' gradient
  T* ds;            // the same
  T* staged;        // [warps][kStrip][row], results on their way
  float* padding;   // [strips][2][D] sums for k and v of the padding, or nothing
  Slots slots;
  size_t bytes;

  __host__ __device__ BackwardMemory(char* start, const Attention& a)
      : BackwardMemory(Carver{start}, a) {}

  __device__ T* at(int stage, Tile which, int strip = 0) const {
    return stages + (stage * kTiles + which) * tile + strip * kStrip * Row::kStride;
  }
  __device__ T* staging(int warp) const { return staged + warp * kStrip * Row::kStride; }
  // [16][kWide] of a strip, where the probabilities were.
  __device__ float* bias_gradient(int strip) const {
    return reinterpret_cast<float*>(p) + strip * kStrip * kWide;
  }
  // [rows of the table] of a warp, where the tiles were.
  __device__ float* table_copy(int warp, const Attention& a) const {
    return reinterpret_cast<float*>(stages) + warp * a.table_rows;
  }
  __device__ float* pad_sums(int strip) const { return padding + strip * 2 * D; }

 private:
  __host__ __device__ BackwardMemory(Carver carver, const Attention& a)
      : strips(a.strips),
        rows(a.strips * kStrip),
        tile(rows * Row::kStride),
        stages(carver.take<T>(std::max<int64_t>(
            int64_t(kStages) * kTiles * tile,
            int64_t(strips) * kTableCopies * a.table_rows * 4 / int64_t(sizeof(T))))),
        lse(carver.take<float>(kStages * rows)),
        delta(carver.take<float>(2 * rows)),
        p(carver.take<T>(int64_t(rows) * kWide * 4 / int64_t(sizeof(T)))),
        ds(p + rows * kWide),
        staged(carver.take<T>(int64_t(2) * rows * Row::kStride)),
        padding(carver.take<float>(a.partial_pad == nullptr ? 0 : strips * 2 * D)),
        slots(carver, a),
        bytes(carver.bytes) {}
};

// Waits for the other warp of a strip. Barriers by number: a kernel that reckons one takes them all.
__device__ __forceinline__ void sync_strip(int strip) {
  static_assert(kMostStrips == 4);
  switch (strip) {
    case 0: return sync_some<1, 64>();
    case 1: return sync_some<2, 64>();
    case 2: return sync_some<3, 64>();
    default: return sync_some<4, 64>();
  }
}

// kGeneral: heads may have fewer columns than D, and padding a value.
template <class T, int D, bool kGeneral>
__global__ void __launch_bounds__(2 * 32 * kMostStrips, 2)
    attention_backward_kernel(const Attention a) {
  using P = Products<T, D>;
  static_assert(P::kKept == 0, "left operands have to be in registers");
  static_assert(kTableCopies == 2, "one for each warp of a strip");
  using Memory = BackwardMemory<T, D>;
  constexpr int kOwnStrips = kMostStrips / 2;            // of keys, of a warp
  constexpr int kOwnColumns = D >= 32 ? D / 2 : D;       // of q's gradient; all of them the first warp's
  DYNAMIC_SHARED(shared);
  const Memory memory(shared, a);
  const Place place = memory.slots.find_place(a, true);
  const int warp = int(threadIdx.x) / 32, lane = lane_index();
  const int half = warp >= memory.strips, strip = warp - half * memory.strips;
  constexpr float kLog2E = 1.4426950408889634f;

  allow_next_kernel();
  __syncthreads();
  if (!place.has_images() || memory.slots.nothing_from(0, a.grad_q.data != nullptr)) {
    store_padding<D>(nullptr, 0, a);
    return store_partial(nullptr, 0, a);
  }
  if (kGeneral && a.partial_pad != nullptr && half == 0) clear_padding<D>(memory.pad_sums(strip));
  // One half of the block brings q and k, the other v and the gradient of the output.
  const auto start_load = [&](int stage, int image) {
    if (image < place.last_image) {
      const int* row = memory.slots.row;
      const int threads = 2 * memory.rows, thread = int(threadIdx.x) - half * threads;
      if (half == 0) {
        load_tiles<T, D, kGeneral>(
            memory.at(stage, Memory::kQuery),
            {HeadRows<T>(a.q, place.head, image),
             HeadRows<T>(a.k, place.head, image, padding_of<T>(a, 1, place.head))},
            row, a.head_dim, memory.tile, thread, threads);
      } else {
        load_tiles<T, D, kGeneral>(
            memory.at(stage, Memory::kValue),
            {HeadRows<T>(a.v, place.head, image, padding_of<T>(a, 2, place.head)),
             HeadRows<T>(a.grad_out, place.head, image)},
            row, a.head_dim, memory.tile, thread, threads);
      }
      load_numbers(
          memory.lse + stage * memory.rows,
          nth<const float>(a.lse + int64_t(place.head) * a.rows, image, a.heads * a.rows), row,
          memory.rows);
    }
    copy_async_commit();
  };

  start_load(0, place.first_image);
  // While the first image is on its way.
  memory.slots.read_table(a, place);
  const Band band = band_of(memory.slots, place, strip, a.reach());
  __syncthreads();  // the table is there
  float bias[kOwnStrips][2][4];
  make_bias<kOwnStrips, 2>(bias, memory.slots, strip, band, half);

  const float scale = a.scale * kLog2E;
  constexpr int kWide = Memory::kWide;
  float grad_bias[kOwnStrips][2][4];
#pragma unroll
  for (int i = 0; i < kOwnStrips; ++i) clear(grad_bias[i]);

  int stage = 0;
  for (int image = place.first_image; image < place.last_image; ++image, stage ^= 1) {
    copy_async_wait<0>();
    // Also: no warp still works on the stage that is filled next.
    __syncthreads();
    start_load(stage ^ 1, image + 1);
    const float* lse = memory.lse + stage * memory.rows;

    {  // The strip as queries.
      const int g = computed_here(lane / 4), q = computed_here(lane % 4);
      typename P::Left query, grad_out;
      query.load(memory.at(stage, Memory::kQuery, strip), nullptr);
      grad_out.load(memory.at(stage, Memory::kGradOut, strip), nullptr);
      const float own_lse[2] = {
          lse[strip * kStrip + g] * kLog2E, lse[strip * kStrip + g + 8] * kLog2E};
      const typename P::ScoresRight key(memory.at(stage, Memory::kKey));
      const typename P::ScoresRight value(memory.at(stage, Memory::kValue));
      Square p[kOwnStrips], dp[kOwnStrips];
      float own_delta[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < kOwnStrips; ++i) {
        const int j = 2 * i + half;
        if (!band.holds(j)) continue;
        clear(p[i]);
        P::scores(p[i], query, key, j);
        clear(dp[i]);
        P::scores(dp[i], grad_out, value, j);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            p[i][n][e] = exp2_fast(fmaf(p[i][n][e], scale, bias[i][n][e]) - own_lse[e / 2]);
            own_delta[e / 2] = fmaf(p[i][n][e], dp[i][n][e], own_delta[e / 2]);
          }
        }
      }
      // The other warp's share of it comes through memory.
      float* shares = memory.delta + strip * kStrip + g;
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        own_delta[upper] = quad_sum(own_delta[upper]);
        if (q == 0) shares[half * memory.rows + 8 * upper] = own_delta[upper];
      }
      sync_strip(strip);
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
        own_delta[upper] += shares[(1 - half) * memory.rows + 8 * upper];
#pragma unroll
      for (int i = 0; i < kOwnStrips; ++i) {
        const int j = 2 * i + half;
        if (!band.holds(j)) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            float *two = p[i][n] + 2 * upper, *grad = dp[i][n] + 2 * upper;
            const int at = (strip * kStrip + g + 8 * upper) * kWide + j * kStrip + 8 * n + 2 * q;
            grad[0] = two[0] * (grad[0] - own_delta[upper]);
            grad[1] = two[1] * (grad[1] - own_delta[upper]);
            grad_bias[i][n][2 * upper] += grad[0];
            grad_bias[i][n][2 * upper + 1] += grad[1];
            store_pair(memory.p + at, two[0], two[1]);
            store_pair(memory.ds + at, grad[0], grad[1]);
          }
      }
    }
    if (a.grad_q.data == nullptr) continue;

    __syncthreads();  // all probabilities are there
    T* staging = memory.staging(warp);
    const int* row = memory.slots.row + strip * kStrip;
    // The gradient of v, or of k: the strip as keys. And columns of q's.
    const T* left = half == 0 ? memory.p : memory.ds;
    const typename P::ApplyRight right(
        memory.at(stage, half == 0 ? Memory::kGradOut : Memory::kQuery));
    const typename P::ApplyRight key(
        memory.at(stage, Memory::kKey), kOwnColumns < D ? half * kOwnColumns : 0);
    const bool has_columns = kOwnColumns < D || half == 0;
    Wide<D> grad_key;
    Wide<kOwnColumns> grad_query;
    clear<D>(grad_key);
    clear<kOwnColumns>(grad_query);
#pragma unroll
    for (int j = 0; j < kMostStrips; ++j) {
      if (!band.holds(j)) continue;
      P::apply_transposed(grad_key, left + j * kStrip * kWide + strip * kStrip, kWide, right, j);
      if (has_columns)
        P::apply_stored(grad_query, memory.ds + strip * kStrip * kWide + j * kStrip, kWide, key, j);
    }
    if (has_columns) {
      HeadRows<T> to(a.grad_q, place.head, image);
      const int first = kOwnColumns < D ? half * kOwnColumns : 0;
      to.first += first;
      stage_strip<T, kOwnColumns>(grad_query, a.scale, a.scale, staging);
      __syncwarp();
      write_strips<T, kOwnColumns, kGeneral>(staging, {to}, row, a.head_dim - first);
      __syncwarp();
    }
    const float factor = half == 0 ? 1 : a.scale;
    stage_strip<T, D>(grad_key, factor, factor, staging);
    __syncwarp();
    write_strips<T, D, kGeneral>(
        staging, {HeadRows<T>(half == 0 ? a.grad_v : a.grad_k, place.head, image)}, row, a.head_dim);
    if (kGeneral && a.partial_pad != nullptr)
      add_padding<T, D>(memory.pad_sums(strip) + (half == 0 ? D : 0), staging, row);
  }
  copy_async_wait<0>();
  if (a.partial == nullptr && a.partial_pad == nullptr) return;

  __syncthreads();  // nobody reads tiles or probabilities any more
  store_padding<D>(memory.pad_sums(0), memory.strips, a);
  if (a.partial == nullptr) return;
  const int g = lane / 4, q = lane % 4;
  float* own = memory.bias_gradient(strip);
#pragma unroll
  for (int i = 0; i < kOwnStrips; ++i) {
    const int j = 2 * i + half;
    if (!band.holds(j)) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
        store_pair(own + (g + 8 * upper) * kWide + j * kStrip + 8 * n + 2 * q,
                   grad_bias[i][n][2 * upper], grad_bias[i][n][2 * upper + 1]);
  }
  sync_strip(strip);
  // Half of the queries each.
  const int first = half * kStrip / 2;
  add_to_table<1>(memory.table_copy(warp, a), own + first * kWide + band.first * kStrip, kWide, a,
                  memory.slots, strip * kStrip + first, kStrip / 2, band);
  __syncthreads();
  store_partial(memory.table_copy(0, a), memory.strips * kTableCopies, a);
}

}  // namespace greenmim::cuda
