// Forward attention: a block takes one head of one group, or a piece of a long group, and goes over
// images. With a mask per image it takes one group after the other, and goes over heads of each. A warp owns
// 16 queries and visits the strips of keys that share a window with them.
#pragma once

#include "over_heads.cuh"

namespace greenmim::cuda {

template <class T, int D, bool kOverHeads>
struct ForwardMemory {
  // One image on its way while one is worked on: with more, blocks that read the same lines for other heads
  // are further from one another, and memory is slower.
  static constexpr int kStages = 2;
  enum Tile { kQuery, kKey, kValue, kTiles };

  int tile;      // elements of a tile
  T* stages;     // [kStages][kTiles][rows of the block][kStride]
  T* kept;       // [strips][Products::kKept]
  Slots slots;
  Band* bands;   // of each warp
  size_t bytes;

  __host__ __device__ ForwardMemory(char* start, const Attention& a)
      : ForwardMemory(Carver{start}, a) {}

  __device__ T* at(int stage, Tile which) const { return stages + (stage * kTiles + which) * tile; }

 private:
  __host__ __device__ ForwardMemory(Carver carver, const Attention& a)
      : tile(a.strips * kStrip * TileRow<T, D>::kStride),
        stages(carver.take<T>(int64_t(kStages) * kTiles * tile)),
        kept(carver.take<T>(a.strips * Products<T, D>::kKept)),
        slots(carver, a, kOverHeads),
        bands(carver.take<Band>(kMostStrips)),
        bytes(carver.bytes) {}
};

// Blocks that a processor holds: four where 128 registers are enough without a spill.
template <class T, int D, bool kLong, bool kOverHeads>
constexpr int forward_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int kMost = 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr int kMost = kLong || kOverHeads ? 3 : 4;
#else
  constexpr int kMost = 4;
#endif
  return sizeof(T) == 2 && D <= 32 ? kMost : 1;
}

