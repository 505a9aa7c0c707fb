// Packing windows into groups: one-dimensional bin packing of small integers.
//
// The strategy, in the order it is tried, each step only while the lower bound is not met:
//   1. fill group after group as full as possible, the largest window left always inside
//      (minimum bin slack, Gupta and Ho 1999), by an exact subset-sum over a bit set;
//   2. the same without the forced window (the greedy of Huang et al., NeurIPS 2022, section 3.2);
//   3. best-fit decreasing;
//   4. a branch-and-bound search for one group less, until it fails, the lower bound is met or the
//      effort is spent. Effort counts steps, never time: the same counts give the same groups.
#pragma once

#include <cstdint>
#include <vector>

namespace greenmim {

class Packer {
 public:
  // Packs counts[0..n) into groups of at most `size`; every count must lie in [1, size].
  // Returns the number of groups; group_of()[i] is then the group of window i. No two groups could
  // be merged, and fuller groups come first. `effort` bounds the search, in machine-word steps.
  int pack(const int32_t* counts, int n, int64_t size, int64_t effort);

  const std::vector<int32_t>& group_of() const { return group_of_; }

 private:
  // Equal windows are one kind: kinds are sorted by value, the largest first.
  struct Kind {
    int64_t value;
    int32_t left;  // windows of this kind not yet in a group
  };
  // One step of a packing: `copies` windows of a kind put in a group.
  struct Move {
    int32_t group;
    int32_t kind;
    int32_t copies;
  };
  enum class Outcome { kFound, kExhausted, kOutOfEffort };

  void sort_into_kinds(const int32_t* counts, int n, int64_t size);
  int64_t lower_bound() const;
  void keep_if_better(int groups);
  bool sums_affordable() const;
  void fill_greedily(bool force_largest);
  void best_fit_decreasing();
  bool search(int groups);
  Outcome search_group(int group, int first_kind, int64_t slack);
  Outcome search_fill(int group, int kind, int64_t rest, int64_t slack);

  void subset_sums(int level, int first_kind, int64_t room);
  bool reachable(int level, int kind, int64_t sum) const;
  void put(int group, int kind, int copies);
  void take_back();
  int number_groups();

  int64_t size_ = 0;   // of a group, in units of the greatest common divisor
  int64_t total_ = 0;  // of all windows, likewise
  int64_t words_ = 0;  // of one bit set over the sums 0..size
  int64_t effort_ = 0;
  std::vector<Kind> kinds_;
  std::vector<int32_t> order_;    // windows by decreasing count, ties by index
  std::vector<uint64_t> sums_;    // [level, kind + 1, word], see subset_sums
  std::vector<Move> moves_;       // of the packing being built
  std::vector<Move> best_moves_;  // of the best packing so far
  int best_ = 0;
  std::vector<int32_t> group_of_;
};

}  // namespace greenmim
