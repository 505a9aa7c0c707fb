#include "attention_kernels.cuh"
#include "attention_type.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<bfloat16, 16, false>(bool, Pass);
template AttentionKernel* attention_kernel<bfloat16, 32, false>(bool, Pass);
template AttentionKernel* attention_kernel<bfloat16, 64, false>(bool, Pass);
template bool plan_attention<bfloat16>(Attention&, int, Pass, const Device&);
template void run_attention<bfloat16>(const Attention&, int, Pass, void*);

}  // namespace greenmim::cuda
