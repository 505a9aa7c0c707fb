// From a call to launches: which kernel, how a group is cut, how many images or heads a block goes over.
#pragma once

#include "attention_backward.cuh"
#include "attention_backward_long.cuh"
#include "attention_forward.cuh"

#include <limits>

namespace greenmim::cuda {

// What a block does once, measured in images: its slots, bands and bias, and backward the gradient of
// the table. Counted on an H200 at Swin-B's first stage: backward some 1570 instructions of a warp
// against 520 an image, forward 790 against 300.
constexpr int64_t kSetupImages = 3;

// How many images a block goes over, so that the launch is over soonest: `places` blocks run at the
// same time, and a run of images needs `blocks`. Few images repeat the setup, many leave places empty,
// in the last wave above all.
inline int64_t images_per_block(int64_t batch, int64_t blocks, int64_t places) {
  int64_t best = batch, least = std::numeric_limits<int64_t>::max();
  for (int64_t wanted = 1; wanted <= batch; ++wanted) {
    // Even without a wave that is not full, and more so with every further chunk.
    if (least != std::numeric_limits<int64_t>::max() &&
        blocks * (batch + wanted * kSetupImages) >= least * places)
      break;
    const int64_t images = (batch + wanted - 1) / wanted;
    const int64_t chunks = (batch + images - 1) / images;
    const int64_t waves = (blocks * chunks + places - 1) / places;
    const int64_t cost = waves * (kSetupImages + images);
    if (cost < least) {
      least = cost;
      best = images;
    }
  }
  return best;
}

// Shared memory that the device keeps for itself in every block that a processor holds; a processor
// has this much more than a block may ask for.
constexpr size_t kReservedBytes = 1024;

// What holds a whole group's probabilities in registers has no room for those of float32, nor for
// wider heads.
template <class T, int D>
constexpr bool kHasShortBackward = sizeof(T) == 2 && D <= 32;

// Kernels that go over heads: those of short groups, in the types that training has.
template <class T>
constexpr bool kHasOverHeads = sizeof(T) == 2;

template <class T, int D>
size_t shared_bytes(const Attention& a, Pass pass) {
  if (pass == Pass::Forward)
    return a.over_heads ? ForwardMemory<T, D, true>(nullptr, a).bytes
                        : ForwardMemory<T, D, false>(nullptr, a).bytes;
  if (a.is_long) return LongBackwardMemory<T, D>(nullptr, a).bytes;
  return a.over_heads ? BackwardMemory<T, D, true>(nullptr, a).bytes
                      : BackwardMemory<T, D, false>(nullptr, a).bytes;
}

using AttentionKernel = void(Attention);

// The kernel for heads of up to D columns; see attention_kernels.cuh.
template <class T, int D, bool kGeneral>
AttentionKernel* attention_kernel(const Attention& a, Pass pass);

template <int D>
bool is_general(const Attention& a) {
  return a.head_dim != D || a.pad_value != nullptr;
}

template <class T, int D>
AttentionKernel* kernel_of(const Attention& a, Pass pass) {
  return is_general<D>(a) ? attention_kernel<T, D, true>(a, pass)
                          : attention_kernel<T, D, false>(a, pass);
}

template <class T, int D>
int resident_blocks(const Attention& a, Pass pass) {
  return resident_blocks(reinterpret_cast<const void*>(kernel_of<T, D>(a, pass)), 32 * a.strips,
                         shared_bytes<T, D>(a, pass));
}

// Groups of an image that hold tokens. Those of 64 are most often as full as they can be at Swin's second
// stage (for 98 of 100 random masks); where they have to be a dozen and more, they take one more (68 of 100
// at the first stage).
inline int least_groups(const Attention& a) {
  return std::min(a.groups, (a.rows + a.slots - 1) / a.slots);
}
inline int expected_groups(const Attention& a) {
  const int least = least_groups(a);
  return std::min(a.groups, least + (least >= 12));
}

// What a block that goes over heads does for every group, measured in heads: in the machine code of sm_90 a
// warp has some 560 instructions for a group and 390 for a head forward, 930 and 750 backward.
constexpr int64_t kSetupHeads = 1;

// How many heads a block goes over, so that the launch is over soonest: as many blocks as run at the same
// time take the groups in turn. Few heads repeat what is done for every group, many leave less work to
// share and need more shared memory.
template <class T, int D>
bool plan_over_heads(Attention& a, Pass pass, const Device& device) {
  const int64_t groups = int64_t(expected_groups(a)) * a.batch;
  Attention best = a;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int runs = 1; a.block_heads != 1 || runs == 1; runs *= 2) {
    a.block_heads = (a.heads + runs - 1) / runs;
    a.head_runs = (a.heads + a.block_heads - 1) / a.block_heads;
    if (shared_bytes<T, D>(a, pass) > size_t(device.shared_bytes)) continue;
    const int64_t places = int64_t(resident_blocks<T, D>(a, pass)) * device.processors;
    a.share = int(std::clamp<int64_t>(places / a.head_runs, 1, groups));
    const int64_t cost = (groups + a.share - 1) / a.share * (kSetupHeads + a.block_heads);
    if (cost >= least || (a.head_runs > places && least < std::numeric_limits<int64_t>::max())) continue;
    least = cost;
    best = a;
  }
  a = best;
  return least < std::numeric_limits<int64_t>::max();
}

