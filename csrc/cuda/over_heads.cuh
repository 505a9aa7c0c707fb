// Attention with a mask per image: blocks of short groups take the groups of all images in turn, and go over
// heads of each. What attends what, where its bias lies and where the bias' gradient goes is found once for all
// heads; the next group is read meanwhile, and its first tiles are on their way before the last head is done.
#pragma once

#include "slots.cuh"

namespace greenmim::cuda {

// Which heads a block goes over, and which groups: of those of all images every `share`-th. The first groups of
// all images come first, then the second ones: groups without tokens, which are the last of an image, are
// shared evenly, too. They are left out; but not where zeros are written to them.
class HeadBlocks {
  int group;      // that the lowest bit stands for
  int token;      // the first one of the lane's
  unsigned bits;  // of 32 groups from there on, `share` apart: which are not left out

 public:
  int first_head, last_head;  // the last is excluded

  __device__ explicit HeadBlocks(const Attention& a) : group(int(blockIdx.x / unsigned(a.head_runs))) {
    first_head = int(blockIdx.x % unsigned(a.head_runs)) * a.block_heads;
    last_head = a.heads - first_head > a.block_heads ? first_head + a.block_heads : a.heads;
    ask(a);
  }

  // The first group; whether it is left out `settle` finds out, and then `next` gives the groups.
  __device__ Place expected(const Attention& a) const { return place_of(a, group); }
  __device__ bool settle() {
    bits = __ballot_sync(0xFFFFFFFF, token >= 0);
    return bits & 1;
  }
  // Without images if there is none any more.
  __device__ Place next(const Attention& a) {
#pragma unroll 1
    while (bits == 0) {
      group += 32 * a.share;
      if (group >= a.groups * a.batch) return Place(a, first_head, 0, -1);
      ask(a);
      settle();
    }
    const int found = group + (__ffs(int(bits)) - 1) * a.share;
    bits &= bits - 1;
    return place_of(a, found);
  }

  // The block's row of the partial sums of its first head.
  __device__ float* partial(const Attention& a) const {
    const int64_t program = blockIdx.x / unsigned(a.head_runs);
    return a.partial + (program * a.heads + first_head) * a.table_rows;
  }

 private:
  __device__ Place place_of(const Attention& a, int number) const {
    return Place(a, first_head, int(unsigned(number) / unsigned(a.batch)),
                 int(unsigned(number) % unsigned(a.batch)));
  }

  // In gathered groups all rows are written.
  __device__ void ask(const Attention& a) {
    const int own = group + lane_index() * a.share;
    token = -1;
    if (own >= a.groups * a.batch) return;
    const Place place = place_of(a, own);
    const int64_t slot = (int64_t(place.first_image) * a.groups + place.group) * a.slots;
    token = a.token_index == nullptr ? 0 : a.token_index[slot];
  }
};

// In their place in kernels that go over images.
struct NoHeadBlocks {
  __device__ explicit NoHeadBlocks(const Attention&) {}
};

// Starts the copy of the table, and finds where the block works, and its slots.
__device__ inline Place start(
    const Slots& slots, const Attention& a, bool has_whole_group, const NoHeadBlocks&) {
  slots.start_table(a);
  return slots.find_place(a, has_whole_group);
}
__device__ inline Place start(const Slots& slots, const Attention& a, bool, HeadBlocks& blocks) {
#pragma unroll 1
  for (int i = 0; i < blocks.last_head - blocks.first_head; ++i) {
    float* column = slots.table + i * slots.column;
    slots.start_column(a, blocks.first_head + i, column);
    if (threadIdx.x == 0) column[slots.column - 1] = -INFINITY;
  }
  copy_async_commit();
  // As if the first group was not left out: not to wait for the answer.
  slots.read_partition(a, blocks.expected(a));
  const bool is_expected = blocks.settle();
  const Place place = blocks.next(a);
  if (!is_expected && place.has_images()) slots.read_partition(a, place);
  return place;
}

// Multiplies what the thread has copied of the table, once it is there.
__device__ inline void scale_table(
    const Slots& slots, const Attention& a, float factor, const NoHeadBlocks&) {
  slots.scale_column(a, factor, slots.table);
}
__device__ inline void scale_table(
    const Slots& slots, const Attention& a, float factor, const HeadBlocks& blocks) {
#pragma unroll 1
  for (int i = 0; i < blocks.last_head - blocks.first_head; ++i)
    slots.scale_column(a, factor, slots.table + i * slots.column);
}

// The group that comes next, and the copy of what the partition says of it. (Registers do not serve: what is made
// of the entries does not depend on the head, so compilers make it, and wait, before the first one.)
class NextGroup {
  bool is_odd = false;  // the current one

 public:
  Place place;

  __device__ NextGroup(const Attention& a, const Slots& slots, HeadBlocks& blocks)
      : place(blocks.next(a)) {
    start_copy(a, slots, blocks);
  }

