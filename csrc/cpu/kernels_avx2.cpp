#include "capability.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define GREENMIM_CAPABILITY "avx2"
#define GREENMIM_KERNELS kernels_avx2
#define GREENMIM_VECTOR_BYTES 32
#define GREENMIM_VECTOR_REGISTERS 16
#include "kernels.h"
#endif
