#include "attention_kernels.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<bfloat16, 16, true>(bool, Pass);
template AttentionKernel* attention_kernel<bfloat16, 32, true>(bool, Pass);
template AttentionKernel* attention_kernel<bfloat16, 64, true>(bool, Pass);

}  // namespace greenmim::cuda
