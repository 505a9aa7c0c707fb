// Linear layers of float32 CPU tensors by oneDNN, forward and backward.
//
// The products are oneDNN's, called through PyTorch. The backward pass is one operator, as the hundred
// linear layers of a model would else spend a few percent of a step between small operators, and as
// oneDNN wants a factor of the weight's gradient transposed: PyTorch's own copy of a transposed matrix
// runs on one thread, ours takes the bias's gradient along.
#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace greenmim::cpu {

namespace {

// A line of the cache: each is read once, whatever the distance between rows.
constexpr int64_t kColumns = 16;
constexpr int64_t kElementsPerThread = 1 << 13;
// Rows that are summed in float before the sum goes on in double.
constexpr int64_t kRowsPerSum = 256;

using Four = float __attribute__((vector_size(16)));
using UnalignedFour = float __attribute__((vector_size(16), aligned(4), may_alias));
using Lanes = int __attribute__((vector_size(16)));

Four load(const float* from) { return *reinterpret_cast<const UnalignedFour*>(from); }
void store(float* to, Four value) { *reinterpret_cast<UnalignedFour*>(to) = value; }

// Transposes 4 x 4 values and returns the sums of their columns.
inline Four transpose_four(const float* from, int64_t columns, float* to, int64_t rows) {
  const Four a = load(from), b = load(from + columns);
  const Four c = load(from + 2 * columns), d = load(from + 3 * columns);
  const Four ab_low = __builtin_shuffle(a, b, Lanes{0, 4, 1, 5});
  const Four ab_high = __builtin_shuffle(a, b, Lanes{2, 6, 3, 7});
  const Four cd_low = __builtin_shuffle(c, d, Lanes{0, 4, 1, 5});
  const Four cd_high = __builtin_shuffle(c, d, Lanes{2, 6, 3, 7});
  store(to, __builtin_shuffle(ab_low, cd_low, Lanes{0, 1, 4, 5}));
  store(to + rows, __builtin_shuffle(ab_low, cd_low, Lanes{2, 3, 6, 7}));
  store(to + 2 * rows, __builtin_shuffle(ab_high, cd_high, Lanes{0, 1, 4, 5}));
  store(to + 3 * rows, __builtin_shuffle(ab_high, cd_high, Lanes{2, 3, 6, 7}));
  return (a + b) + (c + d);
}

// One strip of at most kColumns columns; `width` of them are there.
void transpose_strip(
    const float* from, float* to, float* sums, int64_t rows, int64_t columns, int64_t width) {
  const int64_t whole = width / 4 * 4;
  double total[kColumns] = {};
  for (int64_t first = 0; first < rows; first += kRowsPerSum) {
    const int64_t last = std::min(rows, first + kRowsPerSum);
    Four sum[kColumns / 4] = {};
    int64_t row = first;
    for (; row + 4 <= last; row += 4)
      for (int64_t c = 0; c < whole; c += 4)
        sum[c / 4] +=
            transpose_four(from + row * columns + c, columns, to + c * rows + row, rows);
    for (int64_t c = 0; c < width; c++) {
      total[c] += sum[c / 4][c % 4];  // zero beyond `whole`
      for (int64_t r = c < whole ? row : first; r < last; r++) {
        to[c * rows + r] = from[r * columns + c];
        total[c] += from[r * columns + c];
      }
    }
  }
  for (int64_t c = 0; c < width; c++) sums[c] = float(total[c]);
}

// [M, O] -> [O, M], [O]
std::tuple<Tensor, Tensor> transpose_and_sum(const Tensor& x) {
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor transposed = torch::stable::new_empty(x, {columns, rows});
  Tensor sums = torch::stable::new_empty(x, {columns});
  const float* from = x.const_data_ptr<float>();
  float* to = transposed.mutable_data_ptr<float>();
  float* sum = sums.mutable_data_ptr<float>();
  const int64_t strips = (columns + kColumns - 1) / kColumns;
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, rows * kColumns));
  torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      const int64_t c = s * kColumns;
      transpose_strip(
          from + c, to + c * rows, sum + c, rows, columns, std::min(kColumns, columns - c));
    }
  });
  return {transposed, sums};
}

// x [..., I], weight [O, I] of any strides -> x weight^T + bias [..., O]. What torch.compile itself
// calls for the linear layers of a frozen model.
Tensor product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(x), from(weight), from(bias), from(std::string("none")), from(std::vector<double>{}),
      from(std::optional<std::string>(""))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      "mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void check(const Tensor& tensor, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(
      tensor.dim() > 0 && tensor.size(tensor.dim() - 1) == columns, name, " must be [..., ",
      columns, "]");
}

}  // namespace

Tensor onednn_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [O, I], got ", weight.dim(), " axes");
  check(weight, weight.size(1), "weight");
  check(x, weight.size(1), "x");
  if (bias) {  // oneDNN reads it as dense, whatever its strides
    STD_TORCH_CHECK(bias->dim() == 1, "bias must be [O], got ", bias->dim(), " axes");
    check(*bias, weight.size(0), "bias");
    bias = torch::stable::contiguous(*bias);
  }
  return product(x, weight, bias);
}

// What is not needed comes back empty.
std::tuple<Tensor, Tensor, Tensor> onednn_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight,
    bool need_bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [O, I], got ", weight.dim(), " axes");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  check(weight, inputs, "weight");
  check(x, inputs, "x");
  check(grad, outputs, "grad");
  STD_TORCH_CHECK(
      grad.numel() * inputs == x.numel() * outputs, "grad and x must have as many rows");
  const auto none = [&] { return torch::stable::new_empty(grad, {0}); };
  Tensor grad_x = need_x ? product(grad, torch::stable::transpose(weight, 0, 1), std::nullopt)
                         : none();
  Tensor grad_weight = none(), grad_bias = none();
  if (need_weight || need_bias) {
    const Tensor rows = torch::stable::contiguous(torch::stable::reshape(grad, {-1, outputs}));
    const auto [transposed, sums] = transpose_and_sum(rows);
    if (need_bias) grad_bias = sums;
    if (need_weight && rows.size(0) == 0)  // oneDNN refuses a sum over nothing
      grad_weight = torch::stable::new_zeros(grad, {outputs, inputs});
    else if (need_weight)
      grad_weight = product(
          transposed, torch::stable::transpose(torch::stable::reshape(x, {-1, inputs}), 0, 1),
          std::nullopt);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace greenmim::cpu

STABLE_TORCH_LIBRARY_IMPL(greenmim, CPU, m) {
  m.impl("onednn_linear", TORCH_BOX(&greenmim::cpu::onednn_linear));
  m.impl("onednn_linear_backward", TORCH_BOX(&greenmim::cpu::onednn_linear_backward));
}