// kLong: keys come in several pieces, with a running softmax, and the bias is looked up; otherwise there is
// one piece, and the bias stays in registers for all images, as what products of q and k are added to: so
// scores are without their scale, which has to be above zero, until they are exponents. kGeneral: heads may
// have fewer columns than D, and padding a value. kOverHeads: what stays in registers for all heads is where
// the bias lies in a head's column of the table; the slots of the next group are read meanwhile.
template <class T, int D, bool kLong, bool kGeneral, bool kOverHeads = false>
__global__ void __launch_bounds__(32 * kMostStrips, forward_blocks<T, D, kLong, kOverHeads>())
    attention_forward_kernel(const Attention a) {
  static_assert(!kOverHeads || (!kLong && !kGeneral));
  using P = Products<T, D>;
  using Memory = ForwardMemory<T, D, kOverHeads>;
  DYNAMIC_SHARED(shared);
  const Memory memory(shared, a);
  Slots slots = memory.slots;
  std::conditional_t<kOverHeads, HeadBlocks, NoHeadBlocks> blocks(a);
  Place place = start(slots, a, !kLong, blocks);
  const int warp = warp_index(), lane = lane_index(), g = lane / 4, q = lane % 4;
  const int first_own = place.own - place.base, strip = first_own + warp;
  constexpr float kLog2E = 1.4426950408889634f;

  __syncthreads();
  if (!place.has_images() || (!kOverHeads && slots.nothing_from(first_own, true)))
    return copy_async_wait<0>();
  Band band{0, 0}, keys{0, a.strips};
  if constexpr (kLong) {
    band = band_of(slots, place, strip, a.reach());
    keys = union_of(band, memory.bands);
  }
  const int pieces = kLong ? (keys.last - keys.first + a.strips - 1) / a.strips : 1;
  const int pieces_or_one = pieces > 1 ? pieces : 1;

  // What the block goes over: images, or heads.
  int first_step = place.first_image, last_step = place.last_image;
  if constexpr (kOverHeads) first_step = blocks.first_head, last_step = blocks.last_head;
  struct Cursor {
    int step, piece;
  };
  const auto advance = [&](Cursor& cursor) {
    if (++cursor.piece == pieces_or_one) {
      cursor.piece = 0;
      ++cursor.step;
    }
  };
  Pieces<T, D> own(slots.row + first_own * kStrip, threadIdx.x, blockDim.x);
  // Of the image, or head, whose copies start next.
  const auto rows_of = [&](const Rows& x, const Place& place, int pads = 0) {
    return HeadRows<T>(x, place.head, place.first_image, kOverHeads,
                       pads == 0 ? nullptr : padding_of<T>(a, pads, place.head));
  };
  HeadRows<T> query_rows = rows_of(a.q, place), key_rows = rows_of(a.k, place, 1);
  HeadRows<T> value_rows = rows_of(a.v, place, 2);
  const SharedAddress tiles = in_register(shared_address(memory.stages));
  const unsigned tile_bytes = memory.tile * unsigned(sizeof(T)), stage_bytes = Memory::kTiles * tile_bytes;
  const auto start_load = [&](int stage, const Cursor& cursor) {
    if (cursor.step < last_step) {
      const SharedAddress to = tiles + stage * stage_bytes;
      if constexpr (!kLong) {
        own.template load<kGeneral>(to, {query_rows, key_rows, value_rows}, a.head_dim, tile_bytes);
      } else {
        if (cursor.piece == 0)
          own.template load<kGeneral>(to + Memory::kQuery * tile_bytes, {query_rows}, a.head_dim);
        const int first = keys.first + cursor.piece * a.strips;
        Pieces<T, D>(slots.row + first * kStrip, threadIdx.x, blockDim.x)
            .template load<kGeneral>(
                to + Memory::kKey * tile_bytes, {key_rows, value_rows}, a.head_dim, tile_bytes);
      }
      if (!kLong || cursor.piece == pieces_or_one - 1) {
        query_rows.to_next();
        key_rows.to_next();
        value_rows.to_next();
      }
    }
    copy_async_commit();
  };

  Cursor now{first_step, 0}, next = now;
  for (int i = 0; i < Memory::kStages - 1; ++i) {
    start_load(i, next);
    advance(next);
  }

  std::conditional_t<kOverHeads, NextGroup, NoNextGroup> next_group(a, slots, blocks);
  // While the first images are on their way.
  copy_async_wait<Memory::kStages - 1>();
  scale_table(slots, a, kLong ? kLog2E : a.inverse_scale, blocks);
  int stage = 0;
#pragma unroll 1
  do {  // for every group; there is one, unless blocks go over heads
    now = {first_step, 0};
    if constexpr (kOverHeads) band = WindowStarts(slots, place).band(slots, strip);
    else if constexpr (!kLong) band = band_of(slots, place, strip, a.reach());
    if constexpr (!kLong && !kOverHeads) __syncthreads();  // the table is there
    [[maybe_unused]] const int2 upper = slots.query[strip * kStrip + g];
    [[maybe_unused]] const int2 lower = slots.query[strip * kStrip + g + 8];
    [[maybe_unused]] float4 bias[kMostStrips][2];
    [[maybe_unused]] PairPlaces places[kMostStrips][2];
    if constexpr (kOverHeads)
      make_places(slots, strip, band, [&](int j, int n, PairPlaces x) { places[j][n] = x; });
    else if constexpr (!kLong)
      make_bias(slots, strip, band, [&](int j, int n, float4 x) { bias[j][n] = x; });
    const int* rows = slots.row + strip * kStrip;
    const Results<T, D> results(rows);
    HeadRows<T> out_rows = rows_of(a.out, place);
    // Two lanes of four write a row's sum each.
    int lse_row = q < 2 ? rows[g + 8 * q] : Slots::kNothing;
    const bool has_no_sum = lse_row <= Slots::kZeroRow;
    if (has_no_sum) lse_row = Slots::zero_row(lse_row);
    float* lse = nth(a.lse + int64_t(place.head) * a.rows, place.first_image, a.heads * a.rows);

    // Where the lane reads in a stage: as queries, and, in a kernel with one piece, the strips of the band.
    constexpr unsigned kStripBytes = TileRow<T, D>::kStripBytes;
    const unsigned own_strip = in_register(warp * kStripBytes);
    const unsigned query_at = in_register(own_strip + P::Left::lane_offset());
    const unsigned key_at = in_register(
        Memory::kKey * tile_bytes + band.first * kStripBytes + P::ScoresRight::lane_offset());
    const unsigned value_at = in_register(
        Memory::kValue * tile_bytes + band.first * kStripBytes + P::ApplyRight::lane_offset());
    const typename P::At first_tile = P::at(memory.stages);

    typename P::Left query;
    Wide<D> out;
    float top[2], sum[2];
    const float scale = a.scale * kLog2E;
    const float unit = kLong ? 1 : scale;  // of what is in `top`, and in scores, in base 2
    for (; now.step < last_step; advance(now)) {
      copy_async_wait<Memory::kStages - 2>();
      // Also: no warp still works on the stage that is filled next.
      __syncthreads();
      if constexpr (kOverHeads)
        if (next.step == last_step && next_group.place.has_images()) {
          const Slots after = next_group.put(a, slots);
          __syncthreads();
          next = {first_step, 0};
          own = Pieces<T, D>(after.row, threadIdx.x, blockDim.x);
          query_rows.to(a.q, next_group.place);
          key_rows.to(a.k, next_group.place);
          value_rows.to(a.v, next_group.place);
        }
      start_load(stage == 0 ? Memory::kStages - 1 : stage - 1, next);
      advance(next);
      [[maybe_unused]] const float* column = slots.table + (now.step - first_step) * slots.column;
      const typename P::At tile = first_tile + stage * stage_bytes;
      if (now.piece == 0) {
        query.load(tile + query_at, memory.kept + warp * P::kKept);
        clear<D>(out);
        top[0] = top[1] = -INFINITY;
        sum[0] = sum[1] = 0;
      }
      // The band, or what of it is in the piece.
      const int before = kLong ? keys.first + now.piece * a.strips : 0;
      const int first = kLong ? std::max(band.first, before) : band.first;
      const int last = kLong ? std::min(band.last, before + a.strips) : band.last;
      const int skipped = kLong ? (first - before - band.first) * int(kStripBytes) : 0;
      with_strips(last - first, [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        const typename P::ScoresRight key{tile + key_at + skipped};
        const typename P::ApplyRight value{tile + value_at + skipped};
        Square score[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          clear(score[j]);
          if constexpr (!kLong)
#pragma unroll
            for (int n = 0; n < 2; ++n)
              set(score[j][n], kOverHeads ? places[j][n].of(column) : bias[j][n]);
          P::scores(score[j], query, key, j);
        }
        float new_top[2][2] = {{top[0], top[0]}, {top[1], top[1]}};
#pragma unroll
        for (int j = 0; j < kCount; ++j)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              if constexpr (kLong) {
                const int2 by = slots.key[(first + j) * kStrip + 8 * n + 2 * q + e % 2];
                score[j][n][e] = fmaf(
                    score[j][n][e], scale, bias_of(e < 2 ? upper : lower, by, slots.table));
              }
              new_top[e / 2][e % 2] = fmaxf(new_top[e / 2][e % 2], score[j][n][e]);
            }
        float pivot[2], more[2][2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float found = quad_max(fmaxf(new_top[half][0], new_top[half][1]));
          pivot[half] = found * unit;
          if constexpr (kLong) {
            // No key of the row's window yet.
            if (found == -INFINITY) pivot[half] = 0;
            const float factor = exp2_fast(top[half] - pivot[half]);
            sum[half] *= factor;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
              out[n][2 * half] *= factor;
              out[n][2 * half + 1] *= factor;
            }
          }
          top[half] = found;
        }
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              score[j][n][e] = exp2_fast(fmaf(score[j][n][e], unit, -pivot[e / 2]));
              more[e / 2][e % 2] += score[j][n][e];
            }
          P::apply(out, typename P::Rounded(score[j]), value, j);
        }
        sum[0] += more[0][0] + more[0][1];
        sum[1] += more[1][0] + more[1][1];
      });
      if (now.piece == pieces_or_one - 1) {
        const float total[2] = {quad_sum(sum[0]), quad_sum(sum[1])};
        // The strip of queries is in registers now, so its memory serves the results; in later pieces
        // nothing was loaded there.
        __syncwarp();
        // Infinite where no score is above minus infinity: zero times it is NaN, as there is no softmax.
        // Padding, which has no key, is not written, or as zeros.
        results.stage(
            out, reciprocal_fast(total[0]), reciprocal_fast(total[1]), rows, tile + own_strip);
        const float own_lse = (q % 2 == 0 ? top[0] : top[1]) * unit + log2_fast(q % 2 == 0 ? total[0] : total[1]);
        if (lse_row >= 0) lse[computed_here(lse_row)] = has_no_sum ? 0 : own_lse * 0.6931471805599453f;
        __syncwarp();
        results.pieces.template store<kGeneral>(
            tiles + stage * stage_bytes + own_strip, {out_rows}, a.head_dim);
        out_rows.to_next();
        lse = nth(lse, 1, kOverHeads ? a.rows : a.heads * a.rows);
      }
      stage = stage == Memory::kStages - 1 ? 0 : stage + 1;
    }
  } while (next_group.take(a, blocks, slots, place));
  copy_async_wait<0>();
}

}  // namespace greenmim::cuda
