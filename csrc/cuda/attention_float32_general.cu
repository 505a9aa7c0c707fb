#include "attention_kernels.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<float, 16, true>(const Attention&, Pass);
template AttentionKernel* attention_kernel<float, 32, true>(const Attention&, Pass);
template AttentionKernel* attention_kernel<float, 64, true>(const Attention&, Pass);

}  // namespace greenmim::cuda
