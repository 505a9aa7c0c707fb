// The body of every capability: included once by each kernels_<capability>.cpp, after its settings.
namespace greenmim::cpu {
namespace {  // all internal: nothing of one instruction set may be linked into another

#include "vector.h"

#include "matrix_product.h"

#include "window_attention.h"

#include "gelu.h"

#include "depthwise_conv.h"

}  // namespace

const Kernels GREENMIM_KERNELS = {
    GREENMIM_CAPABILITY, scratch_bytes, forward_any, backward_any, gelu, transpose_strips,
    finish_strips, conv_any, conv_backward_any};

}  // namespace greenmim::cpu