  // Puts its slots beside those of the group before. To be called after a wait for the copy, and a barrier has
  // to follow.
  __device__ Slots put(const Attention& a, const Slots& before) const {
    const Slots slots = before.other(a, is_odd);
    const int i = int(threadIdx.x), count = a.known_strips() * kStrip;
    if (i < a.slots) {
      const int* entry = slots.entries + i;
      const int token = a.token_index == nullptr ? place.group * a.slots + i : entry[0];
      slots.put(a, i, token, entry[count], entry[2 * count], entry[3 * count]);
    } else if (i < count) {
      slots.put(a, i, Slots::kNothing, -1, 0, 0);
    }
    return slots;
  }

  // Makes it the current group, unless there is none.
  __device__ bool take(const Attention& a, HeadBlocks& blocks, Slots& slots, Place& current) {
    if (!place.has_images()) return false;
    slots = slots.other(a, is_odd);
    is_odd = !is_odd;
    current = place;
    place = blocks.next(a);
    start_copy(a, slots, blocks);
    return true;
  }

 private:
  // It is part of what is committed for the next head, or, where there is none, is committed here.
  __device__ void start_copy(const Attention& a, const Slots& slots, const HeadBlocks& blocks) const {
    const int i = int(threadIdx.x), count = a.known_strips() * kStrip;
    // A thread for each slot: a block has twice as many.
    if (place.has_images() && i < a.slots) {
      const int64_t at = (int64_t(place.first_image) * a.groups + place.group) * a.slots + i;
      const auto copy = [&](int which, const int* from) {
        if (from != nullptr)
          copy_async_4(shared_address(slots.entries + which * count + i), from + at, true);
      };
      copy(0, a.token_index);
      copy(1, a.window_id);
      copy(2, a.query_row);
      copy(3, a.key_row);
    }
    if (blocks.last_head - blocks.first_head == 1) copy_async_commit();
  }
};

struct NoNextGroup {
  __device__ NoNextGroup(const Attention&, const Slots&, const NoHeadBlocks&) {}
  __device__ bool take(const Attention&, const NoHeadBlocks&, const Slots&, const Place&) { return false; }
};

// Where the windows of a short group start, and its padding: bits of its slots.
class WindowStarts {
  uint64_t bits = 0;
  int count;

 public:
  __device__ __forceinline__ WindowStarts(const Slots& slots, const Place& place)
      : count(place.count * kStrip) {
    static_assert(kMostStrips * kStrip <= 64);
#pragma unroll
    for (int start = 0; start < kMostStrips * kStrip; start += 32) {
      const int i = start + lane_index();
      const bool is_first = i < count && (i == 0 || slots.key[i].x != slots.key[i - 1].x);
      bits |= uint64_t(__ballot_sync(0xFFFFFFFF, is_first)) << start;
    }
  }

  // Of the window that a slot is in; the last is excluded.
  __device__ __forceinline__ int first(int slot) const { return 63 - __clzll(bits & until(slot)); }
  __device__ __forceinline__ int last(int slot) const {
    const int next = __ffsll(bits & ~until(slot)) - 1;
    return next < 0 ? count : next;
  }

  // As band_of has it.
  __device__ __forceinline__ Band band(const Slots& slots, int strip) const {
    const int own = strip * kStrip;
    if (slots.key[own].x < 0) return {0, 0};  // padding comes last
    const int tokens = slots.key[count - 1].x < 0 ? first(count - 1) : count;
    return {same_in_warp(first(own) / kStrip),
            same_in_warp((last(std::min(own + kStrip, tokens) - 1) + kStrip - 1) / kStrip)};
  }

 private:
  static __device__ __forceinline__ uint64_t until(int slot) { return (uint64_t(2) << slot) - 1; }
};

// Where the bias of pairs lies in a head's column of the table, in bytes: of the first of two in the low half.
// It is the same for all heads.
struct PairPlaces {
  uint32_t upper, lower;  // of two columns of a row of scores, and of the row eight further down

  // From a column in shared memory.
  __device__ __forceinline__ float4 of(const float* column) const {
    const char* start = reinterpret_cast<const char*>(column);
    const auto at = [&](unsigned bytes) { return *reinterpret_cast<const float*>(start + bytes); };
    return {at(upper & 0xFFFF), at(upper >> 16), at(lower & 0xFFFF), at(lower >> 16)};
  }
};

// The places of a warp's strip and those of its band, as make_bias gives the bias.
template <class Keep>
__device__ __forceinline__ void make_places(
    const Slots& slots, int strip, Band band, const Keep& keep) {
  const int nowhere = slots.column - 1;
  const auto of = [&](int2 query, int2 first, int2 second) {
    const int low = share_window(query, first) ? query.y + first.y : nowhere;
    const int high = share_window(query, second) ? query.y + second.y : nowhere;
    return unsigned(sizeof(float)) * (unsigned(low) | unsigned(high) << 16);
  };
  visit_pairs(slots, strip, band, [&](int j, int n, int2 upper, int2 lower, int2 first, int2 second) {
    keep(j, n, PairPlaces{of(upper, first, second), of(lower, first, second)});
  });
}

// Clears shared memory.
__device__ inline void clear(float* x, int count) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) x[i] = 0;
}

