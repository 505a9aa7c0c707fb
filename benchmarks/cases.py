"""Which problems are measured: studies of Swin's attention layers, in selections of three lengths.

A study varies one thing. "short" is what `make bench` runs, "default" what a GPU runs in minutes,
"full" the whole product, "tiny" everything at sizes that only try the code, "table" the layers of
Swin-B with the few peers that a first look at a GPU needs, "rest" what that leaves out.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from greenmim_kernels.testing import Case

from .peers import ATTENTION, FLEX, NAIVE, OPERATORS, PEERS, Peer
from .traffic import PASSES

# Channels at stage 1 over head dim 32; doubled at every stage.
HEADS = {"swin-t": 3, "swin-b": 4, "swin-l": 6}
SELECTIONS = ("short", "default", "full", "tiny", "table", "rest")
# One pass over stage 1 of Swin-B takes milliseconds on a GPU at the one, on a CPU at the other.
BATCH = {"cuda": 128, "cpu": 8}
FUSED = "group_window_attention"
STAGES = (1, 2, 3, 4)
OURS = ("greenmim-cpp", "greenmim-cuda", "greenmim-triton")


@dataclasses.dataclass(frozen=True)
class Problem:
    """An operator on a case, as part of a study, with those beside it and the passes timed."""

    study: str
    operator: str
    model: str
    case: Case
    peers: tuple[Peer, ...]
    passes: tuple[str, ...] = PASSES

    def __str__(self) -> str:
        return f"{self.study}-{self.operator}-{self.model}-{self.case}"


def peers_of(operator: str, device: str, names: tuple[str, ...] = ()) -> tuple[Peer, ...]:
    """The peers of an operator that are meant for a device, ours first; those named if any are."""
    elsewhere = {
        "cuda": ("greenmim-cpp",),
        # Of FlexAttention's blocks a CPU takes one: it compiles for minutes.
        "cpu": ("greenmim-cuda", "greenmim-triton", *FLEX[:-1]),
    }[device]
    return tuple(
        peer
        for peer in PEERS
        if operator in peer.operators
        and peer.name not in elsewhere
        and (not names or peer.name in names)
    )


def swin(model: str, stage: int, batch: int, **sizes) -> Case:
    """One attention layer of a Swin."""
    return Case(stage=stage, num_heads=HEADS[model] * 2 ** (stage - 1), batch=batch, **sizes)


def select(selection: str, device: str, batch: int | None = None) -> list[Problem]:
    """The problems of a selection.

    Args:
        selection: one of `SELECTIONS`.
        device: "cpu" or "cuda".
        batch: images; 8 on a CPU and 128 on a GPU if None.

    Raises:
        ValueError: no such selection.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"no selection {selection!r}; choose one of {', '.join(SELECTIONS)}")
    if selection == "tiny":
        return _tiny(device, batch or 2)
    batch = batch or BATCH[device]
    dtype = torch.float32 if selection == "short" and device == "cpu" else torch.bfloat16
    if selection == "full":
        return _full(device, batch)
    if selection == "table":
        return _table(device, batch, dtype)
    if selection == "rest":
        return _rest(device, batch, dtype)
    problems = [
        *_stages(device, batch, dtype),
        *_operators(device, batch, dtype),
        *_shapes(device, batch, dtype),
        *_growth(device, batch, dtype),
    ]
    return [_shortened(problem) for problem in problems] if selection == "short" else problems


def _shortened(problem: Problem) -> Problem:
    """Without what takes minutes: compilers at every stage, and single passes of every shape."""
    case = problem.case
    if problem.study in ("operators", "shapes"):
        return dataclasses.replace(problem, passes=("both",))
    if problem.study == "stages" and (case.stage not in (1, 3) or case.shifted):
        peers = tuple(peer for peer in problem.peers if not peer.compiles)
        return dataclasses.replace(problem, peers=peers)
    return problem


def _problem(study: str, device: str, case: Case, model: str = "swin-b", **rest) -> Problem:
    operator = rest.pop("operator", FUSED)
    names = rest.pop("names", ())
    return Problem(study, operator, model, case, peers_of(operator, device, names), **rest)


def _stages(device: str, batch: int, dtype: torch.dtype) -> list[Problem]:
    """The layers of Swin-B at 224 px with everybody beside them."""
    cases = [swin("swin-b", stage, batch, dtype=dtype) for stage in STAGES]
    cases.insert(1, dataclasses.replace(cases[0], shifted=True))
    problems = [_problem("stages", device, case) for case in cases]
    return problems + _as_trained(device, batch, dtype)


def _as_trained(device: str, batch: int, dtype: torch.dtype) -> list[Problem]:
    """The same on partitions with capacity; the others of the peers do not see empty groups."""
    return [
        _problem("stages", device, swin("swin-b", stage, batch, dtype=dtype, capacity=True),
                 names=(*OURS, *NAIVE))
        for stage in STAGES
    ]  # fmt: skip


def _table(device: str, batch: int, dtype: torch.dtype) -> list[Problem]:
    """What is known in two minutes: ours and naive first, then FlexAttention, which compiles."""
    exact = [swin("swin-b", stage, batch, dtype=dtype) for stage in STAGES]
    ours = [_problem("stages", device, case, names=(*OURS, *NAIVE)) for case in exact]
    flex = [_problem("stages", device, case, names=FLEX) for case in exact]
    return ours + _as_trained(device, batch, dtype) + flex


