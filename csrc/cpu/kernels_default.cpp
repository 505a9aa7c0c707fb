// SSE2 on x86-64, NEON on Arm: what every processor of the architecture has.
#include "capability.h"
#define GREENMIM_CAPABILITY "default"
#define GREENMIM_KERNELS kernels_default
#define GREENMIM_VECTOR_BYTES 16
#if defined(__aarch64__)
#define GREENMIM_VECTOR_REGISTERS 32
#else
#define GREENMIM_VECTOR_REGISTERS 16
#endif
#include "kernels.h"
