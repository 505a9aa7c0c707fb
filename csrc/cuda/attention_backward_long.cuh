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
  using Row = TileRow<T, D>;
  static constexpr int kStages = 2;
  // Of a step over queries, and of one over keys.
  enum QueryTile { kQuery, kGradOut, kOut, kTiles };
  enum KeyTile { kKey, kValue };

  int strips, rows, tile;
  int gradient_stride;
  T* stages;        // [kStages][kTiles][rows][row]; at the end the warps' copies of the table
  float* lse;       // [kStages][rows]
  T* staging;       // [strips][16][row]
  T* kept;          // [strips][2][Products::kKept]
  float* gradient;  // [strips][16][gradient_stride], or nothing
  float* padding;   // [strips][2][D] sums for k and v of the padding, or nothing
  Slots slots;
  Band* bands;
  size_t bytes;

  __host__ __device__ LongBackwardMemory(char* start, const Attention& a)
      : LongBackwardMemory(Carver{start}, a) {}

  __device__ T* at(int stage, int which, int strip = 0) const {
    return stages + (stage * kTiles + which) * tile + strip * kStrip * Row::kStride;
  }
  __device__ T* staging_of(int warp) const { return staging + warp * kStrip * Row::kStride; }
  __device__ T* kept_of(int warp) const { return kept + 2 * warp * Products<T, D>::kKept; }
  __device__ float* bias_gradient(int warp) const {
    return gradient + warp * kStrip * gradient_stride;
  }
  // [kTableCopies][rows of the table] of a warp, where the tiles were.
  __device__ float* table_copies(int warp, const Attention& a) const {
    return reinterpret_cast<float*>(stages) + warp * kTableCopies * a.table_rows;
  }
  __device__ float* pad_sums(int warp) const { return padding + warp * 2 * D; }

 private:
  __host__ __device__ LongBackwardMemory(Carver carver, const Attention& a)
      : strips(a.strips),
        rows(a.strips * kStrip),
        tile(rows * Row::kStride),
        gradient_stride(a.strips_of_strip() * kStrip + 8),
        stages(carver.take<T>(std::max<int64_t>(
            int64_t(kStages) * kTiles * tile,
            int64_t(strips) * kTableCopies * a.table_rows * 4 / int64_t(sizeof(T))))),
        lse(carver.take<float>(kStages * rows)),
        staging(carver.take<T>(tile)),
        kept(carver.take<T>(2 * a.strips * Products<T, D>::kKept)),
        gradient(carver.take<float>(a.partial == nullptr ? 0 : int64_t(rows) * gradient_stride)),
        padding(carver.take<float>(a.partial_pad == nullptr ? 0 : strips * 2 * D)),
        slots(carver, a),
        bands(carver.take<Band>(kMostStrips)),
        bytes(carver.bytes) {}
};

// Sums of grad_out * out for the rows of a strip, two lanes a row; then `of` gives any row's. Both
// tiles keep the pieces of a row in the same order, so it does not matter which.
template <class T, int D>
struct RowDelta {
  float value;

  __device__ __forceinline__ RowDelta(const T* grad_out, const T* out) {
    const int offset = lane_index() / 2 * TileRow<T, D>::kStride + lane_index() % 2 * (D / 2);
    value = dot<T, D / 2>(grad_out + offset, out + offset);
    value += __shfl_xor_sync(0xFFFFFFFF, value, 1);
  }
  __device__ __forceinline__ float of(int row) const {
    return __shfl_sync(0xFFFFFFFF, value, 2 * row);
  }
};

enum class Step { OwnQueries, Keys, OwnKeys, Queries };

