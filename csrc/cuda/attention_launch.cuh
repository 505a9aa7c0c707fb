// From a call to launches: which kernel, how a group is cut, how many images a block goes over.
#pragma once

#include "attention_backward.cuh"
#include "attention_backward_long.cuh"
#include "attention_forward.cuh"

namespace greenmim::cuda {

// Blocks per processor that a launch aims at. More balance the load better, fewer make a bias tile
// less often; a block that shares its bias over several images wants at least this many of them.
constexpr int64_t kBlocksPerProcessor = 16;

// What holds a whole group's probabilities in registers has no room for those of float32, nor for
// wider heads.
template <class T, int D>
constexpr bool kHasShortBackward = sizeof(T) == 2 && D <= 32;

template <class T, int D>
size_t shared_bytes(const Attention& a, Pass pass) {
  if (pass == Pass::Forward) return ForwardMemory<T, D>(nullptr, a).bytes;
  return a.is_long ? LongBackwardMemory<T, D>(nullptr, a).bytes
                   : BackwardMemory<T, D>(nullptr, a).bytes;
}

// Fills in the plan. False where a block would need more shared memory than the device has.
template <class T, int D>
bool plan(Attention& a, Pass pass, const Device& device) {
  const auto room = size_t(device.shared_bytes);
  a.images = 1;
  a.strips = std::min(a.group_strips(), kMostStrips);
  a.is_long = a.group_strips() > kMostStrips ||
              (pass == Pass::Backward && !kHasShortBackward<T, D>);
  a.is_long = a.is_long || shared_bytes<T, D>(a, pass) > room;
  if (a.is_long)
    // Two blocks side by side hide each other's waiting.
    while (a.strips > 1 && 2 * shared_bytes<T, D>(a, pass) > room) a.strips = (a.strips + 1) / 2;
  if (shared_bytes<T, D>(a, pass) > room) return false;
  if (!a.per_image && a.batch > 1) {
    const int64_t blocks = int64_t(a.heads) * a.groups * a.pieces();
    const int64_t chunks = std::clamp<int64_t>(
        (kBlocksPerProcessor * device.processors + blocks - 1) / blocks, 1, a.batch);
    a.images = int((a.batch + chunks - 1) / chunks);
  }
  return true;
}

template <class T, int D>
void launch_attention(const Attention& a, Pass pass, cudaStream_t stream) {
  auto* kernel = attention_forward_kernel<T, D, false>;
  if (pass == Pass::Forward) {
    if (a.is_long) kernel = attention_forward_kernel<T, D, true>;
  } else {
    kernel = attention_backward_long_kernel<T, D>;
    if constexpr (kHasShortBackward<T, D>)
      if (!a.is_long) kernel = attention_backward_kernel<T, D>;
  }
  launch(kernel, unsigned(a.blocks()), 32 * a.strips, shared_bytes<T, D>(a, pass), stream, a);
}

}  // namespace greenmim::cuda
