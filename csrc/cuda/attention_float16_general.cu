#include "attention_kernels.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<float16, 16, true>(const Attention&, Pass);
template AttentionKernel* attention_kernel<float16, 32, true>(const Attention&, Pass);
template AttentionKernel* attention_kernel<float16, 64, true>(const Attention&, Pass);

}  // namespace greenmim::cuda
