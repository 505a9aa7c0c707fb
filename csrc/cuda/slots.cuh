// What the attention kernels share: where a block works, its slots, their bias, and its tiles.
#pragma once

#include "products.cuh"

namespace greenmim::cuda {

// Cuts shared memory, or, from null, measures it.
struct Carver {
  char* start;
  size_t bytes = 0;

  template <class T>
  __host__ __device__ T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(start + bytes);
    bytes += (size_t(count) * sizeof(T) + 15) / 16 * 16;
    return found;
  }
};

// Which head, group, strips and images a block works on. Heads are innermost: blocks that run at the
// same time then read neighbouring bytes.
struct Place {
  int head, group;
  int own;    // the block's first strip in its group
  int base;   // the first strip in reach; strips are counted from here below
  int count;  // strips in reach
  int64_t first_image, last_image;

  __device__ explicit Place(const Attention& a) {
    int rest = int(blockIdx.x);
    head = rest % a.heads;
    rest /= a.heads;
    own = rest % a.pieces() * a.strips;
    rest /= a.pieces();
    group = rest % a.groups;
    first_image = int64_t(rest / a.groups) * a.images;
    last_image = first_image + a.images < a.batch ? first_image + a.images : a.batch;
    base = own > a.reach() ? own - a.reach() : 0;
    const int end = own + a.strips + a.reach();
    count = (end < a.group_strips() ? end : a.group_strips()) - base;
  }
};

// The slots in reach, and the head's column of the bias table in base 2.
struct Slots {
  int2* cell;    // window and position; -1 as window of padding
  int* row;      // row of the token in its image, -1 in padding
  float* table;  // zeros where there is none

  __host__ __device__ Slots(Carver& carver, const Attention& a) {
    // A block reads whole pieces, of which the last may end after the last strip in reach.
    const int slots = (a.strips_of_block() + a.strips) * kStrip;
    cell = carver.take<int2>(slots);
    row = carver.take<int>(slots);
    table = carver.take<float>(a.table_rows());
  }

  __device__ void read_partition(const Attention& a, const Place& place) const {
    const int64_t partition = a.per_image ? place.first_image : 0;
    const int64_t first = (partition * a.groups + place.group) * a.slots;
    const int width = 2 * a.window_width - 1;
    for (int i = int(threadIdx.x); i < (place.count + a.strips) * kStrip; i += int(blockDim.x)) {
      const int slot = place.base * kStrip + i;
      int window = -1, position = 0, token = -1;
      if (i < place.count * kStrip && slot < a.slots) {
        // All at once: a read that asks another one first would wait for it.
        const int down = a.coords[2 * (first + slot)], right = a.coords[2 * (first + slot) + 1];
        window = a.window_id[first + slot];
        token = a.token_index == nullptr ? place.group * a.slots + slot
                                         : a.token_index[first + slot];
        if (window >= 0)
          position = down * width + right;
        else
          token = -1;
      }
      cell[i] = int2{window, position};
      row[i] = token;
    }
  }

  __device__ void read_table(const Attention& a, const Place& place) const {
    constexpr float kLog2E = 1.4426950408889634f;
    for (int i = int(threadIdx.x); i < a.table_rows(); i += int(blockDim.x))
      table[i] = a.table == nullptr ? 0.0f : a.table[int64_t(i) * a.heads + place.head] * kLog2E;
  }
};

// Where the difference of two equal positions is in the table.
__device__ __forceinline__ int table_centre(const Attention& a) {
  return (a.window_height - 1) * (2 * a.window_width - 1) + a.window_width - 1;
}

__device__ __forceinline__ bool share_window(int2 query, int2 key) {
  return query.x == key.x && query.x >= 0;
}

// What is added to the score, in base 2; minus infinity between windows.
__device__ __forceinline__ float bias_of(int2 query, int2 key, const float* table, int centre) {
  return share_window(query, key) ? table[query.y - key.y + centre] : -INFINITY;
}

// A run of strips, counted from the first one in reach.
struct Band {
  int first, last;  // last is excluded

  __device__ __forceinline__ bool holds(int strip) const {
    return first <= strip && strip < last;
  }
};

// The strips that share a window with `strip`: the slots of a window are neighbours, so what is
// beyond the strip's own slots belongs to its first and its last window.
__device__ inline Band band_of(
    const Slots& slots, const Place& place, int strip, int reach) {
  if (strip >= place.count) return {0, 0};
  const int first_window = slots.cell[strip * kStrip].x;
  if (first_window < 0) return {0, 0};  // padding comes last
  int last_window = first_window;
  for (int i = 1; i < kStrip; ++i) {
    const int window = slots.cell[strip * kStrip + i].x;
    if (window >= 0) last_window = window;
  }
  int first = strip, last = strip;
  for (int i = lane_index(); i < place.count * kStrip; i += 32) {
    const int window = slots.cell[i].x;
    if (window != first_window && window != last_window) continue;
    first = i / kStrip < first ? i / kStrip : first;
    last = i / kStrip > last ? i / kStrip : last;
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const int other_first = __shfl_xor_sync(0xFFFFFFFF, first, mask);
    const int other_last = __shfl_xor_sync(0xFFFFFFFF, last, mask);
    first = other_first < first ? other_first : first;
    last = other_last > last ? other_last : last;
  }
  // Slots that are not sorted by window must not lead out of the memory set aside for the band.
  first = first > strip - reach ? first : strip - reach;
  last = last < strip + reach ? last : strip + reach;
  return {first, last + 1};
}

