// One binary for every machine of an architecture: these kernels are compiled once per
// instruction set ("capability"), and the best one the processor has is taken at run time.
#pragma once

#include <cstdint>

namespace greenmim::cpu {

enum class StorageType { Float32, Float64, BFloat16, Float16 };

// One of q, k, v or their gradients: element d of head h of row r of image b is at
// b * image + r * row + h * head + d.
struct Rows {
  void* data;
  int64_t image, row, head;
};

// Elements that are taken from or added to a column of the bias table at a time. Most lines of a window
// are one piece; a longer one would reach far into what the line before has just written, for which a
// processor waits.
constexpr int kPiece = 8;

// Keys of a window of which the places go up by one from slot to slot.
struct Run {
  int32_t slot, count;
  int32_t key_place;  // of the first
};

// One window, one head, and the images that share them. Slots are tokens first, then padding that
// attends: keys without a row, of which queries would be of no use to anybody.
struct WindowTask {
  StorageType storage;
  Rows q, k, v;
  Rows grad_q, grad_k, grad_v;  // backward only; data is null where they are not asked for
  const void* pad_k;            // of this head, where there is padding
  const void* pad_v;
  const void* grad_out;      // backward only; [images, rows_per_image, heads, head_dim]
  void* out;                 // forward only; the same
  void* lse;                 // [images, heads, rows_per_image], arithmetic type
  const void* table;         // column of this head, last row first, or null; kPiece rows more are read
  void* grad_table;          // sums of this task likewise, or null; to kPiece rows more zeros are added
  void* grad_pad;            // [2, head_dim] likewise, of pad_k and pad_v, or null
  const int32_t* rows;       // [tokens]
  const int32_t* query_place;  // [size]; a pair's place in the column is the sum of two
  const int32_t* key_place;    // [size]
  const Run* runs;           // of the keys; or null where they are short
  int32_t num_runs;
  int32_t size;              // slots in the window
  int32_t tokens;            // of them
  int32_t head, num_heads, head_dim;
  int64_t rows_per_image;
  int64_t first_image, last_image;
  double scale;
};

// Columns that are taken at a time: a line of the cache, so that each is read once.
constexpr int64_t kStripColumns = 16;
// Rows that are summed in float before the sum goes on in double, and columns with sums at hand.
constexpr int64_t kRowsPerSum = 64;
constexpr int64_t kColumnsPerSum = 1024;

// The gradient of what a linear layer gave, and what goes with its transposition. All matrices are
// [rows, columns] but `transposed`.
struct TransposeTask {
  const float* grad;
  const float* slope;  // what grad is to be multiplied by, element by element, first; or null
  float* scaled;       // with a slope: the product; may be grad
  float* transposed;   // [columns, rows] the gradient, or null
  float* sums;         // [columns] sums of its columns
  int64_t rows, columns;
};

// What a linear layer gave as weight x^T, to be transposed, with what comes next.
struct FinishTask {
  const float* transposed;  // [columns, rows]
  const float* bias;        // [columns] to be added, or null
  float* out;               // [rows, columns] the result, or GELU of it
  float* slope;             // [rows, columns] GELU's derivative, or null: no GELU
  int64_t rows, columns;
};

// A run of the tokens of all images for a depthwise convolution of kTaps places; x, grad_out and out are
// [tokens of all images, channels].
struct ConvTask {
  StorageType storage;
  const void* x;
  const void* grad_out;  // backward only
  void* out;             // the result; backward that of x, or null
  const void* weight;    // [taps, channels], arithmetic type; backward the last place first
  const void* bias;      // [channels] likewise, or null
  void* sums;            // [taps + 1, channels] likewise, gradients of weight, the last place first, and
                         // of bias over these tokens; or null
  const int32_t* neighbours;  // [tokens, taps], of an image or of all
  int64_t tokens_per_image, channels;
  bool per_image;
  int64_t first, last;   // tokens
};

struct Kernels {
  const char* name;
  // Bytes of 64-byte aligned scratch that a task of this size and head dim needs at most.
  int64_t (*scratch_bytes)(StorageType, int64_t size, int64_t head_dim);
  void (*forward)(const WindowTask&, void* scratch);
  void (*backward)(const WindowTask&, void* scratch);
  // out = GELU(x); x becomes its derivative.
  void (*gelu)(float* x, float* out, int64_t size);
  // Strips of kStripColumns columns, begin to end.
  void (*transpose_strips)(const TransposeTask&, int64_t begin, int64_t end);
  void (*finish_strips)(const FinishTask&, int64_t begin, int64_t end);
  void (*conv)(const ConvTask&);
  void (*conv_backward)(const ConvTask&);
};

// The kernels for this processor; GREENMIM_CPU_CAPABILITY may name a lesser one
// (default, avx2, avx512). Throws std::runtime_error for one that is not there.
const Kernels& kernels();

extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace greenmim::cpu