def _rest(device: str, batch: int, dtype: torch.dtype) -> list[Problem]:
    """Other operators, the convolution first, and shapes, without what compiles for a minute."""
    slow = ("gather-einsum-compiled", "reference")
    operators = sorted(
        _operators(device, batch, dtype), key=lambda p: p.operator != "sparse_depthwise_conv"
    )
    found = [
        dataclasses.replace(
            problem,
            peers=tuple(peer for peer in problem.peers if peer.name not in slow),
            passes=PASSES if problem.operator == "sparse_depthwise_conv" else ("both",),
        )
        for problem in operators
    ]
    beside = (*OURS, *NAIVE, "padded-sdpa", "varlen")
    for problem in _shapes(device, batch, dtype):
        peers = tuple(peer for peer in problem.peers if peer.name in beside)
        found.append(dataclasses.replace(problem, peers=peers, passes=("both",)))
    return found


def _operators(device: str, batch: int, dtype: torch.dtype) -> list[Problem]:
    """The operators other than the fused one."""
    return [
        _problem("operators", device, swin("swin-b", stage, batch, dtype=dtype), operator=operator)
        for operator in OPERATORS
        if operator != FUSED
        for stage in (1, 3)
    ]


def _shapes(device: str, batch: int, dtype: torch.dtype) -> list[Problem]:
    """Other models, windows, types and masks, at stage 1 unless said; ours, naive and padded."""
    base = {"dtype": dtype}
    varied = [
        ("swin-t", 1, {}),
        ("swin-l", 1, {}),
        ("swin-b", 1, {"window_size": 14}),
        ("swin-b", 2, {"window_size": 14}),
        ("swin-b", 1, {"per_image": True}),
        ("swin-b", 1, {"mask_ratio": 0.6}),
        ("swin-b", 1, {"mask_ratio": 0.9}),
        ("swin-b", 1, {"dtype": torch.bfloat16 if device == "cpu" else torch.float32}),
    ]
    if device == "cuda":
        varied += [
            ("swin-b", 1, {"image_size": (384, 384)}),
            ("swin-b", 1, {"image_size": (512, 512)}),
            ("swin-b", 3, {"window_size": 14}),
            ("swin-b", 1, {"dtype": torch.float16}),
            ("swin-b", 3, {"dtype": torch.float32}),
        ]
    names = () if device == "cuda" else (*OURS, *NAIVE, "padded-sdpa")
    if device == "cpu":
        varied = [one for one in varied if one[2].get("mask_ratio") is None]
    return [
        _problem("shapes", device, swin(model, stage, batch, **(base | sizes)), model, names=names)
        for model, stage, sizes in varied
    ]


def _growth(device: str, batch: int, dtype: torch.dtype) -> list[Problem]:
    """Stage 1 of Swin-B with more tokens, images and pixels; ours and naive, both passes."""
    studies = {
        "tokens": [{"mask_ratio": ratio} for ratio in (0.9, 0.8, 0.7, 0.6)],
        "batch": [{"batch": max(1, batch * k // 4)} for k in (1, 2, 4, 8)],
        "image": [{"image_size": (side, side)} for side in (224, 320, 384, 512)],
    }
    return [
        _problem(
            study,
            device,
            swin("swin-b", 1, **({"batch": batch, "dtype": dtype} | sizes)),
            names=(*OURS, "naive"),
            passes=("both",),
        )
        for study, varied in studies.items()
        for sizes in varied
    ]


def _full(device: str, batch: int) -> list[Problem]:
    """Every model, window, stage, image, ratio, type and kind of mask, with everybody."""
    dtypes = (torch.float32, torch.bfloat16, *((torch.float16,) if device == "cuda" else ()))
    product = itertools.product(
        HEADS, (7, 14), (1, 2, 3, 4), (224, 384, 512), (0.6, 0.75, 0.9), dtypes, (False, True)
    )
    cases = [
        (model, swin(model, stage, batch, window_size=window, image_size=(side, side),
                     mask_ratio=ratio, dtype=dtype, per_image=per_image))
        for model, window, stage, side, ratio, dtype, per_image in product
    ]  # fmt: skip
    short = [problem for name in (_stages, _growth) for problem in name(device, batch, dtypes[1])]
    return short + [
        _problem("full", device, case, model, operator=operator)
        for model, case in cases
        for operator in OPERATORS
        # The others know no windows' size but through the groups.
        if operator in ATTENTION or case.window_size == 7
    ]


def _tiny(device: str, batch: int) -> list[Problem]:
    """Every operator and peer at sizes that a CPU runs in no time."""
    size = {"image_size": (64, 96), "window_size": 4, "mask_ratio": 0.5, "dtype": torch.float32}
    per_image = swin("swin-t", 2, batch, **size, per_image=True)
    cases = [swin("swin-t", 2, batch, **size), per_image]
    problems = [
        _problem("stages" if operator == FUSED else "operators", device, case, "swin-t",
                 operator=operator)
        for operator in OPERATORS
        for case in cases
    ]  # fmt: skip
    growth = [swin("swin-t", 2, batch * k, **size) for k in (1, 2, 4)]
    return problems + [
        _problem("batch", device, case, "swin-t", names=(*OURS, "naive"), passes=("both",))
        for case in growth
    ]
