// What the kernels take from the hardware beyond plain C++: all inline PTX is here and nowhere else.
//
// Each primitive has a twin in tests/emulator/emulated_primitives.h, so that the kernels' own source
// also runs on the CPU under sanitizers; tests/emulator/conformance.cu compares the two on a GPU.
#pragma once

#ifdef GREENMIM_EMULATE
#include "emulated_primitives.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

// Bytes that a copy of 16 brings into the second cache: 0, 64, 128 or 256. The neighbours of a head's are
// another head's, which another block reads at about the same time.
#ifndef GREENMIM_L2_PREFETCH
#define GREENMIM_L2_PREFETCH 128
#endif
#if GREENMIM_L2_PREFETCH
#define GREENMIM_TEXT_OF(x) #x
#define GREENMIM_TEXT(x) GREENMIM_TEXT_OF(x)
#define GREENMIM_COPY_16 \
  "cp.async.cg.shared.global.L2::" GREENMIM_TEXT(GREENMIM_L2_PREFETCH) "B [%0], [%1], 16, ignored;"
#else
#define GREENMIM_COPY_16 "cp.async.cg.shared.global [%0], [%1], 16, ignored;"
#endif

// A name for all of the block's dynamic shared memory, as bytes.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]
// A variable in static shared memory; the type has to be one word (an alias for arrays).
#define STATIC_SHARED(Type, name) __shared__ Type name

namespace greenmim::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

// Two values rounded to nearest even, the first in the low half: how registers of a fragment hold
// them.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  else
    return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// d += a b for a [16, 16], b [16, 8], d [16, 8]; sums in float32.
template <class T>
__device__ __forceinline__ void mma(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of a byte in shared memory, to reckon with.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* at) {
  return SharedAddress(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ uint4 load_16(SharedAddress at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}

// The value of the warp's first lane: the same number, where all have the same, but the compiler knows
// that they do, and that a branch on it is taken by all lanes or none.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xFFFFFFFF, x, 0); }

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8
// of matrix l / 8. Lane l receives elements 2 (l % 4) and the next of row l / 4, or, transposed, of
// column l / 4.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], SharedAddress address) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Such matrices, as load_matrices<false> gives them, into a [16, 16] tile in shared memory, of which they
// are the upper left, lower left, upper right and lower right quarter: the left operand of an mma.
// `of(row, half)` is the address of half a row, `own` that of row l % 16 and half l / 16 for lane l.
template <class Of>
__device__ __forceinline__ void store_matrices(
    const uint32_t (&r)[4], SharedAddress own, [[maybe_unused]] const Of& of) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(own),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned i = 0; i < 4; ++i)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(of(lane / 4 + i % 2 * 8, i / 2) + lane % 4 * 4),
                 "r"(r[i])
                 : "memory");
#endif
}

// 16 bytes from global to shared memory without a register between; zeros where not valid, and then
// nothing is read. Complete after the commit and the wait that follow.
__device__ __forceinline__ void copy_async_16(SharedAddress to, const void* from, bool valid) {
  asm volatile("{.reg .pred ignored; setp.eq.u32 ignored, %2, 0;" GREENMIM_COPY_16 "}" ::"r"(to),
               "l"(from), "r"(unsigned(valid))
               : "memory");
}
__device__ __forceinline__ void copy_async_8(SharedAddress to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(SharedAddress to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until no more than kPending of this thread's committed groups are on their way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same number, but what is computed from it is not moved out of the loop around: an address that
// takes an instruction or two is not worth a register for the whole loop.
__device__ __forceinline__ int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The same number, but it stays in a register and is not computed again where it is needed, which the
// compiler prefers where it is a few instructions.
__device__ __forceinline__ unsigned in_register(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}
// An address of global memory.
__device__ __forceinline__ const char* in_register(const char* x) {
  asm volatile("" : "+l"(x));
  __builtin_assume(__isGlobal(x));
  return x;
}

// The kernel that follows on the stream with launch_early may start from now on: its blocks take places
// as they become free, and wait. The other one waits for all that the kernel before it has written.
// Both from sm_90 on; before, the launch itself waits.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Within 2 ulp, and exact at minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Within 2 ulp but near one, where it is within 2^-22; minus infinity at zero.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Within 1 ulp; infinity at zero.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The percentage of a processor's memory that kernels ask for as shared memory; the driver chooses if it
// is below zero. Compared as well.
inline int shared_carveout = -1;

inline void check_prepared(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch of another operator would be blamed
  throw std::runtime_error(std::string("cannot prepare a kernel: ") + cudaGetErrorString(error));
}

// Blocks of a kernel that a processor of the current device holds at the same time; 0 where it cannot
// hold one. Asked once for each kernel, device and size: the answers are kept. Before the first one
// the kernel is given leave to use all shared memory of the device, always the same amount, so that
// host threads that launch it at the same time cannot take it from each other.
inline int resident_blocks(const void* kernel, unsigned threads, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, unsigned, size_t>, int> known;
  int device = 0;
  check_prepared(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace({kernel, device, threads, shared_bytes}, 0);
  if (!is_new) return found->second;
  try {
    int most_bytes = 0;
    check_prepared(
        cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check_prepared(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes));
    if (shared_carveout >= 0)
      check_prepared(cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, shared_carveout));
    check_prepared(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &found->second, kernel, int(threads), shared_bytes));
  } catch (...) {
    known.erase(found);
    throw;
  }
  return found->second;
}

// Whether the current device's code of a kernel has wait_for_last_kernel in it.
inline bool waits_itself(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int>, bool> known;
  int device = 0;
  check_prepared(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  check_prepared(cudaFuncGetAttributes(&attributes, kernel));
  return known[{kernel, device}] = attributes.ptxVersion >= 90;
}

// Blocks of `threads` threads on a line. The launch is checked by the caller; a kernel that takes more
// than 48 KB of dynamic shared memory has been through resident_blocks.
template <class Kernel, class... Arguments>
void launch(
    Kernel* kernel, unsigned grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
    Arguments... arguments) {
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
}

// The same for a kernel that waits for the one before it itself, with wait_for_last_kernel, before it
// reads or writes memory: it starts while that one ends.
template <class... Parameters, class... Arguments>
void launch_early(
    void (*kernel)(Parameters...), unsigned grid, unsigned threads, cudaStream_t stream,
    Arguments... arguments) {
  if (!waits_itself(reinterpret_cast<const void*>(kernel)))
    return launch(kernel, grid, threads, 0, stream, arguments...);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace greenmim::cuda

#endif
