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
    bytes += (size_t(count) * sizeof(T) + 127) / 128 * 128;  // a tile may be next
    return found;
  }
};

// Which head, group, strips and images a block works on. Heads are innermost: blocks that run at the
// same time then read neighbouring bytes.
//
// With one mask for all images the blocks of a head share the groups that hold tokens, and a run of
// images each; those left over have none.
struct Place {
  int head, group;
  int own;    // the block's first strip in its group
  int base;   // the first strip in reach; strips are counted from here below
  int count;  // strips in reach
  int first_image, last_image;

  // Where the first `filled` groups hold tokens. A block of a kernel for short groups has whole ones.
  __device__ Place(const Attention& a, bool has_whole_group, int filled) {
    const unsigned block = blockIdx.x / unsigned(a.heads);
    head = int(blockIdx.x % unsigned(a.heads));
    const unsigned own_pieces = has_whole_group ? 1 : unsigned(a.pieces());
    const unsigned pieces = unsigned(filled) * own_pieces;
    const unsigned piece = block % pieces, run = block / pieces;
    own = int(piece % own_pieces) * a.strips;
    group = int(piece / own_pieces);
    // The host has divided already where it is as expected; a block's first copies wait for this.
    unsigned images = unsigned(a.images);
    if (filled != a.filled) {
      const unsigned runs = unsigned(a.share) > pieces ? unsigned(a.share) / pieces : 1;
      images = (unsigned(a.batch) + runs - 1) / runs;
    }
    // A run may begin beyond the batch: then it is empty.
    const uint64_t first = uint64_t(run) * images;
    first_image = first < unsigned(a.batch) ? int(first) : a.batch;
    last_image = a.batch - first_image > int(images) ? first_image + int(images) : a.batch;
    base = own > a.reach() ? own - a.reach() : 0;
    const int end = own + a.strips + a.reach();
    count = (end < a.group_strips() ? end : a.group_strips()) - base;
  }

  __device__ bool has_images() const { return first_image < last_image; }
};

// The slots in reach, and the head's column of the bias table in base 2.
struct Slots {
  int2* query;   // window and number of the table's row; -2 as window where there is none
  int2* key;     // the same as key; -1 where there is none
  int* row;      // in the image: the token's that is read and written; or, below zero, what padding is
  float* table;  // a zero where there is none

  __host__ __device__ Slots(Carver& carver, const Attention& a) {
    const int slots = a.known_strips() * kStrip;
    query = carver.take<int2>(slots);
    key = carver.take<int2>(slots);
    row = carver.take<int>(slots);
    table = carver.take<float>(a.table == nullptr ? 1 : a.table_rows);
  }

  // What stands for a slot without a token of a window: kNothing; padding that attends, where it has a
  // value other than zero; or a row of the result that is written as zeros, that of a token in no
  // window, or of padding in gathered groups.
  static constexpr int kNothing = -1, kPadding = -2, kZeroRow = -3;
  static __device__ __forceinline__ int zero_row(int to) { return kZeroRow - to; }  // its inverse

