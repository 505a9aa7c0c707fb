"""The planner: group partitions of grids, their invariants, sizes, errors and speed.

``tests/data/grouping_cases.json`` holds window counts and numbers of groups that the published
GreenMIM code gives (Huang et al., NeurIPS 2022); in its unit masks 1 means hidden.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import math
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenmim_kernels import (
    GroupPartition,
    _planner,
    group_partition,
    pack_windows,
    partition_capacity,
)

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "grouping_cases.json").read_text())["cases"]
MASK_CASES = [case for case in CASES if case["kind"] == "mask"]


def named(case: dict) -> str:
    return case["id"]


def random_grid(rng: np.random.Generator, units: int = 7, patches: int = 8, keep: float = 0.25):
    """A square token grid whose unit cells are kept at random, as training draws them."""
    count = units * units
    visible = rng.permutation(count) < int(count * keep)
    return np.kron(visible.reshape(units, units), np.ones((patches, patches), bool))


def check_partition(part: GroupPartition, visible: np.ndarray, window, shift, segment=None) -> int:
    """Every promise of the docstring, by the formulas. Returns the most groups with tokens."""
    axes, sides = len(window), 2 * np.array(window) - 1
    first, window = np.subtract(window, shift) % window, np.array(window)
    grids = visible if visible.ndim > axes else visible[None]
    labels = None if segment is None else segment.reshape(grids.shape)
    shape = (len(grids), part.num_groups, part.group_size)
    for tensor in part.tensors:
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert tensor.shape == shape and tensor.device.type == "cpu"
    assert (part.window_size, part.table_rows) == (tuple(window), np.prod(sides))
    assert part.num_partitions == len(grids)
    most = 0
    for image, grid in enumerate(grids):
        tokens = np.argwhere(grid)  # row-major
        assert part.num_tokens == len(tokens)
        index, windows, query_row, key_row = (tensor[image].numpy() for tensor in part.tensors)
        filled = index >= 0
        assert sorted(index[filled].tolist()) == list(range(len(tokens)))
        places = tokens[index[filled]]
        own = list(map(tuple, (places + first) // window))
        if labels is not None:
            own = list(zip(own, labels[image][grid][index[filled]], strict=True))
        names = dict(zip(windows[filled].tolist(), own, strict=True))
        assert [names[number] for number in windows[filled].tolist()] == own
        assert len(set(own)) == len(names), "a window has two numbers"
        assert [names[number] for number in sorted(names)] == sorted(names.values())
        # The bias table's row of every pair of a window.
        a, b = np.nonzero(np.equal.outer(windows[filled], windows[filled]))
        offset = places[a] - places[b] + window - 1
        rows = np.ravel_multi_index(tuple(offset.T), sides)
        assert (query_row[filled][a] + key_row[filled][b] == rows).all()
        for padding in (windows[~filled] + 1, query_row[~filled], key_row[~filled]):
            assert (padding == 0).all()
        sizes = filled.sum(1)
        assert (filled == (np.arange(part.group_size) < sizes[:, None])).all(), "padding not last"
        groups = int((sizes > 0).sum())
        assert (sizes[:groups] > 0).all(), "a group without tokens before one with"
        owners: list[int] = []
        for group in range(groups):
            slots = slice(0, sizes[group])
            assert (np.diff(windows[group, slots]) >= 0).all()
            same = np.diff(windows[group, slots]) == 0
            assert (np.diff(index[group, slots])[same] > 0).all()
            owners += np.unique(windows[group, slots]).tolist()
        assert len(owners) == len(set(owners)), "a window is split between groups"
        if groups > 1:
            assert sum(sorted(sizes[:groups])[:2]) > part.group_size, "two groups fit into one"
        most = max(most, groups)
    return most


@pytest.mark.parametrize("case", MASK_CASES, ids=named)
def test_partitions_agree_with_published_counts(case):
    hidden = np.array([int(c) for c in case["unit_mask"]], bool).reshape(case["unit_grid_hw"])
    patches = case["resolution_hw"][0] // case["unit_grid_hw"][0]
    visible = np.kron(~hidden, np.ones((patches, patches), bool))
    window, shift = case["window_effective"], case["shift"]
    part = group_partition(visible, window, shift, group_size=case["group_size"])
    assert check_partition(part, visible, (window,) * 2, (shift,) * 2) == part.num_groups
    _, counts = part.window_id[part.window_id >= 0].unique(return_counts=True)
    assert counts.tolist() == case["window_counts"]
    assert part.num_tokens == case["n_visible"]
    assert part.num_groups <= case["num_groups"]
    assert part.num_groups * part.group_size <= case["padded_total"]


@st.composite
def problems(draw):
    """Grids of any shape, density and number of images, with any window, shift and segments."""
    axes = draw(st.integers(1, 3))
    longest = (300, 20, 7)[axes - 1]
    grid = [draw(st.integers(1, longest)) for _ in range(axes)]
    window = tuple(draw(st.integers(1, longest + 4)) for _ in range(axes))
    shift = tuple(draw(st.integers(0, side - 1)) for side in window)
    tokens = draw(st.integers(1, math.prod(grid)))
    images = draw(st.sampled_from([None, 1, 3]))
    labels = draw(st.sampled_from([None, 1, 2, 5]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    grids = [rng.permutation(math.prod(grid)) < tokens for _ in range(images or 1)]
    visible = np.stack(grids).reshape(-1, *grid)
    segment = rng.integers(-3, labels - 3, visible.shape) if labels else None
    if images is None:
        visible, segment = visible[0], segment if segment is None else segment[0]
    return visible, window, shift, segment


@settings(max_examples=300, deadline=None)
@given(problems())
def test_partitions_keep_their_promises(problem):
    visible, window, shift, segment = problem
    grid = visible.shape[-len(window) :]
    part = group_partition(visible, window, shift, segment=segment)
    assert check_partition(part, *problem) == part.num_groups
    assert part.group_size % 16 == 0

    fullest = max(int(torch.bincount(ids[ids >= 0]).max()) for ids in part.window_id)
    exact = group_partition(visible, window, shift, group_size=fullest, segment=segment)
    assert check_partition(exact, *problem) == exact.num_groups
    labels = 1 if segment is None else len(np.unique(segment))
    for size in (None, fullest, part.group_size):
        capacity = partition_capacity(grid, window, shift, part.num_tokens, size, labels)
        fixed = group_partition(visible, window, shift, size, capacity, segment)
        assert check_partition(fixed, *problem) <= fixed.num_groups == capacity
        if size is None:
            needed = min(math.prod(window), part.num_tokens)
            assert fixed.group_size == math.ceil(needed / 16) * 16


def window_grid(counts: list[int], window: int) -> np.ndarray:
    """One row of windows with the given visible tokens."""
    visible = np.zeros((window, len(counts), window), bool)
    for i, count in enumerate(counts):
        visible[:, i] = (np.arange(window * window) < count).reshape(window, window)
    return visible.reshape(window, -1)


@pytest.mark.parametrize("images", [None, 3])
def test_group_size_of_least_cost(images):
    rng = np.random.default_rng(3)
    for keep, patches, window in itertools.product([0.1, 0.25, 0.6, 1.0], [1, 2, 8], [7, 14]):
        grids = [random_grid(rng, patches=patches, keep=keep) for _ in range(images or 1)]
        visible = np.stack(grids) if images else grids[0]
        part = group_partition(visible, window, window // 2)

        def cost(size, visible=visible, window=window):
            fixed = group_partition(visible, window, window // 2, group_size=size)
            used = int((fixed.window_id[:, :, 0] >= 0).sum())
            return used * _planner.group_cost(size), fixed.num_groups * size, size

        fullest = max(int(torch.bincount(ids[ids >= 0]).max()) for ids in part.window_id)
        sizes = range(math.ceil(fullest / 16) * 16, math.ceil(part.num_tokens / 16) * 16 + 1, 16)
        assert part.group_size == min(map(cost, sizes))[2]


@pytest.mark.parametrize(
    ("counts", "group_size"),
    [
        ([12], 16),  # the last stage: one small window
        ([32, 32, 20, 12], 32),  # two tiles of 32 are cheaper than one of 64
        ([40, 24, 49, 15, 33, 31], 64),  # windows of 7 at the first stage
        ([40, 40, 24, 24], 64),  # a tile of 48 is computed as 64
        ([34], 48),  # no more slots than needed where the tile is the same
        ([196, 60], 256),
    ],
)
def test_group_sizes_chosen(counts, group_size):
    window = 14 if max(counts) > 49 else 7
    assert group_partition(window_grid(counts, window), window).group_size == group_size


def test_shift_is_a_partition_of_the_same_grid_without_wrapping():
    part = group_partition(np.ones((5, 6), bool), (3, 4), (1, 2))
    windows = np.empty((5, 6), int)
    filled = part.token_index >= 0
    windows.flat[part.token_index[filled].numpy()] = part.window_id[filled].numpy()
    assert windows.tolist() == [
        [0, 0, 1, 1, 1, 1],
        [2, 2, 3, 3, 3, 3],
        [2, 2, 3, 3, 3, 3],
        [2, 2, 3, 3, 3, 3],
        [4, 4, 5, 5, 5, 5],
    ]


def test_numpy_torch_and_strides_agree():
    rng = np.random.default_rng(4)
    wide = rng.random((3, 22, 30)) < 0.5
    wide[:, ::2, ::3] = np.arange(3 * 110).reshape(3, 11, 10) % 2 == 0
    visible = np.ascontiguousarray(wide[:, ::2, ::3])
    expected = group_partition(visible, 4, 2)
    torch_wide = torch.from_numpy(wide)
    for same in (
        wide[:, ::2, ::3],
        torch_wide[:, ::2, ::3],
        np.asfortranarray(visible),
        torch.from_numpy(visible).transpose(1, 2).contiguous().transpose(1, 2),
    ):
        part = group_partition(same, np.int64(4), (np.int32(2), 2))
        assert all(map(torch.equal, part.tensors, expected.tensors))
    alone = group_partition(visible[1], 4, 2, expected.group_size, expected.num_groups)
    assert alone.window_id[0].equal(expected.window_id[1])


def test_partition_of_a_slice_is_not_a_view_of_the_input():
    visible = np.ones((7, 7), bool)
    part = group_partition(visible)
    visible[:] = False
    assert part.token_index.flatten()[:49].tolist() == list(range(49))


def test_capacity_bound_holds_and_is_reached():
    rng = np.random.default_rng(5)
    most = {}
    for _ in range(3000):
        window, patches = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        shift = int(rng.integers(0, window))
        visible = random_grid(rng, int(rng.integers(1, 8)), patches, rng.uniform(0.1, 1))
        if not visible.any():
            continue
        part = group_partition(visible, window, shift, group_size=window * window)
        bound = partition_capacity(
            visible.shape, window, shift, part.num_tokens, group_size=window * window
        )
        most[part.num_groups == bound] = most.get(part.num_groups == bound, 0) + 1
        assert part.num_groups <= bound
    assert most[True] > 100 and most[False] > 100
    # Windows of 33 tokens, one to a group of 64: the bound cannot be lower.
    worst = window_grid([33] * 23, 7)
    assert group_partition(worst, group_size=64).num_groups == 23
    assert partition_capacity((7, 161), 7, 0, 33 * 23) == 23


ONES = np.ones((4, 4), bool)
UNEQUAL = np.stack([ONES, ONES, np.tri(4, dtype=bool)])


@pytest.mark.parametrize(
    ("visible", "arguments", "error", "message"),
    [
        (ONES[0], {}, ValueError, r"shape \(4,\); for a window of 2 axes .* \[H, W\]"),
        (ONES, {"window_size": (2, 2, 2)}, ValueError, r"3 axes .* \[D, H, W\] .* \[B, D, H, W\]"),
        (ONES[None, None], {}, ValueError, r"shape \(1, 1, 4, 4\)"),
        (ONES[:, :0], {}, ValueError, r"shape \(4, 0\)"),
        (ONES[None][:0], {}, ValueError, r"shape \(0, 4, 4\)"),
        (np.broadcast_to(False, (2**16, 2**16)), {}, ValueError, "above"),
        (ONES.astype(np.uint8), {}, TypeError, "dtype uint8"),
        (torch.ones(4, 4), {}, TypeError, "dtype float32"),
        ([[True]], {}, TypeError, "visible is a list"),
        (torch.ones(4, 4, dtype=torch.bool, device="meta"), {}, ValueError, "visible is on meta"),
        (~ONES, {}, ValueError, "keeps no token"),
        (UNEQUAL, {}, ValueError, "16 tokens in image 0 and 10 in image 2"),
        (ONES, {"window_size": 0}, ValueError, "window_size=0"),
        (ONES, {"window_size": (3, -1)}, ValueError, r"window_size=\(3, -1\)"),
        (ONES, {"window_size": 2.0}, TypeError, "window_size=2.0"),
        (ONES, {"window_size": (2, 2, 2, 2)}, TypeError, r"window_size=\(2, 2, 2, 2\) .* 1 to 3"),
        (ONES, {"window_size": (2.0, 2.0)}, TypeError, r"\(2.0, 2.0\) .* 1 to 3 integers"),
        (ONES, {"window_size": ()}, TypeError, r"window_size=\(\)"),
        (ONES, {"window_size": 2**15}, ValueError, "window_size=32768 .* fewer than 2"),
        (ONES, {"shift_size": (0, 1, 0)}, TypeError, r"shift_size=\(0, 1, 0\) .* tuple of 2"),
        (ONES, {"segment": np.zeros((4, 4))}, TypeError, "segment has dtype float64"),
        (ONES, {"segment": np.zeros((4, 5), int)}, ValueError, r"segment has shape \(4, 5\)"),
        (ONES, {"segment": [[0]]}, TypeError, "segment is a list"),
        (ONES, {"segment": torch.zeros(4, 4, device="meta")}, ValueError, "segment is on meta"),
        (ONES, {"shift_size": 7}, ValueError, "shift_size=7 .* window is 7 x 7"),
        (ONES, {"shift_size": (0, -1)}, ValueError, r"shift_size=\(0, -1\)"),
        (ONES, {"shift_size": None}, TypeError, "shift_size=None"),
        (ONES, {"group_size": 15}, ValueError, "group_size=15 .* holds 16 visible"),
        (ONES, {"group_size": 0}, ValueError, "group_size=0"),
        (ONES, {"group_size": "16"}, TypeError, "group_size='16'"),
        (UNEQUAL[:2], {"window_size": 2, "capacity": 3, "group_size": 4}, ValueError, "4 groups"),
        (ONES, {"capacity": 0}, ValueError, "capacity=0"),
        (ONES, {"capacity": 2.5}, TypeError, "capacity=2.5"),
    ],
)
def test_partition_errors(visible, arguments, error, message):
    with pytest.raises(error, match=message):
        group_partition(visible, **arguments)


def step_grids(rng: np.random.Generator, images: int | None = None) -> list:
    """The (grid, shift) of the seven partitions of a Swin-B training step at 224 px."""
    many = [random_grid(rng, patches=1) for _ in range(images or 1)]
    units = np.stack(many) if images else many[0]
    return [
        (units.repeat(patches, -1).repeat(patches, -2), shift)
        for patches, shift in [(8, 0), (8, 3), (4, 0), (4, 3), (2, 0), (2, 3), (1, 0)]
    ]


def test_group_partition_moves_and_survives_pickling(monkeypatch):
    part = group_partition(ONES, 3, 1)
    moved = part.to("meta", non_blocking=True)
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    assert part.token_index.device.type == "cpu"
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for other in (moved, part.pin_memory(), pickle.loads(pickle.dumps(part))):
        assert other is not part
        assert (other.num_tokens, other.num_groups, other.group_size) == (16, 1, 16)
        assert (other.window_size, other.table_rows) == ((3, 3), 25)
    for tensor, source in zip(pinned, part.tensors, strict=True):
        assert tensor is source
    assert "num_groups=1, group_size=16, num_tokens=16" in repr(part)
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.num_tokens = 3


def test_group_partition_passes_through_compile():
    def rows(x, part):
        kept = part.token_index >= 0
        return (x[part.token_index.clamp(min=0).long()] * kept).sum() * part.group_size

    part = group_partition(ONES, 3)
    x = torch.arange(16.0)
    compiled = torch.compile(rows, fullgraph=True, backend="eager")
    assert compiled(x, part) == rows(x, part) == 120 * 16


def test_threads_get_the_same_groups():
    grids = step_grids(np.random.default_rng(6), images=8)

    def plan(_):
        return [group_partition(grid, 7, shift) for grid, shift in grids]

    alone = plan(0)
    with ThreadPoolExecutor(8) as pool:
        for parts in pool.map(plan, range(32)):
            for part, expected in zip(parts, alone, strict=True):
                assert all(map(torch.equal, part.tensors, expected.tensors))


@pytest.mark.parametrize("work", ["partition", "capacity too small", "packing"])
def test_planning_releases_the_interpreter_lock(work):
    rng = np.random.default_rng(7)
    grid, shift = step_grids(rng, images=1000)[1]
    counts = rng.integers(41, 69, 64)  # a long search; NumPy gives the lock away for large arrays

    def run(finished):
        if work == "packing":
            pack_windows(counts, 154)
        elif work == "partition":
            group_partition(grid, 7, shift)
        else:  # ends before the arrays are filled
            with pytest.raises(ValueError, match="capacity"):
                group_partition(grid, 7, shift, capacity=1)
        finished.append(True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # no thread loses the lock unless it gives it away
    try:
        for _ in range(20):
            finished: list[bool] = []
            thread = threading.Thread(target=run, args=(finished,))
            thread.start()  # returns once this thread has the lock again
            before_the_end = not finished
            thread.join()
            if before_the_end:
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail("the lock was held until the planning had ended, 20 times out of 20")


def best_time(grids: list, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for grid, shift in grids:
            group_partition(grid, 7, shift)
        times.append(time.perf_counter() - start)
    return min(times)


def test_a_step_is_planned_in_a_fraction_of_a_millisecond():
    # About 0.1 ms, and 10 ms for a loop over tokens in Python. The margin is for slow and busy
    # machines, of which the best of 200 runs is a fair one.
    assert best_time(step_grids(np.random.default_rng(8)), 200) < 3e-3


def test_time_is_linear_in_images():
    rng = np.random.default_rng(9)
    few, many = step_grids(rng, images=32), step_grids(rng, images=256)
    # A quadratic planner would be 64 times slower.
    assert best_time(many, 10) < 3 * 8 * best_time(few, 10)


@pytest.mark.parametrize("change", [True, False])
def test_what_changes_while_it_is_packed_is_told(change, monkeypatch):
    """Another thread may write to the array: nothing is written outside of the result."""
    visible = np.zeros((14, 14), dtype=bool)
    visible[:3] = True
    real = _planner._fill

    def fill(*arguments):
        visible[:] = change
        return real(*arguments)

    monkeypatch.setattr(_planner, "_fill", fill)
    with pytest.raises(ValueError, match="visible was changed while its windows were packed"):
        group_partition(visible, window_size=7)


def test_every_grouping_is_freed_and_memory_that_is_not_there_is_told(monkeypatch):
    freed = []
    real = _planner._free
    monkeypatch.setattr(_planner, "_free", lambda grouping: (freed.append(1), real(grouping)))
    group_partition(np.ones((7, 7), dtype=bool))
    assert freed == [1]
    assert isinstance(_planner._thrown(ctypes.create_string_buffer(8)), MemoryError)
