#include "attention_type.cuh"

namespace greenmim::cuda {

template bool plan_attention<float>(Attention&, int, Pass, const Device&);
template void run_attention<float>(const Attention&, int, Pass, void*);

}  // namespace greenmim::cuda
