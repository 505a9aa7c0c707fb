// What the operators do with tensors and devices.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "primitives.cuh"

namespace greenmim::cuda {

using torch::stable::Tensor;
using Guard = torch::stable::accelerator::DeviceGuard;

// PyTorch is not asked for what is contiguous already: a call through the stable interface takes time.
inline Tensor to_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Tensor none_like(const Tensor& x) { return torch::stable::new_empty(x, {0}); }

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_prepared(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// The sums that blocks left, partial [programs, heads, rows] -> [rows, heads], on the current stream;
// in group_window_attention.cu.
Tensor summed(const Tensor& partial);

}  // namespace greenmim::cuda
