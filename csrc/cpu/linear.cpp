// Linear layers of float32 CPU tensors by oneDNN, forward and backward.
//
// The products are oneDNN's, called through PyTorch. The backward pass is one operator, as the hundred
// linear layers of a model would else spend a few percent of a step between small operators, and as
// oneDNN wants a factor of the weight's gradient transposed: PyTorch's own copy of a transposed matrix
// runs on one thread, ours takes the bias's gradient along. The two layers of an MLP are an operator,
// too, whose GELU has its backward pass within that copy.
#include "../checks.h"
#include "../library.h"
#include "capability.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace greenmim::cpu {

namespace {

constexpr int64_t kElementsPerThread = 1 << 13;

template <class Work>
void for_strips(int64_t rows, int64_t columns, const Work& work) {
  const Kernels& chosen = kernels();  // here: parallel_for would wrap its error
  const int64_t strips = (columns + kStripColumns - 1) / kStripColumns;
  const int64_t grain = kElementsPerThread / std::max<int64_t>(1, rows * kStripColumns);
  torch::stable::parallel_for(
      0, strips, std::max<int64_t>(1, grain),
      [&](int64_t begin, int64_t end) { work(chosen, begin, end); });
}

struct Transposed {
  Tensor values, sums;  // [columns, rows] and [columns]
};

// Of grad [rows, columns], dense. With a slope, grad is multiplied by it first, in place.
Transposed transposed(const Tensor& grad, bool wanted, const Tensor* slope = nullptr) {
  const int64_t rows = grad.size(0), columns = grad.size(1);
  Transposed found{
      torch::stable::new_empty(grad, {wanted ? columns : 0, rows}),
      torch::stable::new_empty(grad, {columns})};
  TransposeTask task{};
  task.grad = grad.const_data_ptr<float>();
  if (slope != nullptr) {
    task.slope = slope->const_data_ptr<float>();
    task.scaled = grad.mutable_data_ptr<float>();
  }
  task.transposed = wanted ? found.values.mutable_data_ptr<float>() : nullptr;
  task.sums = found.sums.mutable_data_ptr<float>();
  task.rows = rows, task.columns = columns;
  for_strips(rows, columns, [&](const Kernels& kernels, int64_t begin, int64_t end) {
    kernels.transpose_strips(task, begin, end);
  });
  return found;
}

// GELU of x, dense; x becomes its derivative.
Tensor gelu(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  float* from = x.mutable_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, x.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
    chosen.gelu(from + begin, to + begin, end - begin);
  });
  return out;
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

// [..., columns] -> [M, columns], dense.
Tensor rows_of(const Tensor& tensor) {
  const int64_t columns = tensor.size(tensor.dim() - 1);
  const int64_t rows = columns ? tensor.numel() / columns : 0;
  return torch::stable::contiguous(torch::stable::reshape(tensor, {rows, columns}));
}

// A layer of x [..., I], and GELU of its result with a slope, which becomes GELU's derivative.
//
// oneDNN copies the second factor into blocks before it multiplies. With fewer rows than outputs that
// is to be x: weight x^T took a tenth less time than x weight^T for 192 rows, a fifth less for 48; the
// transposition back, where the bias is added, takes half of the first gain and little of the second.
Tensor layer(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    Tensor* slope = nullptr) {
  const int64_t columns = weight.size(0);
  const int64_t rows = x.numel() / weight.size(1);
  if (rows == 0 || rows >= columns) {
    Tensor out = product(x, weight, bias);
    if (slope == nullptr) return out;
    *slope = torch::stable::contiguous(out);
    return gelu(*slope);
  }
  const Tensor transposed =
      torch::stable::contiguous(product(torch::stable::contiguous(weight), rows_of(x), std::nullopt));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  Tensor out = torch::stable::new_empty(x, sizes);
  FinishTask task{};
  task.transposed = transposed.const_data_ptr<float>();
  task.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  task.out = out.mutable_data_ptr<float>();
  if (slope != nullptr) {
    *slope = torch::stable::new_empty(x, sizes);
    task.slope = slope->mutable_data_ptr<float>();
  }
  task.rows = rows, task.columns = columns;
  for_strips(rows, columns, [&](const Kernels& kernels, int64_t begin, int64_t end) {
    kernels.finish_strips(task, begin, end);
  });
  return out;
}

// The weight's gradient from the transposed one [O, M] and the layer's input x [M, I].
Tensor weight_gradient(const Tensor& transposed, const Tensor& x) {
  if (x.size(0) == 0)  // oneDNN refuses a sum over nothing
    return torch::stable::new_zeros(x, {transposed.size(0), x.size(1)});
  return product(transposed, torch::stable::transpose(x, 0, 1), std::nullopt);
}

Tensor input_gradient(const Tensor& grad, const Tensor& weight) {
  return product(grad, torch::stable::transpose(weight, 0, 1), std::nullopt);
}

Tensor like(const Tensor& rows, const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  return torch::stable::reshape(rows, sizes);
}

