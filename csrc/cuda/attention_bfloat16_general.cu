#include "attention_kernels.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<bfloat16, 16, true>(const Attention&, Pass);
template AttentionKernel* attention_kernel<bfloat16, 32, true>(const Attention&, Pass);
template AttentionKernel* attention_kernel<bfloat16, 64, true>(const Attention&, Pass);

}  // namespace greenmim::cuda
