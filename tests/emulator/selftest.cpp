// Small kernels, right and wrong, that show what the emulator sees. Run by name.
#include "emulated_primitives.h"

#include <cstdio>
#include <string>

using namespace greenmim::cuda;

namespace {

constexpr int kThreads = 64;
float results[kThreads];

template <bool kInWarp>
void meet() {
  kInWarp ? __syncwarp() : __syncthreads();
}

// Every thread writes its number and reads that of a lane of its warp, or of a thread of another warp.
template <bool kInWarp>
void exchange(bool barrier) {
  launch(
      +[](bool barrier) {
        DYNAMIC_SHARED(shared);
        float* numbers = reinterpret_cast<float*>(shared);
        numbers[threadIdx.x] = float(threadIdx.x);
        if (barrier) meet<kInWarp>();
        results[threadIdx.x] = numbers[threadIdx.x ^ (kInWarp ? 1 : 32)];
      },
      1, kThreads, kThreads * 4, nullptr, barrier);
}

// The same between two other barriers, and where it is missing, in the last of three blocks alone.
template <bool kInWarp>
void exchange_between(bool barrier) {
  launch(
      +[](bool barrier) {
        DYNAMIC_SHARED(shared);
        float* numbers = reinterpret_cast<float*>(shared);
        meet<kInWarp>();
        numbers[threadIdx.x] = float(threadIdx.x);
        if (barrier || blockIdx.x < 2) meet<kInWarp>();
        const float number = numbers[threadIdx.x ^ (kInWarp ? 1 : 32)];
        meet<kInWarp>();
        if (blockIdx.x == 2) results[threadIdx.x] = number;
      },
      3, kThreads, kThreads * 4, nullptr, barrier);
}

// Copies of 16 bytes, two groups of them; the second is read.
template <int kPending>
void copies() {
  static float source[2 * 4 * kThreads];
  for (int i = 0; i < 2 * 4 * kThreads; ++i) source[i] = float(i);
  launch(
      +[](const float* source) {
        DYNAMIC_SHARED(shared);
        float* numbers = reinterpret_cast<float*>(shared);
        for (int group = 0; group < 2; ++group) {
          const int at = 4 * (group * kThreads + int(threadIdx.x));
          copy_async_16(shared_address(numbers + at), source + at, threadIdx.x % 2 == 0);
          copy_async_commit();
        }
        copy_async_wait<kPending>();
        results[threadIdx.x] = numbers[4 * (kThreads + threadIdx.x) + 1];
        copy_async_wait<0>();
      },
      1, kThreads, 2 * 16 * kThreads, nullptr, static_cast<const float*>(source));
}

void print() {
  for (float x : results) std::printf("%g ", x);
  std::printf("\n");
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  emulator::thread_order = unsigned(std::stoi(arguments[2]));
  if (name == "barrier") exchange<false>(true);
  if (name == "missing-barrier") exchange<false>(false);
  if (name == "warp-barrier") exchange<true>(true);
  if (name == "missing-warp-barrier") exchange<true>(false);
  if (name == "barrier-between") exchange_between<false>(true);
  if (name == "missing-barrier-between") exchange_between<false>(false);
  if (name == "warp-barrier-between") exchange_between<true>(true);
  if (name == "missing-warp-barrier-between") exchange_between<true>(false);
  if (name == "copies") copies<0>();
  if (name == "copies-not-waited-for") copies<1>();
  if (name == "copies-never-waited-for")
    launch(
        +[] {
          DYNAMIC_SHARED(shared);
          alignas(16) static const float source[4] = {};
          copy_async_16(shared_address(shared), source, true);
          copy_async_commit();
        },
        1, 1, 16, nullptr);
  if (name == "misaligned-copy")
    launch(
        +[] {
          DYNAMIC_SHARED(shared);
          alignas(16) static const float source[8] = {};
          copy_async_16(shared_address(shared), source + 1, true);
        },
        1, 1, 16, nullptr);
  if (name == "misaligned-ldmatrix")
    launch(
        +[] {
          DYNAMIC_SHARED(shared);
          uint32_t fragment[4];
          load_matrices<false>(fragment, shared_address(shared + 8));
        },
        1, 32, 1024, nullptr);
  if (name == "same-banks")
    launch(
        +[] {
          DYNAMIC_SHARED(shared);
          uint32_t fragment[4];
          load_matrices<false>(fragment, shared_address(shared + threadIdx.x % 8 * 64));
        },
        1, 32, 1024, nullptr);
  if (name == "barrier-for-some")
    launch(
        +[] {
          if (threadIdx.x < 40) __syncthreads();
          // The others wait for their own warps here, for good.
          if (threadIdx.x >= 40) __syncwarp();
          __syncthreads();
        },
        1, kThreads, 0, nullptr);
  if (name == "different-collectives")
    launch(
        +[] {
          float x = 0;
          if (threadIdx.x % 2 == 0)
            x = __shfl_xor_sync(0xFFFFFFFF, x, 1);
          else
            __syncwarp();
        },
        1, 32, 0, nullptr);
  if (name == "ended-lanes")
    launch(
        +[] {
          if (threadIdx.x >= 16) return;
          results[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFF, 1.0f, 1);
        },
        1, 32, 0, nullptr);
  if (name == "absent-lane")
    launch(+[] { results[threadIdx.x] = __shfl_sync(0xFFFFFFFF, 1.0f, 40); }, 1, 32, 0, nullptr);
  if (name == "part-of-a-warp")
    launch(+[] { results[threadIdx.x] = __shfl_sync(0xFFFF, 1.0f, 0); }, 1, 32, 0, nullptr);
  if (name == "beyond-shared-memory")
    launch(
        +[] {
          DYNAMIC_SHARED(shared);
          reinterpret_cast<float*>(shared)[threadIdx.x + 1] = 0;
        },
        1, kThreads, kThreads * 4, nullptr);
  if (name == "poison") {  // the second block must not see what the first one wrote
    for (float& x : results) x = 1;
    launch(
        +[] {
          DYNAMIC_SHARED(shared);
          using Numbers = float[kThreads];
          STATIC_SHARED(Numbers, fixed);
          float* numbers = reinterpret_cast<float*>(shared);
          const bool fresh =
              std::isnan(numbers[threadIdx.x]) && std::isnan(fixed[threadIdx.x]);
          if (!fresh) results[threadIdx.x] = 0;
          numbers[threadIdx.x] = fixed[threadIdx.x] = 1;
        },
        2, kThreads, kThreads * 4, nullptr);
  }
  if (name == "atomics") {
    static int sum = 0;
    launch(+[] { atomicAdd(&sum, int(threadIdx.x)); }, 3, kThreads, 0, nullptr);
    results[0] = float(sum);
  }
  if (name == "order") {  // who comes first
    static int turn = 0;
    launch(+[] { results[threadIdx.x] = float(atomicAdd(&turn, 1)); }, 1, kThreads, 0, nullptr);
  }
  print();
  return 0;
}
