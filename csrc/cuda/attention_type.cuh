// Compiles every head dimension for the element type that the including file names.
#pragma once

#include "attention_launch.cuh"

namespace greenmim::cuda {

template <class T>
bool plan_attention(Attention& a, int head_dim, Pass pass, const Device& device) {
  if (head_dim <= 16) return plan<T, 16>(a, pass, device);
  if (head_dim <= 32) return plan<T, 32>(a, pass, device);
  return head_dim <= 64 && plan<T, 64>(a, pass, device);
}

template <class T>
void run_attention(const Attention& a, int head_dim, Pass pass, void* any_stream) {
  const auto stream = static_cast<cudaStream_t>(any_stream);
  if (head_dim <= 16) return launch_attention<T, 16>(a, pass, stream);
  if (head_dim <= 32) return launch_attention<T, 32>(a, pass, stream);
  return launch_attention<T, 64>(a, pass, stream);
}

}  // namespace greenmim::cuda