  __device__ void read_partition(const Attention& a, const Place& place) const {
    const int64_t partition = a.per_image ? place.first_image : 0;
    const int64_t first = (partition * a.groups + place.group) * a.slots;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < a.known_strips() * kStrip; i += int(blockDim.x)) {
      int2 as_query{-2, 0}, as_key{-1, 0};
      int entry = kNothing;
      const int slot = place.base * kStrip + i;
      if (i < place.count * kStrip && slot < a.slots) {
        // All at once: a read that asks another one first would wait for it.
        const int query_row = a.query_row[first + slot], key_row = a.key_row[first + slot];
        const int window = a.window_id[first + slot];
        entry =
            a.token_index == nullptr ? place.group * a.slots + slot : a.token_index[first + slot];
        if (window < 0) {
          entry = entry < 0 ? kNothing : zero_row(entry);
        } else {
          as_key = int2{window, a.table == nullptr ? 0 : key_row};
          // Nobody reads what padding would ask for.
          if (entry >= 0) as_query = int2{window, a.table == nullptr ? 0 : query_row};
          else entry = a.pad_value == nullptr ? kNothing : kPadding;
        }
      }
      query[i] = as_query;
      key[i] = as_key;
      row[i] = entry;
    }
  }

  // Where the block works, and its slots. How many groups hold tokens stands in the partition alone,
  // since one with capacity has as many groups for every mask, and those without tokens come last. Not
  // to wait for it, the slots are read at the same time as if it were the expected number, and again
  // where it is another one.
  __device__ Place find_place(const Attention& a, bool has_whole_group) const {
    const int lane = lane_index();
    const int token =
        a.is_counted && lane < a.groups ? a.token_index[int64_t(lane) * a.slots] : -1;
    int filled = a.filled;
#pragma unroll 1
    while (true) {
      const Place place(a, has_whole_group, filled);
      read_partition(a, place);
      if (!a.is_counted) return place;
      const int found = filled_groups(a, token);
      if (found == filled) return place;
      filled = found;
    }
  }

  // Whether a block whose first strip this is has nothing to do: what is in no window is left at once,
  // unless it is part of the result that is written, as zeros.
  __device__ bool nothing_from(int strip, bool writes) const {
    if (key[strip * kStrip].x >= 0) return false;
    return row[strip * kStrip] == kNothing || !writes;
  }

  // One more than the last group that holds tokens, at least one; `token` is that of the first slot of
  // the group that is the lane's number.
  static __device__ int filled_groups(const Attention& a, int token) {
    int filled = 1;
#pragma unroll 1
    for (int first = 0; first < a.groups; first += 32) {
      const int i = first + lane_index();
      if (first > 0) token = i < a.groups ? a.token_index[int64_t(i) * a.slots] : -1;
      const unsigned found = __ballot_sync(0xFFFFFFFF, token >= 0);
      if (found != 0) filled = first + 32 - __clz(int(found));
    }
    return filled;
  }

  __device__ void read_table(const Attention& a, const Place& place) const {
    constexpr float kLog2E = 1.4426950408889634f;
    if (a.table == nullptr && threadIdx.x == 0) table[0] = 0;
#pragma unroll 1
    for (int i = int(threadIdx.x); a.table != nullptr && i < a.table_rows; i += int(blockDim.x))
      table[i] = a.table[int64_t(i) * a.heads + place.head] * kLog2E;
  }
};

__device__ __forceinline__ bool share_window(int2 query, int2 key) { return query.x == key.x; }

// What is added to the score, in base 2; minus infinity between windows.
__device__ __forceinline__ float bias_of(int2 query, int2 key, const float* table) {
  const bool shared = share_window(query, key);
  const float bias = table[shared ? query.y + key.y : 0];  // without a branch around
  return shared ? bias : -INFINITY;
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
  const int lane = lane_index(), own = slots.key[strip * kStrip + lane % kStrip].x;
  const int first_window = __shfl_sync(0xFFFFFFFF, own, 0);
  if (first_window < 0) return {0, 0};  // padding comes last
  const unsigned tokens = __ballot_sync(0xFFFFFFFF, own >= 0);
  const int last_window = __shfl_sync(0xFFFFFFFF, own, 31 - __clz(int(tokens)));
  int first = strip, last = strip;
#pragma unroll 1
  for (int start = 0; start < place.count * kStrip; start += 32) {
    const int window = start + lane < place.count * kStrip ? slots.key[start + lane].x : -1;
    const unsigned same =
        __ballot_sync(0xFFFFFFFF, window == first_window || window == last_window);
    if (same == 0) continue;
    const int lowest = (start + __ffs(int(same)) - 1) / kStrip;
    const int highest = (start + 31 - __clz(int(same))) / kStrip;
    first = lowest < first ? lowest : first;
    last = highest > last ? highest : last;
  }
  // Slots that are not sorted by window must not lead out of the memory set aside for the band.
  first = first > strip - reach ? first : strip - reach;
  last = last < strip + reach ? last : strip + reach;
  return {first, last + 1};
}

// The bias of a warp's strip and those of its band, as the lanes hold scores; zeros beyond the band.
__device__ __forceinline__ void make_bias(
    float (&bias)[kMostStrips][2][4], const Slots& slots, int strip, Band band) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  const int2 upper = slots.query[strip * kStrip + g], lower = slots.query[strip * kStrip + g + 8];
#pragma unroll
  for (int j = 0; j < kMostStrips; ++j) {
    clear(bias[j]);
    if (!band.holds(j)) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        bias[j][n][e] = bias_of(
            e < 2 ? upper : lower, slots.key[j * kStrip + 8 * n + 2 * q + e % 2], slots.table);
  }
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

// The n-th of images, or of rows, that begin `elements` apart: fewer than 4 GB, so that the address is
// one multiplication of 32 bits by 32.
template <class T>
__device__ __forceinline__ T* nth(T* first, int n, unsigned elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(
      reinterpret_cast<Byte*>(first) + uint64_t(unsigned(n)) * (elements * unsigned(sizeof(T))));
}

