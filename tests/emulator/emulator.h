// A CUDA device for tests: one block at a time on the CPU, every CUDA thread a fiber.
//
// A fiber runs until it meets a barrier or a collective of its warp and then gives way, so a block
// needs one OS thread, any order of threads can be forced, and a barrier that not all threads reach
// is a deadlock that is seen at once. What it checks beyond the results:
//
// - shared memory, static and dynamic, is filled with NaN before every block;
// - cp.async leaves NaN at its destination until the wait that completes it (primitives.h);
// - the rows of a matrix that ldmatrix reads must lie in different banks;
// - lanes of a warp that meet in different collectives, or not at all, stop the program;
// - under -fsanitize=thread every fiber is a thread to the race detector, and only __syncthreads and
//   __syncwarp order them; under -fsanitize=address every fiber has a stack of its own.
//
// Exit status of a program that breaks a rule: abort, with a line that begins "emulator:".
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define EMULATOR_TSAN 1
#define EMULATOR_UNWATCHED __attribute__((no_sanitize("thread")))
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#else
#define EMULATOR_TSAN 0
#define EMULATOR_UNWATCHED
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
extern "C" {
void __asan_unpoison_memory_region(const volatile void*, size_t);
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#else
#define EMULATOR_ASAN 0
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr int kMostStatics = 8;
constexpr size_t kStaticBytes = 48 * 1024;  // as on the device

enum class State { Ready, InCollective, AtBarrier, Done };

// A copy on its way to shared memory.
struct AsyncCopy {
  char* to;
  const char* from;
  int bytes;
  bool valid;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  int thread = 0;
  dim3 thread_index;
  State state = State::Ready;
  const char* place = "its first line";
  std::vector<AsyncCopy> copies;      // issued, in order
  std::vector<size_t> copy_groups;    // how many copies each committed group holds
  size_t uncommitted = 0;
  void* tsan = nullptr;
  void* asan_fake_stack = nullptr;
};

struct Warp {
  int lanes = 0, alive = 0, arrived = 0;
  void* argument[kWarp] = {};
  const char* place = nullptr;
  char order[2] = {};  // as the block's
  unsigned phase = 0;
};

using Memory = std::unique_ptr<char, void (*)(void*)>;

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> schedule;
  int alive = 0, at_barrier = 0;
  Fiber* current = nullptr;
  dim3 index, size, grid;
  const std::function<void()>* body = nullptr;
  Memory dynamic{nullptr, &std::free};
  size_t dynamic_bytes = 0;
  // Static shared memory, handed out by the place of a declaration. Made before the fibers are and
  // kept in plain arrays: what they share without order must not be seen by the race detector.
  Memory statics{nullptr, &std::free};
  int num_statics = 0;
  const char* static_place[kMostStatics] = {};
  size_t static_end[kMostStatics + 1] = {};
  void* scheduler_pointer = nullptr;
  void* scheduler_tsan = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  // Their addresses name, to the race detector, the start of the block, its barriers, its end. A
  // barrier and the next have two names: who goes on late from one must not see who is at the next.
  char begin = 0, order[2] = {}, end = 0;
  unsigned phase = 0;  // barriers that all have met
};

inline Block* block = nullptr;

// In which order threads take their turns: 0 ascending, 1 descending, otherwise shuffled by it.
inline unsigned thread_order = 0;

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "emulator: %s, in block (%u, %u, %u)", what, block->index.x, block->index.y,
               block->index.z);
  if (block->current != nullptr)
    std::fprintf(stderr, ", thread %d", block->current->thread);
  for (const Fiber& fiber : block->fibers)
    if (fiber.state == State::InCollective || fiber.state == State::AtBarrier) {
      std::fprintf(stderr, "; thread %d waits at %s", fiber.thread, fiber.place);
      break;
    }
  std::fprintf(stderr, "\n");
  std::abort();
}

// --- fibers -------------------------------------------------------------------------------------

