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

// The n-th of images, or of rows, that begin `elements` apart: fewer than 4 GB, so that the address is
// one multiplication of 32 bits by 32.
template <class T>
__device__ __forceinline__ T* nth(T* first, int n, unsigned elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(
      reinterpret_cast<Byte*>(first) + uint64_t(unsigned(n)) * (elements * unsigned(sizeof(T))));
}

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

  // Where blocks go over heads: a group of an image; below zero, of none.
  __device__ Place(const Attention& a, int head, int group, int image)
      : head(head),
        group(group),
        own(0),
        base(0),
        count(a.group_strips()),
        first_image(image),
        last_image(image < 0 ? image : image + 1) {}

  __device__ bool has_images() const { return first_image < last_image; }
};

// The slots in reach, and the head's column of the bias table. Where blocks go over heads (over_heads.cuh), the
// columns of all of them, each with a minus infinity behind it, and the slots of two groups, the next one's
// as the partition has them.
struct Slots {
  int2* query;   // window and number of the table's row; -2 as window where there is none
  int2* key;     // the same as key; -1 where there is none
  int* row;      // in the image: the token's that is read and written; or, below zero, what padding is
  float* table;  // a zero where there is none
  int column;    // elements from one head's column to the next
  int* entries;  // [4][slots] of the partition's arrays: what comes next, over heads

  __host__ __device__ Slots(Carver& carver, const Attention& a, bool over_heads = false) {
    const int slots = a.known_strips() * kStrip * (over_heads ? 2 : 1);
    query = carver.take<int2>(slots);
    key = carver.take<int2>(slots);
    row = carver.take<int>(slots);
    column = a.column_rows() + 1;
    table = carver.take<float>(over_heads ? a.block_heads * column : a.column_rows());
    entries = carver.take<int>(over_heads ? 4 * a.known_strips() * kStrip : 0);
  }

  // Of two groups, those of the other one; `is_odd` tells which these are.
  __device__ Slots other(const Attention& a, bool is_odd) const {
    Slots result = *this;
    const int offset = (is_odd ? -1 : 1) * a.known_strips() * kStrip;
    result.query += offset;
    result.key += offset;
    result.row += offset;
    return result;
  }

  // What stands for a slot without a token of a window: kNothing; padding that attends, where it has a
  // value other than zero; or a row of the result that is written as zeros, that of a token in no
  // window, or of padding in gathered groups.
  static constexpr int kNothing = -1, kPadding = -2, kZeroRow = -3;
  static __device__ __forceinline__ int zero_row(int to) { return kZeroRow - to; }  // its inverse

  // Stores the i-th slot in reach from its entries in the partition.
  __device__ __forceinline__ void put(
      const Attention& a, int i, int token, int window, int query_row, int key_row) const {
    int2 as_query{-2, 0}, as_key{-1, 0};
    if (window < 0) {
      token = token < 0 ? kNothing : zero_row(token);
    } else {
      as_key = int2{window, a.table == nullptr ? 0 : key_row};
      // Nobody reads what padding would ask for.
      if (token >= 0) as_query = int2{window, a.table == nullptr ? 0 : query_row};
      else token = a.pad_value == nullptr ? kNothing : kPadding;
    }
    query[i] = as_query;
    key[i] = as_key;
    row[i] = token;
  }

