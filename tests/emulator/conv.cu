// The convolution of visible tokens as a program, as attention.cu is one of attention.
#include "../../csrc/cuda/sparse_depthwise_conv.cuh"
#include "../../csrc/cuda/table_gradient.cuh"
#include "memory.h"

using namespace greenmim::cuda;

namespace {

// In the order of the Python side.
struct Header {
  int64_t thread_order, element, batch, tokens, channels, partitions, has_bias, need_x, need_weight,
      need_bias, processors;
};

template <class T>
void convolve(const Header& h) {
  const size_t elements = h.batch * h.tokens * h.channels;
  Buffer x(elements * sizeof(T)), grad_out(elements * sizeof(T)), weight(h.channels * kPlaces * 4);
  Buffer bias(h.has_bias ? h.channels * 4 : 0), neighbours(h.partitions * h.tokens * kPlaces * 4);
  for (Buffer* buffer : {&x, &grad_out, &weight, &bias, &neighbours}) buffer->read();
  const Buffer out(elements * sizeof(T)), grad_x(h.need_x ? elements * sizeof(T) : 0);
  Conv c{};
  c.from = x.as<T>();
  c.to = out.as<T>();
  c.weight = weight.as<float>();
  c.bias = h.has_bias ? bias.as<float>() : nullptr;
  c.neighbours = neighbours.as<int>();
  c.batch = int(h.batch);
  c.tokens = int(h.tokens);
  c.channels = int(h.channels);
  c.per_image = h.partitions > 1;
  plan_conv<T, false>(c, int(h.processors));
  launch_conv<T, false>(c, nullptr);

  c.from = grad_out.as<T>();
  c.to = h.need_x ? grad_x.as<T>() : nullptr;
  c.x = x.as<T>();
  plan_conv<T, true>(c, int(h.processors));
  const int64_t parts = c.parts(), runs = table_runs(parts);
  const int places[] = {h.need_weight ? kPlaces : 0, h.need_bias ? 1 : 0};
  const Buffer of_weight(parts * places[0] * h.channels * 4), of_bias(parts * places[1] * h.channels * 4);
  c.partial_weight = places[0] ? of_weight.as<float>() : nullptr;
  c.partial_bias = places[1] ? of_bias.as<float>() : nullptr;
  launch_conv<T, true>(c, nullptr);
  out.write();
  grad_x.write();
  for (int i = 0; i < 2; ++i) {
    if (places[i] == 0) continue;
    const Buffer sums(runs * places[i] * h.channels * 8), gradient(places[i] * h.channels * 4);
    run_table_gradient(i == 0 ? c.partial_weight : c.partial_bias, sums.as<double>(),
                       gradient.as<float>(), parts, places[i], c.channels, nullptr);
    gradient.write();
  }
}

}  // namespace

int main() try {
  Header h;
  if (std::fread(&h, sizeof h, 1, stdin) != 1) throw std::runtime_error("no header");
#ifdef GREENMIM_EMULATE
  emulator::thread_order = unsigned(h.thread_order);
#endif
  if (h.element == 0) convolve<float>(h);
  if (h.element == 1) convolve<bfloat16>(h);
  if (h.element == 2) convolve<float16>(h);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "conv: %s\n", error.what());
  return 1;
}
