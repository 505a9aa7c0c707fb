// From a grid of visible tokens to groups of windows: count, choose the group size, pack, fill.
#pragma once

#include <cstdint>
#include <vector>

namespace greenmim {

// One axis of the grid. A position p lies in window (p + (window - shift) % window) / window: with
// a shift the first window is only `shift` wide, and nothing wraps around the border.
struct Axis {
  int32_t size;
  int32_t window;
  int32_t shift;

  int32_t window_of(int32_t position) const {
    const int64_t moved = int64_t{position} + (window - shift) % window;
    return static_cast<int32_t>(moved / window);
  }
  int32_t num_windows() const { return window_of(size - 1) + 1; }
};

// Slots of a group where the shapes must not depend on which tokens are visible.
int64_t fixed_group_size(int64_t window_area, int64_t num_tokens);

// Estimated cost of one group; the model is explained in grouping.cpp.
int64_t group_cost(int64_t group_size);

// The groups of the windows of a batch of grids.
class Grouping {
 public:
  // visible: [images, rows.size, columns.size], nonzero = visible, not copied. group_size 0: chosen
  // by cost, or fixed_group_size where a capacity is given. capacity 0: as many groups as needed.
  // Throws std::invalid_argument with a sentence for the user.
  Grouping(const uint8_t* visible, int64_t images, Axis rows, Axis columns, int64_t group_size,
           int64_t capacity);

  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_groups() const { return num_groups_; }
  int64_t group_size() const { return group_size_; }

  // Writes every slot of token_index and window_id [images, groups, slots] and coords [.., 2].
  void fill(int32_t* token_index, int32_t* window_id, int32_t* coords) const;

 private:
  // The groups of every image for one group size.
  struct Packing {
    int64_t group_size = 0;
    int64_t most_groups = 0;        // of any image
    int64_t cost = 0;               // of all images
    std::vector<int32_t> group_of;  // parallel to windows_
  };

  void count_windows();
  void check_tokens(int64_t image, int64_t num_tokens) const;
  bool pack(int64_t group_size, int64_t cost, int64_t cost_limit, Packing& packing) const;
  Packing pack_at_least_cost() const;
  template <typename Visit>
  void for_each_visible(int64_t image, Visit visit) const;

  const uint8_t* visible_;
  int64_t images_;
  Axis rows_;
  Axis columns_;
  int64_t num_windows_;
  int64_t num_tokens_ = 0;
  int64_t num_groups_ = 0;
  int64_t group_size_ = 0;
  int32_t fullest_ = 0;                 // visible tokens of the fullest window
  std::vector<int32_t> row_window_;     // of a row: window row times the number of window columns
  std::vector<int32_t> column_window_;  // of a column: window column
  std::vector<int32_t> windows_;        // ids of the windows with visible tokens, image after image
  std::vector<int32_t> counts_;         // their visible tokens
  std::vector<int64_t> first_window_;   // [images + 1]: where an image begins in the two above
  std::vector<int32_t> group_of_;       // group of each of these windows
};

}  // namespace greenmim