// Adds a warp's strip of bias gradients to its copies of the table, as add_to_table does, for every head: which
// gradient goes where is found once for all of them. Half a warp takes a row, and the keys of the row's window,
// which are neighbours, kLanes at a time; the two halves have a copy each.
class WindowSums {
  static constexpr int kLanes = 32 / kTableCopies, kSteps = kStrip / kTableCopies;

  unsigned gradient[kSteps];  // that of the first key, in bytes from the start of the strip's
  // The entry of every kLanes-th key from there on, in bytes from the start of the copies, two in a word.
  uint32_t entry[kSteps][kMostStrips / 2];
  int chunks;                 // that a window has at most

 public:
  // Elements of a warp's copies: the tables, and for each lane a place for what it has no key for.
  static __host__ __device__ int copies(int table_rows) { return kTableCopies * table_rows + 32; }
  // The most rows of a table whose entries two bytes can name.
  static constexpr int kMostRows = (65536 / int(sizeof(float)) - 32) / kTableCopies;
  // Elements that may be read behind a strip's gradients, for no use.
  static constexpr int kBehind = kMostStrips * kStrip;

  // In the gradients columns are slots, and rows `stride` apart.
  __device__ __forceinline__ void find(
      const Slots& slots, const WindowStarts& windows, int strip, int stride, int table_rows) {
    const int lane = lane_index(), half = lane / kLanes;
    // What a lane finds for a row it tells the others: its first key, and the last, excluded.
    const int slot = strip * kStrip + lane % kStrip;
    const bool asks = slots.query[slot].x >= 0;
    const int own_first = windows.first(slot), own_last = asks ? windows.last(slot) : own_first;
    int most = own_last - own_first;
#pragma unroll
    for (int other = 1; other < kStrip; other *= 2)
      most = std::max(most, __shfl_xor_sync(0xFFFFFFFF, most, other));
    chunks = same_in_warp((most + kLanes - 1) / kLanes);
    int first[kSteps], last[kSteps], base[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = kTableCopies * i + half;
      const int keys = __shfl_sync(0xFFFFFFFF, own_first | own_last << 16, row);
      first[i] = (keys & 0xFFFF) + lane % kLanes;
      last[i] = keys >> 16;
      base[i] = half * table_rows + slots.query[strip * kStrip + row].y;
      gradient[i] = unsigned(sizeof(float)) * unsigned(row * stride + first[i]);
    }
#pragma unroll
    for (int pair = 0; pair < kMostStrips / 2; ++pair) {
      if (2 * pair >= chunks) break;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const auto entry_of = [&](int chunk) {
          const int key = first[i] + chunk * kLanes;
          const int to = key < last[i] ? base[i] + slots.key[key].y : kTableCopies * table_rows + lane;
          return unsigned(sizeof(float)) * unsigned(to);
        };
        entry[i][pair] = entry_of(2 * pair) | entry_of(2 * pair + 1) << 16;
      }
    }
  }

  __device__ __forceinline__ void add(float* copies, const float* gradients) const {
    static_assert(kLanes == kStrip);
    with_strips(chunks, [&](auto count) {
      constexpr int kChunks = decltype(count)::value;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const auto* from = reinterpret_cast<const float*>(
            reinterpret_cast<const char*>(gradients) + gradient[i]);
        float* to[kChunks];
        float sum[kChunks];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const unsigned bytes = c % 2 == 0 ? entry[i][c / 2] & 0xFFFF : entry[i][c / 2] >> 16;
          to[c] = reinterpret_cast<float*>(reinterpret_cast<char*>(copies) + bytes);
          sum[c] = *to[c] + from[c * kLanes];
        }
#pragma unroll
        for (int c = 0; c < kChunks; ++c) *to[c] = sum[c];
        __syncwarp();
      }
    });
  }
};

// What a block leaves of the sums of its heads: those of its warps' copies, in their order; zeros if it has
// none.
__device__ inline void store_window_sums(
    const float* copies, int strips, const Attention& a, const HeadBlocks& blocks) {
  if (a.partial == nullptr) return;
  float* to = blocks.partial(a);
  const int of_warp = WindowSums::copies(a.table_rows);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < (blocks.last_head - blocks.first_head) * a.table_rows;
       i += int(blockDim.x)) {
    const int first = i / a.table_rows * strips * of_warp + i % a.table_rows;
    float sum = 0;
    for (int strip = 0; strip < strips; ++strip)
      for (int copy = 0; copy < kTableCopies; ++copy)
        sum += copies[first + strip * of_warp + copy * a.table_rows];
    to[i] = sum;
  }
}

}  // namespace greenmim::cuda
