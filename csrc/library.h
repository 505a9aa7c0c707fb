// The operators' namespace: `greenmim`, or a name that the build chooses. A build for the Hugging Face Hub
// has one of its own, so that a process can load several versions.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef GREENMIM_NAMESPACE
#define GREENMIM_NAMESPACE greenmim
#endif

// In two steps, so that GREENMIM_NAMESPACE is expanded before it is pasted.
#define GREENMIM_LIBRARY_IMPL(key, m) GREENMIM_EXPANDED_LIBRARY_IMPL(GREENMIM_NAMESPACE, key, m)
#define GREENMIM_EXPANDED_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
