#include "capability.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define GREENMIM_CAPABILITY "avx512"
#define GREENMIM_KERNELS kernels_avx512
#define GREENMIM_VECTOR_BYTES 64
#define GREENMIM_VECTOR_REGISTERS 32
#include "kernels.h"
#endif
