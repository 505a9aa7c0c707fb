#include "attention_kernels.cuh"
#include "attention_type.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<float, 16, false>(const Attention&, Pass);
template AttentionKernel* attention_kernel<float, 32, false>(const Attention&, Pass);
template AttentionKernel* attention_kernel<float, 64, false>(const Attention&, Pass);
template bool plan_attention<float>(Attention&, int, Pass, const Device&);
template void run_attention<float>(const Attention&, int, Pass, void*);

}  // namespace greenmim::cuda