extern "C" void emulator_switch(void** save, void* load);
#if defined(__x86_64__)
constexpr int kSavedRegisters = 6;
asm(R"(.text
.weak emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
#elif defined(__aarch64__)
constexpr int kSavedRegisters = 20;  // x19 to x30 and d8 to d15; x30 holds where to go on
asm(R"(.text
.weak emulator_switch
.type emulator_switch,%function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch,.-emulator_switch
)");
#else
#error "the emulator switches stacks on x86-64 and AArch64 only"
#endif

EMULATOR_UNWATCHED __attribute__((noinline)) inline void to_scheduler() {
  Block* b = block;
  Fiber* self = b->current;
#if EMULATOR_TSAN
  __tsan_switch_to_fiber(b->scheduler_tsan, 1);  // 1: a switch orders nothing
#endif
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(
      self->state == State::Done ? nullptr : &self->asan_fake_stack, b->scheduler_stack,
      b->scheduler_stack_bytes);
#endif
  emulator_switch(&self->stack_pointer, b->scheduler_pointer);
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(
      self->asan_fake_stack, &b->scheduler_stack, &b->scheduler_stack_bytes);
#endif
}

EMULATOR_UNWATCHED __attribute__((noinline)) inline void to_fiber(Fiber& fiber) {
  Block* b = block;
  b->current = &fiber;
#if EMULATOR_TSAN
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&b->scheduler_fake_stack, fiber.stack.get(), kStack);
#endif
  emulator_switch(&b->scheduler_pointer, fiber.stack_pointer);
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(b->scheduler_fake_stack, nullptr, nullptr);
#endif
  b->current = nullptr;
}

inline void release(void* order) {
#if EMULATOR_TSAN
  __tsan_release(order);
#else
  (void)order;
#endif
}

inline void acquire(void* order) {
#if EMULATOR_TSAN
  __tsan_acquire(order);
#else
  (void)order;
#endif
}

EMULATOR_UNWATCHED inline void open_barrier() {
  block->at_barrier = 0;
  ++block->phase;
  for (Fiber& fiber : block->fibers)
    if (fiber.state == State::AtBarrier) fiber.state = State::Ready;
}

EMULATOR_UNWATCHED __attribute__((noinline)) inline void first_line() {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  Block* b = block;
  acquire(&b->begin);  // what the scheduler set up
  (*b->body)();
  Fiber* self = b->current;
  if (!self->copies.empty()) stop("a thread ended before it waited for its cp.async");
  self->state = State::Done;
  Warp& warp = b->warps[self->thread / kWarp];
  --b->alive;
  --warp.alive;
  if (warp.arrived != 0) stop("a thread ended while its warp waits for it in a collective");
  // A thread that has ended counts as arrived, as on the device.
  if (b->at_barrier != 0 && b->at_barrier == b->alive) open_barrier();
  release(&b->end);
  to_scheduler();
  std::abort();  // never taken up again
}

// --- barriers and collectives -------------------------------------------------------------------

EMULATOR_UNWATCHED inline void sync_threads(const char* place) {
  Block* b = block;
  Fiber* self = b->current;
  char* const order = &b->order[b->phase % 2];
  release(order);
  self->place = place;
  if (++b->at_barrier < b->alive) {
    self->state = State::AtBarrier;
    to_scheduler();
  } else {
    open_barrier();
  }
  acquire(order);
}

