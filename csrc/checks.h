// Checks shared by the operators of every device: what keeps a kernel from reading or writing outside
// its tensors. The messages for users are in greenmim_kernels/functional.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace greenmim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_indices(const Tensor& indices, int64_t dim, const char* name) {
  STD_TORCH_CHECK(indices.dim() == dim, name, " must have ", dim, " axes, got ", indices.dim());
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int, name, " must be int32");
}

// P, the first axis, is 1 or the batch size.
inline void check_batch(const Tensor& indices, int64_t batch, const char* name) {
  STD_TORCH_CHECK(
      indices.size(0) == 1 || indices.size(0) == batch, "the first axis of ", name,
      " must be 1 or the batch size, ", batch, ", got ", indices.size(0));
}

// There is a slot for every token; otherwise the result would have rows that nothing writes.
inline void check_room(const Tensor& token_index, int64_t num_tokens) {
  const int64_t slots = token_index.size(1) * token_index.size(2);
  STD_TORCH_CHECK(
      token_index.size(0) == 0 || num_tokens <= slots, "token_index has ", slots,
      " slots, too few for the ", num_tokens, " tokens of an image");
}

inline void check_gather(const Tensor& x, const Tensor& token_index) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, C], got ", x.dim(), " axes");
  check_indices(token_index, 3, "token_index");
  check_batch(token_index, x.size(0), "token_index");
  check_room(token_index, x.size(1));
}

inline void check_scatter(const Tensor& x, const Tensor& token_index, int64_t num_tokens) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, G, S, C], got ", x.dim(), " axes");
  check_indices(token_index, 3, "token_index");
  check_batch(token_index, x.size(0), "token_index");
  STD_TORCH_CHECK(
      x.size(1) == token_index.size(1) && x.size(2) == token_index.size(2),
      "x and token_index must have the same groups and slots");
  STD_TORCH_CHECK(num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
  check_room(token_index, num_tokens);
}

// Sizes of a convolution of visible tokens, checked.
struct ConvShape {
  int64_t batch, tokens, channels;
};

constexpr int kTaps = 9;  // of a kernel of 3 x 3

inline ConvShape check_conv(
    const Tensor& x, const Tensor& weight, ScalarType weight_type, const Tensor& neighbours) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, C], got ", x.dim(), " axes");
  const ConvShape shape{x.size(0), x.size(1), x.size(2)};
  check_indices(neighbours, 3, "neighbours");
  check_batch(neighbours, shape.batch, "neighbours");
  STD_TORCH_CHECK(
      neighbours.size(1) == shape.tokens && neighbours.size(2) == kTaps,
      "neighbours must be [1 or B, N, 9]");
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == shape.channels && weight.size(1) == kTaps &&
          weight.scalar_type() == weight_type && weight.device() == x.device(),
      "weight must be [C, 9] in fp32 (fp64 for fp64), on the device of x");
  return shape;
}

inline void check_conv_like(
    const Tensor& tensor, const Tensor& x, const ConvShape& shape, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == shape.batch && tensor.size(1) == shape.tokens &&
          tensor.size(2) == shape.channels && tensor.scalar_type() == x.scalar_type() &&
          tensor.device() == x.device(),
      name, " must be like x in shape, dtype and device");
}

inline void check_conv_bias(
    const std::optional<Tensor>& bias, const Tensor& weight, const ConvShape& shape) {
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == shape.channels &&
                bias->scalar_type() == weight.scalar_type() && bias->device() == weight.device()),
      "bias must be [C], of weight's dtype and on its device");
}

// q, k and v [B, N, heads, D] with any strides but the last. Or all in q, without k and v: [B, N, 3C],
// or [B, G, S, 3C] for gathered groups.
struct QueryKeyValue {
  Tensor q;
  std::optional<Tensor> k, v;

  bool is_packed() const { return !k; }
};

// q, k or v, copied unless the last axis, and no other, has stride 1. What empty_like makes of the
// result then has its layout.
inline Tensor with_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  bool fits = x.size(last) == 1 || x.stride(last) == 1;
  for (int64_t axis = 0; fits && axis < last; ++axis)
    fits = x.size(axis) == 1 || x.size(last) == 1 || x.stride(axis) != 1;
  return fits ? x : torch::stable::contiguous(x);
}

// A partition as the operators get it.
struct PartitionTensors {
  std::optional<Tensor> token_index;  // absent: the rows of q are gathered groups
  Tensor window_id, query_row, key_row;
};

// Sizes of a call of an attention operator, checked.
struct AttentionShape {
  int64_t batch, partitions, groups, slots;
  int64_t rows;  // of an image: N, or G * S for gathered groups
  int64_t heads, channels, head_dim;
  int64_t table_rows;  // 0 without a table
};

