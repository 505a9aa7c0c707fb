// sparse_depthwise_conv for CUDA tensors.
#include "../checks.h"
#include "../library.h"
#include "sparse_depthwise_conv.cuh"
#include "stream.h"
#include "tensors.h"

#include <optional>
#include <tuple>

namespace greenmim::cuda {

namespace {

static_assert(kPlaces == kTaps);

struct ConvProblem {
  Tensor x, weight, neighbours;
  ConvShape shape;
  Conv c{};

  ConvProblem(const Tensor& x_any, const Tensor& weight_any, const Tensor& neighbours_any)
      : x(to_contiguous(x_any)),
        weight(to_contiguous(weight_any)),
        neighbours(to_contiguous(neighbours_any)),
        shape(check_conv(x, weight, ScalarType::Float, neighbours)) {
    STD_TORCH_CHECK(on_one_device(neighbours, x), "neighbours must be on the device of x");
    constexpr int64_t kMost = int64_t(1) << 30;
    STD_TORCH_CHECK(
        shape.batch < kMost && shape.tokens < kMost && shape.channels < kMost,
        "x must have fewer than 2^30 images, tokens and channels");
    c.weight = weight.const_data_ptr<float>();
    c.neighbours = neighbours.const_data_ptr<int>();
    c.batch = int(shape.batch);
    c.tokens = int(shape.tokens);
    c.channels = int(shape.channels);
    c.per_image = neighbours.size(0) > 1;
  }

  bool empty() const { return x.numel() == 0; }

  template <class Call>
  void for_type(Call call) const {
    switch (x.scalar_type()) {
      case ScalarType::Float: return call(float{});
      case ScalarType::BFloat16: return call(bfloat16{});
      case ScalarType::Half: return call(float16{});
      default:
        STD_TORCH_CHECK(false, "the CUDA kernels compute in float32, bfloat16 and float16 only");
    }
  }

  template <bool kBackward>
  void plan() {
    const int device = x.get_device_index();
    const int processors = attribute(cudaDevAttrMultiProcessorCount, device);
    for_type([&](auto zero) { plan_conv<decltype(zero), kBackward>(c, processors); });
  }

  template <bool kBackward>
  void run() const {
    const cudaStream_t stream = current_stream(x.get_device_index());
    for_type([&](auto zero) { launch_conv<decltype(zero), kBackward>(c, stream); });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

Tensor sparse_depthwise_conv(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias_any, const Tensor& neighbours) {
  const Guard guard(x.get_device_index());
  ConvProblem problem(x, weight, neighbours);
  check_conv_bias(bias_any, weight, problem.shape);
  Tensor out = torch::stable::empty_like(problem.x);
  if (problem.empty()) return out;
  std::optional<Tensor> bias;
  if (bias_any) bias = to_contiguous(*bias_any);
  problem.c.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  problem.c.from = problem.x.const_data_ptr();
  problem.c.to = out.mutable_data_ptr();
  problem.plan<false>();
  problem.run<false>();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sparse_depthwise_conv_backward(
    const Tensor& grad_out_any, const Tensor& x, const Tensor& weight, const Tensor& neighbours,
    bool need_x, bool need_weight, bool need_bias) {
  const Guard guard(x.get_device_index());
  ConvProblem problem(x, weight, neighbours);
  check_conv_like(grad_out_any, x, problem.shape, "grad_out");
  const Tensor grad_out = to_contiguous(grad_out_any);
  const int64_t channels = problem.shape.channels;
  Tensor grad_x = need_x ? torch::stable::empty_like(problem.x) : none_like(x);
  Tensor grad_weight = none_like(problem.weight), grad_bias = none_like(problem.weight);
  if (problem.empty()) {
    if (need_weight) grad_weight = torch::stable::new_zeros(problem.weight, {channels, kTaps});
    if (need_bias) grad_bias = torch::stable::new_zeros(problem.weight, {channels});
    return {grad_x, grad_weight, grad_bias};
  }
  if (!need_x && !need_weight && !need_bias) return {grad_x, grad_weight, grad_bias};
  Conv& c = problem.c;
  c.from = grad_out.const_data_ptr();
  c.x = problem.x.const_data_ptr();
  c.to = need_x ? grad_x.mutable_data_ptr() : nullptr;
  problem.plan<true>();
  const auto sums = [&](bool needed, int64_t places) {
    return torch::stable::new_empty(problem.weight, {needed ? c.parts() : 0, places, channels});
  };
  Tensor of_weight = sums(need_weight, kTaps), of_bias = sums(need_bias, 1);
  c.partial_weight = need_weight ? of_weight.mutable_data_ptr<float>() : nullptr;
  c.partial_bias = need_bias ? of_bias.mutable_data_ptr<float>() : nullptr;
  problem.run<true>();
  if (need_weight) grad_weight = summed(of_weight);
  if (need_bias) grad_bias = torch::stable::flatten(summed(of_bias));
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace greenmim::cuda

GREENMIM_LIBRARY_IMPL(CUDA, m) {
  m.impl("sparse_depthwise_conv", TORCH_BOX(&greenmim::cuda::sparse_depthwise_conv));
  m.impl("sparse_depthwise_conv_backward", TORCH_BOX(&greenmim::cuda::sparse_depthwise_conv_backward));
}
