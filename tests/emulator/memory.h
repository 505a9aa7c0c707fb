// Buffers that both programs here and the device can read: the emulator's are plain memory of
// exactly the size asked for, so that the address sanitizer sees the first byte beyond.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#ifdef GREENMIM_EMULATE
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  return memory;
}
inline void release(void* memory) { std::free(memory); }
inline void wait_for_device() {}
#else
#include <cuda_runtime.h>

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMallocManaged(&memory, bytes == 0 ? 1 : bytes));
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void wait_for_device() {
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
}
#endif

// Filled with 0xFF, NaN in every type, until something is read into it or written by a kernel.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : memory_(allocate(bytes)), bytes_(bytes) {
    std::memset(memory_, 0xFF, bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { release(memory_); }

  void read() {
    if (std::fread(memory_, 1, bytes_, stdin) != bytes_) throw std::runtime_error("short input");
  }
  void write() const {
    wait_for_device();
    if (std::fwrite(memory_, 1, bytes_, stdout) != bytes_) throw std::runtime_error("short output");
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
  size_t bytes_;
};
