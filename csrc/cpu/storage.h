// Element types of CPU tensors.
#pragma once

#include "../checks.h"
#include "capability.h"

#include <torch/csrc/stable/ops.h>

namespace greenmim::cpu {

inline StorageType storage_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return StorageType::Float32;
    case ScalarType::Double: return StorageType::Float64;
    case ScalarType::BFloat16: return StorageType::BFloat16;
    case ScalarType::Half: return StorageType::Float16;
    default:
      STD_TORCH_CHECK(
          false, "the CPU kernels compute in float64, float32, bfloat16 and float16 only");
  }
}

inline ScalarType arithmetic_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What is not asked for, in a result.
inline Tensor none_like(const Tensor& x) { return torch::stable::new_empty(x, {0}); }

}  // namespace greenmim::cpu
