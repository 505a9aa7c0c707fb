#include "attention_type.cuh"

namespace greenmim::cuda {

template bool plan_attention<bfloat16>(Attention&, int, Pass, const Device&);
template void run_attention<bfloat16>(const Attention&, int, Pass, void*);

}  // namespace greenmim::cuda
