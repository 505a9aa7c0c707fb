// The depthwise convolution of visible tokens. Bound by memory: a row is read from it once, and by its
// neighbours from the caches.
#pragma once

#include "primitives.cuh"

#include <algorithm>
#include <limits>

namespace greenmim::cuda {

constexpr int kConvThreads = 128;
constexpr int kPlaces = 9;  // of a kernel of 3 x 3
// Images of a block, which read neighbours once where all have the same. Of more, the rows that the next
// tokens need as well would no longer be in the first cache.
constexpr int kConvImages = 4;
constexpr int kMostWaves = 4;  // of blocks
constexpr int kConvSetup = 2;  // of a block, in steps: guessed

// Neighbours are mutual: m is at place 8 - k of the token at its place k. So the backward pass is the
// same walk, over grad_out in the place of x.
struct Conv {
  const void* from;  // x or grad_out [B, N, C]
  void* to;          // the output or grad_x, or null
  const float *weight, *bias;  // [C, 9], and [C] or null
  const int* neighbours;       // [P, N, 9]
  const void* x;               // for the gradients of weight and bias, as the next two
  float *partial_weight, *partial_bias;  // [parts, 9, C] and [parts, C], or null
  int batch, tokens, channels;
  bool per_image;  // P = B instead of 1
  unsigned row_bytes;
  int64_t image_bytes;

  // The plan: a block takes a run of images, a run of steps of their tokens, and a tile of channels.
  bool wide;  // accesses of 8 bytes, or of one element
  int lanes;  // threads that share a row, a power of two: the others take the next ones, of a step
  int tiles, images, steps;

