#include "attention_kernels.cuh"
#include "attention_type.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<bfloat16, 16, false>(const Attention&, Pass);
template AttentionKernel* attention_kernel<bfloat16, 32, false>(const Attention&, Pass);
template AttentionKernel* attention_kernel<bfloat16, 64, false>(const Attention&, Pass);
template bool plan_attention<bfloat16>(Attention&, int, Pass, const Device&);
template void run_attention<bfloat16>(const Attention&, int, Pass, void*);

}  // namespace greenmim::cuda
