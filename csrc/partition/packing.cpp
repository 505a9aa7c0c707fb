#include "packing.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace greenmim {

namespace {

// Above these the subset sums and the search would cost more than a group is worth, and best-fit
// decreasing does the packing. Grids of windows stay far below.
constexpr int64_t kMaxTableWords = 1 << 16;   // of one table of subset sums
constexpr int64_t kMaxGreedySteps = 1 << 29;  // of filling all groups once, about 0.2 s
constexpr int64_t kMaxSearchWords = 1 << 22;  // of the tables of one search
constexpr int kMaxSearchWindows = 1024;       // bounds the depth of the recursion
constexpr int64_t kMaxRounding = 12;          // of the dual feasible functions

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int Packer::pack(const int32_t* counts, int n, int64_t size, int64_t effort) {
  group_of_.assign(n, 0);
  if (n == 0) return 0;
  best_ = n + 1;
  sort_into_kinds(counts, n, size);
  if (!sums_affordable()) {
    best_fit_decreasing();
    return number_groups();
  }

  fill_greedily(/*force_largest=*/true);
  if (best_ > ceil_div(total_, size_)) {
    const int64_t bound = lower_bound();
    if (best_ > bound) fill_greedily(/*force_largest=*/false);
    if (best_ > bound) best_fit_decreasing();
    const int64_t table = static_cast<int64_t>(kinds_.size() + 1) * words_;
    effort_ = effort;
    while (best_ > bound && n <= kMaxSearchWindows && best_ * table <= kMaxSearchWords) {
      if (!search(best_ - 1)) break;
    }
  }
  return number_groups();
}

void Packer::sort_into_kinds(const int32_t* counts, int n, int64_t size) {
  order_.resize(n);
  std::iota(order_.begin(), order_.end(), 0);
  std::sort(order_.begin(), order_.end(), [counts](int32_t a, int32_t b) {
    return counts[a] != counts[b] ? counts[a] > counts[b] : a < b;
  });
  kinds_.clear();
  int64_t divisor = 0;
  total_ = 0;
  for (int32_t window : order_) {
    const int64_t value = counts[window];
    if (kinds_.empty() || kinds_.back().value != value) {
      kinds_.push_back({value, 0});
      divisor = std::gcd(divisor, value);
    }
    ++kinds_.back().left;
    total_ += value;
  }
  // Sums are multiples of the divisor: what is left of the size can never be used.
  for (Kind& kind : kinds_) kind.value /= divisor;
  total_ /= divisor;
  size_ = std::min(size / divisor, total_);
  words_ = size_ / 64 + 1;
}

bool Packer::sums_affordable() const {
  int64_t copies = 0;
  for (const Kind& kind : kinds_) copies += std::min<int64_t>(kind.left, size_ / kind.value);
  return static_cast<int64_t>(kinds_.size() + 1) * words_ <= kMaxTableWords &&
         copies * words_ <= kMaxGreedySteps / ceil_div(total_, size_);
}

// The largest of three families of bounds, each the sum of a dual feasible function over the
// windows (Fekete and Schepers 2001): the plain sum, Martello and Toth's L2, and rounded multiples.
int64_t Packer::lower_bound() const {
  int64_t bound = ceil_div(total_, size_);
  for (const Kind& small : kinds_) {  // L2: leave out windows below `small`, round up above
    if (2 * small.value > size_) continue;
    int64_t sum = 0;
    for (const Kind& kind : kinds_) {
      if (kind.value > size_ - small.value) {
        sum += size_ * kind.left;
      } else if (kind.value >= small.value) {
        sum += kind.value * kind.left;
      }
    }
    bound = std::max(bound, ceil_div(sum, size_));
  }
  for (int64_t k = 1; k <= kMaxRounding; ++k) {
    int64_t sum = 0;  // in units of size * k
    for (const Kind& kind : kinds_) {
      const int64_t scaled = (k + 1) * kind.value;
      sum += kind.left * (scaled % size_ == 0 ? kind.value * k : scaled / size_ * size_);
    }
    bound = std::max(bound, ceil_div(sum, size_ * k));
  }
  return bound;
}

void Packer::put(int group, int kind, int copies) {
  kinds_[kind].left -= copies;
  moves_.push_back({group, kind, copies});
}

void Packer::take_back() {
  kinds_[moves_.back().kind].left += moves_.back().copies;
  moves_.pop_back();
}

// Keeps the packing in moves_ where it is the best so far, and empties moves_.
void Packer::keep_if_better(int groups) {
  if (groups < best_) {
    best_ = groups;
    best_moves_ = moves_;
  }
  while (!moves_.empty()) take_back();
}

// Row t of the table of a level is the set of sums <= room that the windows left of kinds t, t + 1,
// ... can make.
void Packer::subset_sums(int level, int first_kind, int64_t room) {
  const int kinds = static_cast<int>(kinds_.size());
  const int64_t words = room / 64 + 1;
  const int64_t stride = words_;
  const size_t needed = static_cast<size_t>((level + 1) * (kinds + 1) * stride);
  if (sums_.size() < needed) sums_.resize(needed);
  uint64_t* table = sums_.data() + static_cast<int64_t>(level) * (kinds + 1) * stride;
  uint64_t* row = table + kinds * stride;
  std::fill(row, row + words, 0);
  row[0] = 1;
  const uint64_t last_mask = room % 64 == 63 ? ~uint64_t{0} : (uint64_t{2} << (room % 64)) - 1;
  for (int kind = kinds - 1; kind >= first_kind; --kind) {
    uint64_t* next = row - stride;
    std::copy(row, row + words, next);
    const int64_t value = kinds_[kind].value;
    const int64_t copies = std::min<int64_t>(kinds_[kind].left, room / value);
    const int64_t word_shift = value / 64;
    const int bit_shift = static_cast<int>(value % 64);
    for (int64_t copy = 0; copy < copies; ++copy) {
      for (int64_t word = words - 1; word >= word_shift; --word) {
        uint64_t shifted = next[word - word_shift] << bit_shift;
        if (bit_shift != 0 && word > word_shift) {
          shifted |= next[word - word_shift - 1] >> (64 - bit_shift);
        }
        next[word] |= shifted;
      }
      next[words - 1] &= last_mask;
    }
    effort_ -= copies * words + 1;
    row = next;
  }
}

bool Packer::reachable(int level, int kind, int64_t sum) const {
  const int64_t kinds = static_cast<int64_t>(kinds_.size());
  const uint64_t* row = sums_.data() + (level * (kinds + 1) + kind) * words_;
  return row[sum / 64] >> (sum % 64) & 1;
}

void Packer::fill_greedily(bool force_largest) {
  const int kinds = static_cast<int>(kinds_.size());
  int group = 0;
  int first = 0;
  while (true) {
    while (first < kinds && kinds_[first].left == 0) ++first;
    if (first == kinds) break;
    int64_t room = size_;
    if (force_largest) {
      room -= kinds_[first].value;
      put(group, first, 1);
    }
    subset_sums(0, first, room);
    int64_t rest = room;
    while (!reachable(0, first, rest)) --rest;
    // Larger windows first: the small ones are worth more later.
    for (int kind = first; rest > 0; ++kind) {
      const int64_t value = kinds_[kind].value;
      int64_t copies = std::min<int64_t>(kinds_[kind].left, rest / value);
      while (copies > 0 && !reachable(0, kind + 1, rest - copies * value)) --copies;
      if (copies > 0) put(group, kind, static_cast<int>(copies));
      rest -= copies * value;
    }
    ++group;
  }
  keep_if_better(group);
}

void Packer::best_fit_decreasing() {
  std::multimap<int64_t, int32_t> by_room;  // groups by the slots they have left
  int groups = 0;
  for (int kind = 0; kind < static_cast<int>(kinds_.size()); ++kind) {
    const int64_t value = kinds_[kind].value;
    while (kinds_[kind].left > 0) {
      auto tightest = by_room.lower_bound(value);
      if (tightest == by_room.end()) tightest = by_room.emplace(size_, groups++);
      auto node = by_room.extract(tightest);
      put(node.mapped(), kind, 1);
      node.key() -= value;
      by_room.insert(std::move(node));
    }
  }
  keep_if_better(groups);
}

// Looks for a packing into `groups`; with enough effort, false proves that there is none.
bool Packer::search(int groups) {
  const bool found = search_group(0, 0, groups * size_ - total_) == Outcome::kFound;
  keep_if_better(found ? groups : best_);
  return found;
}

// Fills one group around the largest window left. `slack` is how many slots the groups from this
// one on may leave empty in all, which cuts every branch that wastes more than the target allows.
Packer::Outcome Packer::search_group(int group, int first_kind, int64_t slack) {
  const int kinds = static_cast<int>(kinds_.size());
  while (first_kind < kinds && kinds_[first_kind].left == 0) ++first_kind;
  if (first_kind == kinds) return Outcome::kFound;
  if (effort_ < 0) return Outcome::kOutOfEffort;
  put(group, first_kind, 1);
  const int64_t room = size_ - kinds_[first_kind].value;
  subset_sums(group, first_kind, room);
  for (int64_t rest = room; rest >= std::max<int64_t>(0, room - slack); --rest) {
    if (!reachable(group, first_kind, rest)) continue;
    const Outcome outcome = search_fill(group, first_kind, rest, slack - (room - rest));
    if (outcome != Outcome::kExhausted) return outcome;
  }
  take_back();
  return Outcome::kExhausted;
}

// Tries every set of windows of kinds `kind`, `kind` + 1, ... that fills exactly `rest` slots.
Packer::Outcome Packer::search_fill(int group, int kind, int64_t rest, int64_t slack) {
  if (rest == 0) return search_group(group + 1, 0, slack);
  for (; reachable(group, kind, rest); ++kind) {
    if (--effort_ < 0) return Outcome::kOutOfEffort;
    const int64_t value = kinds_[kind].value;
    for (int64_t copies = std::min<int64_t>(kinds_[kind].left, rest / value); copies > 0;
         --copies) {
      if (!reachable(group, kind + 1, rest - copies * value)) continue;
      put(group, kind, static_cast<int>(copies));
      const Outcome outcome = search_fill(group, kind + 1, rest - copies * value, slack);
      if (outcome != Outcome::kExhausted) return outcome;
      take_back();
    }
  }
  return Outcome::kExhausted;
}

// Numbers the groups by decreasing fill and hands the windows of each kind out in increasing index.
//
// No two groups need merging. Best-fit opens a group only for a window that fits nowhere. The other
// two fill a group with the largest sum that still can be had, and the search tries larger sums
// first: had a later group fitted in too, a larger sum would have been taken, or found exhausted
// although the remaining groups show a packing of what would have remained.
int Packer::number_groups() {
  std::vector<int64_t> fill(best_, 0);
  for (const Move& move : best_moves_) fill[move.group] += move.copies * kinds_[move.kind].value;
  std::vector<int32_t> by_fill(best_);
  std::iota(by_fill.begin(), by_fill.end(), 0);
  std::sort(by_fill.begin(), by_fill.end(), [&fill](int32_t a, int32_t b) {
    return fill[a] != fill[b] ? fill[a] > fill[b] : a < b;
  });
  std::vector<int32_t> number(best_);
  for (int32_t rank = 0; rank < best_; ++rank) number[by_fill[rank]] = rank;

  std::vector<int32_t> next(kinds_.size(), 0);  // position in order_ of the next window of a kind
  int32_t start = 0;
  for (size_t kind = 0; kind < kinds_.size(); ++kind) {
    next[kind] = start;
    start += kinds_[kind].left;
  }
  for (const Move& move : best_moves_) {
    for (int32_t copy = 0; copy < move.copies; ++copy) {
      group_of_[order_[next[move.kind]++]] = number[move.group];
    }
  }
  return best_;
}

}  // namespace greenmim
