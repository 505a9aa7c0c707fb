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
  // Within the window.
  int32_t offset_of(int32_t position) const {
    const int64_t moved = int64_t{position} + (window - shift) % window;
    return static_cast<int32_t>(moved % window);
  }
  // Rows of the bias table along this axis: differences of two offsets.
  int32_t table_width() const { return 2 * window - 1; }
};

// Slots of a group where the shapes must not depend on which tokens are visible.
int64_t fixed_group_size(int64_t window_area, int64_t num_tokens);

// Estimated cost of one group; the model is explained in grouping.cpp.
int64_t group_cost(int64_t group_size);

// The groups of the windows of a batch of grids.
class Grouping {
 public:
  // visible: [images, sizes of the axes], nonzero = visible, not copied. segment: of the same shape,
  // each token's number in [0, num_segments), not copied; null: all in one. group_size 0: chosen by
  // cost, or fixed_group_size where a capacity is given. capacity 0: as many groups as needed.
  // Throws std::invalid_argument with a sentence for the user.
  Grouping(const uint8_t* visible, int64_t images, const std::vector<Axis>& axes,
           const int32_t* segment, int64_t num_segments, int64_t group_size, int64_t capacity);

  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_groups() const { return num_groups_; }
  int64_t group_size() const { return group_size_; }

  // Writes every slot of [images, groups, slots] each.
  void fill(int32_t* token_index, int32_t* window_id, int32_t* query_row, int32_t* key_row) const;

 private:
  // The groups of every image for one group size.
  struct Packing {
    int64_t group_size = 0;
    int64_t most_groups = 0;        // of any image
    int64_t cost = 0;               // of all images
    std::vector<int32_t> group_of;  // parallel to windows_
  };

  // Of a line or a column. A token's window is the sum of its line's and its column's, and its place
  // in the window, counted in rows of the bias table, likewise.
  struct Numbers {
    std::vector<int32_t> window{0}, place{0};
    void extend(const Axis& axis);
  };

  void lay_out(const std::vector<Axis>& axes);
  void count_windows();
  void check_tokens(int64_t image, int64_t num_tokens) const;
  bool pack(int64_t group_size, int64_t cost, int64_t cost_limit, Packing& packing) const;
  Packing pack_at_least_cost() const;
  template <typename Visit>
  void for_each_visible(int64_t image, Visit visit) const;

  // The window of a token, or with segments, the part of it that the token attends to.
  int32_t window_of(int64_t image, int32_t line, int32_t column) const {
    const int32_t window = lines_.window[line] + columns_.window[column];
    if (segment_ == nullptr) return window;
    const int64_t token = (image * num_lines_ + line) * num_columns_ + column;
    return static_cast<int32_t>(window * num_segments_ + segment_[token]);
  }

  const uint8_t* visible_;
  const int32_t* segment_;
  int64_t images_;
  int64_t num_segments_;
  int32_t num_lines_ = 0;     // of an image: all axes but the last one
  int32_t num_columns_ = 0;   // of a line: the last axis
  int64_t window_area_ = 1;   // tokens of a full window
  int64_t num_windows_ = 0;   // of an image, times segments
  int32_t table_centre_ = 0;  // row of the bias table of two tokens at one place
  int64_t num_tokens_ = 0;
  int64_t num_groups_ = 0;
  int64_t group_size_ = 0;
  int32_t fullest_ = 0;  // visible tokens of the fullest window
  Numbers lines_, columns_;
  std::vector<int32_t> windows_;       // ids of the windows with visible tokens, image after image
  std::vector<int32_t> counts_;        // their visible tokens
  std::vector<int64_t> first_window_;  // [images + 1]: where an image begins in the two above
  std::vector<int32_t> group_of_;      // group of each of these windows
};

}  // namespace greenmim
