// The planner behind a C interface, which greenmim_kernels/_planner.py calls: no Python is needed to build
// it, and one build serves every version of Python. ctypes releases the interpreter lock meanwhile, so that
// loader threads plan side by side.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>
#include <vector>

#include "grouping.h"
#include "packing.h"

using greenmim::Axis;
using greenmim::Grouping;
using greenmim::Packer;

namespace {

// Steps of one call of pack_windows, at most some 0.1 s: it is called by hand, not in every step.
constexpr int64_t kSearchEffort = 4'000'000;

// What `work` returns; where it throws, `failed`, with the reason in `error`. A reason that is empty stands
// for memory that was not there.
template <class Result, class Work>
Result guarded(char* error, int64_t error_size, Result failed, const Work& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    std::snprintf(error, static_cast<size_t>(error_size), "%s", "");
  } catch (const std::exception& thrown) {
    std::snprintf(error, static_cast<size_t>(error_size), "%s", thrown.what());
  }
  return failed;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int64_t greenmim_fixed_group_size(int64_t window_area, int64_t num_tokens) {
  return greenmim::fixed_group_size(window_area, num_tokens);
}

EXPORTED int64_t greenmim_group_cost(int64_t group_size) { return greenmim::group_cost(group_size); }

// counts: [windows], each in [1, group_size]. The number of groups, and in group_of [windows] each window's; -1
// with a reason.
EXPORTED int64_t greenmim_pack_windows(const int32_t* counts, int32_t windows, int64_t group_size,
                                       int32_t* group_of, char* error, int64_t error_size) {
  return guarded<int64_t>(error, error_size, -1, [&] {
    Packer packer;
    const int64_t groups = packer.pack(counts, windows, group_size, kSearchEffort);
    for (int32_t window = 0; window < windows; ++window) group_of[window] = packer.group_of()[window];
    return groups;
  });
}

// The groups of a batch of grids, to be filled in and freed; null with a reason. See Grouping for what is
// passed; sizes, window and shift have a number per axis. facts: the number of groups, the slots of a group
// and the tokens of an image.
EXPORTED void* greenmim_grouping(const uint8_t* visible, int64_t images, int32_t num_axes,
                                 const int32_t* sizes, const int32_t* window, const int32_t* shift,
                                 const int32_t* segment, int64_t num_segments, int64_t group_size,
                                 int64_t capacity, int64_t* facts, char* error, int64_t error_size) {
  return guarded<void*>(error, error_size, nullptr, [&]() -> void* {
    std::vector<Axis> axes;
    for (int32_t i = 0; i < num_axes; ++i) axes.push_back({sizes[i], window[i], shift[i]});
    auto* grouping =
        new Grouping(visible, images, axes, segment, num_segments, group_size, capacity);
    facts[0] = grouping->num_groups();
    facts[1] = grouping->group_size();
    facts[2] = grouping->num_tokens();
    return grouping;
  });
}

// Writes every slot of [images, groups, slots] each. visible and segment are read again. Whether it did; else the
// reason.
EXPORTED int32_t greenmim_grouping_fill(const void* grouping, int32_t* token_index,
                                        int32_t* window_id, int32_t* query_row, int32_t* key_row,
                                        char* error, int64_t error_size) {
  return guarded<int32_t>(error, error_size, 0, [&] {
    static_cast<const Grouping*>(grouping)->fill(token_index, window_id, query_row, key_row);
    return 1;
  });
}

EXPORTED void greenmim_grouping_free(void* grouping) { delete static_cast<Grouping*>(grouping); }