  __device__ void read_partition(const Attention& a, const Place& place) const {
    const int64_t partition = a.per_image ? place.first_image : 0;
    const int64_t first = (partition * a.groups + place.group) * a.slots;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < a.known_strips() * kStrip; i += int(blockDim.x)) {
      const int slot = place.base * kStrip + i;
      int token = kNothing, window = -1, query_row = 0, key_row = 0;
      if (i < place.count * kStrip && slot < a.slots) {
        // All at once: a read that asks another one first would wait for it.
        query_row = a.query_row[first + slot], key_row = a.key_row[first + slot];
        window = a.window_id[first + slot];
        token =
            a.token_index == nullptr ? place.group * a.slots + slot : a.token_index[first + slot];
      }
      put(a, i, token, window, query_row, key_row);
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

  // Starts the copy of a head's column of the table: before all others, or it would queue behind the tiles of
  // all blocks.
  __device__ void start_column(const Attention& a, int head, float* to) const {
    const float* from = a.table + head;
    if (a.table == nullptr && threadIdx.x == 0) to[0] = 0;
#pragma unroll 1
    for (int i = int(threadIdx.x); a.table != nullptr && i < a.table_rows; i += int(blockDim.x))
      copy_async_4(shared_address(to + i), nth(from, i, a.heads), true);
  }
  __device__ void start_table(const Attention& a) const {
    start_column(a, int(blockIdx.x % unsigned(a.heads)), table);
    copy_async_commit();
  }
  // Multiplies what the thread has copied, once it is there. Where all keys of a query have the same huge
  // negative bias, as masks have it, its rounding would be all that is left of their scores.
  __device__ void scale_column(const Attention& a, float factor, float* x) const {
    constexpr float kLeast = -1e5f;
#pragma unroll 1
    for (int i = int(threadIdx.x); a.table != nullptr && i < a.table_rows; i += int(blockDim.x)) {
      const bool is_huge = x[i] < kLeast && x[i] > -INFINITY;  // NaN stays
      x[i] = (is_huge ? kLeast : x[i]) * factor;
    }
  }
};

__device__ __forceinline__ bool share_window(int2 query, int2 key) { return query.x == key.x; }

// What is added to the score; minus infinity between windows.
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
  __device__ __forceinline__ int count() const { return last - first; }
};

// Calls `body` with a number of strips, up to kMostStrips, that the compiler knows: products of one strip
// then overlap with those of the next, which they do not across a branch. Nothing where it is zero.
template <class Body>
__device__ __forceinline__ void with_strips(int count, const Body& body) {
  static_assert(kMostStrips == 4);
  if (count == 3)
    body(std::integral_constant<int, 3>());
  else if (count >= 4)
    body(std::integral_constant<int, 4>());
  else if (count == 2)
    body(std::integral_constant<int, 2>());
  else if (count == 1)
    body(std::integral_constant<int, 1>());
}

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
  return {same_in_warp(first), same_in_warp(last + 1)};
}

// The pairs of a warp's strip and those of its band, as the lanes hold scores: calls `visit` with the number of
// a strip in the band, that of eight of its columns, the lane's two queries and its two keys.
template <class Visit>
__device__ __forceinline__ void visit_pairs(
    const Slots& slots, int strip, Band band, const Visit& visit) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  const int2 upper = slots.query[strip * kStrip + g], lower = slots.query[strip * kStrip + g + 8];
#pragma unroll
  for (int j = 0; j < kMostStrips; ++j) {
    if (j >= band.count()) break;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int2* keys = slots.key + (band.first + j) * kStrip + 8 * n + 2 * q;
      visit(j, n, upper, lower, keys[0], keys[1]);
    }
  }
}

