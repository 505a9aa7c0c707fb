"""Packing windows into groups, and the bound on the number of groups.

``tests/data/grouping_cases.json`` holds window counts and numbers of groups that the published
GreenMIM code gives (Huang et al., NeurIPS 2022).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenmim_kernels import pack_windows, partition_capacity

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "grouping_cases.json").read_text())["cases"]


def named(case: dict) -> str:
    return case["id"]


def check_packing(groups: list[np.ndarray], counts, group_size: int) -> None:
    assert all(group.dtype == np.int64 and (np.diff(group) > 0).all() for group in groups)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(counts)))
    fills = [sum(int(counts[i]) for i in group) for group in groups]
    assert fills == sorted(fills, reverse=True)
    assert fills[0] <= group_size
    assert len(fills) == 1 or fills[-1] + fills[-2] > group_size, "two groups fit into one"


def fewest_groups(counts: list[int], group_size: int) -> int:
    """The optimum, by dynamic programming over all subsets of the windows."""
    best = {0: (1, 0)}  # subset -> (groups, fill of the last one)
    for subset in range(1, 1 << len(counts)):
        options = []
        for i, count in enumerate(counts):
            if subset >> i & 1:
                groups, fill = best[subset & ~(1 << i)]
                fits = fill + count <= group_size
                options.append((groups, fill + count) if fits else (groups + 1, count))
        best[subset] = min(options)
    return best[len(best) - 1][0]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_never_more_groups_than_published(case):
    groups = pack_windows(case["window_counts"], case["group_size"])
    check_packing(groups, case["window_counts"], case["group_size"])
    assert len(groups) <= case["num_groups"]


def test_beats_the_published_packing_in_total():
    ours = sum(len(pack_windows(c["window_counts"], c["group_size"])) for c in CASES)
    assert ours <= 2620 < sum(c["num_groups"] for c in CASES)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=120), st.integers(0, 140))
def test_packing_keeps_its_promises(counts, more):
    group_size = max(counts) + more
    check_packing(pack_windows(counts, group_size), counts, group_size)


def test_small_cases_are_packed_optimally():
    rng = np.random.default_rng(1)
    for _ in range(250):
        size = int(rng.integers(5, 200))
        low, high = sorted(rng.integers(1, size + 1, 2))
        counts = rng.integers(low, high + 1, int(rng.integers(1, 11))).tolist()
        assert len(pack_windows(counts, size)) == fewest_groups(counts, size), (counts, size)


@pytest.mark.parametrize(
    ("counts", "group_size", "optimum"),
    [
        # Largest first puts 4 with 4 and needs a third group.
        ([4, 4, 3, 3, 3, 3], 10, 2),
        # Found by the search only: each of the three greedy packers needs one group more.
        ([26, 23, 20, 20, 17, 13, 12, 11, 7], 50, 3),
        # The plain bound is 39 groups; three windows never fit, so 47 is proven at once.
        ([49] * 46 + [71] * 47, 144, 47),
        ([2**30] * 5, 2**31 - 1, 5),
        ([7] * 5000, 15, 2500),
        ([1] * 1000, 1, 1000),
        ([1] * 1000, 2**31 - 1, 1),
    ],
)
def test_known_optima(counts, group_size, optimum):
    groups = pack_windows(counts, group_size)
    check_packing(groups, counts, group_size)
    assert len(groups) == optimum


BEST_FIT_WINS = (
    [37, 40, 40, 40, 40, 41, 41, 41, 43, 44, 44, 45, 45, 46, 46, 47, 47, 48, 49, 50, 50, 51, 53]
    + [53, 54, 54, 54, 55, 55, 56, 56, 56, 57, 57, 60, 60, 61, 61, 61, 62, 62, 62, 63, 63, 63, 63]
    + [64, 64, 64, 65, 65, 67, 67, 70, 70, 71, 72, 73, 74, 75, 76, 76, 77, 78, 80, 81, 83, 84]
)
FULLEST_FILL_WINS = (
    [41, 41, 41, 41, 42, 42, 42, 42, 42, 44, 44, 44, 45, 45, 45, 45, 45, 46, 46, 46, 47, 48, 48]
    + [50, 51, 52, 52, 53, 53, 54, 55, 55, 56, 56, 56, 56, 57, 57, 57, 57, 58, 58, 58, 59, 59, 59]
    + [60, 60, 60, 61, 61, 62, 62, 62, 63, 63, 63, 65, 65, 66, 67, 67, 67, 68]
)


@pytest.mark.parametrize(
    ("counts", "group_size", "reached"),
    [(BEST_FIT_WINS, 166, 26), (FULLEST_FILL_WINS, 154, 25)],
    ids=["best fit", "fullest fill"],
)
def test_each_order_is_tried(counts, group_size, reached):
    # Too many windows for the search to make up for the order that is missing.
    assert len(pack_windows(counts, group_size)) <= reached


def test_large_inputs_stay_affordable():
    rng = np.random.default_rng(2)
    for counts, size in [
        (rng.integers(1, 1001, 20_000), 4096),
        (rng.integers(1, 10**6 + 1, 3000), 10**6),
    ]:
        start = time.perf_counter()
        groups = pack_windows(counts, size)
        assert time.perf_counter() - start < 20
        check_packing(groups, counts, size)
        assert len(groups) <= 1.05 * max(counts.sum() / size, (counts * 2 > size).sum()) + 1


def test_packing_takes_any_integers():
    expected = [group.tolist() for group in pack_windows([5, 3, 2, 6], 8)]
    assert expected == [[2, 3], [0, 1]]
    for dtype in (np.uint8, np.int16, np.int64, np.uint64):
        strided = np.array([5, 0, 3, 0, 2, 0, 6, 0], dtype)[::2]
        assert [g.tolist() for g in pack_windows(strided, np.int32(8))] == expected
    assert pack_windows([], 8) == []


@pytest.mark.parametrize(
    ("counts", "group_size", "error", "message"),
    [
        ([3, 0, 2], 8, ValueError, r"counts\[1\] is 0"),
        ([3, 2, -4], 8, ValueError, r"counts\[2\] is -4"),
        ([3, 9], 8, ValueError, r"counts\[1\] is 9, more than group_size=8"),
        (np.array([2**63], np.uint64), 8, ValueError, r"more than group_size=8"),
        ([[3, 2]], 8, ValueError, r"shape \(1, 2\)"),
        (3, 8, ValueError, r"shape \(\)"),
        ([3, 2], 0, ValueError, "group_size=0"),
        ([3.0, 2.0], 8, TypeError, "float64"),
        ([True, True], 8, TypeError, "bool"),
        ([3, 2], 8.0, TypeError, "group_size=8.0"),
        ([3, 2], None, TypeError, "group_size=None"),
    ],
)
def test_packing_errors(counts, group_size, error, message):
    with pytest.raises(error, match=message):
        pack_windows(counts, group_size)


@pytest.mark.parametrize(
    ("arguments", "capacity"),
    [
        ((56, 7, 0, 768), 23),  # 2 * 768 // 65
        ((28, 7, 3, 192), 5),
        ((7, 7, 0, 12), 1),
        ((56, 14, 7, 768), 7),  # groups of 208
        (((4, 6), 3, 1, 24, 9), 4),  # 2 * 24 // 10
        (((4, 6), 3, 1, 24, 6), 6),  # 2 x 3 windows, and 2 * 24 // 7 = 6
        (((4, 5), 2, 0, 20, 4), 6),  # 2 x 3 windows, fewer than 2 * 20 // 5
        (((4, 5), 2, 1, 20, 4), 8),  # 3 x 3 windows, more than 2 * 20 // 5
        ((np.int64(8), (1, 1), 0, np.int64(5), 1), 5),
        ((4, 10, 9, 1), 1),
    ],
)
def test_partition_capacity_values(arguments, capacity):
    assert partition_capacity(*arguments) == capacity


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 7, 0, 1), ValueError, "grid_size=0"),
        ((7, 0, 0, 1), ValueError, "window_size=0"),
        ((7, 7, 7, 1), ValueError, "shift_size=7"),
        ((7, 7, 0, 0), ValueError, "num_tokens=0"),
        ((7, 7, 0, 50), ValueError, "num_tokens=50 is more than the 7 x 7"),
        ((7, 7, 0, 5, 0), ValueError, "group_size=0"),
        ((7.0, 7, 0, 5), TypeError, "grid_size=7.0"),
    ],
)
def test_partition_capacity_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        partition_capacity(*arguments)