// One head of the rows of one image.
template <class T>
struct HeadRows {
  T* first;
  unsigned row;  // elements from one to the next
  const T* pad;  // what padding that attends has; null: zeros

  __device__ __forceinline__ HeadRows(
      const Rows& x, int head, int image, const void* pad_value = nullptr)
      : first(nth(static_cast<T*>(x.data) + uint64_t(unsigned(head)) * x.head, image, x.image)),
        row(x.row),
        pad(static_cast<const T*>(pad_value)) {}

  __device__ __forceinline__ T* of(int i, unsigned column) const { return nth(first + column, i, row); }
};

// k (1) or v (2) of the padding of a head.
template <class T>
__device__ __forceinline__ const T* padding_of(const Attention& a, int which, int head) {
  if (a.pad_value == nullptr) return nullptr;
  return static_cast<const T*>(a.pad_value) + (which * a.heads + head) * a.head_dim;
}

// A piece of a row that has only so many of its columns, none or a multiple of four.
template <class T>
__device__ __forceinline__ void copy_async_part(T* to, const T* from, int columns, bool valid) {
  if constexpr (sizeof(T) == 4) {
    copy_async_16(to, from, valid && columns >= 4);
  } else {
    copy_async_8(to, from, valid && columns >= 4);
    copy_async_8(to + 4, from + 4, valid && columns >= 8);
  }
}

// Starts the copy of a block's strips of rows into shared memory, from kTensors tensors into tiles that
// lie `tile_step` apart. Rows of nothing become zeros, since a product takes all rows and zero times NaN
// is NaN. A block has two threads for a row.
template <class T, int D, bool kGeneral, int kTensors>
__device__ __forceinline__ void load_tiles(
    T* tile, const HeadRows<T> (&x)[kTensors], const int* row, int head_dim, int tile_step = 0) {
  using Row = TileRow<T, D>;
  const unsigned thread = unsigned(computed_here(int(threadIdx.x)));
  const unsigned slot = thread / Row::kPieces, piece = thread % Row::kPieces;
  const unsigned step = blockDim.x / Row::kPieces, column = piece * Row::kPiece;
  int from[Row::kPieces / 2];  // all read before the first copy, behind which they would wait
#pragma unroll
  for (int i = 0; i < Row::kPieces / 2; ++i) from[i] = row[slot + i * step];
#pragma unroll
  for (int t = 0; t < kTensors; ++t)
#pragma unroll
    for (int i = 0; i < Row::kPieces / 2; ++i) {
      T* to = tile + t * tile_step + Row::offset(slot + i * step, piece);
      if constexpr (!kGeneral) {
        copy_async_16(to, x[t].of(from[i] < 0 ? 0 : from[i], column), from[i] >= 0);
      } else {
        const bool pads = x[t].pad != nullptr && from[i] == Slots::kPadding;
        const T* source = pads ? x[t].pad + column : x[t].of(from[i] < 0 ? 0 : from[i], column);
        if (head_dim == D)
          copy_async_16(to, source, pads || from[i] >= 0);
        else
          copy_async_part(to, source, head_dim - int(column), pads || from[i] >= 0);
      }
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

// Brings a warp's strip of results, times `factor` for each of the lane's two rows, into shared
// memory for 16 rows that no other warp uses now, from where write_strips takes it after a
// __syncwarp.
template <class T, int D>
__device__ __forceinline__ void stage_strip(
    const Wide<D>& x, float upper_factor, float lower_factor, T* staging) {
  using Row = TileRow<T, D>;
  const unsigned lane = unsigned(computed_here(lane_index())), g = lane / 4, q = lane % 4;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const unsigned column = 8 * n + 2 * q;
    T* to = staging + (Row::offset(g, column / Row::kPiece) + column % Row::kPiece);
    store_pair(to, x[n][0] * upper_factor, x[n][1] * upper_factor);
    store_pair(to + 8 * Row::kStride, x[n][2] * lower_factor, x[n][3] * lower_factor);
  }
}

// 16 bytes of a row, or those that are columns of a head of fewer than D.
template <bool kGeneral, int D, class T>
__device__ __forceinline__ void write_piece(T* to, const T* from, unsigned column, int head_dim) {
  if (!kGeneral || head_dim == D || (sizeof(T) == 4 && int(column) < head_dim)) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else if (sizeof(T) == 2) {
    for (int half = 0; half < 2; ++half)
      if (int(column) + 4 * half < head_dim)
        reinterpret_cast<uint2*>(to)[half] = reinterpret_cast<const uint2*>(from)[half];
  }
}

// Writes staged strips to kTensors tensors, from strips that lie `staging_step` apart. `row` is that of
// the strip's first slot.
template <class T, int D, bool kGeneral, int kTensors>
__device__ __forceinline__ void write_strips(
    const T* staging, const HeadRows<T> (&x)[kTensors], const int* row, int head_dim,
    int staging_step = 0) {
  using Row = TileRow<T, D>;
  const unsigned lane = unsigned(computed_here(lane_index()));
  const unsigned slot = lane / Row::kPieces, piece = lane % Row::kPieces;
  const unsigned column = piece * Row::kPiece;
#pragma unroll
  for (int i = 0; i < Row::kPieces / 2; ++i) {
    const int to = row[slot + i * (32 / Row::kPieces)];
    const T* from = staging + Row::offset(slot + i * (32 / Row::kPieces), piece);
    if (to >= 0) {
#pragma unroll
      for (int t = 0; t < kTensors; ++t)
        write_piece<kGeneral, D>(x[t].of(to, column), from + t * staging_step, column, head_dim);
    } else if (to <= Slots::kZeroRow) {
      // Beside a token that is not finite, what was computed for padding is NaN.
      const uint4 zeros{};
      for (int t = 0; t < kTensors; ++t)
        write_piece<kGeneral, D>(
            x[t].of(Slots::zero_row(to), column), reinterpret_cast<const T*>(&zeros), column, head_dim);
    }
  }
}

// A warp's sums for k and v of the padding.
template <int D>
__device__ inline void clear_padding(float* sums) {
  for (int d = lane_index(); d < 2 * D; d += 32) sums[d] = 0;
  __syncwarp();
}

// Adds the rows of padding of a warp's staged strip to its sums [D].
template <class T, int D>
__device__ inline void add_padding(float* sums, const T* staging, const int* row) {
  using Row = TileRow<T, D>;
#pragma unroll 1
  for (unsigned d = unsigned(lane_index()); d < D; d += 32) {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < kStrip; ++i)
      if (row[i] == Slots::kPadding)
        sum += to_float(staging[Row::offset(i, d / Row::kPiece) + d % Row::kPiece]);
    sums[d] += sum;
  }
}

