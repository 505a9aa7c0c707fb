// The two matrix products that attention is made of, on strips of 16 rows, one warp each.
//
//   scores:  [16, D] x [16, D]^T -> [16, 16]
//   apply:   [16, 16] x [16, D]  -> [16, D]
//
// The left operand is held for as long as a warp needs it, in registers or, of float32, in a place of
// its own in shared memory; the right one lies in shared memory as rows of D elements, and sums are
// in float32 registers in the layout of the tensor core's results: with g = lane / 4 and
// q = lane % 4, lane holds of every 8 columns n the elements
//
//   [n][0], [n][1]: row g, columns 8 n + 2 q and the next;  [n][2], [n][3]: the same of row g + 8.
//
// float32 is multiplied in float32, never in TF32.
#pragma once

#include "attention.h"
#include "primitives.cuh"

namespace greenmim::cuda {

__device__ __forceinline__ int lane_index() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return same_in_warp(int(threadIdx.x / 32)); }

// The sum, or largest, over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

// Tiles in shared memory: rows of D elements, in pieces of 16 bytes, from an address that is a multiple
// of 128. Those of 16-bit types follow each other without a gap, and the pieces of a row trade places
// such that the same piece of eight rows, which ldmatrix reads at once, lies in different banks; so do
// the pieces of eight lanes that copy whole rows. Rows of float32, of which one is read at a time, lie 16
// bytes apart.
template <class T, int D>
struct TileRow {
  static constexpr bool kSwizzled = sizeof(T) == 2;
  static constexpr int kPiece = 16 / int(sizeof(T));  // elements
  static constexpr int kPieces = D / kPiece;          // of a row
  static constexpr int kStride = kSwizzled ? D : D + kPiece;
  static constexpr int kStripBytes = 16 * kStride * int(sizeof(T));

  static __device__ __forceinline__ unsigned offset(unsigned row, unsigned piece) {
    if constexpr (!kSwizzled) return row * kStride + piece * kPiece;
    // Which place a piece has, its row adds by exclusive or, so that from the place of one piece in a
    // tile the others are one such operation away.
    return (row * kStride + row * kPieces / 8 % kPieces * kPiece) ^ (piece * kPiece);
  }
};

// Square [16, 16] and wide [16, D] results.
using Square = float[2][4];
template <int D>
using Wide = float[D / 8][4];

// bfloat16 and float16: tensor cores.
template <class T, int D>
struct Products {
  using Row = TileRow<T, D>;
  static constexpr int kKept = 0;  // elements of shared memory that a left operand takes

  // A place in a tile, and that of a pointer, which is not computed again.
  using At = SharedAddress;
  static __device__ __forceinline__ At at(const T* x) { return in_register(shared_address(x)); }

  // A tile as the right operand of each product: where this lane reads the first pieces of its rows, from
  // the tile's start and in shared memory. The others' places differ in the bits of the piece alone.
  struct ScoresRight {
    At first;
    static __device__ __forceinline__ unsigned lane_offset() {
      const unsigned lane = unsigned(lane_index());
      return Row::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) * unsigned(sizeof(T));
    }
  };
  struct ApplyRight {
    At first;
    static __device__ __forceinline__ unsigned lane_offset() {
      const unsigned lane = unsigned(lane_index());
      return Row::offset(lane % 16, lane / 16) * unsigned(sizeof(T));
    }
  };

  // The left operand of scores: a strip.
  struct Left {
    uint32_t a[D / 16][4];
    static __device__ __forceinline__ unsigned lane_offset() { return ApplyRight::lane_offset(); }

    __device__ __forceinline__ void load(At first, T*) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) load_matrices<false>(a[k], first ^ (32 * k));
    }
  };

  static __device__ __forceinline__ void scores(
      Square& s, const Left& left, ScoresRight right, int strip) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      load_matrices<false>(b, (right.first ^ (32 * k)) + strip * Row::kStripBytes);
      mma<T>(s[0], left.a[k], b[0], b[1]);
      mma<T>(s[1], left.a[k], b[2], b[3]);
    }
  }

  // A square as a left operand: rounded to the element type.
  struct Rounded {
    uint32_t a[4];

    __device__ __forceinline__ explicit Rounded(const Square& p)
        : a{pack<T>(p[0][0], p[0][1]), pack<T>(p[0][2], p[0][3]), pack<T>(p[1][0], p[1][1]),
            pack<T>(p[1][2], p[1][3])} {}
  };

  static __device__ __forceinline__ void apply(
      Wide<D>& out, const Rounded& p, ApplyRight right, int strip) {
    multiply(out, p.a, right, strip);
  }

  // The same with the transpose of a square that lies in shared memory: where this lane reads it.
  static __device__ __forceinline__ void apply_transposed(
      Wide<D>& out, SharedAddress p, ApplyRight right, int strip) {
    uint32_t a[4];
    load_matrices<true>(a, p);
    multiply(out, a, right, strip);
  }
  // That of the first square, of which the rows are `stride` apart.
  static __device__ __forceinline__ SharedAddress transposed(const T* p, int stride) {
    const unsigned lane = unsigned(lane_index());
    return shared_address(p) +
           ((lane % 8 + lane / 16 * 8) * unsigned(stride) + lane / 8 % 2 * 8) * unsigned(sizeof(T));
  }

 private:
  static __device__ __forceinline__ void multiply(
      Wide<D>& out, const uint32_t (&a)[4], ApplyRight right, int strip) {
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      load_matrices<true>(b, (right.first ^ (16 * n)) + strip * Row::kStripBytes);
      mma<T>(out[n], a, b[0], b[1]);
      mma<T>(out[n + 1], a, b[2], b[3]);
    }
  }
};

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

