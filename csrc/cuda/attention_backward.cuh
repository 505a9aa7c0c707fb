// Backward attention of groups that fit into one block. A warp owns a strip of 16 slots, first as
// queries (gradients of q and of the bias), then as keys (gradients of k and v). Between the two the
// probabilities and their gradients change hands through shared memory, rounded to the element type
// as the products take them; sums stay in registers. delta, the sum over keys of P dP, is taken from
// the strip itself and needs neither the output nor its rounding.
//
// With a mask per image a block takes one group after the other, and goes over heads of each (kOverHeads). What
// attends what is then never the same twice for a head, so the bias' gradient goes into the table's every time.
#pragma once

#include "over_heads.cuh"

namespace greenmim::cuda {

template <class T, int D, bool kOverHeads>
struct BackwardMemory {
  using Row = TileRow<T, D>;
  static constexpr int kStages = 2;
  enum Tile { kQuery, kKey, kValue, kGradOut, kTiles };
  // Elements from row to row of what is as wide as a group, such that what a warp touches lies in
  // different banks.
  static constexpr int kWide = kMostStrips * kStrip + 8;

  int strips, rows, tile;
  T* stages;        // [kStages][kTiles][rows][row]; at the end the warps' copies of the table
  T* p;             // [2][rows][kWide]: p and ds; at the end the bias' gradient
  float4* bias;     // [strips][kMostStrips][2][32], as the lanes hold scores
  float* padding;   // [strips][2][D] sums for k and v of the padding, or nothing
  float* gradient;  // [strips][16][kWide] of the bias: over heads, a place of its own
  float* copies;    // over heads, [heads][strips][WindowSums::copies]: of the table, for all groups
  Slots slots;
  size_t bytes;

  __host__ __device__ BackwardMemory(char* start, const Attention& a)
      : BackwardMemory(Carver{start}, a) {}

  // [16][kWide] of a warp: over images, where the probabilities were.
  static constexpr int kGradient = kStrip * kWide + (kOverHeads ? WindowSums::kBehind : 0);
  __device__ float* bias_gradient(int warp) const { return gradient + warp * kGradient; }
  // [kTableCopies][rows of the table] of a warp, where the tiles were.
  __device__ float* table_copies(int warp, const Attention& a) const {
    return copies + warp * kTableCopies * a.table_rows;
  }
  __device__ float* pad_sums(int warp) const { return padding + warp * 2 * D; }
  // Elements of the copies of one head.
  __host__ __device__ int head_copies(const Attention& a) const {
    return strips * WindowSums::copies(a.table_rows);
  }

