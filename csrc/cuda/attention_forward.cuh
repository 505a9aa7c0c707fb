// Forward attention: a block takes one head of one group, or a piece of a long group, and goes over
// images. A warp owns 16 queries and visits the strips of keys that share a window with them.
#pragma once

#include "slots.cuh"

namespace greenmim::cuda {

template <class T, int D>
struct ForwardMemory {
  // Two tiles on their way while one is worked on.
  static constexpr int kStages = 3;
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
        slots(carver, a),
        bands(carver.take<Band>(kMostStrips)),
        bytes(carver.bytes) {}
};

// kLong: keys come in several pieces, with a running softmax, and the bias is looked up; otherwise
// there is one piece and the bias stays in registers for all images. kGeneral:
// heads may have fewer columns than D, and padding a value. Where 128 registers are enough, a processor
// holds four blocks.
template <class T, int D, bool kLong, bool kGeneral>
__global__ void __launch_bounds__(32 * kMostStrips, sizeof(T) == 2 && D <= 32 ? 4 : 1)
    attention_forward_kernel(const Attention a) {
  using P = Products<T, D>;
  using Memory = ForwardMemory<T, D>;
  DYNAMIC_SHARED(shared);
  const Memory memory(shared, a);
  const Place place = memory.slots.find_place(a, !kLong);
  const int warp = int(threadIdx.x) / 32, lane = lane_index(), g = lane / 4, q = lane % 4;
  const int first_own = place.own - place.base, strip = first_own + warp;

  __syncthreads();
  if (!place.has_images() || memory.slots.nothing_from(first_own, true)) return;
  Band band{0, 0}, keys{0, a.strips};
  if constexpr (kLong) {
    band = band_of(memory.slots, place, strip, a.reach());
    keys = union_of(band, memory.bands);
  }
  const int pieces = kLong ? (keys.last - keys.first + a.strips - 1) / a.strips : 1;
  const int pieces_or_one = pieces > 1 ? pieces : 1;

  struct Cursor {
    int image, piece;
  };
  const auto advance = [&](Cursor& cursor) {
    if (++cursor.piece == pieces_or_one) {
      cursor.piece = 0;
      ++cursor.image;
    }
  };
  const auto start_load = [&](int stage, const Cursor& cursor) {
    if (cursor.image < place.last_image) {
      const int* row = memory.slots.row;
      const HeadRows<T> query(a.q, place.head, cursor.image);
      const HeadRows<T> key(a.k, place.head, cursor.image, padding_of<T>(a, 1, place.head));
      const HeadRows<T> value(a.v, place.head, cursor.image, padding_of<T>(a, 2, place.head));
      if constexpr (!kLong) {
        load_tiles<T, D, kGeneral>(memory.at(stage, Memory::kQuery), {query, key, value}, row, a.head_dim,
                         memory.tile);
      } else {
        if (cursor.piece == 0)
          load_tiles<T, D, kGeneral>(memory.at(stage, Memory::kQuery), {query}, row + first_own * kStrip,
                           a.head_dim);
        load_tiles<T, D, kGeneral>(memory.at(stage, Memory::kKey), {key, value},
                         row + (keys.first + cursor.piece * a.strips) * kStrip, a.head_dim,
                         memory.tile);
      }
    }
    copy_async_commit();
  };

  Cursor now{place.first_image, 0}, next = now;
  for (int i = 0; i < Memory::kStages - 1; ++i) {
    start_load(i, next);
    advance(next);
  }

  // While the first images are on their way.
  memory.slots.read_table(a, place);
  if constexpr (!kLong) {
    band = band_of(memory.slots, place, strip, a.reach());
    __syncthreads();  // the table is there
  }
  [[maybe_unused]] const int2 upper = memory.slots.query[strip * kStrip + g];
  [[maybe_unused]] const int2 lower = memory.slots.query[strip * kStrip + g + 8];
  float bias[kLong ? 1 : kMostStrips][2][4];
  if constexpr (!kLong) make_bias(bias, memory.slots, strip, band);

  typename P::Left query;
  Wide<D> out;
  float top[2], sum[2];
  const float scale = a.scale * 1.4426950408889634f;
  int stage = 0;
  for (; now.image < place.last_image; advance(now)) {
    copy_async_wait<Memory::kStages - 2>();
    // Also: no warp still works on the stage that is filled next.
    __syncthreads();
    start_load(stage == 0 ? Memory::kStages - 1 : stage - 1, next);
    advance(next);
    T* own_rows = memory.at(stage, Memory::kQuery) + warp * kStrip * TileRow<T, D>::kStride;
    if (now.piece == 0) {
      query.load(own_rows, memory.kept + warp * P::kKept);
      clear<D>(out);
      top[0] = top[1] = -INFINITY;
      sum[0] = sum[1] = 0;
    }
    const int first = kLong ? keys.first + now.piece * a.strips : 0;
    const typename P::ScoresRight key(memory.at(stage, Memory::kKey));
    const typename P::ApplyRight value(memory.at(stage, Memory::kValue));
    Square score[kMostStrips];
    float new_top[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < kMostStrips; ++j) {
      if (j >= a.strips || !band.holds(first + j)) continue;
      clear(score[j]);
      P::scores(score[j], query, key, j);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float added;
          if constexpr (kLong)
            added = bias_of(e < 2 ? upper : lower,
                            memory.slots.key[(first + j) * kStrip + 8 * n + 2 * q + e % 2],
                            memory.slots.table);
          else
            added = bias[j][n][e];
          score[j][n][e] = fmaf(score[j][n][e], scale, added);
          new_top[e / 2] = fmaxf(new_top[e / 2], score[j][n][e]);
        }
    }
    float pivot[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      new_top[half] = quad_max(new_top[half]);
      pivot[half] = new_top[half];
      if constexpr (kLong) {
        // No key of the row's window yet.
        if (new_top[half] == -INFINITY) pivot[half] = 0;
        const float factor = exp2_fast(top[half] - pivot[half]);
        sum[half] *= factor;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[n][2 * half] *= factor;
          out[n][2 * half + 1] *= factor;
        }
      }
      top[half] = new_top[half];
    }
#pragma unroll
    for (int j = 0; j < kMostStrips; ++j) {
      if (j >= a.strips || !band.holds(first + j)) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          score[j][n][e] = exp2_fast(score[j][n][e] - pivot[e / 2]);
          sum[e / 2] += score[j][n][e];
        }
      P::apply(out, score[j], value, j);
    }
    if (now.piece == pieces_or_one - 1) {
      float inverse[2];
      float* lse = nth(a.lse + int64_t(place.head) * a.rows, now.image, a.heads * a.rows);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(sum[half]);
        // Infinite where no score is above minus infinity: zero times it is NaN, as there is no softmax.
        // Padding, which has no key, is not written, or as zeros.
        inverse[half] = reciprocal_fast(total);
        const int to = memory.slots.row[strip * kStrip + g + 8 * half];
        if (q == 0 && to >= 0)
          lse[to] = (top[half] + log2_fast(total)) * 0.6931471805599453f;
        else if (q == 0 && to <= Slots::kZeroRow)
          lse[Slots::zero_row(to)] = 0;
      }
      // The strip of queries is in registers now, so its memory serves the results; in later pieces
      // nothing was loaded there.
      __syncwarp();
      stage_strip<T, D>(out, inverse[0], inverse[1], own_rows);
      __syncwarp();
      write_strips<T, D, kGeneral>(own_rows, {HeadRows<T>(a.out, place.head, now.image)},
                         memory.slots.row + strip * kStrip, a.head_dim);
    }
    stage = stage == Memory::kStages - 1 ? 0 : stage + 1;
  }
  copy_async_wait<0>();
}

}  // namespace greenmim::cuda
