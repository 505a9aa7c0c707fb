// Checks shared by the operators of every device: what a kernel relies on so as not to read or write
// outside its tensors. The messages for users are in greenmim_kernels/functional.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace greenmim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_indices(const Tensor& indices, int64_t dim, const char* name) {
  STD_TORCH_CHECK(indices.dim() == dim, name, " must have ", dim, " axes, got ", indices.dim());
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int, name, " must be int32");
}

// [P, G, S] or [P, G, S, 2] beside a batch of B images.
inline void check_batch(const Tensor& indices, int64_t batch, const char* name) {
  STD_TORCH_CHECK(
      indices.size(0) == 1 || indices.size(0) == batch, name, " holds ", indices.size(0),
      " partitions for a batch of ", batch, "; it must be 1 or one per image");
}

inline void check_gather(const Tensor& x, const Tensor& token_index) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, C], got ", x.dim(), " axes");
  check_indices(token_index, 3, "token_index");
  check_batch(token_index, x.size(0), "token_index");
}

inline void check_scatter(const Tensor& x, const Tensor& token_index, int64_t num_tokens) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, G, S, C], got ", x.dim(), " axes");
  check_indices(token_index, 3, "token_index");
  check_batch(token_index, x.size(0), "token_index");
  STD_TORCH_CHECK(
      x.size(1) == token_index.size(1) && x.size(2) == token_index.size(2),
      "x and token_index must have the same groups and slots");
  STD_TORCH_CHECK(num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
}

}  // namespace greenmim
