// Included first in every source of a build with MANYLINUX=1. The build may run on a system whose C and C++
// libraries are newer than those of manylinux_2_28; this binds functions to their older versions. A test
// reads the versions that the binaries need.
#pragma once

#if defined(__linux__) && !defined(__CUDA_ARCH__)
#if defined(__x86_64__)
#define GREENMIM_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define GREENMIM_GLIBC "GLIBC_2.17"
#else
#error "MANYLINUX=1 supports x86-64 and aarch64 only; build without it"
#endif
__asm__(".symver dlsym,dlsym@" GREENMIM_GLIBC);  // in libdl before 2.34; Python has loaded libdl
__asm__(".symver exp,exp@" GREENMIM_GLIBC);      // 2.29: without wrappers that set errno
__asm__(".symver log,log@" GREENMIM_GLIBC);

// 2.32: libstdc++ leaves out atomics where it is nonzero, that is with one thread. Ours stays 0.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded;
}

#ifndef __CUDACC__  // CUDA sources do not need it
// GCC 12: called for an array of an impossible size; older libraries lack it.
#include <bits/functexcept.h>
namespace std {
[[noreturn]] __attribute__((weak)) void __throw_bad_array_new_length() {
  __throw_bad_alloc();
}
}  // namespace std
#endif
#endif