// The bands of all warps, one after the other: what the block has to read.
__device__ inline Band union_of(Band own, Band* all) {
  const int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  if (lane_index() == 0) all[warp] = own;
  __syncthreads();
  Band whole{0, 0};
  for (int i = 0; i < warps; ++i) {
    const Band band = all[i];
    if (band.first == band.last) continue;
    if (whole.first == whole.last) whole = band;
    whole.first = band.first < whole.first ? band.first : whole.first;
    whole.last = band.last > whole.last ? band.last : whole.last;
  }
  return whole;
}

// Starts the copy of a block's strips of rows into shared memory, from one tensor or from
// kTensors columns of it that lie `source_step` apart, into tiles that lie `tile_step` apart. Rows of
// padding become zeros, since a product takes all rows and zero times NaN is NaN. A block has two
// threads for a row.
template <class T, int D, int kTensors = 1>
__device__ __forceinline__ void load_tiles(
    T* tile, const T* source, int stride, const int* row, int tile_step = 0, int source_step = 0) {
  constexpr int kPiece = 16 / int(sizeof(T)), kPieces = D / kPiece;
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    const int piece = computed_here(int(threadIdx.x)) + i * int(blockDim.x);
    const int slot = piece / kPieces, column = piece % kPieces * kPiece;
    const int from = row[slot];
    T* to = tile + slot * kStride<T, D> + column;
    const T* at = source + int64_t(from < 0 ? 0 : from) * stride + column;
#pragma unroll
    for (int t = 0; t < kTensors; ++t)
      copy_async_16(to + t * tile_step, at + t * source_step, from >= 0);
  }
}

// The same for one number per row. Ends with a warp whose lanes go on together: with one strip, half of
// them have nothing to copy.
__device__ __forceinline__ void load_numbers(float* to, const float* source, const int* row) {
  const int slot = int(threadIdx.x);
  if (slot < int(blockDim.x) / 2) {
    const int from = row[slot];
    copy_async_4(to + slot, source + (from < 0 ? 0 : from), from >= 0);
  }
  __syncwarp();
}

// Writes a warp's strip of results, times `factor` for each of the lane's two rows, in accesses of
// 16 bytes: through `staging`, memory for 16 rows that no other warp uses now.
template <class T, int D>
__device__ __forceinline__ void store_strip(
    const Wide<D>& x, float upper_factor, float lower_factor, T* staging, T* out, int stride,
    const Attention& a, const Place& place, int strip, const int* row) {
  const int lane = computed_here(lane_index()), g = lane / 4, q = lane % 4;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    T* to = staging + g * kStride<T, D> + 8 * n + 2 * q;
    store_pair(to, x[n][0] * upper_factor, x[n][1] * upper_factor);
    store_pair(to + 8 * kStride<T, D>, x[n][2] * lower_factor, x[n][3] * lower_factor);
  }
  __syncwarp();
  constexpr int kPiece = 16 / int(sizeof(T)), kPieces = D / kPiece;
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    const int slot = (lane + 32 * i) / kPieces, column = (lane + 32 * i) % kPieces * kPiece;
    const int token = row[strip * kStrip + slot];
    int to = token;
    uint4 results = *reinterpret_cast<const uint4*>(staging + slot * kStride<T, D> + column);
    if (a.token_index == nullptr) {
      // Padding of gathered groups is part of the result, as zeros; what was computed for it is NaN
      // beside a token that is not finite.
      const int in_group = (place.base + strip) * kStrip + slot;
      to = in_group < a.slots ? place.group * a.slots + in_group : -1;
      if (token < 0) results = uint4{0, 0, 0, 0};
    }
    if (to >= 0) *reinterpret_cast<uint4*>(out + int64_t(to) * stride + column) = results;
  }
}

// Adds a warp's strip of bias gradients to a copy of the table. Keys of one row have different
// places in the table, so one row at a time needs no atomics and has one order.
__device__ inline void add_to_table(
    float* copy, const float* gradient, int stride, const Slots& slots, int strip, Band keys,
    int centre) {
  for (int i = 0; i < kStrip; ++i) {
    const int2 query = slots.cell[strip * kStrip + i];
    for (int j = lane_index(); j < (keys.last - keys.first) * kStrip; j += 32) {
      const int2 key = slots.cell[keys.first * kStrip + j];
      if (share_window(query, key)) copy[query.y - key.y + centre] += gradient[i * stride + j];
    }
    __syncwarp();
  }
}

// The sum of the warps' copies, in the order of warps, as this block's row of partial sums.
__device__ inline void store_partial(const float* copies, const Attention& a) {
  for (int i = int(threadIdx.x); i < a.table_rows(); i += int(blockDim.x)) {
    float sum = 0;
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) sum += copies[warp * a.table_rows() + i];
    a.partial[int64_t(blockIdx.x) * a.table_rows() + i] = sum;
  }
}

}  // namespace greenmim::cuda
