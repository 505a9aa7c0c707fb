// Each primitive on fixed inputs, its results on standard output. Compiled by nvcc it runs on a GPU,
// by a C++ compiler on the emulator, and the two must write the same bytes; only the fast exponential,
// logarithm and reciprocal, which come last, may differ in their last bits.
#include "../../csrc/cuda/primitives.cuh"
#include "memory.h"

using namespace greenmim::cuda;

namespace {

struct Results {
  uint32_t plain[32][4], transposed[32][4];  // ldmatrix
  float product_bfloat16[32][4], product_float16[32][4];
  uint32_t packed_bfloat16[32], packed_float16[32];
  float unpacked[32][4];
  float shuffled[32][2];
  float copied_16[32][4], copied_8[32][2], copied_4[32];
  uint32_t voted[32];
  uint32_t stored[32][4], loaded[32][4];  // stmatrix, read by ldmatrix and 16 bytes at a time
  int32_t same[32];
  float exp2[32], log2[32], reciprocal[32];
};

// Integers small enough that every product and sum is exact.
template <class T>
__device__ void multiply(float (&d)[4], int lane) {
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i)
    a[i] = pack<T>(float((lane * 7 + i * 3) % 17 - 8), float((lane * 5 + i) % 13 - 6));
  for (int i = 0; i < 2; ++i)
    b[i] = pack<T>(float((lane * 3 + i * 5) % 11 - 5), float((lane + i * 2) % 7 - 3));
  for (int i = 0; i < 4; ++i) d[i] = float(lane - i);
  mma<T>(d, a, b[0], b[1]);
}

__global__ void conformance_kernel(const float* numbers, Results* results) {
  DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x);
  uint16_t* matrix = reinterpret_cast<uint16_t*>(shared);
  for (int i = lane; i < 16 * 24; i += 32) matrix[i] = uint16_t(i * 37);
  __syncwarp();
  // Rows of 16 elements, 24 apart: the addresses of the left operand.
  load_matrices<false>(
      results->plain[lane], shared_address(matrix + lane % 16 * 24 + lane / 16 * 8));
  load_matrices<true>(
      results->transposed[lane], shared_address(matrix + lane % 16 * 24 + lane / 16 * 8));
  multiply<bfloat16>(results->product_bfloat16[lane], lane);
  multiply<float16>(results->product_float16[lane], lane);
  const float x = numbers[2 * lane], y = numbers[2 * lane + 1];
  results->packed_bfloat16[lane] = pack<bfloat16>(x, y);
  results->packed_float16[lane] = pack<float16>(x, y);
  const float2 u = unpack<bfloat16>(pack<bfloat16>(x, y)), v = unpack<float16>(pack<float16>(x, y));
  const float all[4] = {u.x, u.y, v.x, v.y};
  for (int i = 0; i < 4; ++i) results->unpacked[lane][i] = all[i];
  results->shuffled[lane][0] = __shfl_xor_sync(0xFFFFFFFF, x, 5);
  results->shuffled[lane][1] = __shfl_sync(0xFFFFFFFF, x, (lane * 11 + 3) % 32);
  __syncwarp();
  float* copies = reinterpret_cast<float*>(shared);
  copy_async_16(shared_address(copies + 4 * lane), numbers + 4 * (lane % 16), lane % 3 != 0);
  copy_async_commit();
  copy_async_4(shared_address(copies + 128 + lane), numbers + 63 - lane, lane % 5 != 0);
  copy_async_8(shared_address(copies + 160 + 2 * lane), numbers + 2 * (lane * 5 % 32), lane % 7 != 0);
  copy_async_commit();
  copy_async_wait<1>();
  for (int i = 0; i < 4; ++i) results->copied_16[lane][i] = copies[4 * lane + i];
  copy_async_wait<0>();
  results->copied_4[lane] = copies[128 + lane];
  for (int i = 0; i < 2; ++i) results->copied_8[lane][i] = copies[160 + 2 * lane + i];
  results->voted[lane] = __ballot_sync(0xFFFFFFFF, lane * 7 % 5 < 2);
  // A tile of 16 x 16, of which rows are 48 bytes apart: those of a matrix in different banks.
  __syncwarp();
  const SharedAddress tile = shared_address(matrix);
  const auto half_row = [&](unsigned row, unsigned half) { return tile + row * 48 + half * 16; };
  const SharedAddress own = half_row(unsigned(lane) % 16, unsigned(lane) / 16);
  uint32_t quarters[4];
  for (int i = 0; i < 4; ++i) quarters[i] = uint32_t(lane * 4 + i) * 0x01010193u;
  store_matrices(quarters, own, half_row);
  __syncwarp();
  load_matrices<false>(results->stored[lane], own);
  const uint4 loaded = load_16(own);
  const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  for (int i = 0; i < 4; ++i) results->loaded[lane][i] = words[i];
  results->same[lane] = same_in_warp(37);
  results->exp2[lane] = lane == 0 ? exp2_fast(-INFINITY) : exp2_fast(x);
  results->log2[lane] = lane == 0 ? log2_fast(0) : log2_fast(fabsf(y) + 0.5f);
  results->reciprocal[lane] = lane == 0 ? reciprocal_fast(0) : reciprocal_fast(y);
}

}  // namespace

int main() try {
  float drawn[64];
  uint32_t state = 1;
  for (float& number : drawn) {
    state = state * 1664525 + 1013904223;
    number = (float(state >> 8) / float(1 << 24) - 0.5f) * 16;
  }
  Buffer numbers(sizeof drawn), results(sizeof(Results));
  numbers.fill(drawn);
  launch(conformance_kernel, 1, 32, 1024, nullptr, static_cast<const float*>(numbers.as<float>()),
         results.as<Results>());
  results.write();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "conformance: %s\n", error.what());
  return 1;
}
