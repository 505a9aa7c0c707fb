#include "grouping.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "packing.h"

namespace greenmim {

namespace {

// Steps of the packer's search per image, a few microseconds: planning runs for every training
// step, and searching 100 times longer would save less than half a percent of the groups.
constexpr int64_t kSearchEffort = 1000;

constexpr int64_t kTileRows = 16;   // rows of a tensor core tile
constexpr int64_t kBlockRows = 64;  // rows of the largest tile; larger groups loop over blocks
constexpr int64_t kLargestUseful = 256;
constexpr char kChanged[] = "visible was changed while its windows were packed";

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows a kernel computes for a group: Triton's tiles are powers of two (48 slots cost 64 rows), and
// above 64 slots queries and keys come in blocks of 64.
int64_t tile_rows(int64_t group_size) {
  if (group_size > kBlockRows) return round_up(group_size, kBlockRows);
  int64_t rows = kTileRows;
  while (rows < group_size) rows *= 2;
  return rows;
}

}  // namespace

int64_t fixed_group_size(int64_t window_area, int64_t num_tokens) {
  return round_up(std::min(window_area, num_tokens), kTileRows);
}

// The cost model. Attention on windows of 7 is bound by memory, and each visible token is read and
// written once whatever the grouping, so the traffic is the same for every group size and drops
// out. What the group size changes is the work on the tiles and the number of them:
//
//   cost of a group = 512 + 8 * rows + rows^2     (rows: see tile_rows)
//
// The unit is one cell of the score tile, for one head of one image: an exponential (a quarter-rate
// instruction), four to six lane operations beside it, and its share of the products, about 16 lane
// operations in all. A row costs its address arithmetic, predicated loads and stores and the
// reduction of its maximum and sum, about 128 lane operations. A group costs the latency that the
// loop over images cannot hide: some 200 cycles of 128 lanes with four groups in flight, 6400 to
// 8000 lane operations. These are estimates from instruction rates, not fits to a device; only
// their ratios matter, and the choice is insensitive to them: a tile of 64 loses to two of 32
// wherever the windows fit into 32, and beats one of 128.
int64_t group_cost(int64_t group_size) {
  const int64_t rows = tile_rows(group_size);
  return 512 + 8 * rows + rows * rows;
}

Grouping::Grouping(const uint8_t* visible, int64_t images, const std::vector<Axis>& axes,
                   const int32_t* segment, int64_t num_segments, int64_t group_size,
                   int64_t capacity)
    : visible_(visible),
      segment_(segment),
      images_(images),
      num_segments_(segment == nullptr ? 1 : num_segments) {
  lay_out(axes);
  count_windows();
  if (group_size == 0 && capacity != 0) {
    group_size = fixed_group_size(window_area_, num_tokens_);
  }
  if (group_size != 0 && group_size < fullest_) {
    throw std::invalid_argument("group_size=" + std::to_string(group_size) +
                                " is smaller than the fullest window, which holds " +
                                std::to_string(fullest_) + " visible tokens; pass at least " +
                                std::to_string(fullest_) + ", or None");
  }
  Packing packing;
  if (group_size == 0) {
    packing = pack_at_least_cost();
  } else {
    pack(group_size, /*cost=*/0, /*cost_limit=*/0, packing);
  }
  if (capacity != 0 && capacity < packing.most_groups) {
    throw std::invalid_argument(
        "capacity=" + std::to_string(capacity) + " is too small: " +
        std::to_string(packing.most_groups) + " groups of " + std::to_string(group_size) +
        " slots are needed; partition_capacity() gives a bound that holds for every grid");
  }
  num_groups_ = capacity != 0 ? capacity : packing.most_groups;
  group_size_ = packing.group_size;
  group_of_ = std::move(packing.group_of);
}

void Grouping::Numbers::extend(const Axis& axis) {
  Numbers longer{{}, {}};
  for (size_t i = 0; i < window.size(); ++i) {
    for (int32_t position = 0; position < axis.size; ++position) {
      longer.window.push_back(window[i] * axis.num_windows() + axis.window_of(position));
      longer.place.push_back(place[i] * axis.table_width() + axis.offset_of(position));
    }
  }
  *this = std::move(longer);
}

void Grouping::lay_out(const std::vector<Axis>& axes) {
  num_windows_ = num_segments_;
  for (const Axis& axis : axes) {
    num_windows_ *= axis.num_windows();
    window_area_ *= axis.window;
    table_centre_ = table_centre_ * axis.table_width() + axis.window - 1;
  }
  for (size_t i = 0; i + 1 < axes.size(); ++i) lines_.extend(axes[i]);
  columns_.extend(axes.back());
  for (int32_t& number : lines_.window) number *= axes.back().num_windows();
  for (int32_t& number : lines_.place) number *= axes.back().table_width();
  num_lines_ = static_cast<int32_t>(lines_.window.size());
  num_columns_ = static_cast<int32_t>(columns_.window.size());
}

// Calls visit(line, column) for the visible tokens of an image in row-major order.
template <typename Visit>
void Grouping::for_each_visible(int64_t image, Visit visit) const {
  const uint8_t* cell = visible_ + image * num_lines_ * num_columns_;
  for (int32_t line = 0; line < num_lines_; ++line, cell += num_columns_) {
    int32_t column = 0;
    while (column < num_columns_) {
      // Most of the grid is hidden: look at eight tokens at a time.
      uint64_t eight = 0;
      const int32_t end = std::min(column + 8, num_columns_);
      std::memcpy(&eight, cell + column, end - column);
      if (eight == 0) {
        column = end;
        continue;
      }
      for (; column < end; ++column) {
        if (cell[column] != 0) visit(line, column);
      }
    }
  }
}

void Grouping::count_windows() {
  first_window_.reserve(images_ + 1);
  first_window_.push_back(0);
  std::vector<int32_t> count(num_windows_);
  for (int64_t image = 0; image < images_; ++image) {
    std::fill(count.begin(), count.end(), 0);
    for_each_visible(image, [&](int32_t line, int32_t column) {
      ++count[window_of(image, line, column)];
    });
    int64_t num_tokens = 0;
    for (int32_t window = 0; window < num_windows_; ++window) {
      if (count[window] == 0) continue;
      windows_.push_back(window);
      counts_.push_back(count[window]);
      num_tokens += count[window];
      fullest_ = std::max(fullest_, count[window]);
    }
    first_window_.push_back(static_cast<int64_t>(windows_.size()));
    if (image == 0) num_tokens_ = num_tokens;
    check_tokens(image, num_tokens);
  }
}

void Grouping::check_tokens(int64_t image, int64_t num_tokens) const {
  if (num_tokens != num_tokens_) {
    throw std::invalid_argument("visible keeps " + std::to_string(num_tokens_) +
                                " tokens in image 0 and " + std::to_string(num_tokens) +
                                " in image " + std::to_string(image) +
                                "; every image of a batch must keep the same number");
  }
  if (num_tokens == 0) {
    throw std::invalid_argument("visible keeps no token; at least one must be visible (True)");
  }
}

// Packs every image, a group at the given cost. False, with the packing unfinished, where the sum
// exceeds the limit.
bool Grouping::pack(int64_t group_size, int64_t cost, int64_t cost_limit,
                    Packing& packing) const {
  const int64_t least = ceil_div(num_tokens_, group_size) * cost;
  packing.group_size = group_size;
  packing.group_of.reserve(windows_.size());
  Packer packer;
  for (int64_t image = 0; image < images_; ++image) {
    const int64_t first = first_window_[image];
    const int32_t windows = static_cast<int32_t>(first_window_[image + 1] - first);
    const int64_t groups = packer.pack(counts_.data() + first, windows, group_size, kSearchEffort);
    packing.group_of.insert(packing.group_of.end(), packer.group_of().begin(),
                            packer.group_of().end());
    packing.most_groups = std::max(packing.most_groups, groups);
    packing.cost += groups * cost;
    if (packing.cost + (images_ - 1 - image) * least > cost_limit) return false;
  }
  return true;
}

// The multiple of 16 with the least cost summed over the images (groups an image lacks to the
// longest one are padding, which a kernel leaves at once); among equals the fewest slots, then the
// smallest group. Sizes are tried from the most promising bound on, and rarely more than one is.
Grouping::Packing Grouping::pack_at_least_cost() const {
  struct Candidate {
    int64_t bound;  // no packing costs less
    int64_t size;
  };
  const int64_t smallest = round_up(fullest_, kTileRows);
  const int64_t useful = std::max(kLargestUseful, tile_rows(smallest));
  const int64_t largest = std::min(round_up(num_tokens_, kTileRows), useful);
  std::vector<Candidate> candidates;
  for (int64_t size = smallest; size <= largest; size += kTileRows) {
    candidates.push_back({images_ * ceil_div(num_tokens_, size) * group_cost(size), size});
  }
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.bound != b.bound ? a.bound < b.bound : a.size > b.size;
  });
  Packing best;
  best.cost = std::numeric_limits<int64_t>::max();
  for (const Candidate& candidate : candidates) {
    if (candidate.bound > best.cost) break;
    const int64_t least_slots = ceil_div(num_tokens_, candidate.size) * candidate.size;
    const int64_t slots = best.most_groups * best.group_size;
    if (candidate.bound == best.cost && least_slots > slots) continue;
    Packing packing;
    if (!pack(candidate.size, group_cost(candidate.size), best.cost, packing)) continue;
    const int64_t new_slots = packing.most_groups * packing.group_size;
    if (packing.cost < best.cost || new_slots < slots ||
        (new_slots == slots && packing.group_size < best.group_size)) {
      best = std::move(packing);
    }
  }
  return best;
}