// All lanes of the warp hand in `argument`; the last one runs `action` on them all.
template <class Action>
EMULATOR_UNWATCHED inline void collective(const char* place, void* argument, Action action) {
  Block* b = block;
  Fiber* self = b->current;
  Warp& warp = b->warps[self->thread / kWarp];
  if (warp.alive != warp.lanes) stop("a collective without the lanes that have ended");
  if (warp.arrived == 0)
    warp.place = place;
  else if (std::strcmp(warp.place, place) != 0)
    stop("lanes of a warp meet in different collectives");
  warp.argument[self->thread % kWarp] = argument;
  self->place = place;
  if (++warp.arrived < warp.lanes) {
    self->state = State::InCollective;
    to_scheduler();
    return;
  }
  action(warp.argument);
  warp.arrived = 0;
  Fiber* first = &b->fibers[self->thread / kWarp * kWarp];
  for (int lane = 0; lane < warp.lanes; ++lane)
    if (first[lane].state == State::InCollective) first[lane].state = State::Ready;
}

// Exchanges of registers order nothing in memory; only __syncwarp does.
EMULATOR_UNWATCHED inline void sync_warp(const char* place) {
  Warp& warp = block->warps[block->current->thread / kWarp];
  char* const order = &warp.order[warp.phase % 2];
  release(order);
  collective(place, nullptr, [&warp](void**) EMULATOR_UNWATCHED { ++warp.phase; });
  acquire(order);
}

template <class T>
inline T shuffle(const char* place, T value, int source) {
  struct Lane {
    T value, result;
    int source;
  } lane{value, value, source};
  const int lanes = block->warps[block->current->thread / kWarp].lanes;
  collective(place, &lane, [lanes](void** all) EMULATOR_UNWATCHED {
    for (int i = 0; i < lanes; ++i) {
      Lane* self = static_cast<Lane*>(all[i]);
      if (self->source < 0 || self->source >= lanes) stop("a shuffle from a lane that is not there");
      self->result = static_cast<Lane*>(all[self->source])->value;
    }
  });
  return lane.result;
}

inline unsigned ballot(const char* place, bool value) {
  struct Lane {
    unsigned value;  // and the result
  } lane{value};
  const int lanes = block->warps[block->current->thread / kWarp].lanes;
  collective(place, &lane, [lanes](void** all) EMULATOR_UNWATCHED {
    unsigned votes = 0;
    for (int i = 0; i < lanes; ++i) votes |= static_cast<Lane*>(all[i])->value << i;
    for (int i = 0; i < lanes; ++i) static_cast<Lane*>(all[i])->value = votes;
  });
  return lane.value;
}

inline int lane() { return block->current->thread % kWarp; }

// --- shared memory ------------------------------------------------------------------------------

// All ones: NaN in every floating point type, -1 in every integer.
inline Memory poisoned(size_t bytes) {
  void* memory = nullptr;
  // Not one byte more than asked for, so that the address sanitizer sees what is beyond.
  if (posix_memalign(&memory, 128, bytes) != 0) stop("no memory for shared memory");
  std::memset(memory, 0xFF, bytes);
  return Memory(static_cast<char*>(memory), &std::free);
}

EMULATOR_UNWATCHED inline void* static_shared(const char* place, size_t bytes) {
  Block* b = block;
  char* memory = b->statics.get();
  int i = 0;
  while (i < b->num_statics && b->static_place[i] != place) ++i;
  if (i == b->num_statics) {
    const size_t end = b->static_end[i] + (bytes + 15) / 16 * 16;
    if (i == kMostStatics || end > kStaticBytes) stop("too much static shared memory");
    b->static_place[i] = place;
    b->static_end[i + 1] = end;
    ++b->num_statics;
  }
  return memory + b->static_end[i];
}

// --- launch -------------------------------------------------------------------------------------