// Their bias: calls `keep` with these numbers and the lane's four values.
template <class Keep>
__device__ __forceinline__ void make_bias(
    const Slots& slots, int strip, Band band, const Keep& keep) {
  visit_pairs(slots, strip, band, [&](int j, int n, int2 upper, int2 lower, int2 first, int2 second) {
    keep(j, n, float4{bias_of(upper, first, slots.table), bias_of(upper, second, slots.table),
                      bias_of(lower, first, slots.table), bias_of(lower, second, slots.table)});
  });
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

// One head of the rows of one image.
template <class T>
struct HeadRows {
  T* first;
  unsigned row, step;  // elements from one row to the next, and to the next image or head
  const T* pad;        // what padding that attends has; null: zeros

  __device__ __forceinline__ HeadRows(
      const Rows& x, int head, int image, bool over_heads = false, const void* pad_value = nullptr)
      : first(of_head(x, head, image)),
        row(x.row),
        step(over_heads ? x.head : x.image),
        pad(static_cast<const T*>(pad_value)) {}

  static __device__ __forceinline__ T* of_head(const Rows& x, int head, int image) {
    return nth(static_cast<T*>(x.data) + uint64_t(unsigned(head)) * x.head, image, x.image);
  }
  __device__ __forceinline__ T* of(int i, unsigned column) const { return nth(first + column, i, row); }
  __device__ __forceinline__ void to_next() { first = nth(first, 1, step); }
  // The same tensor's; `row` and `step` stay what the compiler knows them to be.
  __device__ __forceinline__ void to(const Rows& x, const Place& place) {
    first = of_head(x, place.head, place.first_image);
  }
};

// k (1) or v (2) of the padding of a head.
template <class T>
__device__ __forceinline__ const T* padding_of(const Attention& a, int which, int head) {
  if (a.pad_value == nullptr) return nullptr;
  return static_cast<const T*>(a.pad_value) + (which * a.heads + head) * a.head_dim;
}

// A piece of a row that has only so many of its columns, none or a multiple of four.
template <class T>
__device__ __forceinline__ void copy_async_part(
    SharedAddress to, const T* from, int columns, bool valid) {
  if constexpr (sizeof(T) == 4) {
    copy_async_16(to, from, valid && columns >= 4);
  } else {
    copy_async_8(to, from, valid && columns >= 4);
    copy_async_8(to + 8, from + 4, valid && columns >= 8);
  }
}

// The pieces of a strip's, or a block's, rows that a thread copies: of every row, as many threads as it
// has pieces copy one each. kRows: of a thread.
template <class T, int D>
struct Pieces {
  using Row = TileRow<T, D>;
  static constexpr int kRows = Row::kPieces / 2;  // two threads, or lanes, for a row
  unsigned column;        // in elements
  unsigned place[kRows];  // in a tile, in bytes
  int row[kRows];         // of the tensor, or below zero: see Slots

  // Of `threads` threads, two for each of the rows at `rows`, this is the one with that number.
  __device__ __forceinline__ Pieces(const int* rows, unsigned thread, unsigned threads)
      : column(thread % Row::kPieces * Row::kPiece) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const unsigned slot = thread / Row::kPieces + i * (threads / Row::kPieces);
      place[i] = in_register(Row::offset(slot, thread % Row::kPieces) * unsigned(sizeof(T)));
      row[i] = rows[slot];
    }
  }

  // Starts their copy from kTensors tensors into tiles in shared memory, which lie `tile_step` bytes
  // apart. Rows of nothing become zeros, since a product takes all rows and zero times NaN is NaN.
  template <bool kGeneral, int kTensors>
  __device__ __forceinline__ void load(
      SharedAddress tile, const HeadRows<T> (&x)[kTensors], int head_dim,
      unsigned tile_step = 0) const {
#pragma unroll
    for (int t = 0; t < kTensors; ++t)
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const SharedAddress to = tile + t * tile_step + place[i];
        const bool is_there = row[i] >= 0;
        const T* from = x[t].of(computed_here(is_there ? row[i] : 0), column);
        if constexpr (!kGeneral) {
          copy_async_16(to, from, is_there);
        } else {
          const bool pads = x[t].pad != nullptr && row[i] == Slots::kPadding;
          if (pads) from = x[t].pad + column;
          if (head_dim == D)
            copy_async_16(to, from, pads || is_there);
          else
            copy_async_part(to, from, head_dim - int(column), pads || is_there);
        }
      }
  }

  // Writes them from tiles in shared memory, as load has read them. Rows of nothing are not written.
  template <bool kGeneral, int kTensors>
  __device__ __forceinline__ void store(
      SharedAddress tile, const HeadRows<T> (&x)[kTensors], int head_dim,
      unsigned tile_step = 0) const {
#pragma unroll
    for (int t = 0; t < kTensors; ++t)
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint4 piece = load_16(tile + t * tile_step + place[i]);
        if (row[i] < 0) continue;
        T* to = x[t].of(computed_here(row[i]), column);
        if (!kGeneral || head_dim == D || (sizeof(T) == 4 && int(column) < head_dim)) {
          *reinterpret_cast<uint4*>(to) = piece;
        } else if (sizeof(T) == 2) {
          if (int(column) < head_dim) reinterpret_cast<uint2*>(to)[0] = uint2{piece.x, piece.y};
          if (int(column) + 4 < head_dim) reinterpret_cast<uint2*>(to)[1] = uint2{piece.z, piece.w};
        }
      }
  }
};

