#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace greenmim::cpu {

namespace {

// What this processor can run, best first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    usable.push_back(&kernels_avx512);
  if (has_avx2) usable.push_back(&kernels_avx2);
#endif
  usable.push_back(&kernels_default);
  return usable;
}

const Kernels& choose_kernels() {
  const auto usable = usable_kernels();
  const char* wanted = std::getenv("GREENMIM_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return *usable.front();
  std::string names;
  for (const Kernels* candidate : usable) {
    if (std::string(wanted) == candidate->name) return *candidate;
    names += (names.empty() ? "" : ", ") + std::string(candidate->name);
  }
  throw std::runtime_error(
      "GREENMIM_CPU_CAPABILITY names '" + std::string(wanted) +
      "', which this processor or build does not have; choose one of " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace greenmim::cpu

// For Python, through ctypes: the name of the capability in use, or null where the environment names
// one that is not there; then the second function says so in a sentence.
#define GREENMIM_EXPORT extern "C" __attribute__((visibility("default")))

GREENMIM_EXPORT const char* greenmim_cpu_capability() {
  try {
    return greenmim::cpu::kernels().name;
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}

GREENMIM_EXPORT const char* greenmim_cpu_capability_problem() {
  static thread_local std::string problem;
  try {
    greenmim::cpu::kernels();
    problem.clear();
  } catch (const std::runtime_error& error) {
    problem = error.what();
  }
  return problem.c_str();
}
