// The kernels themselves, which take long to compile: half of those of an element type in each file.
#pragma once

#include "attention_launch.cuh"

namespace greenmim::cuda {

template <class T, int D, bool kGeneral>
AttentionKernel* attention_kernel(const Attention& a, Pass pass) {
  if constexpr (kHasOverHeads<T> && !kGeneral)
    if (a.over_heads) {
      if (pass == Pass::Forward) return attention_forward_kernel<T, D, false, false, true>;
      if constexpr (kHasShortBackward<T, D>) return attention_backward_kernel<T, D, false, true>;
    }
  if (pass == Pass::Forward)
    return a.is_long ? attention_forward_kernel<T, D, true, kGeneral>
                     : attention_forward_kernel<T, D, false, kGeneral>;
  if constexpr (kHasShortBackward<T, D>)
    if (!a.is_long) return attention_backward_kernel<T, D, kGeneral>;
  return attention_backward_long_kernel<T, D, kGeneral>;
}

}  // namespace greenmim::cuda
