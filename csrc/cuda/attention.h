// One call of an attention operator, as kernels and launchers see it: plain numbers and pointers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace greenmim::cuda {

constexpr int kStrip = 16;       // slots of a strip: what a warp owns, the rows of one mma
constexpr int kMostStrips = 4;   // of a block

// Element d of head h of row r of image b is at b * image + r * row + h * head + d.
struct Rows {
  void* data;
  unsigned image, row, head;
};

struct Attention {
  Rows q, k, v;
  Rows out;                 // written forward, read backward by long groups
  Rows grad_out;            // read backward
  Rows grad_q, grad_k, grad_v;  // written backward; without data where they are not asked for
  const void* pad_value;    // [3C] q, k and v of padding that attends, or null: zeros
  const float* table;       // [table_rows, heads], or null
  const int* token_index;   // [P, G, S], or null for gathered groups
  const int* window_id;     // [P, G, S]
  const int* query_row;     // [P, G, S]: the table's row of a pair is the query's number and the key's
  const int* key_row;       // [P, G, S]
  float* lse;               // [batch, heads, rows]; written forward, read backward
  float* partial;           // [programs, heads, table_rows], or null
  float* partial_pad;       // [programs, heads, 2 head_dim] of k and v of the padding, or null
  int batch;
  int rows;                 // of an image: N, or G * S for gathered groups
  int groups, slots, heads;
  int head_dim;             // of the tensors; a kernel may take more, of which the last are zeros
  int window_slots;         // that a window has at most
  int table_rows;           // 0 without a table
  bool per_image;           // P = batch instead of 1
  float scale;
  float inverse_scale;      // by which kernels of short groups multiply the bias

  // The plan of the launch.
  bool is_long;             // groups of more slots than a block holds: it goes over them in pieces
  bool over_heads;          // a block goes over groups and, of each, over heads; else over images of a head
  int strips;               // of a block: its warps
  int filled;               // groups of an image that are expected to hold tokens
  bool is_counted;          // blocks have to look how many really do
  int share;                // blocks of a head that these groups share, with a mask for all images, or
                            // that those of all images share, where blocks go over heads
  int images;               // that a block then goes over, where as many as expected hold tokens
  int block_heads;          // that a block goes over: one, but for over_heads
  int head_runs;            // runs of so many heads

  constexpr int group_strips() const { return (slots + kStrip - 1) / kStrip; }
  constexpr int pieces() const { return (group_strips() + strips - 1) / strips; }
  constexpr int64_t group_pieces() const { return int64_t(groups) * pieces(); }
  // Blocks of a head: each has a row of partial sums for it.
  constexpr int64_t programs() const {
    if (over_heads) return share;
    return per_image ? group_pieces() * batch : std::max(group_pieces(), int64_t(share));
  }
  constexpr int64_t blocks() const { return programs() * head_runs; }
  // Of a head's column of the table in shared memory: a zero where there is no table.
  constexpr int column_rows() const { return std::max(table_rows, 1); }

  // The slots of a window are neighbours, so they reach this many strips beyond the strip that one of
  // them is in.
  constexpr int reach() const {
    return std::min((window_slots - 1 + kStrip - 1) / kStrip, group_strips());
  }
  // Strips that may share a window with one strip, and with a block; those that the block knows the slots
  // of: it reads whole pieces, of which the last may end after the last strip in reach.
  constexpr int strips_of_strip() const { return std::min(group_strips(), 1 + 2 * reach()); }
  constexpr int strips_of_block() const { return std::min(group_strips(), strips + 2 * reach()); }
  constexpr int known_strips() const { return strips_of_block() + (is_long ? strips : 0); }
};

// What the launcher knows of the device.
struct Device {
  int processors;           // streaming multiprocessors
  int shared_bytes;         // that a block may ask for
};

enum class Pass { Forward, Backward };

// Fills in the plan of a launch; false where there is no kernel for this head dimension or a block
// would need more shared memory than the device has. Compiled in attention_<type>.cu for T = float,
// bfloat16 and float16.
template <class T>
bool plan_attention(Attention& a, int head_dim, Pass pass, const Device& device);

// Launches a planned call; `stream` is a cudaStream_t.
template <class T>
void run_attention(const Attention& a, int head_dim, Pass pass, void* stream);

}  // namespace greenmim::cuda