// pad_value [3C], or absent: zeros.
inline AttentionShape check_attention(
    const QueryKeyValue& x, const std::optional<Tensor>& table, ScalarType table_type,
    const std::optional<Tensor>& pad_value, const PartitionTensors& part, int64_t heads) {
  const Tensor &qkv = x.q, &window_id = part.window_id;
  AttentionShape shape{};
  const int64_t axes = part.token_index && x.is_packed() ? 3 : 4;
  STD_TORCH_CHECK(
      x.k.has_value() == x.v.has_value(), "pass both k and v, or neither, with all three in q");
  STD_TORCH_CHECK(
      qkv.dim() == axes, x.is_packed() ? "qkv" : "q", " must have ", axes, " axes, got ", qkv.dim());
  check_indices(window_id, 3, "window_id");
  shape.batch = qkv.size(0);
  check_batch(window_id, shape.batch, "window_id");
  shape.partitions = window_id.size(0);
  shape.groups = window_id.size(1);
  shape.slots = window_id.size(2);
  const auto check_like = [&](const Tensor& x, const char* name) {
    check_indices(x, 3, name);
    STD_TORCH_CHECK(
        x.size(0) == shape.partitions && x.size(1) == shape.groups && x.size(2) == shape.slots,
        name, " must have the shape of window_id");
  };
  check_like(part.query_row, "query_row");
  check_like(part.key_row, "key_row");
  if (part.token_index) {
    check_like(*part.token_index, "token_index");
    shape.rows = qkv.size(1);
    check_room(*part.token_index, shape.rows);
  } else {
    STD_TORCH_CHECK(
        x.is_packed() && qkv.size(1) == shape.groups && qkv.size(2) == shape.slots,
        "qkv must be [B, G, S, 3C]");
    shape.rows = shape.groups * shape.slots;
  }
  shape.heads = heads;
  if (x.is_packed()) {
    const int64_t width = qkv.size(axes - 1);
    STD_TORCH_CHECK(
        heads > 0 && heads <= width / 3 && width % (3 * heads) == 0,
        "qkv must hold 3 x num_heads x head_dim values, got ", width, " for ", heads, " heads");
    shape.head_dim = width / 3 / heads;
  } else {
    bool alike = true;
    for (const Tensor* other : {&*x.k, &*x.v}) {
      alike = alike && other->dim() == 4 && other->scalar_type() == qkv.scalar_type() &&
              other->device() == qkv.device();
      for (int64_t axis = 0; alike && axis < 4; ++axis)
        alike = other->size(axis) == qkv.size(axis);
    }
    STD_TORCH_CHECK(
        alike && qkv.size(2) == heads && heads > 0 && qkv.size(3) > 0,
        "q, k and v must be [B, N, ", heads, " heads, head_dim], of one dtype and on one device");
    shape.head_dim = qkv.size(3);
  }
  shape.channels = heads * shape.head_dim;
  if (table) {
    STD_TORCH_CHECK(
        table->dim() == 2 && table->size(0) > 0 && table->size(1) == heads,
        "the bias table must be [rows, ", heads, "], with at least one row");
    STD_TORCH_CHECK(
        table->scalar_type() == table_type, "the bias table must be in fp32 (fp64 for fp64)");
    shape.table_rows = table->size(0);
    // Kernels count its elements in 32 bits.
    STD_TORCH_CHECK(
        shape.table_rows * heads < int64_t(1) << 31, "the bias table must have fewer than 2^31 values");
  }
  if (pad_value)
    STD_TORCH_CHECK(
        pad_value->dim() == 1 && pad_value->size(0) == 3 * shape.channels &&
            pad_value->scalar_type() == qkv.scalar_type() && pad_value->device() == qkv.device(),
        "pad_value must be [3C], of qkv's dtype and on its device");
  return shape;
}

// Where q, k or v lies in `tensor`: from element `first` on, its images, rows and heads so many elements
// apart.
struct Strides {
  const Tensor* tensor;
  int64_t first, image, row, head;
};

// which: 0 is q, 1 is k, 2 is v.
inline Strides strides_of(const QueryKeyValue& x, int which, const AttentionShape& shape) {
  const Tensor& tensor = which == 0 || x.is_packed() ? x.q : which == 1 ? *x.k : *x.v;
  if (!x.is_packed()) return {&tensor, 0, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  // Packed tensors are contiguous by now. Strides are computed: PyTorch's are any for an axis of size 1.
  const int64_t row = 3 * shape.channels;
  return {&tensor, which * shape.channels, shape.rows * row, row, shape.head_dim};
}

inline bool on_one_device(const Tensor& x, const Tensor& y) {
  return x.device() == y.device();
}

// What a backward pass is given: the output or its gradient, [B, N, C] or [B, G, S, C].
inline void check_rows(
    const Tensor& x, const QueryKeyValue& qkv, const AttentionShape& shape, bool grouped,
    const char* name) {
  bool fits = x.dim() == (grouped ? 4 : 3) && x.scalar_type() == qkv.q.scalar_type() &&
              on_one_device(x, qkv.q) && x.size(0) == shape.batch &&
              x.size(x.dim() - 1) == shape.channels;
  fits = fits && (grouped ? x.size(1) == shape.groups && x.size(2) == shape.slots
                          : x.size(1) == shape.rows);
  STD_TORCH_CHECK(fits, name, " must be like qkv: of its dtype, on its device, [B, N, C] or [B, G, S, C]");
}

// The logarithm of the softmax's denominator.
inline void check_lse(
    const Tensor& lse, const Tensor& qkv, ScalarType type, int64_t batch, int64_t heads,
    int64_t rows) {
  STD_TORCH_CHECK(
      lse.scalar_type() == type && on_one_device(lse, qkv) && lse.dim() == 3 &&
          lse.size(0) == batch && lse.size(1) == heads && lse.size(2) == rows,
      "lse must be what the forward pass returned, [B, heads, rows]");
}

}  // namespace greenmim
