#include "attention_kernels.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<float16, 16, true>(bool, Pass);
template AttentionKernel* attention_kernel<float16, 32, true>(bool, Pass);
template AttentionKernel* attention_kernel<float16, 64, true>(bool, Pass);

}  // namespace greenmim::cuda