// Fills in the plan. False where a block would need more shared memory than the device has.
template <class T, int D>
bool plan(Attention& a, Pass pass, const Device& device) {
  const auto room = size_t(device.shared_bytes);
  a.strips = std::min(a.group_strips(), kMostStrips);
  // Kernels for short groups divide the bias by the scale.
  constexpr float kLeastScale = 1e-6f;
  a.inverse_scale = 1 / a.scale;
  a.is_long = a.group_strips() > kMostStrips || !(a.scale >= kLeastScale) ||
              (pass == Pass::Backward && !kHasShortBackward<T, D>);
  a.over_heads = a.per_image && !a.is_long && kHasOverHeads<T> && !is_general<D>(a) &&
                 a.column_rows() <= WindowSums::kMostRows &&
                 int64_t(a.groups) * a.batch < int64_t(1) << 30;
  a.block_heads = 1;
  a.over_heads = a.over_heads && shared_bytes<T, D>(a, pass) <= room;
  a.is_long = a.is_long || shared_bytes<T, D>(a, pass) > room;
  if (a.is_long)
    // Two blocks side by side hide each other's waiting.
    while (a.strips > 1 &&
           2 * (shared_bytes<T, D>(a, pass) + kReservedBytes) > room + kReservedBytes)
      a.strips = (a.strips + 1) / 2;
  if (shared_bytes<T, D>(a, pass) > room) return false;
  if (a.over_heads) return plan_over_heads<T, D>(a, pass, device);
  a.head_runs = a.heads;
  const int resident = resident_blocks<T, D>(a, pass);
  if (resident == 0) return false;
  // With one mask for all images.
  a.is_counted = !a.per_image && a.token_index != nullptr && least_groups(a) < a.groups;
  a.filled = a.is_counted ? expected_groups(a) : a.groups;
  // As many blocks as run at the same time, which know how many groups there are to share; more where
  // several waves are over sooner. No more than there is work for.
  const int64_t places = int64_t(resident) * device.processors;
  const int64_t pieces = int64_t(a.filled) * a.pieces();
  const int64_t images = images_per_block(a.batch, a.heads * pieces, places);
  const int64_t share = std::max(places / a.heads, (a.batch + images - 1) / images * pieces);
  a.share = int(std::min({share, a.group_pieces() * a.batch,
                          int64_t(std::numeric_limits<int>::max())}));
  const int runs = std::max(1, int(a.share / pieces));
  a.images = a.per_image ? 1 : (a.batch + runs - 1) / runs;
  return true;
}

// Launches a planned call.
template <class T, int D>
void launch_attention(const Attention& a, Pass pass, cudaStream_t stream) {
  launch(kernel_of<T, D>(a, pass), unsigned(a.blocks()), 32 * a.strips, shared_bytes<T, D>(a, pass),
         stream, a);
}

}  // namespace greenmim::cuda
