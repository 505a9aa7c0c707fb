// The emulated twin of every primitive in csrc/cuda/primitives.cuh.
#pragma once

#include "emulator.h"

namespace greenmim::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_float(float16 x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return value;
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  const _Float16 value = _Float16(x);
  float16 result;
  std::memcpy(&result.bits, &value, 2);
  return result;
}

template <class T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <class T>
EMULATOR_UNWATCHED inline float half_of(uint32_t pair, int which) {
  return to_float(T{uint16_t(pair >> 16 * which)});
}

template <class T>
inline float2 unpack(uint32_t pair) {
  return {half_of<T>(pair, 0), half_of<T>(pair, 1)};
}

// Fragments as in "Matrix fragments for mma.m16n8k16" of the PTX manual; g = lane / 4, q = lane % 4.
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } self{d, a, {b0, b1}};
  emulator::collective("mma", &self, [](void** lanes) EMULATOR_UNWATCHED {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane* x = static_cast<Lane*>(lanes[lane]);
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int h = 0; h < 2; ++h)
          left[g + i % 2 * 8][2 * q + h + i / 2 * 8] = half_of<T>(x->a[i], h);
      for (int i = 0; i < 2; ++i)
        for (int h = 0; h < 2; ++h) right[2 * q + h + 8 * i][g] = half_of<T>(x->b[i], h);
    }
    float product[16][8] = {};
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) product[i][j] += left[i][k] * right[k][j];
    for (int lane = 0; lane < 32; ++lane) {
      float* d = static_cast<Lane*>(lanes[lane])->d;
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < 4; ++i) d[i] += product[g + i / 2 * 8][2 * q + i % 2];
    }
  });
}

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* at) { return reinterpret_cast<uintptr_t>(at); }
inline uint4 load_16(SharedAddress at) { return *reinterpret_cast<const uint4*>(at); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTransposed>
inline void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  struct Lane {
    uint16_t row[8];
    SharedAddress address;
    uint32_t* r;
  } self;
  self.address = row;
  if (row % 16 != 0)
    emulator::stop("ldmatrix from an address that is no multiple of 16");
  // Read by the lane itself, so that the sanitizers see the access in its thread.
  const uint16_t* elements = reinterpret_cast<const uint16_t*>(row);
  for (int i = 0; i < 8; ++i) self.row[i] = elements[i];
  self.r = r;
  emulator::collective(
      kTransposed ? "ldmatrix.trans" : "ldmatrix", &self, [](void** lanes) EMULATOR_UNWATCHED {
        for (int matrix = 0; matrix < 4; ++matrix) {
          unsigned banks = 0;  // groups of four, as a row takes
          for (int i = 0; i < 8; ++i)
            banks |= 1u << static_cast<Lane*>(lanes[8 * matrix + i])->address / 16 % 8;
          if (banks != 0xFF) emulator::stop("rows of one matrix of an ldmatrix in the same banks");
          for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, q = lane % 4;
            uint32_t pair = 0;
            for (int h = 0; h < 2; ++h) {
              const int i = kTransposed ? 2 * q + h : g, j = kTransposed ? g : 2 * q + h;
              pair |= uint32_t(static_cast<Lane*>(lanes[8 * matrix + i])->row[j]) << 16 * h;
            }
            static_cast<Lane*>(lanes[lane])->r[matrix] = pair;
          }
        }
      });
}

inline int same_in_warp(int x) {
  const int first = emulator::shuffle("same in warp", x, 0);
  if (first != x) emulator::stop("what should be the same in a warp is not");
  return first;
}

template <class Of>
inline void store_matrices(const uint32_t (&r)[4], SharedAddress own, const Of& of) {
  const unsigned lane = unsigned(emulator::lane());
  struct Lane {
    SharedAddress own;
  } self{own};
  if (own % 16 != 0) emulator::stop("stmatrix to an address that is no multiple of 16");
  if (own != of(lane % 16, lane / 16)) emulator::stop("stmatrix to another row than it says");
  emulator::collective("stmatrix", &self, [](void** lanes) EMULATOR_UNWATCHED {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i)
        banks |= 1u << static_cast<Lane*>(lanes[8 * matrix + i])->own / 16 % 8;
      if (banks != 0xFF) emulator::stop("rows of one matrix of an stmatrix in the same banks");
    }
  });
  // By the lane itself, so that the sanitizers see the access in its thread.
  for (unsigned i = 0; i < 4; ++i)
    *reinterpret_cast<uint32_t*>(of(lane / 4 + i % 2 * 8, i / 2) + lane % 4 * 4) = r[i];
}

// The bytes land at the wait that completes them and no sooner; until then NaN is there, so that
// both reading too early and writing too early give wrong results, or a race.
inline void copy_async(int bytes, SharedAddress at, const void* from, bool valid) {
  char* to = reinterpret_cast<char*>(at);
  if (at % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
    emulator::stop("cp.async between addresses that are no multiples of its size");
  std::memset(to, 0xFF, bytes);
  emulator::Fiber* self = emulator::block->current;
  self->copies.push_back({to, static_cast<const char*>(from), bytes, valid});
  ++self->uncommitted;
}
inline void copy_async_16(SharedAddress to, const void* from, bool valid) {
  copy_async(16, to, from, valid);
}
inline void copy_async_8(SharedAddress to, const void* from, bool valid) {
  copy_async(8, to, from, valid);
}
inline void copy_async_4(SharedAddress to, const void* from, bool valid) {
  copy_async(4, to, from, valid);
}

inline void copy_async_commit() {
  emulator::Fiber* self = emulator::block->current;
  self->copy_groups.push_back(self->uncommitted);
  self->uncommitted = 0;
}

template <int kPending>
inline void copy_async_wait() {
  emulator::Fiber* self = emulator::block->current;
  while (self->copy_groups.size() > kPending) {
    const size_t count = self->copy_groups.front();
    for (size_t i = 0; i < count; ++i) {
      const emulator::AsyncCopy& copy = self->copies[i];
      if (copy.valid)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + count);
    self->copy_groups.erase(self->copy_groups.begin());
  }
}

inline int computed_here(int x) { return x; }
template <class T>  // also of an address, which is wider here
inline T in_register(T x) {
  return x;
}

// One kernel ends before the next one starts.
inline void allow_next_kernel() {}
inline void wait_for_last_kernel() {}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

// What the registers of the heaviest kernels leave room for on every architecture, two blocks, where shared
// memory does as well: a processor has 1 KB more of it than a block may ask for, and keeps 1 KB for each.
inline size_t most_shared_bytes = 232448;
inline int resident_blocks(const void*, unsigned, size_t shared_bytes) {
  return (most_shared_bytes + 1024) / (shared_bytes + 1024) > 1 ? 2 : 1;
}

template <class Kernel, class... Arguments>
inline void launch(
    Kernel* kernel, unsigned grid, unsigned threads, size_t shared_bytes, cudaStream_t,
    Arguments... arguments) {
  emulator::launch(grid, threads, shared_bytes, [=] { kernel(arguments...); });
}

template <class Kernel, class... Arguments>
inline void launch_early(
    Kernel* kernel, unsigned grid, unsigned threads, cudaStream_t stream, Arguments... arguments) {
  launch(kernel, grid, threads, 0, stream, arguments...);
}

}  // namespace greenmim::cuda

#define DYNAMIC_SHARED(name) char* name = emulator::block->dynamic.get()
#define STATIC_SHARED(Type, name) \
  Type& name = *static_cast<std::remove_reference_t<Type>*>( \
      emulator::static_shared(EMULATOR_PLACE #name, sizeof(Type)))