void check(const Tensor& tensor, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(
      tensor.dim() > 0 && tensor.size(tensor.dim() - 1) == columns, name, " must be [..., ",
      columns, "]");
}

void check_rows(const Tensor& tensor, const Tensor& x, const char* name) {
  const bool same = tensor.sizes().slice(0, tensor.dim() - 1).equals(x.sizes().slice(0, x.dim() - 1));
  STD_TORCH_CHECK(same, name, " and x must agree in all axes but the last");
}

void check_weight(const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(weight.dim() == 2, name, " must be [O, I], got ", weight.dim(), " axes");
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, name, " must not be empty");
  check(weight, weight.size(1), name);
}

void check_mlp(const Tensor& x, const Tensor& weight1, const Tensor& weight2) {
  check_weight(weight1, "weight1");
  check_weight(weight2, "weight2");
  check(weight2, weight1.size(0), "weight2");
  check(x, weight1.size(1), "x");
}

// oneDNN reads a bias as dense, whatever its strides.
std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, int64_t size, const char* name) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == size && bias->scalar_type() == ScalarType::Float, name,
      " must be float32 of shape [", size, "]");
  return torch::stable::contiguous(*bias);
}

}  // namespace

Tensor onednn_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  check_weight(weight, "weight");
  check(x, weight.size(1), "x");
  return layer(x, weight, checked_bias(bias, weight.size(0), "bias"));
}

// What is not needed comes back empty.
std::tuple<Tensor, Tensor, Tensor> onednn_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight,
    bool need_bias) {
  check_weight(weight, "weight");
  check(x, weight.size(1), "x");
  check(grad, weight.size(0), "grad");
  check_rows(grad, x, "grad");
  const auto none = [&] { return torch::stable::new_empty(grad, {0}); };
  Tensor grad_x = need_x ? input_gradient(grad, weight) : none();
  Tensor grad_weight = none(), grad_bias = none();
  if (need_weight || need_bias) {
    const Transposed of = transposed(rows_of(grad), need_weight);
    if (need_bias) grad_bias = of.sums;
    if (need_weight) grad_weight = weight_gradient(of.values, rows_of(x));
  }
  return {grad_x, grad_weight, grad_bias};
}

// Two layers with GELU between them. The other results are for the backward pass: GELU, and its
// derivative, which forward costs a multiplication and backward an exponential.
std::tuple<Tensor, Tensor, Tensor> onednn_mlp(
    const Tensor& x, const Tensor& weight1, std::optional<Tensor> bias1, const Tensor& weight2,
    std::optional<Tensor> bias2) {
  check_mlp(x, weight1, weight2);
  bias1 = checked_bias(bias1, weight1.size(0), "bias1");
  bias2 = checked_bias(bias2, weight2.size(0), "bias2");
  Tensor slope;
  const Tensor hidden = layer(x, weight1, bias1, &slope);
  return {layer(hidden, weight2, bias2), hidden, slope};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> onednn_mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& hidden, const Tensor& slope,
    const Tensor& weight1, const Tensor& weight2, bool need_x, bool need_weight1, bool need_bias1,
    bool need_weight2, bool need_bias2) {
  check_mlp(x, weight1, weight2);
  check(hidden, weight1.size(0), "hidden");
  check(slope, weight1.size(0), "slope");
  check(grad, weight2.size(0), "grad");
  for (const auto& [tensor, name] : {std::pair{&hidden, "hidden"}, {&slope, "slope"}, {&grad, "grad"}})
    check_rows(*tensor, x, name);
  const auto none = [&] { return torch::stable::new_empty(grad, {0}); };
  Tensor grad_x = none(), grad_weight1 = none(), grad_bias1 = none(), grad_weight2 = none(),
         grad_bias2 = none();
  const Tensor rows = rows_of(grad);
  if (need_weight2 || need_bias2) {
    const Transposed of = transposed(rows, need_weight2);
    if (need_bias2) grad_bias2 = of.sums;
    if (need_weight2) grad_weight2 = weight_gradient(of.values, rows_of(hidden));
  }
  if (need_x || need_weight1 || need_bias1) {
    const Tensor of_slope = rows_of(slope);
    const Tensor grad_hidden = torch::stable::contiguous(input_gradient(rows, weight2));
    const Transposed of = transposed(grad_hidden, need_weight1, &of_slope);
    if (need_bias1) grad_bias1 = of.sums;
    if (need_weight1) grad_weight1 = weight_gradient(of.values, rows_of(x));
    if (need_x) grad_x = like(input_gradient(grad_hidden, weight1), x);
  }
  return {grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2};
}

}  // namespace greenmim::cpu

GREENMIM_LIBRARY_IMPL(CPU, m) {
  m.impl("onednn_linear", TORCH_BOX(&greenmim::cpu::onednn_linear));
  m.impl("onednn_linear_backward", TORCH_BOX(&greenmim::cpu::onednn_linear_backward));
  m.impl("onednn_mlp", TORCH_BOX(&greenmim::cpu::onednn_mlp));
  m.impl("onednn_mlp_backward", TORCH_BOX(&greenmim::cpu::onednn_mlp_backward));
}
