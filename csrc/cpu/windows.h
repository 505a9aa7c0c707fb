// The windows of a partition as lists of rows, for kernels that work window by window.
#pragma once

#include "../checks.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace greenmim::cpu {

struct Window {
  int64_t partition;  // 0 where one mask serves the batch, else the image
  int64_t start;      // first entry in `rows` and `positions`
  int32_t size;       // tokens
};

struct Windows {
  std::vector<Window> list;
  std::vector<int32_t> rows;       // row of a token within its image
  std::vector<int32_t> positions;  // h * (2 Mw - 1) + w
  int32_t largest = 0;             // tokens in the fullest window
};

// token_index may be null: then a token's row is its slot, as in tensors [B, G * S, C].
inline Windows find_windows(
    const int32_t* token_index, const int32_t* window_id, const int32_t* coords, int64_t partitions,
    int64_t groups, int64_t slots, int64_t num_rows, int64_t window_height, int64_t window_width) {
  Windows windows;
  windows.rows.reserve(partitions * groups * slots);
  windows.positions.reserve(partitions * groups * slots);
  std::vector<int64_t> order(slots);
  std::vector<char> seen(token_index == nullptr ? 0 : num_rows);
  for (int64_t p = 0; p < partitions; p++) {
    std::fill(seen.begin(), seen.end(), 0);
    int64_t tokens = 0;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t base = (p * groups + g) * slots;
      std::iota(order.begin(), order.end(), base);
      const auto by_window = [&](int64_t a, int64_t b) { return window_id[a] < window_id[b]; };
      // The planner sorts a group by window, with the padding (-1) last: nothing to do then.
      const auto padding = std::find_if(
          order.begin(), order.end(), [&](int64_t slot) { return window_id[slot] < 0; });
      auto last = padding;
      if (!std::is_sorted(order.begin(), padding, by_window) ||
          std::any_of(padding, order.end(), [&](int64_t slot) { return window_id[slot] >= 0; })) {
        last = std::stable_partition(
            order.begin(), order.end(), [&](int64_t slot) { return window_id[slot] >= 0; });
        std::stable_sort(order.begin(), last, by_window);
      }
      for (auto slot = order.begin(); slot != last;) {
        Window window{p, int64_t(windows.rows.size()), 0};
        const int32_t id = window_id[*slot];
        int32_t lowest[2] = {INT32_MAX, INT32_MAX}, highest[2] = {INT32_MIN, INT32_MIN};
        for (; slot != last && window_id[*slot] == id; ++slot, window.size++) {
          const int64_t row = token_index == nullptr ? *slot - p * groups * slots
                                                     : int64_t(token_index[*slot]);
          STD_TORCH_CHECK(
              row >= 0 && row < num_rows, "token_index names token ", row, " of ", num_rows);
          if (token_index != nullptr) {
            STD_TORCH_CHECK(!seen[row], "token_index names token ", row, " twice");
            seen[row] = 1;
          }
          const int32_t h = coords[2 * *slot], w = coords[2 * *slot + 1];
          lowest[0] = std::min(lowest[0], h), highest[0] = std::max(highest[0], h);
          lowest[1] = std::min(lowest[1], w), highest[1] = std::max(highest[1], w);
          windows.rows.push_back(int32_t(row));
          windows.positions.push_back(int32_t(h * (2 * window_width - 1) + w));
        }
        STD_TORCH_CHECK(
            int64_t(highest[0]) - lowest[0] < window_height &&
                int64_t(highest[1]) - lowest[1] < window_width,
            "the coords of window ", id, " span more than ", window_height, " x ", window_width);
        tokens += window.size;
        windows.largest = std::max(windows.largest, window.size);
        windows.list.push_back(window);
      }
    }
    STD_TORCH_CHECK(
        token_index == nullptr || tokens == num_rows, "the partition holds ", tokens,
        " tokens, the image ", num_rows);
  }
  return windows;
}

}  // namespace greenmim::cpu
