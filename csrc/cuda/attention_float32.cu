#include "attention_kernels.cuh"
#include "attention_type.cuh"

namespace greenmim::cuda {

template AttentionKernel* attention_kernel<float, 16, false>(bool, Pass);
template AttentionKernel* attention_kernel<float, 32, false>(bool, Pass);
template AttentionKernel* attention_kernel<float, 64, false>(bool, Pass);
template bool plan_attention<float>(Attention&, int, Pass, const Device&);
template void run_attention<float>(const Attention&, int, Pass, void*);

}  // namespace greenmim::cuda