// kGeneral: heads may have fewer columns than D, and padding a value.
template <class T, int D, bool kGeneral>
__global__ void __launch_bounds__(32 * kMostStrips, 1)
    attention_backward_long_kernel(const Attention a) {
  using P = Products<T, D>;
  using Memory = LongBackwardMemory<T, D>;
  DYNAMIC_SHARED(shared);
  const Memory memory(shared, a);
  memory.slots.start_table(a);
  const Place place = memory.slots.find_place(a, false);
  const int warp = warp_index(), lane = lane_index(), g = lane / 4, q = lane % 4;
  const int first_own = place.own - place.base, strip = first_own + warp;
  const Slots& slots = memory.slots;
  constexpr float kLog2E = 1.4426950408889634f;

  allow_next_kernel();
  __syncthreads();
  if (!place.has_images() || memory.slots.nothing_from(first_own, a.grad_q.data != nullptr)) {
    copy_async_wait<0>();
    store_padding<D>(nullptr, 0, a);
    return store_partial(nullptr, 0, a);
  }
  if (kGeneral && a.partial_pad != nullptr) clear_padding<D>(memory.pad_sums(warp));
  const Band band = band_of(memory.slots, place, strip, a.reach());
  const Band whole = union_of(band, memory.bands);
  const int pieces = (whole.last - whole.first + a.strips - 1) / a.strips;
  const int2 query_upper = slots.query[strip * kStrip + g], key_upper = slots.key[strip * kStrip + g];
  const int2 query_lower = slots.query[strip * kStrip + g + 8];
  const int2 key_lower = slots.key[strip * kStrip + g + 8];
  float* gradient = memory.bias_gradient(warp);
  if (a.partial != nullptr)
#pragma unroll 1
    for (int i = lane; i < kStrip * memory.gradient_stride; i += 32) gradient[i] = 0;
  __syncwarp();

  // The steps in their order, and the copies for one of them.
  struct Cursor {
    int image;
    Step step;
    int piece;
  };
  const auto advance = [&](Cursor& cursor) {
    const bool is_own = cursor.step == Step::OwnQueries || cursor.step == Step::OwnKeys;
    if (is_own ? pieces > 0 : cursor.piece + 1 < pieces) {
      cursor.piece = is_own ? 0 : cursor.piece + 1;
      if (cursor.step == Step::OwnQueries) cursor.step = Step::Keys;
      if (cursor.step == Step::OwnKeys) cursor.step = Step::Queries;
      return;
    }
    const bool as_queries = cursor.step == Step::OwnQueries || cursor.step == Step::Keys;
    if (as_queries && a.grad_q.data != nullptr) {
      cursor.step = Step::OwnKeys;
    } else {
      cursor.step = Step::OwnQueries;
      ++cursor.image;
    }
  };
  const auto start_load = [&](int stage, const Cursor& cursor) {
    if (cursor.image < place.last_image) {
      const bool is_own = cursor.step == Step::OwnQueries || cursor.step == Step::OwnKeys;
      const int first = is_own ? first_own : whole.first + cursor.piece * a.strips;
      const int* row = memory.slots.row + first * kStrip;
      const Pieces<T, D> copied(row, threadIdx.x, blockDim.x);
      const auto rows_of = [&](const Rows& x, int pads = 0) {
        return HeadRows<T>(x, place.head, cursor.image, false,
                           pads == 0 ? nullptr : padding_of<T>(a, pads, place.head));
      };
      if (cursor.step == Step::OwnQueries || cursor.step == Step::Queries) {
        copied.template load<kGeneral>(shared_address(memory.at(stage, Memory::kQuery)),
                                       {rows_of(a.q), rows_of(a.grad_out), rows_of(a.out)},
                                       a.head_dim, memory.tile * unsigned(sizeof(T)));
        load_numbers(memory.lse + stage * memory.rows,
                     nth<const float>(a.lse + int64_t(place.head) * a.rows, cursor.image,
                                           a.heads * a.rows),
                     row);
      } else {
        copied.template load<kGeneral>(shared_address(memory.at(stage, Memory::kKey)),
                                       {rows_of(a.k, 1), rows_of(a.v, 2)}, a.head_dim, memory.tile * unsigned(sizeof(T)));
      }
    }
    copy_async_commit();
  };
  Cursor next{place.first_image, Step::OwnQueries, 0};
  int stage = 1;
  // Waits for the tiles of the next step, now in `stage`, and starts the copies of the one after it.
  const auto take_step = [&] {
    copy_async_wait<0>();
    // Also: no warp still works on the stage that is filled next.
    __syncthreads();
    start_load(stage, next);
    advance(next);
    stage ^= 1;
  };

  typename P::Left first_left, second_left;  // q and grad_out, then k and v
  const auto load_left = [&](int first, int second) {
    T* kept = memory.kept_of(warp);
    const auto at = [&](int which) { return P::at(memory.at(stage, which, warp)) + P::Left::lane_offset(); };
    first_left.load(at(first), kept);
    second_left.load(at(second), kept + P::kKept);
  };
  const float scale = a.scale * kLog2E;
  const auto probability = [&](float score, int2 query, int2 key, float lse) {
    return exp2_fast(fmaf(score, scale, bias_of(query, key, slots.table)) - lse);
  };

  start_load(0, next);
  advance(next);
  copy_async_wait<1>();
  memory.slots.scale_column(a, kLog2E, memory.slots.table);  // while the first strips are on their way
  const int* row = slots.row + strip * kStrip;
  const Results<T, D> results(row);
  for (int image = place.first_image; image < place.last_image; ++image) {
    const auto write = [&](Wide<D>& x, float factor, const Rows& to, int pads = 0) {
      T* staging = memory.staging_of(warp);
      __syncwarp();
      results.stage(x, factor, factor, row, P::at(staging));
      __syncwarp();
      results.pieces.template store<kGeneral>(
          shared_address(staging), {HeadRows<T>(to, place.head, image)}, a.head_dim);
      if (kGeneral && pads != 0 && a.partial_pad != nullptr)
        add_padding<T, D>(memory.pad_sums(warp) + (pads - 1) * D, staging, row);
    };

    // Step::OwnQueries
    take_step();
    load_left(Memory::kQuery, Memory::kGradOut);
    Wide<D> grad_query;
    clear<D>(grad_query);
    // The output is rounded, and delta with it: rows of dS then add up to `off` and not to zero, which a
    // large logit scale multiplies. P k takes it away again.
    constexpr bool kRounded = sizeof(T) == 2;
    [[maybe_unused]] Wide<D> applied_p;
    if constexpr (kRounded) clear<D>(applied_p);
    [[maybe_unused]] float off[2] = {};
    float own_lse[2], own_delta[2];
    {
      const RowDelta<T, D> delta(
          memory.at(stage, Memory::kGradOut, warp), memory.at(stage, Memory::kOut, warp));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        own_delta[half] = delta.of(g + 8 * half);
        own_lse[half] = memory.lse[stage * memory.rows + warp * kStrip + g + 8 * half] * kLog2E;
      }
    }
    for (int first = whole.first; first < whole.last; first += a.strips) {  // Step::Keys
      take_step();
      const typename P::ScoresRight key{P::at(memory.at(stage, Memory::kKey)) + P::ScoresRight::lane_offset()};
      const typename P::ScoresRight value{P::at(memory.at(stage, Memory::kValue)) + P::ScoresRight::lane_offset()};
      const typename P::ApplyRight applied_key{P::at(memory.at(stage, Memory::kKey)) + P::ApplyRight::lane_offset()};
      for (int j = 0; j < a.strips; ++j) {
        if (!band.holds(first + j)) continue;
        const int2* keys = slots.key + (first + j) * kStrip + 2 * q;
        Square p, dp;
        clear(p);
        P::scores(p, first_left, key, j);
        clear(dp);
        P::scores(dp, second_left, value, j);
        float* into = gradient + (first + j - band.first) * kStrip + 2 * q;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              p[n][e] = probability(
                  p[n][e], half == 0 ? query_upper : query_lower, keys[8 * n + e % 2], own_lse[half]);
              dp[n][e] = p[n][e] * (dp[n][e] - own_delta[half]);
              if constexpr (kRounded) off[half] += dp[n][e];
            }
            if (a.partial != nullptr) {
              float2* two = reinterpret_cast<float2*>(
                  into + (g + 8 * half) * memory.gradient_stride + 8 * n);
              *two = float2{two->x + dp[n][2 * half], two->y + dp[n][2 * half + 1]};
            }
          }
        if (a.grad_q.data == nullptr) continue;
        P::apply(grad_query, typename P::Rounded(dp), applied_key, j);
        if constexpr (kRounded) P::apply(applied_p, typename P::Rounded(p), applied_key, j);
      }
    }
    if (a.grad_q.data == nullptr) continue;
    if constexpr (kRounded) {
      const float sum[2] = {quad_sum(off[0]), quad_sum(off[1])};
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) grad_query[n][e] -= sum[e / 2] * applied_p[n][e];
    }
    write(grad_query, a.scale, a.grad_q);

    // Step::OwnKeys
    take_step();
    load_left(Memory::kKey, Memory::kValue);
    Wide<D> grad_key, grad_value;
    clear<D>(grad_key);
    clear<D>(grad_value);
    for (int first = whole.first; first < whole.last; first += a.strips) {  // Step::Queries
      take_step();
      const typename P::ScoresRight query{P::at(memory.at(stage, Memory::kQuery)) + P::ScoresRight::lane_offset()};
      const typename P::ScoresRight grad_out{P::at(memory.at(stage, Memory::kGradOut)) + P::ScoresRight::lane_offset()};
      const typename P::ApplyRight applied_query{P::at(memory.at(stage, Memory::kQuery)) + P::ApplyRight::lane_offset()};
      const typename P::ApplyRight applied_grad_out{P::at(memory.at(stage, Memory::kGradOut)) + P::ApplyRight::lane_offset()};
      for (int j = 0; j < a.strips; ++j) {
        if (!band.holds(first + j)) continue;
        Square p, dp;  // transposed: rows are the block's keys
        clear(p);
        P::scores(p, first_left, query, j);
        clear(dp);
        P::scores(dp, second_left, grad_out, j);
        const RowDelta<T, D> delta(
            memory.at(stage, Memory::kGradOut, j), memory.at(stage, Memory::kOut, j));
        const float* lse = memory.lse + stage * memory.rows + j * kStrip;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            const int slot = 8 * n + 2 * q + column;
            const float query_delta = delta.of(slot), query_lse = lse[slot] * kLog2E;
            const int2 of_query = slots.query[(first + j) * kStrip + slot];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int e = 2 * half + column;
              p[n][e] = probability(p[n][e], of_query, half == 0 ? key_upper : key_lower, query_lse);
              dp[n][e] = p[n][e] * (dp[n][e] - query_delta);
            }
          }
        P::apply(grad_value, typename P::Rounded(p), applied_grad_out, j);
        P::apply(grad_key, typename P::Rounded(dp), applied_query, j);
      }
    }
    write(grad_key, a.scale, a.grad_k, 1);
    write(grad_value, 1, a.grad_v, 2);
  }
  copy_async_wait<0>();
  if (a.partial == nullptr && a.partial_pad == nullptr) return;

  __syncthreads();  // nobody reads tiles any more
  store_padding<D>(memory.pad_sums(0), memory.strips, a);
  if (a.partial == nullptr) return;
  add_to_table(memory.table_copies(warp, a), gradient, memory.gradient_stride, a, memory.slots,
               strip, band);
  __syncthreads();
  store_partial(memory.table_copies(0, a), memory.strips * kTableCopies, a);
}

}  // namespace greenmim::cuda
