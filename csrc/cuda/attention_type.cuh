// Compiles every head dimension for the element type that the including file names.
#pragma once

#include "attention_launch.cuh"

namespace greenmim::cuda {

template <class T>
bool plan_attention(Attention& a, int head_dim, Pass pass, const Device& device) {
  switch (head_dim) {
    case 16: return plan<T, 16>(a, pass, device);
    case 32: return plan<T, 32>(a, pass, device);
    case 64: return plan<T, 64>(a, pass, device);
    default: return false;
  }
}

template <class T>
void run_attention(const Attention& a, int head_dim, Pass pass, void* any_stream) {
  const auto stream = static_cast<cudaStream_t>(any_stream);
  switch (head_dim) {
    case 16: return launch_attention<T, 16>(a, pass, stream);
    case 32: return launch_attention<T, 32>(a, pass, stream);
    case 64: return launch_attention<T, 64>(a, pass, stream);
  }
}

}  // namespace greenmim::cuda