void Grouping::fill(int32_t* token_index, int32_t* window_id, int32_t* query_row,
                    int32_t* key_row) const {
  const int64_t slots = num_groups_ * group_size_;  // of one image
  std::fill(token_index, token_index + images_ * slots, -1);
  std::fill(window_id, window_id + images_ * slots, -1);
  std::fill(query_row, query_row + images_ * slots, 0);
  std::fill(key_row, key_row + images_ * slots, 0);
  // Of a window's next token, and behind its last one.
  std::vector<int64_t> next_slot(num_windows_), end_slot(num_windows_);
  std::vector<int64_t> group_fill;
  for (int64_t image = 0; image < images_; ++image) {
    group_fill.assign(num_groups_, 0);
    // Windows in increasing order, so that the slots of every group come out sorted by window.
    for (int64_t i = first_window_[image]; i < first_window_[image + 1]; ++i) {
      const int32_t group = group_of_[i];
      next_slot[windows_[i]] = image * slots + group * group_size_ + group_fill[group];
      group_fill[group] += counts_[i];
      end_slot[windows_[i]] = next_slot[windows_[i]] + counts_[i];
    }
    int32_t token = 0;
    for_each_visible(image, [&](int32_t line, int32_t column) {
      const int32_t window = window_of(image, line, column);
      const int64_t slot = next_slot[window]++;
      if (slot >= end_slot[window]) {
        throw std::invalid_argument(kChanged);
      }
      token_index[slot] = token++;
      window_id[slot] = window;
      const int32_t place = lines_.place[line] + columns_.place[column];
      query_row[slot] = place + table_centre_;
      key_row[slot] = -place;
    });
    if (token != num_tokens_) throw std::invalid_argument(kChanged);
  }
}

}  // namespace greenmim
