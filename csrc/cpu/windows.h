// The windows of a partition as lists of rows, for kernels that work window by window.
#pragma once

#include "../checks.h"
#include "capability.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace greenmim::cpu {

struct Window {
  int64_t partition;  // 0 where one mask serves the batch, else the image
  int64_t start;      // its first slot in the lists below
  int32_t size;       // slots: tokens, then padding that attends
  int32_t tokens;
  int64_t first_run;
  int32_t num_runs;  // 0 where runs are too short to be worth it
};

struct Windows {
  std::vector<Window> list;
  std::vector<int32_t> rows;       // row of a token within its image; -1 of padding
  // A pair's row of the bias table, counted from the last one, is the sum of a query's place and a
  // key's. Places of keys along a grid's line then count up, and the line is a piece of the table.
  std::vector<int32_t> query_place, key_place;
  std::vector<Run> runs;
  int32_t largest = 0;             // slots of the fullest window
  // Rows that are in no window, and zero in every result: rows of one partition after the other.
  std::vector<int32_t> outside;
  std::vector<int64_t> first_outside;  // [partitions + 1]
};

struct PartitionSlots {
  const int32_t* token_index;  // or null: then a token's row is its slot, as in [B, G * S, C]
  const int32_t *window_id, *query_row, *key_row;
  int64_t partitions, groups, slots;
};

// The runs of a window's keys, where there are two keys in one at the least on average.
inline void find_runs(Windows& windows, Window& window) {
  window.first_run = int64_t(windows.runs.size());
  const int32_t* place = windows.key_place.data() + window.start;
  for (int32_t slot = 0; slot < window.size; slot++) {
    if (slot > 0 && place[slot] == place[slot - 1] + 1)
      windows.runs.back().count++;
    else
      windows.runs.push_back({slot, 1, place[slot]});
  }
  window.num_runs = int32_t(windows.runs.size() - window.first_run);
  if (2 * window.num_runs <= window.size) return;
  windows.runs.resize(window.first_run);
  window.num_runs = 0;
}

// Of a window's numbers for the table, of which all sums are rows of it: its places. Numbers alone may
// be of any size.
inline void find_places(
    Windows& windows, const Window& window, int64_t lowest_key, int64_t table_rows) {
  for (int64_t i = window.start; i < window.start + window.size; i++) {
    windows.query_place[i] = int32_t(table_rows - 1 - lowest_key - windows.query_place[i]);
    windows.key_place[i] = int32_t(lowest_key - windows.key_place[i]);
  }
}

// table_rows: 0 without a table.
inline Windows find_windows(const PartitionSlots& part, int64_t num_rows, int64_t table_rows) {
  const int32_t *token_index = part.token_index, *window_id = part.window_id;
  const int64_t partitions = part.partitions, groups = part.groups, slots = part.slots;
  Windows windows;
  for (auto* list : {&windows.rows, &windows.query_place, &windows.key_place})
    list->reserve(partitions * groups * slots);
  windows.first_outside.push_back(0);
  std::vector<int64_t> order(slots);
  std::vector<char> seen(partitions == 0 ? 0 : num_rows);
  for (int64_t p = 0; p < partitions; p++) {
    std::fill(seen.begin(), seen.end(), 0);
    int64_t tokens = 0;
    // The row of a slot, named once.
    const auto row_of = [&](int64_t slot) {
      const int64_t row = token_index == nullptr ? slot - p * groups * slots : token_index[slot];
      STD_TORCH_CHECK(
          row >= 0 && row < num_rows, "token_index holds ", row, ", but an image has ", num_rows, " tokens");
      STD_TORCH_CHECK(!seen[row], "token_index names token ", row, " twice");
      seen[row] = 1;
      tokens++;
      return int32_t(row);
    };
    for (int64_t g = 0; g < groups; g++) {
      const int64_t base = (p * groups + g) * slots;
      std::iota(order.begin(), order.end(), base);
      const auto by_window = [&](int64_t a, int64_t b) { return window_id[a] < window_id[b]; };
      // A planner sorts a group by window, with slots without one last: nothing to do then.
      const auto without = std::find_if(
          order.begin(), order.end(), [&](int64_t slot) { return window_id[slot] < 0; });
      auto last = without;
      if (!std::is_sorted(order.begin(), without, by_window) ||
          std::any_of(without, order.end(), [&](int64_t slot) { return window_id[slot] >= 0; })) {
        last = std::stable_partition(
            order.begin(), order.end(), [&](int64_t slot) { return window_id[slot] >= 0; });
        std::stable_sort(order.begin(), last, by_window);
      }
      for (auto slot = order.begin(); slot != last;) {
        Window window{p, int64_t(windows.rows.size()), 0, 0, 0, 0};
        const int32_t id = window_id[*slot];
        const auto end =
            std::find_if(slot, last, [&](int64_t other) { return window_id[other] != id; });
        const auto is_token = [&](int64_t s) { return token_index == nullptr || token_index[s] >= 0; };
        if (!std::is_partitioned(slot, end, is_token)) std::stable_partition(slot, end, is_token);
        int32_t lowest[2] = {INT32_MAX, INT32_MAX}, highest[2] = {INT32_MIN, INT32_MIN};
        for (; slot != end; ++slot, window.size++) {
          const int32_t ends[2] = {part.query_row[*slot], part.key_row[*slot]};
          for (int side = 0; side < 2; side++) {
            lowest[side] = std::min(lowest[side], ends[side]);
            highest[side] = std::max(highest[side], ends[side]);
          }
          const bool token = is_token(*slot);
          windows.rows.push_back(token ? row_of(*slot) : -1);
          windows.query_place.push_back(ends[0]);
          windows.key_place.push_back(ends[1]);
          window.tokens += token;
        }
        STD_TORCH_CHECK(
            table_rows == 0 || (int64_t(lowest[0]) + lowest[1] >= 0 &&
                                int64_t(highest[0]) + highest[1] < table_rows),
            "query_row + key_row of window ", id, " lies outside the ", table_rows,
            " rows of the bias table");
        if (window.tokens == 0) continue;  // nobody asks
        if (table_rows > 0) {
          find_places(windows, window, lowest[1], table_rows);
          find_runs(windows, window);
        }
        windows.largest = std::max(windows.largest, window.size);
        windows.list.push_back(window);
      }
      for (auto slot = last; slot != order.end(); ++slot)
        if (token_index == nullptr || token_index[*slot] >= 0)
          windows.outside.push_back(row_of(*slot));
    }
    windows.first_outside.push_back(int64_t(windows.outside.size()));
    STD_TORCH_CHECK(
        tokens == num_rows, "the partition holds ", tokens, " tokens, the image ", num_rows);
  }
  return windows;
}

}  // namespace greenmim::cpu
