// sparse_depthwise_conv for CPU tensors: a depthwise 3 x 3 convolution of visible tokens.
//
// How tokens are cut into tasks depends on their number alone, and the sums of the tasks are added in a
// fixed order, so the result does not depend on the number of threads.
#include "../checks.h"
#include "../library.h"
#include "capability.h"
#include "storage.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace greenmim::cpu {

namespace {

// Enough tasks to balance many threads; each has sums for a whole kernel.
constexpr int64_t kConvTasks = 64;
constexpr int64_t kConvWorkPerThread = 1 << 15;  // elements of x

// The kernel trusts the indices with raw memory, and its gradient that they are mutual.
void check_neighbours(const Tensor& neighbours) {
  const int64_t tokens = neighbours.size(1);
  const int32_t* of = neighbours.const_data_ptr<int32_t>();
  for (int64_t p = 0; p < neighbours.size(0); p++, of += tokens * kTaps)
    for (int64_t i = 0; i < tokens * kTaps; i++) {
      if (of[i] < 0) continue;
      STD_TORCH_CHECK(
          of[i] < tokens, "neighbours name token ", of[i], ", and an image has ", tokens);
      STD_TORCH_CHECK(
          of[of[i] * int64_t(kTaps) + kTaps - 1 - i % kTaps] == i / kTaps, "token ", of[i],
          " is a neighbour of token ", i / kTaps, ", which is not its neighbour at the opposite place");
    }
}

// Weights as kernels read them, [taps, channels].
template <class A>
std::vector<char> rows_of_taps(const Tensor& weight_any, bool last_first) {
  const Tensor weight = torch::stable::contiguous(weight_any);
  const int64_t channels = weight.size(0);
  std::vector<char> rows(size_t(channels * kTaps) * sizeof(A));
  const A* from = weight.const_data_ptr<A>();
  A* to = reinterpret_cast<A*>(rows.data());
  for (int64_t c = 0; c < channels; c++)
    for (int k = 0; k < kTaps; k++)
      to[(last_first ? kTaps - 1 - k : k) * channels + c] = from[c * kTaps + k];
  return rows;
}

std::vector<char> rows_of_taps(const Tensor& weight, bool last_first) {
  return weight.scalar_type() == ScalarType::Double ? rows_of_taps<double>(weight, last_first)
                                                    : rows_of_taps<float>(weight, last_first);
}

// The sums of all tasks, in their order: to [channels, taps], the last place first, and [channels].
template <class A>
void add_tasks(
    const std::vector<char>& partial, int64_t tasks, int64_t channels, A* grad_weight, A* grad_bias) {
  const A* from = reinterpret_cast<const A*>(partial.data());
  std::vector<double> row(channels);
  for (int k = 0; k <= kTaps; k++) {
    A* const to = k < kTaps ? grad_weight : grad_bias;
    if (to == nullptr) continue;
    std::fill(row.begin(), row.end(), 0);
    for (int64_t task = 0; task < tasks; task++)
      for (int64_t c = 0; c < channels; c++) row[c] += from[(task * (kTaps + 1) + k) * channels + c];
    for (int64_t c = 0; c < channels; c++) (k < kTaps ? to[c * kTaps + kTaps - 1 - k] : to[c]) = A(row[c]);
  }
}

// Calls configure(task, number) and then the kernel for each run of tokens.
template <class Configure>
void run(
    const Tensor& x, const ConvShape& shape, const Tensor& neighbours_any,
    void (*kernel)(const ConvTask&), Configure configure) {
  const Tensor neighbours = torch::stable::contiguous(neighbours_any);
  check_neighbours(neighbours);
  const int64_t tokens = shape.batch * shape.tokens;
  if (tokens == 0 || shape.channels == 0) return;
  ConvTask all{};
  all.storage = storage_type(x);
  all.x = x.const_data_ptr();
  all.neighbours = neighbours.const_data_ptr<int32_t>();
  all.tokens_per_image = shape.tokens;
  all.channels = shape.channels;
  all.per_image = neighbours.size(0) > 1;
  const int64_t work = tokens * shape.channels / kConvTasks + 1;
  const int64_t grain = std::max<int64_t>(1, kConvWorkPerThread / work);
  torch::stable::parallel_for(0, kConvTasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      ConvTask task = all;
      task.first = tokens * i / kConvTasks;
      task.last = tokens * (i + 1) / kConvTasks;
      configure(task, i);
      kernel(task);
    }
  });
}

}  // namespace

Tensor sparse_depthwise_conv(
    const Tensor& x_any, const Tensor& weight, std::optional<Tensor> bias_any,
    const Tensor& neighbours) {
  const ConvShape shape = check_conv(x_any, weight, arithmetic_type(x_any), neighbours);
  check_conv_bias(bias_any, weight, shape);
  const Tensor x = torch::stable::contiguous(x_any);
  if (bias_any) bias_any = torch::stable::contiguous(*bias_any);
  const std::vector<char> rows = rows_of_taps(weight, false);
  Tensor out = torch::stable::empty_like(x);
  void* out_data = out.mutable_data_ptr();
  run(x, shape, neighbours, kernels().conv, [&](ConvTask& task, int64_t) {
    task.weight = rows.data();
    task.bias = bias_any ? bias_any->const_data_ptr() : nullptr;
    task.out = out_data;
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sparse_depthwise_conv_backward(
    const Tensor& grad_out_any, const Tensor& x_any, const Tensor& weight, const Tensor& neighbours,
    bool need_x, bool need_weight, bool need_bias) {
  const ConvShape shape = check_conv(x_any, weight, arithmetic_type(x_any), neighbours);
  check_conv_like(grad_out_any, x_any, shape, "grad_out");
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor grad_out = torch::stable::contiguous(grad_out_any);
  const std::vector<char> rows = rows_of_taps(weight, true);
  const auto sized = [&](bool needed, std::vector<int64_t> sizes) {
    return needed ? torch::stable::new_empty(weight, sizes) : none_like(weight);
  };
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : none_like(x);
  Tensor grad_weight = sized(need_weight, {shape.channels, kTaps});
  Tensor grad_bias = sized(need_bias, {shape.channels});
  const int64_t task_bytes = (kTaps + 1) * shape.channels * int64_t(weight.element_size());
  std::vector<char> partial(need_weight || need_bias ? size_t(kConvTasks * task_bytes) : 0);
  void* grad_x_data = need_x ? grad_x.mutable_data_ptr() : nullptr;
  run(x, shape, neighbours, kernels().conv_backward, [&](ConvTask& task, int64_t number) {
    task.weight = rows.data();
    task.grad_out = grad_out.const_data_ptr();
    task.out = grad_x_data;
    if (!partial.empty()) task.sums = partial.data() + number * task_bytes;
  });
  const auto add = [&](auto* grad_weight, auto* grad_bias) {
    add_tasks(partial, kConvTasks, shape.channels, need_weight ? grad_weight : nullptr,
              need_bias ? grad_bias : nullptr);
  };
  if (!partial.empty() && weight.scalar_type() == ScalarType::Double)
    add(grad_weight.mutable_data_ptr<double>(), grad_bias.mutable_data_ptr<double>());
  else if (!partial.empty())
    add(grad_weight.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>());
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace greenmim::cpu

GREENMIM_LIBRARY_IMPL(CPU, m) {
  m.impl("sparse_depthwise_conv", TORCH_BOX(&greenmim::cpu::sparse_depthwise_conv));
  m.impl("sparse_depthwise_conv_backward",
         TORCH_BOX(&greenmim::cpu::sparse_depthwise_conv_backward));
}