 private:
  __host__ __device__ BackwardMemory(Carver carver, const Attention& a)
      : strips(a.strips),
        rows(a.strips * kStrip),
        tile(rows * Row::kStride),
        stages(carver.take<T>(std::max<int64_t>(
            int64_t(kStages) * kTiles * tile,
            kOverHeads ? 0 : int64_t(strips) * kTableCopies * a.table_rows * 4 / int64_t(sizeof(T))))),
        p(carver.take<T>(int64_t(rows) * kWide * 4 / int64_t(sizeof(T)))),
        bias(carver.take<float4>(kOverHeads ? 0 : strips * kMostStrips * 2 * 32)),
        padding(carver.take<float>(a.partial_pad == nullptr ? 0 : strips * 2 * D)),
        gradient(kOverHeads ? carver.take<float>(a.partial == nullptr ? 0 : strips * kGradient)
                            : reinterpret_cast<float*>(p)),
        copies(kOverHeads
                   ? carver.take<float>(a.partial == nullptr ? 0 : a.block_heads * head_copies(a))
                   : reinterpret_cast<float*>(stages)),
        slots(carver, a, kOverHeads),
        bytes(carver.bytes) {}
};

// A processor holds two blocks. Three of them, in 168 registers each, are no faster: see benchmarks/README.md.
//
// kGeneral: heads may have fewer columns than D, and padding a value. Scores have no scale until they are
// exponents, and it has to be above zero: see attention_forward_kernel.
template <class T, int D, bool kGeneral, bool kOverHeads = false>
__global__ void __launch_bounds__(32 * kMostStrips, 2)
    attention_backward_kernel(const Attention a) {
  using P = Products<T, D>;
  static_assert(P::kKept == 0, "left operands have to be in registers");
  static_assert(!kOverHeads || !kGeneral);
  using Memory = BackwardMemory<T, D, kOverHeads>;
  using Row = TileRow<T, D>;
  DYNAMIC_SHARED(shared);
  const Memory memory(shared, a);
  Slots slots = memory.slots;
  std::conditional_t<kOverHeads, HeadBlocks, NoHeadBlocks> blocks(a);
  Place place = start(slots, a, true, blocks);
  const int strip = warp_index(), lane = lane_index(), g = lane / 4, q = lane % 4;
  constexpr float kLog2E = 1.4426950408889634f;

  // What the block goes over: images, or heads.
  int first_step = place.first_image, last_step = place.last_image;
  if constexpr (kOverHeads) first_step = blocks.first_head, last_step = blocks.last_head;

  allow_next_kernel();
  __syncthreads();
  if (!place.has_images() || (!kOverHeads && slots.nothing_from(0, a.grad_q.data != nullptr))) {
    copy_async_wait<0>();
    if constexpr (kOverHeads) {
      store_window_sums(nullptr, 0, a, blocks);
      return;
    }
    store_padding<D>(nullptr, 0, a);
    return store_partial(nullptr, 0, a);
  }
  if (kGeneral && a.partial_pad != nullptr) clear_padding<D>(memory.pad_sums(strip));
  Pieces<T, D> copied(slots.row, threadIdx.x, blockDim.x);
  // Of the image, or head, whose copies start next.
  const auto rows_of = [&](const Rows& x, const Place& place, int pads = 0) {
    return HeadRows<T>(x, place.head, place.first_image, kOverHeads,
                       pads == 0 ? nullptr : padding_of<T>(a, pads, place.head));
  };
  HeadRows<T> query_rows = rows_of(a.q, place), key_rows = rows_of(a.k, place, 1);
  HeadRows<T> value_rows = rows_of(a.v, place, 2), grad_out_rows = rows_of(a.grad_out, place);
  int lse_row[2] = {slots.row[strip * kStrip + g], slots.row[strip * kStrip + g + 8]};
  const auto lse_of = [&](const Place& place) {
    return nth(static_cast<const float*>(a.lse) + int64_t(place.head) * a.rows, place.first_image,
               a.heads * a.rows);
  };
  const float* lse = lse_of(place);
  const SharedAddress tiles = P::at(memory.stages);
  const unsigned tile_bytes = memory.tile * unsigned(sizeof(T)), stage_bytes = Memory::kTiles * tile_bytes;
  const auto start_load = [&](int stage, int step) {
    if (step < last_step) {
      copied.template load<kGeneral>(
          tiles + stage * stage_bytes, {query_rows, key_rows, value_rows, grad_out_rows}, a.head_dim,
          tile_bytes);
      query_rows.to_next();
      key_rows.to_next();
      value_rows.to_next();
      grad_out_rows.to_next();
    }
    copy_async_commit();
  };

  start_load(0, first_step);
  float next_lse[2] = {};
  const auto load_lse = [&](int step) {
    if (step >= last_step) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)  // rows without a token have none: any other may be NaN
      next_lse[half] = lse_row[half] < 0 ? 0 : lse[computed_here(lse_row[half])];
    lse = nth(lse, 1, kOverHeads ? a.rows : a.heads * a.rows);
  };
  load_lse(first_step);
  std::conditional_t<kOverHeads, NextGroup, NoNextGroup> next_group(a, slots, blocks);
  if (kOverHeads && a.partial != nullptr) clear(memory.copies, a.block_heads * memory.head_copies(a));
  // While the first image is on its way.
  copy_async_wait<1>();
  scale_table(slots, a, a.inverse_scale, blocks);
  constexpr int kWide = Memory::kWide;
  [[maybe_unused]] float grad_bias[kMostStrips][2][4];  // over images
#pragma unroll
  for (int j = 0; j < kMostStrips; ++j) clear(grad_bias[j]);
  // Half a square, the columns of which begin at that of strip j.
  const auto store_bias_gradient = [&](int j, int n, const float (&x)[4]) {
    float* to = memory.bias_gradient(strip) + g * kWide + j * kStrip + 8 * n + 2 * q;
    store_pair(to, x[0], x[1]);
    store_pair(to + 8 * kWide, x[2], x[3]);
  };
  const float scale = a.scale * kLog2E;
  Band band{0, 0};
  int stage = 0;
#pragma unroll 1
  do {  // for every group; there is one, unless blocks go over heads
    if constexpr (!kOverHeads) {
      band = band_of(slots, place, strip, a.reach());
      __syncthreads();  // the table is there
    }
    // Not in registers, of which the gradient of the bias takes as many.
    [[maybe_unused]] float4* bias = memory.bias + strip * kMostStrips * 2 * 32 + lane;
    [[maybe_unused]] PairPlaces places[kMostStrips][2];
    [[maybe_unused]] WindowSums sums;
    if constexpr (kOverHeads) {
      const WindowStarts windows(slots, place);
      band = windows.band(slots, strip);
      make_places(slots, strip, band, [&](int j, int n, PairPlaces x) { places[j][n] = x; });
      if (a.partial != nullptr) sums.find(slots, windows, strip, kWide, a.table_rows);
    } else {
      make_bias(slots, strip, band, [&](int j, int n, float4 x) { bias[(2 * j + n) * 32] = x; });
    }
    const int* rows = slots.row + strip * kStrip;
    const Results<T, D> results(rows);
    HeadRows<T> grad_query_rows = rows_of(a.grad_q, place), grad_key_rows = rows_of(a.grad_k, place);
    HeadRows<T> grad_value_rows = rows_of(a.grad_v, place);
    // Where the lane reads in a stage: its strip, and those of its band.
    const unsigned own_strip = in_register(strip * Row::kStripBytes);
    const unsigned own_at = in_register(own_strip + P::Left::lane_offset());
    const unsigned scores_at = in_register(band.first * Row::kStripBytes + P::ScoresRight::lane_offset());
    const unsigned apply_at = in_register(band.first * Row::kStripBytes + P::ApplyRight::lane_offset());
    // Where it leaves probabilities, and reads them, transposed.
    constexpr unsigned kWideBytes = kWide * unsigned(sizeof(T)), kSquareBytes = kStrip * unsigned(sizeof(T));
    const unsigned ds_step = memory.rows * kWideBytes;
    const SharedAddress p_at = in_register(shared_address(memory.p)) + strip * kStrip * kWideBytes +
                               band.first * kSquareBytes;
    const SharedAddress own_p = in_register(p_at + lane % 16 * kWideBytes + lane / 16 * 16);
    const SharedAddress transposed_p = in_register(
        P::transposed(memory.p + band.first * kStrip * kWide + strip * kStrip, kWide));

    for (int step = first_step; step < last_step; ++step, stage ^= 1) {
      const float own_lse[2] = {next_lse[0] * kLog2E, next_lse[1] * kLog2E};
      if constexpr (!kOverHeads) load_lse(step + 1);
      copy_async_wait<0>();
      // Also: no warp still works on the stage that is filled next.
      __syncthreads();
      int next_step = step + 1;
      if constexpr (kOverHeads) {
        if (next_step == last_step && next_group.place.has_images()) {
          const int* row = next_group.put(a, slots).row;
          __syncthreads();
          next_step = first_step;
          const Place& after = next_group.place;
          copied = Pieces<T, D>(row, threadIdx.x, blockDim.x);
          query_rows.to(a.q, after);
          key_rows.to(a.k, after);
          value_rows.to(a.v, after);
          grad_out_rows.to(a.grad_out, after);
          lse_row[0] = row[strip * kStrip + g];
          lse_row[1] = row[strip * kStrip + g + 8];
          lse = lse_of(after);
        }
        load_lse(next_step);
        __syncwarp();  // ldmatrix takes whole warps
      }
      start_load(stage ^ 1, next_step);
      [[maybe_unused]] const float* column = slots.table + (step - first_step) * slots.column;
      const SharedAddress tile = tiles + stage * stage_bytes;
      Wide<D> grad_query;
      clear<D>(grad_query);

      // The strip as queries.
      with_strips(band.count(), [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        typename P::Left query, grad_out;
        query.load(tile + Memory::kQuery * tile_bytes + own_at, nullptr);
        grad_out.load(tile + Memory::kGradOut * tile_bytes + own_at, nullptr);
        const typename P::ScoresRight key{tile + Memory::kKey * tile_bytes + scores_at};
        const typename P::ScoresRight value{tile + Memory::kValue * tile_bytes + scores_at};
        const typename P::ApplyRight applied_key{tile + Memory::kKey * tile_bytes + apply_at};
        Square p[kCount], dp[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
#pragma unroll
          for (int n = 0; n < 2; ++n)
            if constexpr (kOverHeads) set(p[j][n], places[j][n].of(column));
            else set(p[j][n], bias[(2 * j + n) * 32]);
          P::scores(p[j], query, key, j);
          clear(dp[j]);
          P::scores(dp[j], grad_out, value, j);
        }
        float delta[2][2] = {};
#pragma unroll
        for (int j = 0; j < kCount; ++j)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              p[j][n][e] = exp2_fast(fmaf(p[j][n][e], scale, -own_lse[e / 2]));
              delta[e / 2][e % 2] = fmaf(p[j][n][e], dp[j][n][e], delta[e / 2][e % 2]);
            }
        const float own_delta[2] = {
            quad_sum(delta[0][0] + delta[0][1]), quad_sum(delta[1][0] + delta[1][1])};
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              dp[j][n][e] = p[j][n][e] * (dp[j][n][e] - own_delta[e / 2]);
              if constexpr (!kOverHeads) grad_bias[j][n][e] += dp[j][n][e];
            }
            if constexpr (kOverHeads)
              if (a.partial != nullptr) store_bias_gradient(band.first + j, n, dp[j][n]);
          }
          const typename P::Rounded rounded_p(p[j]), rounded_ds(dp[j]);
          const auto of = [&](unsigned row, unsigned half) {
            return p_at + row * kWideBytes + half * 16 + j * kSquareBytes;
          };
          store_matrices(rounded_p.a, own_p + j * kSquareBytes, of);
          store_matrices(
              rounded_ds.a, own_p + ds_step + j * kSquareBytes,
              [&](unsigned row, unsigned half) { return of(row, half) + ds_step; });
          P::apply(grad_query, rounded_ds, applied_key, j);
        }
      });
      if constexpr (kOverHeads) {
        if (a.partial != nullptr) {
          __syncwarp();
          sums.add(memory.copies + (step - first_step) * memory.head_copies(a) +
                       strip * WindowSums::copies(a.table_rows),
                   memory.bias_gradient(strip));
        }
      }
      if (a.grad_q.data == nullptr) continue;

      __syncthreads();  // all probabilities are there; nobody needs k and v any more
      // Their strips serve the results: that of k first for the gradient of q, which frees registers.
      const SharedAddress staging = tile + Memory::kKey * tile_bytes + own_strip;
      results.stage(grad_query, a.scale, a.scale, rows, staging);
      Wide<D> grad_key, grad_value;  // The strip as keys.
      clear<D>(grad_key);
      clear<D>(grad_value);
      with_strips(band.count(), [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        const typename P::ApplyRight query{tile + Memory::kQuery * tile_bytes + apply_at};
        const typename P::ApplyRight grad_out{tile + Memory::kGradOut * tile_bytes + apply_at};
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const SharedAddress p = transposed_p + j * kStrip * kWideBytes;
          P::apply_transposed(grad_value, p, grad_out, j);
          P::apply_transposed(grad_key, p + ds_step, query, j);
        }
      });
      __syncwarp();
      results.pieces.template store<kGeneral>(staging, {grad_query_rows}, a.head_dim);
      __syncwarp();
      results.stage(grad_key, a.scale, a.scale, rows, staging);
      results.stage(grad_value, 1, 1, rows, staging + tile_bytes);
      __syncwarp();
      results.pieces.template store<kGeneral>(
          staging, {grad_key_rows, grad_value_rows}, a.head_dim, tile_bytes);
      grad_query_rows.to_next();
      grad_key_rows.to_next();
      grad_value_rows.to_next();
      if (kGeneral && a.partial_pad != nullptr) {
        const T* staged = memory.stages + (stage * Memory::kTiles + Memory::kKey) * memory.tile +
                          strip * kStrip * Row::kStride;
        add_padding<T, D>(memory.pad_sums(strip), staged, rows);
        add_padding<T, D>(memory.pad_sums(strip) + D, staged + memory.tile, rows);
      }
    }
  } while (next_group.take(a, blocks, slots, place));
  copy_async_wait<0>();
  if (a.partial == nullptr && a.partial_pad == nullptr) return;

  __syncthreads();  // nobody reads tiles or probabilities any more; what was added over heads is there
  if constexpr (kOverHeads) {
    store_window_sums(memory.copies, memory.strips, a, blocks);
    return;
  }
  store_padding<D>(memory.pad_sums(0), memory.strips, a);
  if (a.partial == nullptr) return;
#pragma unroll
  for (int j = 0; j < kMostStrips; ++j) {
    if (j >= band.count()) break;
#pragma unroll
    for (int n = 0; n < 2; ++n) store_bias_gradient(j, n, grad_bias[j][n]);
  }
  __syncwarp();
  add_to_table(
      memory.table_copies(strip, a), memory.bias_gradient(strip), kWide, a, slots, strip, band);
  __syncthreads();
  store_partial(memory.table_copies(0, a), memory.strips * kTableCopies, a);
}

}  // namespace greenmim::cuda