// Copies of the table that a warp adds its strip of bias gradients to: two rows at a time, one to
// each, so that their additions do not wait for one another.
constexpr int kTableCopies = 2;

// Adds a warp's strip of bias gradients to its copies of the table, which it clears first. Keys of one
// row have different places in the table, so one row of a copy at a time needs no atomics and has one
// order.
__device__ inline void add_to_table(
    float* copies, const float* gradient, int stride, const Attention& a, const Slots& slots,
    int strip, Band keys) {
  const int rows = a.table_rows;
#pragma unroll 1
  for (int i = lane_index(); i < kTableCopies * rows; i += 32) copies[i] = 0;
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < kStrip; i += kTableCopies) {
    int2 query[kTableCopies];
#pragma unroll
    for (int c = 0; c < kTableCopies; ++c) query[c] = slots.query[strip * kStrip + i + c];
#pragma unroll 1
    for (int j = lane_index(); j < (keys.last - keys.first) * kStrip; j += 32) {
      const int2 key = slots.key[keys.first * kStrip + j];
#pragma unroll
      for (int c = 0; c < kTableCopies; ++c)
        if (share_window(query[c], key))
          copies[c * rows + query[c].y + key.y] += gradient[(i + c) * stride + j];
    }
    __syncwarp();
  }
}

// What a block leaves of its sums for the table and for the padding: the sum of its warps' copies, in
// their order; zeros if it has none.
__device__ inline void store_partial(const float* copies, int count, const Attention& a) {
  if (a.partial == nullptr) return;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < a.table_rows; i += int(blockDim.x)) {
    float sum = 0;
    for (int copy = 0; copy < count; ++copy) sum += copies[copy * a.table_rows + i];
    a.partial[int64_t(blockIdx.x) * a.table_rows + i] = sum;
  }
}
template <int D>
__device__ inline void store_padding(const float* sums, int warps, const Attention& a) {
  if (a.partial_pad == nullptr) return;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < 2 * a.head_dim; i += int(blockDim.x)) {
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp)
      sum += sums[2 * D * warp + i / a.head_dim * D + i % a.head_dim];
    a.partial_pad[int64_t(blockIdx.x) * 2 * a.head_dim + i] = sum;
  }
}

}  // namespace greenmim::cuda