inline void prepare(Fiber& fiber) {
  fiber.state = State::Ready;
  fiber.copies.clear();
  fiber.copy_groups.clear();
  fiber.uncommitted = 0;
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
#if EMULATOR_ASAN
  __asan_unpoison_memory_region(fiber.stack.get(), kStack);
#endif
  // As if first_line had just been interrupted by a switch.
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t(63);
  void** sp = reinterpret_cast<void**>(top - 64);
#if defined(__x86_64__)
  *--sp = nullptr;  // a return address that is never used keeps the alignment of a call
  *--sp = reinterpret_cast<void*>(&first_line);
  for (int i = 0; i < kSavedRegisters; ++i) *--sp = nullptr;
#else
  sp -= kSavedRegisters;
  std::fill(sp, sp + kSavedRegisters, nullptr);
  sp[11] = reinterpret_cast<void*>(&first_line);
#endif
  fiber.stack_pointer = sp;
#if EMULATOR_TSAN
  // Made once for all blocks of a launch, which `begin` and `end` order: making one costs more than
  // what it does in a small block.
  if (fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
#endif
}

inline void run_block(Block& b, std::mt19937& random) {
  const int threads = int(b.size.x * b.size.y * b.size.z);
  if (int(b.fibers.size()) != threads) b.fibers = std::vector<Fiber>(threads);
  b.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  b.alive = threads;
  b.at_barrier = 0;
  b.dynamic = poisoned(b.dynamic_bytes);
  b.statics = poisoned(kStaticBytes);
  b.num_statics = 0;
  b.schedule.resize(threads);
#if EMULATOR_TSAN
  b.scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.thread = i;
    fiber.thread_index = dim3(i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y));
    prepare(fiber);
    ++b.warps[i / kWarp].lanes;
    ++b.warps[i / kWarp].alive;
    b.schedule[i] = i;
  }
  if (thread_order == 1) std::reverse(b.schedule.begin(), b.schedule.end());
  if (thread_order > 1) std::shuffle(b.schedule.begin(), b.schedule.end(), random);
  release(&b.begin);
  while (b.alive > 0) {
    bool moved = false;
    for (int i : b.schedule)
      if (b.fibers[i].state == State::Ready) {
        moved = true;
        to_fiber(b.fibers[i]);
      }
    if (!moved && b.alive > 0) stop("deadlock: not every thread reaches a barrier or collective");
  }
  acquire(&b.end);
}

// Runs `body` as every thread of every block. Blocks run in the order of threads, too: a result
// that depends on the order of blocks shows.
inline void launch(dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()>& body) {
  Block b;
  b.grid = grid;
  b.size = size;
  b.dynamic_bytes = dynamic_bytes;
  b.body = &body;
  block = &b;
  std::mt19937 random(thread_order);
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (thread_order == 1) std::reverse(order.begin(), order.end());
  if (thread_order > 1) std::shuffle(order.begin(), order.end(), random);
  for (unsigned i : order) {
    b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
    run_block(b, random);
  }
#if EMULATOR_TSAN
  for (Fiber& fiber : b.fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
  block = nullptr;
}

inline void whole_warp(unsigned members) {
  if (members != 0xFFFFFFFF) stop("a collective of a part of a warp");
}

// Atomics order nothing but themselves.
template <class T>
inline T atomic_add(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}

}  // namespace emulator

#define EMULATOR_TEXT_OF(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_OF(x)
#define EMULATOR_PLACE __FILE__ ":" EMULATOR_TEXT(__LINE__)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulator::block->current->thread_index)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)
#define __syncthreads() emulator::sync_threads(EMULATOR_PLACE)
#define __syncwarp() emulator::sync_warp(EMULATOR_PLACE)
#define __shfl_xor_sync(members, value, mask) \
  (emulator::whole_warp(members), emulator::shuffle(EMULATOR_PLACE, value, emulator::lane() ^ (mask)))
#define __shfl_sync(members, value, source) \
  (emulator::whole_warp(members), emulator::shuffle(EMULATOR_PLACE, value, source))
#define __ballot_sync(members, value) \
  (emulator::whole_warp(members), emulator::ballot(EMULATOR_PLACE, value))
#define __clz(x) __builtin_clz(unsigned(x))
#define __ffs(x) __builtin_ffs(x)
#define __clzll(x) __builtin_clzll(x)
#define __ffsll(x) __builtin_ffsll((long long)(x))
#define atomicAdd(address, value) emulator::atomic_add(address, value)
