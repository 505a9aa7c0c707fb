"""What the attention kernels should take on an H100, from shapes and static figures.

    python -m benchmarks.predicted            # rewrite benchmarks/predicted.md

A launch takes

    start + setup + (images of a block) x (time of an image) + end + what follows,

where an image costs a processor, for all blocks that it holds, the longest of: their bytes at its
share of the rate of a device copy; their instructions at what its four schedulers issue; and the
way of one block from load to store, which nothing shortens. The setup is what
passes until the first tile is there; what a block computes meanwhile is hidden. How many blocks a
processor holds follows from registers and shared memory, how many images a block has from the plan
of the launch. The figures of a kernel are those that the tests hold (`cuda_figures.json`,
`static_figures.json`), of sm_90, bfloat16 and head dim 32; what a scheduler issues was counted on
an H200 (`counters.json` of its results), where one instruction a cycle had been assumed; the rest
are the constants below. What is measured stands beside it in the report, predicted at the rate of a
copy of that run.

Of Triton's kernels for long groups (windows of 14) a block of slots has as many tiles as its
windows take, so blocks differ, and all of a launch are added up: it takes the longest of its
bytes, of those that its tiles read again from the second cache, and of its instructions, at what
as many warps issue as a scheduler holds (`READY`). By their instructions the kernels before should
have taken 180 us forward and 720 us backward on an H200, where they took 271 and 800.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator

import torch

from greenmim.config import model_config
from greenmim_kernels._triton.launch import (
    expected_filled,
    images_per_program,
    pairs_of,
    resident,
)
from greenmim_kernels.testing import Case, make_partition

from . import costs
from .environment import ROOT
from .tables import stage_name

PAGE = pathlib.Path(__file__).parent / "predicted.md"
MODEL = "greenmim_swin_base_patch4_window7_224"
HEADS = (4, 8, 16, 32)  # of Swin-B's stages
HEAD_DIM, TABLE_ROWS = 32, 13 * 13
BATCHES = (128, 256)
PASSES = ("forward", "backward")
LONG_GROUPS = ((1, False), (1, True), (2, True))  # stages and partitions with windows of 14
BACKENDS = ("cuda", "triton")
TRITON = "3.6.0"  # the version of torch 2.11

# An H100.
PROCESSORS, SCHEDULERS, CYCLES = 132, 4, 1.755e9
# Instructions of a scheduler in a cycle, by backend and pass.
ISSUED = {
    ("cuda", "forward"): 0.41,
    ("cuda", "backward"): 0.30,
    ("triton", "forward"): 0.51,
    ("triton", "backward"): 0.33,
}
# How often a warp is ready to issue an instruction, in a cycle. A scheduler issues if one of its
# warps is, so that four and two warps, as the counted kernels of Triton have, issue 0.50 and 0.29.
READY = 0.16
# Triton's kernels for long groups.
LONG = {"forward": ("fwd",), "backward": ("bwd_query", "bwd_key", "bwd_table")}
# What they move of a row of a head: columns of 2 bytes, numbers of 4; of the columns, those that
# every tile reads for its own rows, and whether it reads its bias for every image.
MOVES = {
    "fwd": (4, 1, 2, True),
    "bwd_query": (6, 3, 2, True),
    "bwd_key": (6, 2, 2, True),
    "bwd_table": (4, 2, 4, False),
}
FIRST_CACHE = 262_144  # bytes of a processor, shared memory among them
SECOND_CACHE = 5.5e12  # bytes of a second, as others have measured; not counted by us
# Of the instructions in the loop of a CUDA kernel, which stand once for every number of strips that
# a band may have, what a warp executes for an image: also counted there.
EXECUTED = {"forward": 0.40, "backward": 0.37}
ARCHITECTURE = 90
COPY = costs.COPY_BYTES_PER_SECOND
# Microseconds.
START = 1.0  # from the end of the kernel before, in a CUDA graph
READ = 0.7  # until what is asked for of memory is there
END = 0.4  # the last results on their way
SUM = 2.0 + START + 1.5  # Triton's integer additions; the kernel that sums rows


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        registers: of a thread.
        shared: bytes of a block.
        loop: instructions of a warp for an image.
        before: and before its copies of the first image start.
        end: and after the last image.
        way: cycles of a block for an image that is alone on its processor.
        waits: one after the other, for memory, before the first image is there.
        after: microseconds of what follows the kernel.
        counted: blocks of a processor that Triton's launch counts on, for every version of it.
    """

    threads: int
    registers: int
    shared: int
    loop: int
    before: int
    end: int
    way: float
    waits: int
    after: float = 0
    counted: int = 0

    @property
    def resident(self) -> int:
        """Blocks of it that a processor holds."""
        found = {"registers": self.registers, "shared_bytes": self.shared}
        return resident(found, self.threads // 32, ARCHITECTURE)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer of Swin-B in a training step."""

    stage: int
    batch: int
    capacity: bool
    window: int = 7

    @functools.cached_property
    def _part(self):
        case = Case(
            stage=self.stage, batch=self.batch, capacity=self.capacity, window_size=self.window
        )
        return make_partition(case)

    @property
    def heads(self) -> int:
        return HEADS[self.stage - 1]

    @property
    def slots(self) -> int:
        return self._part.group_size

    @property
    def groups(self) -> int:
        return self._part.num_groups

    @property
    def tokens(self) -> int:
        return self._part.num_tokens

    @property
    def filled(self) -> int:
        """Groups that hold tokens."""
        return int((self._part.window_id[0, :, 0] >= 0).sum())

    def tiles(self, block: int) -> list[int]:
        """Of every block of slots, over all groups: blocks that its windows take."""
        # Here, as reports are written where there is no Triton too.
        from greenmim_kernels._triton.long_groups import ALIGNMENT

        found = []
        for group in self._part.window_id[0]:
            used = group[group >= 0]
            for slots in used.split(block) if len(used) else ():
                band = ((used >= slots.min()) & (used <= slots.max())).nonzero()
                first = int(band[0]) // ALIGNMENT.value * ALIGNMENT.value
                found.append(math.ceil((int(band[-1]) + 1 - first) / block))
        return found

    def bytes(self, which: str) -> int:
        """Moved by a pass: q, k, v and out; or these, two gradients and no output. And lse."""
        columns = {"forward": 4, "backward": 7}[which]
        return self.batch * self.tokens * self.heads * (columns * HEAD_DIM * 2 + 4)

    def copy(self, which: str) -> float:
        """Microseconds of a device copy of as many bytes."""
        return 1e6 * self.bytes(which) / COPY


def cuda_share(batch: int, heads: int, groups: int, tokens: int, slots: int, places: int) -> int:
    """Blocks of a head that share the groups with tokens, as `plan` in attention_launch.cuh."""
    expected = expected_filled(groups, tokens, slots)
    runs = math.ceil(batch / images_per_program(batch, heads * expected, places))
    return min(max(places // heads, runs * expected), groups * batch)


def cuda_plan(problem: Problem, kernel: Kernel) -> tuple[int, int]:
    """Blocks that have images, and images of one, as `Place` has it."""
    share = cuda_share(
        problem.batch, problem.heads, problem.groups, problem.tokens, problem.slots,
        kernel.resident * PROCESSORS,
    )  # fmt: skip
    images = math.ceil(problem.batch / max(1, share // problem.filled))
    return problem.heads * problem.filled * math.ceil(problem.batch / images), images


def cuda_kernel(problem: Problem, which: str) -> Kernel:
    """From what the tests hold of the compiled module."""
    content = json.loads((ROOT / "tests" / "kernels" / "cuda_figures.json").read_text())
    forward = which == "forward"
    name = f"attention_{which}-bfloat16-32" + "-short" * forward
    found = content["kernels"][name]["90"]
    shared = content["shared_memory"][f"16bit-32-{problem.slots}slots-window7-of232448"]
    return Kernel(
        threads=32 * (problem.slots // 16),
        registers=found["registers"],
        shared=shared[which],
        loop=round(EXECUTED[which] * found["loop"]),
        # Counted by hand in the code for sm_90: place and slots; the sums of the table.
        before=280,
        end=0 if forward else 560,
        # What is counted in the code as one chain: two products, a softmax and a row's way through
        # shared memory; backward twice as many and two barriers.
        way=1200 if forward else 2200,
        waits=2,  # for the slots, then for the first tile
        after=0 if forward else 1.8,  # the table's sum, which starts while the kernel ends
    )


def triton_images(problem: Problem, counted: int, working: int = 1) -> int:
    """Images of a program of Triton's, whose host guesses how many groups hold tokens.

    Args:
        counted: programs of a processor that the launch counts on.
        working: programs of a group that have work.
    """
    expected = expected_filled(problem.groups, problem.tokens, problem.slots)
    programs = problem.heads * expected * working
    return images_per_program(problem.batch, programs, counted * PROCESSORS)


def triton_plan(problem: Problem, kernel: Kernel) -> tuple[int, int]:
    """The same of Triton's launches."""
    images = triton_images(problem, kernel.counted)
    return problem.heads * problem.filled * math.ceil(problem.batch / images), images


@functools.cache
def launch_of(name: str, version: str = TRITON) -> tuple[dict, dict]:
    """Static figures of a launch of Triton's, and what the launch table says of it."""
    folder = ROOT / "greenmim_kernels" / "_triton"
    figures = json.loads((folder / "static_figures.json").read_text())
    launches = json.loads((folder / "launch_table.json").read_text())
    return figures[version]["launches"][name][str(ARCHITECTURE)], launches[name]


def triton_kernel(problem: Problem, which: str, version: str = TRITON) -> Kernel:
    """From the committed figures of a version of Triton and the launch table."""
    tile = 64 if problem.slots > 32 else 32 if problem.slots > 16 else 16
    forward = which == "forward"
    found, launch = launch_of(f"{'fwd' if forward else 'bwd'}-{tile}-{HEAD_DIM}-16bit", version)
    return Kernel(
        threads=32 * launch["warps"],
        registers=found["registers"],
        shared=found["shared_bytes"],
        loop=found["loops"][0],
        # A tile's bias is looked up element by element before the first copies.
        before=700,
        end=0 if forward else 700,
        way=1500 if forward else 2800,
        waits=3,  # for the slots, for the bias and for the first tile
        after=0 if forward else SUM,
        counted=launch["resident"],
    )


def plan_of(backend: str, problem: Problem, which: str) -> tuple[Kernel, int, int]:
    """Kernel, blocks with images, images of a block."""
    kernel_of, plan = {
        "cuda": (cuda_kernel, cuda_plan),
        "triton": (triton_kernel, triton_plan),
    }[backend]
    kernel = kernel_of(problem, which)
    return kernel, *plan(problem, kernel)


def microseconds(backend: str, problem: Problem, which: str, copy: float = COPY) -> float:
    """What a pass should take where a device copy moves so many bytes in a second."""
    kernel, blocks, images = plan_of(backend, problem, which)
    piece = problem.bytes(which) / (problem.heads * problem.filled * problem.batch)

    def issuing(together: int) -> float:
        """Seconds of an instruction of all warps of so many blocks."""
        warps = together * (kernel.threads // 32)
        return warps / SCHEDULERS / CYCLES / ISSUED[backend, which]

    def wave(together: int) -> float:
        """Microseconds of a wave with so many blocks on a processor."""
        moved, issue = together * piece * PROCESSORS / copy, issuing(together)
        image = max(moved, issue * kernel.loop, kernel.way / CYCLES)
        return kernel.waits * READ + 1e6 * (issue * kernel.before + images * image)

    whole, rest = divmod(blocks, kernel.resident * PROCESSORS)
    last = math.ceil(rest / PROCESSORS)  # the last wave has fewer blocks, and is over sooner
    waves = whole * wave(kernel.resident) + (wave(last) if last else 0)
    end = END + 1e6 * issuing(last or kernel.resident) * kernel.end
    return START + waves + end + kernel.after


def long_microseconds(problem: Problem, which: str, copy: float = COPY) -> float:
    """What a pass of Triton's kernels for long groups should take."""
    from greenmim_kernels._triton.operators import reach_of

    expanded = 4 * problem.heads * problem.groups * reach_of(problem.slots) ** 2
    total = START + READ + 1e6 * expanded / copy + END
    total += sum(_long_kernel(problem, name, copy) for name in LONG[which])
    return total + (0 if which == "forward" else SUM)


def _long_kernel(problem: Problem, name: str, copy: float) -> float:
    found, launch = launch_of(f"{name}-long-{HEAD_DIM}-16bit")
    block, warps = launch["block"], launch["warps"]
    tiles, blocks = problem.tiles(block), math.ceil(problem.slots / block)
    # A tile's instructions, what else an image has, and what a program has around its images.
    tile, around = found["loops"][0], found["loops"][-1]
    setup = found["instructions"] - around
    programs, of_a_group, working = len(tiles), blocks, blocks
    if name == "bwd_table":
        programs, (of_a_group, working) = sum(tiles), pairs_of(blocks)
    image = sum(tiles) * tile + programs * (around - tile)
    runs = math.ceil(problem.batch / triton_images(problem, launch["resident"], working))
    held = resident(found, warps, ARCHITECTURE)
    together = min(held * PROCESSORS, problem.heads * programs * runs) * warps
    issued = 1 - (1 - READY) ** (together / PROCESSORS / SCHEDULERS)
    instructions = problem.batch * image + runs * programs * setup  # of a head, and a warp
    issue = problem.heads * warps * instructions / (PROCESSORS * SCHEDULERS * CYCLES * issued)
    columns, numbers, again, reads_bias = MOVES[name]
    rows = problem.batch * problem.tokens * problem.heads
    moved = rows * (columns * HEAD_DIM * 2 + numbers * 4)
    # Programs keep their bias in the first cache, if it holds all of theirs.
    bias = 4 * block**2
    room = FIRST_CACHE / held - found["shared_bytes"] - 1024
    is_kept = not reads_bias or bias * sum(tiles) / len(tiles) <= room
    read = again * block * HEAD_DIM * 2 + (0 if is_kept else bias)
    cached = problem.batch * problem.heads * sum(tiles) * read
    cached += rows * (columns - again) * HEAD_DIM * 2
    # Programs without anything to do end when they have read their slots.
    idle = problem.heads * runs * (problem.groups * of_a_group - programs)
    idle *= 2 * READ / (held * PROCESSORS)
    longest = max(issue, moved / copy, cached / SECOND_CACHE)
    return START + 3 * READ + 1e6 * longest + idle + END


def rows() -> Iterator[dict]:
    """One for every batch, stage, kind of partition and pass: microseconds."""
    for batch, stage, capacity, which in itertools.product(
        BATCHES, (1, 2, 3, 4), (False, True), PASSES
    ):
        problem = Problem(stage, batch, capacity)
        yield {
            "batch": batch,
            "stage": stage,
            "capacity": capacity,
            "pass": which,
            "copy": problem.copy(which),
            **{backend: microseconds(backend, problem, which) for backend in BACKENDS},
        }


def step_milliseconds(backend: str, batch: int) -> tuple[float, float]:
    """Attention of the encoder in a training step, and the step: the least of all other kernels,
    what PyTorch adds to it, and the start of each."""
    from greenmim import create_model

    config = model_config(MODEL)
    attention = sum(
        depth * microseconds(backend, Problem(stage, batch, capacity=True), which)
        for stage, depth in enumerate(config.depths, 1)
        for which in PASSES
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(MODEL).parameters())
    others = [
        item
        for item in costs.step_work(config, batch, 0.75, parameters, costs.Widths())
        if not item.part.endswith(", attention")
    ]
    least = sum(item.seconds(COPY, costs.PRODUCT_FLOPS_PER_SECOND) for item in others)
    return attention / 1e3, attention / 1e3 + 1e3 * least + START / 1e3 * len(others)


def page() -> str:
    """The page's text."""
    lines = [
        "# What the attention kernels should take\n",
        "Written by `python -m benchmarks.predicted` from shapes and static figures; its first"
        " lines say how. Nothing here is measured.\n",
        f"Swin-B, window 7, three quarters hidden, bfloat16, an H100 ({COPY / 1e12:.1f} TB/s),"
        " issue rates counted on an H200;"
        f" Triton {TRITON}. Microseconds, and in brackets the share of a device copy of the same"
        " bytes. *Capacity*: the partitions of a training step.\n",
        "| batch | stage | partition | pass | copy | cuda | triton |",
        "|---:|---:|---|---|---:|---:|---:|",
    ]
    for row in rows():
        cells = [f"{row[name]:.1f} ({row['copy'] / row[name]:.0%})" for name in BACKENDS]
        kind = "capacity" if row["capacity"] else "exact"
        lines.append(
            f"| {row['batch']} | {row['stage']} | {kind} | {row['pass']} | {row['copy']:.1f} |"
            f" {' | '.join(cells)} |"
        )
    lines += [
        "\nWindows of 14, Triton; the groups of stage 3 are short ones.\n",
        "| batch | stage | partition | pass | copy | triton |",
        "|---:|---:|---|---|---:|---:|",
    ]
    for batch, (stage, capacity), which in itertools.product(BATCHES, LONG_GROUPS, PASSES):
        problem = Problem(stage, batch, capacity, window=14)
        copy, time = problem.copy(which), long_microseconds(problem, which)
        lines.append(
            f"| {batch} | {stage} | {'capacity' if capacity else 'exact'} | {which} | {copy:.1f} |"
            f" {time:.1f} ({copy / time:.0%}) |"
        )
    lines += [
        "\nA whole training step in a CUDA graph, all else at its least ([step_costs.md]"
        "(step_costs.md)), with what PyTorch adds and the start of every kernel:\n",
        "| batch | backend | attention of the encoder | step | images/s |",
        "|---:|---|---:|---:|---:|",
    ]
    for batch, backend in itertools.product(BATCHES, BACKENDS):
        attention, step = step_milliseconds(backend, batch)
        lines.append(
            f"| {batch} | {backend} | {attention:.2f} ms | {step:.1f} ms |"
            f" {1e3 * batch / step:.0f} |"
        )
    return "\n".join(lines) + "\n"


def beside(result: dict) -> list[dict]:
    """Rows of an operators.json that are predicted: stage, milliseconds of both. Of GPUs for which
    the issue rates hold, those of compute capability 9.0 with all their processors."""
    if not re.search(r"\bG?H[12]00\b", result["environment"]["device"]):
        return []
    found, copy = [], result["rates"]["copy_bytes_per_second"]
    for row in result["rows"]:
        backend = row.get("peer", "").removeprefix("greenmim-")
        is_predicted = (
            "ms" in row
            and backend in BACKENDS
            and row["operator"] == "group_window_attention"
            and row["study"] == "stages"
            and row["dtype"] == "bfloat16"
            and row["pass"] in PASSES
            and not row["per_image"]
            and not row["shifted"]
        )
        if is_predicted:
            problem = Problem(row["stage"], row["batch"], bool(row.get("capacity")))
            predicted = microseconds(backend, problem, row["pass"], copy) / 1e3
            found.append({**row, "backend": backend, "predicted_ms": predicted})
    return found


def beside_table(result: dict) -> str:
    """Measured beside predicted; nothing where nothing is."""
    found = beside(result)
    if not found:
        return ""
    lines = ["| backend | batch | stage | pass | predicted | measured | to predicted |",
             "|---|---:|---|---|---:|---:|---:|"]  # fmt: skip
    lines += [
        f"| {row['backend']} | {row['batch']} | {stage_name(row)} | {row['pass']} |"
        f" {1e3 * row['predicted_ms']:.1f} us | {1e3 * row['ms']:.1f} us |"
        f" {row['ms'] / row['predicted_ms']:.2f} |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    PAGE.write_text(page())
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
