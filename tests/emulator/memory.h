// Memory of the device, filled from and written to files: the emulator's is plain memory of exactly the
// size asked for, so that the address sanitizer sees the first byte beyond. On a GPU nothing is written
// to it but what is read into it, so that compute-sanitizer sees what a kernel leaves out.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef GREENMIM_EMULATE
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  std::memset(memory, 0xFF, bytes);  // NaN in every type, until something is written
  return memory;
}
inline void release(void* memory) { std::free(memory); }
inline void copy_to_device(void* to, const void* from, size_t bytes) {
  if (bytes != 0) std::memcpy(to, from, bytes);
}
inline void copy_from_device(void* to, const void* from, size_t bytes) {
  if (bytes != 0) std::memcpy(to, from, bytes);
}
#else
#include <cuda_runtime.h>

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes == 0 ? 1 : bytes));
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void copy_to_device(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
// Waits for the kernels before it.
inline void copy_from_device(void* to, const void* from, size_t bytes) {
  check(cudaGetLastError());
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}
#endif

class Buffer {
 public:
  explicit Buffer(size_t bytes) : memory_(allocate(bytes)), bytes_(bytes) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { release(memory_); }

  void fill(const void* content) { copy_to_device(memory_, content, bytes_); }
  void read() {
    if (bytes_ == 0) return;
    std::vector<char> content(bytes_);
    if (std::fread(content.data(), 1, bytes_, stdin) != bytes_)
      throw std::runtime_error("short input");
    fill(content.data());
  }
  void write() const {
    if (bytes_ == 0) return;
    std::vector<char> content(bytes_);
    copy_from_device(content.data(), memory_, bytes_);
    if (std::fwrite(content.data(), 1, bytes_, stdout) != bytes_)
      throw std::runtime_error("short output");
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
  size_t bytes_;
};
