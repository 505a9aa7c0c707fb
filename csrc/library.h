// Where operators are registered: `greenmim`, or the name that a build chooses, as one for the Hugging Face
// Hub does, of which a process may load several versions.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef GREENMIM_NAMESPACE
#define GREENMIM_NAMESPACE greenmim
#endif

#define GREENMIM_LIBRARY_IMPL(key, m) GREENMIM_EXPANDED_LIBRARY_IMPL(GREENMIM_NAMESPACE, key, m)
#define GREENMIM_EXPANDED_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