// float32: each lane of a quad multiplies a quarter of the columns.
template <int D>
struct Products<float, D> {
  static constexpr int kStride = TileRow<float, D>::kStride;
  static constexpr int kKept = kStrip * kStride;

  using At = const char*;
  static __device__ __forceinline__ At at(const float* x) { return reinterpret_cast<At>(x); }

  struct ScoresRight {
    At first;
    static __device__ __forceinline__ unsigned lane_offset() { return 0; }
    __device__ __forceinline__ const float* tile() const {
      return reinterpret_cast<const float*>(first);
    }
  };
  using ApplyRight = ScoresRight;
  using Rounded = const Square&;

  struct Left {
    const float* rows;
    static __device__ __forceinline__ unsigned lane_offset() { return 0; }

    __device__ __forceinline__ void load(At first, float* kept) {
      const float* from = reinterpret_cast<const float*>(first);
      __syncwarp();
#pragma unroll
      for (int i = 4 * lane_index(); i < kKept; i += 4 * 32)
        *reinterpret_cast<float4*>(kept + i) = *reinterpret_cast<const float4*>(from + i);
      __syncwarp();
      rows = kept;
    }
  };

  static __device__ __forceinline__ void scores(
      Square& s, const Left& left, ScoresRight from, int strip) {
    const int q = lane_index() % 4;
    const float* right = from.tile() + strip * kKept;
    const float* left_row = left.rows + lane_index() / 4 * kStride + 4 * q;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float sum[2][8] = {};  // over this lane's columns, for eight rows of `right`
#pragma unroll 1  // unrolled, it would read far ahead and run out of registers
      for (int k = 0; k < D / 16; ++k) {
        const float4 upper = *reinterpret_cast<const float4*>(left_row + 16 * k);
        const float4 lower =
            *reinterpret_cast<const float4*>(left_row + 8 * kStride + 16 * k);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float4 b = *reinterpret_cast<const float4*>(
              right + (8 * n + j) * kStride + 16 * k + 4 * q);
          sum[0][j] = dot4(upper, b, sum[0][j]);
          sum[1][j] = dot4(lower, b, sum[1][j]);
        }
      }
      // Lanes swap halves of their sums, then quarters, and end with two whole ones each.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float pair[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float low = sum[half][j], high = sum[half][j + 4];
          pair[j] = (q & 2 ? high : low) + __shfl_xor_sync(0xFFFFFFFF, q & 2 ? low : high, 2);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float low = pair[j], high = pair[j + 2];
          s[n][2 * half + j] +=
              (q & 1 ? high : low) + __shfl_xor_sync(0xFFFFFFFF, q & 1 ? low : high, 1);
        }
      }
    }
  }

  static __device__ __forceinline__ void apply(
      Wide<D>& out, const Square& p, ApplyRight from, int strip) {
    const int lane = lane_index(), q = lane % 4;
    const float* right = from.tile() + strip * kKept;
#pragma unroll 1  // one turn for each lane of the quad; all of them would be a very long program
    for (int holder = 0; holder < 4; ++holder)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float upper = __shfl_sync(0xFFFFFFFF, p[half][e], lane - q + holder);
          const float lower = __shfl_sync(0xFFFFFFFF, p[half][2 + e], lane - q + holder);
          const float* row = right + (8 * half + 2 * holder + e) * kStride + 2 * q;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) {
            const float2 b = *reinterpret_cast<const float2*>(row + 8 * n);
            out[n][0] = fmaf(upper, b.x, out[n][0]);
            out[n][1] = fmaf(upper, b.y, out[n][1]);
            out[n][2] = fmaf(lower, b.x, out[n][2]);
            out[n][3] = fmaf(lower, b.y, out[n][3]);
          }
        }
  }
};

__device__ __forceinline__ void clear(Square& s) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0;
}

// Half of a square's columns.
__device__ __forceinline__ void set(float (&half)[4], float4 x) {
  half[0] = x.x;
  half[1] = x.y;
  half[2] = x.z;
  half[3] = x.w;
}

template <int D>
__device__ __forceinline__ void clear(Wide<D>& x) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0;
}

// Two neighbouring elements into shared memory.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
}
template <>
__device__ __forceinline__ void store_pair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = float2{first, second};
}

// The sum of the products of two runs of elements, which are aligned to 16 bytes.
template <class T, int kCount>
__device__ __forceinline__ float dot(const T* x, const T* y) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 16 / int(sizeof(T))) {
    if constexpr (sizeof(T) == 4) {
      const float4 u = *reinterpret_cast<const float4*>(x + i);
      const float4 v = *reinterpret_cast<const float4*>(y + i);
      sum = dot4(u, v, sum);
    } else {
      const uint4 a = *reinterpret_cast<const uint4*>(x + i);
      const uint4 b = *reinterpret_cast<const uint4*>(y + i);
      const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 u = unpack<T>(left[j]), v = unpack<T>(right[j]);
        sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
      }
    }
  }
  return sum;
}

}  // namespace greenmim::cuda