  __host__ __device__ int rows() const { return kConvThreads / lanes; }
  int all_steps() const { return (tokens + rows() - 1) / rows(); }
  __host__ __device__ int image_runs() const { return (batch + images - 1) / images; }
  int64_t parts() const { return int64_t(image_runs()) * ((all_steps() + steps - 1) / steps); }
};

// The elements of 8 bytes, or one; zeros where there is no row.
template <class T, int kWidth>
__device__ __forceinline__ void load_piece(float (&to)[kWidth], const void* from, bool is_there) {
  if constexpr (kWidth == 1) {
    to[0] = is_there ? to_float(*static_cast<const T*>(from)) : 0.0f;
  } else if constexpr (kWidth == 2) {
    const float2 x = is_there ? *static_cast<const float2*>(from) : float2{};
    to[0] = x.x, to[1] = x.y;
  } else {
    const uint2 x = is_there ? *static_cast<const uint2*>(from) : uint2{};
    const float2 low = unpack<T>(x.x), high = unpack<T>(x.y);
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void store_piece(void* to, const float (&from)[kWidth]) {
  if constexpr (kWidth == 4)
    *static_cast<uint2*>(to) = {pack<T>(from[0], from[1]), pack<T>(from[2], from[3])};
  else if constexpr (kWidth == 2)
    *static_cast<float2*>(to) = {from[0], from[1]};
  else if constexpr (sizeof(T) == 4)
    *static_cast<float*>(to) = from[0];
  else
    *static_cast<uint16_t*>(to) = uint16_t(pack<T>(from[0], 0.0f));
}

// What a block leaves of its rows' sums [10, kWidth], those of the weights' nine places and the bias'.
template <int kWidth>
__device__ void add_up(const Conv& c, const float (&sums)[kPlaces + 1][kWidth], int part, int tile) {
  DYNAMIC_SHARED(memory);
  float* const shared = reinterpret_cast<float*>(memory);  // [rows, columns]
  const int columns = c.lanes * kWidth, column = int(threadIdx.x);
  const int channel = tile * columns + column;
#pragma unroll
  for (int k = 0; k <= kPlaces; ++k) {
    float* const partial = k < kPlaces ? c.partial_weight : c.partial_bias;
    if (partial == nullptr) continue;
    __syncthreads();  // nobody reads the sums before any more
#pragma unroll
    for (int i = 0; i < kWidth; ++i) shared[int(threadIdx.x) * kWidth + i] = sums[k][i];
    __syncthreads();
    if (column >= columns || channel >= c.channels) continue;
    float sum = 0;
    for (int at = column; at < kConvThreads * kWidth; at += columns) sum += shared[at];
    const int64_t to = k < kPlaces ? int64_t(part) * kPlaces + kPlaces - 1 - k : part;
    partial[to * c.channels + channel] = sum;
  }
}

// Backward makes all gradients, also where not all are asked for: only what is kept differs.
template <class T, int kWidth, bool kBackward>
__global__ void __launch_bounds__(kConvThreads, kBackward ? 4 : 5)
    sparse_depthwise_conv_kernel(const Conv c) {
  const int tile = int(blockIdx.x) % c.tiles, part = int(blockIdx.x) / c.tiles;
  const int channel = (tile * c.lanes + int(threadIdx.x) % c.lanes) * kWidth;
  const bool works = channel < c.channels;  // others meet the barriers
  float weight[kPlaces][kWidth] = {}, bias[kWidth] = {};
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (!works) break;
#pragma unroll
    for (int k = 0; k < kPlaces; ++k)
      weight[k][i] = c.weight[int64_t(channel + i) * kPlaces + (kBackward ? kPlaces - 1 - k : k)];
    if (!kBackward && c.bias) bias[i] = c.bias[channel + i];
  }
  [[maybe_unused]] float sums[kPlaces + 1][kWidth] = {};

  const int first_image = part % c.image_runs() * c.images;
  const int last_image = std::min(first_image + c.images, c.batch);
  const int64_t first_token = int64_t(part / c.image_runs()) * c.steps * c.rows();
  const int64_t last_token = std::min<int64_t>(first_token + int64_t(c.steps) * c.rows(), c.tokens);
  const int last = works ? int(last_token) : 0, rows = c.rows();
  for (int token = int(first_token) + int(threadIdx.x) / c.lanes; token < last; token += rows) {
    int near[kPlaces];
#pragma unroll 1
    for (int image = first_image; image < last_image; ++image) {
      if (c.per_image || image == first_image) {
        const int64_t row = (c.per_image ? int64_t(image) * c.tokens : 0) + token;
#pragma unroll
        for (int k = 0; k < kPlaces; ++k) near[k] = c.neighbours[row * kPlaces + k];
      }
      // Addresses kept from image to image would take twice the registers of their numbers.
      const int64_t start =
          computed_here(image) * c.image_bytes + int64_t(channel) * int64_t(sizeof(T));
      const char* const from = in_register(static_cast<const char*>(c.from) + start);
      const int64_t own = start + int64_t(token) * c.row_bytes;
      float around[kPlaces][kWidth], x[kWidth], result[kWidth];
#pragma unroll
      for (int k = 0; k < kPlaces; ++k) {
        const int row = computed_here(near[k]);
        load_piece<T>(around[k], from + uint64_t(unsigned(row)) * c.row_bytes, row >= 0);
      }
      if constexpr (kBackward) load_piece<T>(x, static_cast<const char*>(c.x) + own, true);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        result[i] = bias[i];
#pragma unroll
        for (int k = 0; k < kPlaces; ++k) {
          result[i] += weight[k][i] * around[k][i];
          if constexpr (kBackward) sums[k][i] += x[i] * around[k][i];
        }
        if constexpr (kBackward) sums[kPlaces][i] += around[kPlaces / 2][i];
      }
      if (!kBackward || c.to) store_piece<T>(static_cast<char*>(c.to) + own, result);
    }
  }
  if constexpr (kBackward) {
    allow_next_kernel();
    add_up(c, sums, part, tile);
  }
}

template <class T, bool kBackward>
auto conv_kernel(const Conv& c) {
  constexpr int kWidth = 8 / sizeof(T);
  return c.wide ? sparse_depthwise_conv_kernel<T, kWidth, kBackward>
                : sparse_depthwise_conv_kernel<T, 1, kBackward>;
}

// Bytes of a block: the sums of one place.
template <class T, bool kBackward>
size_t conv_shared_bytes(const Conv& c) {
  return kBackward ? kConvThreads * (c.wide ? 8 / sizeof(T) : 1) * sizeof(float) : 0;
}

// As many blocks as bring the least waves x (setup + steps), where so many run at the same time; but no
// more than some waves of them, as each leaves ten rows of sums.
template <class T, bool kBackward>
void plan_conv(Conv& c, int processors) {
  c.row_bytes = unsigned(c.channels * sizeof(T));
  c.image_bytes = int64_t(c.tokens) * c.row_bytes;
  uintptr_t alignment = c.row_bytes;
  for (const void* at : {c.from, static_cast<const void*>(c.to), c.x})
    alignment |= reinterpret_cast<uintptr_t>(at);
  c.wide = alignment % 8 == 0;
  const int width = c.wide ? 8 / int(sizeof(T)) : 1, units = c.channels / width;
  c.lanes = 1;
  while (c.lanes < units && c.lanes < 32) c.lanes *= 2;
  c.tiles = (units + c.lanes - 1) / c.lanes;
  const void* const kernel = reinterpret_cast<const void*>(conv_kernel<T, kBackward>(c));
  const int64_t places = std::max<int64_t>(
      1, int64_t(processors) * resident_blocks(kernel, kConvThreads, conv_shared_bytes<T, kBackward>(c)));
  c.images = int(std::max(int64_t(kConvImages), c.batch * int64_t(c.tiles) / (kMostWaves * places)));
  const int64_t all_steps = c.all_steps();
  while (c.images > 1 && c.image_runs() * all_steps * c.tiles < places) c.images /= 2;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t runs = 1; runs <= all_steps; ++runs) {  // of steps
    if (runs > 1 && c.image_runs() * (runs - 1) * c.tiles > kMostWaves * places) break;
    const int64_t steps = (all_steps + runs - 1) / runs;
    const int64_t waves = (c.image_runs() * runs * c.tiles + places - 1) / places;
    if (waves * (kConvSetup + steps) < least) {
      least = waves * (kConvSetup + steps);
      c.steps = int(steps);
    }
  }
}

template <class T, bool kBackward>
void launch_conv(const Conv& c, cudaStream_t stream) {
  launch(conv_kernel<T, kBackward>(c), unsigned(c.parts() * c.tiles), kConvThreads,
         conv_shared_bytes<T, kBackward>(c), stream, c);
}

}  // namespace greenmim::cuda
