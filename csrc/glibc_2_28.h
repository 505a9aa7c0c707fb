// Included before everything else of a build with MANYLINUX=1, on a system whose libraries of C and C++ are
// newer than those of manylinux_2_28: takes the older version of each function that has a newer one there. A
// test reads the versions that the binaries ask for.
#pragma once

#if defined(__linux__) && !defined(__CUDA_ARCH__)
#if defined(__x86_64__)
#define GREENMIM_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define GREENMIM_GLIBC "GLIBC_2.17"
#else
#error "MANYLINUX=1 knows the symbols of x86-64 and aarch64 alone"
#endif
__asm__(".symver dlsym,dlsym@" GREENMIM_GLIBC);  // moved from libdl in 2.34, which Python has loaded
__asm__(".symver exp,exp@" GREENMIM_GLIBC);      // 2.29: without wrappers that set errno
__asm__(".symver log,log@" GREENMIM_GLIBC);

// 2.32: whether there is one thread, which libstdc++ asks to leave out atomics. Ours always says no.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded;
}

#ifndef __CUDACC__  // which has no need of it
// GCC 12: what is thrown where too much memory is asked for.
#include <bits/functexcept.h>
namespace std {
[[noreturn]] __attribute__((weak)) void __throw_bad_array_new_length() {
  __throw_bad_alloc();
}
}  // namespace std
#endif
#endif