// The rows of a strip of results: what is written, and which of them as zeros, where what was computed may
// be NaN, beside a token that is not finite.
template <class T, int D>
struct Results {
  using At = typename Products<T, D>::At;
  Pieces<T, D> pieces;
  unsigned place;  // where the lane brings its first ones, from the start of a strip's memory
  bool some_zero;  // in the strip

  // `rows`: of the strip.
  __device__ __forceinline__ explicit Results(const int* rows)
      : pieces(rows, unsigned(lane_index()), 32) {
    using Row = TileRow<T, D>;
    const unsigned lane = unsigned(lane_index());
    place = in_register(
        sizeof(T) == 2 ? Products<T, D>::Left::lane_offset()
                       : (lane / 4 * Row::kStride + lane % 4 * 2) * unsigned(sizeof(T)));
    bool is_zero = false;
#pragma unroll
    for (int i = 0; i < Pieces<T, D>::kRows; ++i)
      if (pieces.row[i] <= Slots::kZeroRow) {
        pieces.row[i] = Slots::zero_row(pieces.row[i]);
        is_zero = true;
      }
    some_zero = __ballot_sync(0xFFFFFFFF, is_zero) != 0;
  }

  // Brings a warp's strip, times `factor` for each of the lane's two rows, into shared memory for 16 rows
  // that no other warp uses now; `pieces` takes it from there after a __syncwarp.
  __device__ __forceinline__ void stage(
      Wide<D>& x, float upper_factor, float lower_factor, const int* rows, At staging) const {
    constexpr unsigned kStride = TileRow<T, D>::kStride;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      x[n][0] *= upper_factor;
      x[n][1] *= upper_factor;
      x[n][2] *= lower_factor;
      x[n][3] *= lower_factor;
    }
    if (some_zero) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (rows[lane_index() / 4 + 8 * half] <= Slots::kZeroRow)
#pragma unroll
          for (int n = 0; n < D / 8; ++n) x[n][2 * half] = x[n][2 * half + 1] = 0;
      __syncwarp();  // stmatrix takes whole warps
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int n = 0; n < D / 8; n += 2)
        store_matrices(
            {pack<T>(x[n][0], x[n][1]), pack<T>(x[n][2], x[n][3]), pack<T>(x[n + 1][0], x[n + 1][1]),
             pack<T>(x[n + 1][2], x[n + 1][3])},
            staging + (place ^ (16 * n)), [&](unsigned row, unsigned half) {
              return staging + TileRow<T, D>::offset(row, n + half) * unsigned(sizeof(T));
            });
    } else {
      float* to = reinterpret_cast<float*>(const_cast<char*>(staging) + place);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        store_pair(to + 8 * n, x[n][0], x[n][1]);
        store_pair(to + 8 * n + 8 * kStride, x[n][2], x[n][3]);
      }
    }
  }
};

// Starts the copy of one number per row of a block's strips. Ends with a converged warp, as ldmatrix needs:
// with one strip, half of the lanes have nothing to copy.
__device__ __forceinline__ void load_numbers(float* to, const float* source, const int* row) {
  const int slot = int(threadIdx.x);
  if (slot < int(blockDim.x) / 2) {
    const int from = row[slot];
    copy_async_4(shared_address(to + slot), source + (from < 0 ? 0 : from), from >= 0);
  }
  __syncwarp();
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
