"""One problem at a time: the inputs, the check against fp64, what is timed, the row of a result.

A peer whose results are not within the error budget is not timed. Passes are timed with gradients
on, as in training: "forward" saves what the backward pass needs, "backward" is timed by itself
after an untimed forward pass of every copy, "both" in one go.
"""

from __future__ import annotations

import dataclasses
import gc

import torch
from torch import Tensor

import greenmim_kernels as gk
from greenmim_kernels import use_backend
from greenmim_kernels.testing import assert_within_budget, make_inputs, relative_error

from .cases import FUSED, OURS, Problem
from .convolution import CONVOLUTION, conv_inputs
from .measure import Call, Rates, Sampler, Timing, bytes_of, capture, copies_beyond_cache
from .peers import COPIES, Function, Peer, Unable, ours
from .traffic import work_of

Results = dict[str, Tensor]
PEER_ROUNDINGS = 8  # of the type's epsilon


@dataclasses.dataclass
class Prepared:
    """What a peer's pass needs to be timed. `clock`: "wall", "graph" (CUDA graph between events)
    or "events" (launched one by one between events), then with why there is no graph."""

    sampler: Sampler
    clock: str
    copies: int
    note: str | None = None


def reason_of(error: BaseException) -> str:
    """One line that says why a peer cannot."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0] if isinstance(error, Unable) else f"{type(error).__name__}: {lines[0]}"
    return text[:200]


def assert_rounded_only(actual: Results, exact: Results, dtype: torch.dtype) -> None:
    """Hold other people's 16-bit results to what rounding alone explains.

    They round scores, probabilities and sums of gradients to 16 bits, where ours are held to a
    budget in float32. Relative to the largest value of each result that is a few units of rounding;
    a wrong mask, bias or index is off by tens of percent.
    """
    allowed = PEER_ROUNDINGS * torch.finfo(dtype).eps
    for name, right in exact.items():
        error = relative_error(actual[name], right)
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.1e}"


class Bench:
    """A problem with its inputs on a device.

    Attributes:
        inputs: of the case (`greenmim_kernels.testing.Inputs`).
        leaves: what the operator takes and gives gradients of: (x,) or (x, table).
        grad_out: gradient of its output, zero in padding.
    """

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem, self.device = problem, device
        self.is_cuda = torch.device(device).type == "cuda"
        operator = problem.operator
        make = conv_inputs if operator == CONVOLUTION else make_inputs
        self.inputs = inputs = make(problem.case, device=device)
        with use_backend("reference"):
            channels = problem.case.channels
            if operator in (FUSED, CONVOLUTION):
                x, self.grad_out = inputs.qkv, inputs.grad_out
            elif operator == "block_diagonal_attention":
                x, self.grad_out = (
                    gk.group_gather(t, inputs.part) for t in (inputs.qkv, inputs.grad_out)
                )
            elif operator == "group_gather":
                x = inputs.qkv
                self.grad_out = gk.group_gather(x.flip(0), inputs.part)
            else:
                x = gk.group_gather(inputs.qkv[..., :channels], inputs.part)
                self.grad_out = inputs.grad_out
        self.leaves = (x,) if operator in COPIES else (x, inputs.table)
        self._expected: dict[bool, tuple[Results, Results]] = {}
        self._functions: dict[str, Function] = {}
        self._checked: dict[tuple[str, bool], str | None] = {}

    def _call(self, function: Function, leaves: tuple[Tensor, ...]) -> Tensor:
        return function(leaves[0], leaves[1] if len(leaves) > 1 else None)

    def _run(self, function: Function, dtype: torch.dtype | None = None) -> Results:
        table_dtype = dtype and torch.promote_types(dtype, torch.float32)
        dtypes = (dtype, table_dtype)[: len(self.leaves)]
        leaves = [t.detach().to(d or t.dtype).requires_grad_() for t, d in zip(self.leaves, dtypes)]  # noqa: B905
        out = self._call(function, tuple(leaves))
        grads = torch.autograd.grad(
            out, leaves, self.grad_out.to(out.dtype), allow_unused=True, materialize_grads=True
        )
        names = ("grad_qkv", "grad_table")
        return {"out": out.detach(), **dict(zip(names, grads, strict=False))}

    def expected(self, with_bias: bool) -> tuple[Results, Results]:
        """The reference's results in the case's dtype and in fp64."""
        if with_bias not in self._expected:
            reference = ours(self.problem.operator, self.inputs)

            def function(x: Tensor, table: Tensor | None) -> Tensor:
                return reference(x, table if with_bias else None)

            with use_backend("reference"):
                self._expected[with_bias] = self._run(function), self._run(function, torch.float64)
        return self._expected[with_bias]

    def function_of(self, peer: Peer) -> Function:
        """Made once; raises what making it raises."""
        if peer.name not in self._functions:
            made = peer.make(self.problem.operator, self.inputs)

            def function(x: Tensor, table: Tensor | None) -> Tensor:
                with use_backend(peer.backend or "auto"):
                    return made(x, table)

            self._functions[peer.name] = made if peer.backend is None else function
        return self._functions[peer.name]

    def run_once(self, peer: Peer) -> None:
        """Forward and backward, unchecked: what compiles for them is compiled then."""
        self._run(self.function_of(peer))

    def check(self, peer: Peer, with_gradients: bool) -> None:
        """Hold a peer to the error budget, once for its output and once for its gradients.

        Raises:
            Unable: it cannot do this here, or its results are wrong; the message says which.
            AssertionError: our own results are wrong.
        """
        key = (peer.name, with_gradients)
        if key not in self._checked:
            self._checked[key] = self._check(peer, with_gradients)
        if reason := self._checked[key]:
            raise Unable(reason)

    def _check(self, peer: Peer, with_gradients: bool) -> str | None:
        plain, exact = self.expected(peer.with_bias)
        dtype = self.leaves[0].dtype
        try:
            function = self.function_of(peer)
            if with_gradients:
                actual = self._run(function)
            else:
                with torch.no_grad():
                    out = self._call(function, self.leaves)
                actual = plain | {"out": out}
        except Exception as error:  # whatever other people's parts raise is the reason
            return reason_of(error)
        try:
            actual["out"] = actual["out"].to(dtype)
            if peer.name in OURS or dtype.itemsize > 2:
                assert_within_budget(actual, plain, exact)
            else:
                assert_rounded_only(actual, exact, dtype)
        except AssertionError as error:
            if peer.name in OURS:
                raise
            return f"wrong, not timed: {error}"[:200]
        return None

    def prepare(self, peer: Peer, which: str) -> Prepared:
        """Check a peer and make ready to time a pass: "forward", "backward" or "both".

        Raises:
            Unable, AssertionError: as `check`.
        """
        forward_only = False
        try:
            self.check(peer, with_gradients=True)
        except Unable:
            if which != "forward":
                raise
            self.check(peer, with_gradients=False)
            forward_only = True
        function = self.function_of(peer)
        copies = copies_beyond_cache(bytes_of(*self.leaves, self.grad_out), self.device)
        try:
            passes = [Pass(self, function, which, forward_only) for _ in range(copies)]
            return self._prepared(passes, forward_only)
        except torch.OutOfMemoryError as error:
            raise Unable(reason_of(error)) from None

    def _prepared(self, passes: list[Pass], forward_only: bool) -> Prepared:
        note = "no backward pass here; timed without gradients" if forward_only else None
        if self.is_cuda:
            try:
                setups, call = captured(passes)
                sampler = Sampler(call, self.device, setups, len(passes))
                return Prepared(sampler, "graph", len(passes), note)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # what synchronises cannot be captured
                torch.cuda.synchronize()
                note = f"no CUDA graph: {reason_of(error)}"
        setups = [one.forward for one in passes if one.which == "backward"]
        sampler = Sampler([one.timed for one in passes], self.device, setups)
        return Prepared(sampler, "events" if self.is_cuda else "wall", len(passes), note)

    def row(self, peer: Peer, which: str) -> dict:
        """What a row of a result says before it is timed."""
        case, part = self.problem.case, self.inputs.part
        return {
            "study": self.problem.study,
            "operator": self.problem.operator,
            "model": self.problem.model,
            "case": str(case),
            "stage": case.stage,
            "shifted": case.shifted,
            "window": case.window_size,
            "image": list(case.image_size),
            "batch": case.batch,
            "ratio": case.mask_ratio,
            "dtype": str(case.dtype).removeprefix("torch."),
            "per_image": case.per_image,
            "capacity": case.capacity,
            "tokens": part.num_tokens,
            "groups": part.num_groups,
            "group_size": part.group_size,
            "peer": peer.name,
            "pass": which,
        }

    def close(self) -> None:
        """Give the memory back."""
        self._expected.clear()
        self._functions.clear()
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


class Pass:
    """One copy of the inputs and the pass that is timed on it."""

    def __init__(self, bench: Bench, function: Function, which: str, forward_only: bool) -> None:
        self.function, self.which, self.call = function, which, bench._call
        self.leaves = tuple(
            t.detach().clone().requires_grad_(not forward_only) for t in bench.leaves
        )
        self.grad_out = bench.grad_out.clone()
        self.out: Tensor | None = None
        self.result: object = None  # of a captured pass: no other copy's lies in its memory

    def forward(self) -> None:
        self.out = self.call(self.function, self.leaves)

    def backward(self) -> tuple[Tensor, ...]:
        out, self.out = self.out, None  # what was saved is freed, as in training
        return torch.autograd.grad(out, self.leaves, self.grad_out.to(out.dtype), allow_unused=True)

    def timed(self) -> object:
        if self.which == "forward":
            return self.call(self.function, self.leaves)
        if self.which == "both":
            self.forward()
        return self.out, self.backward()


def captured(passes: list[Pass]) -> tuple[list[Call], Call]:
    """Setups, and the passes on all copies one after the other, each as one CUDA graph: in a step,
    too, kernels follow one another, where a graph of each would have a launch between them."""

    def forward() -> None:
        for one in passes:
            one.forward()

    def timed() -> None:
        for one in passes:
            one.result = one.timed()

    if passes[0].which != "backward":
        return [], capture(timed)[0].replay

    def whole() -> None:
        forward()
        timed()

    capture(whole)  # warm, and the first that fails if this cannot be captured
    first, _ = capture(forward, warmup=0)
    then, _ = capture(timed, pool=first.pool(), warmup=0)
    return [first.replay], then.replay


def timed_row(row: dict, timing: Timing, prepared: Prepared, rates: Rates, bench: Bench) -> dict:
    """The row with its time, the least time, and the fraction of it that is reached.

    `fraction` is least time / median: 1 is the rate of the fastest of a copy, a multiplication in
    place and AdamW on the same bytes or, where `bound` says "matrix", that of a large product.
    """
    work = work_of(bench.problem.operator, bench.inputs, row["pass"])
    floor, bound = rates.floor(work.bytes, work.flops, row["dtype"])
    return row | {
        "ms": timing.median * 1e3,
        "p20_ms": timing.p20 * 1e3,
        "p80_ms": timing.p80 * 1e3,
        "spread": timing.spread,
        "n": timing.n,
        "clock": prepared.clock,
        "copies": prepared.copies,
        "note": prepared.note,
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_ms": floor * 1e3,
        "bound": bound,
        "fraction": floor / timing.median,
    }


def extra_bytes(bench: Bench, peer: Peer) -> int:
    """Peak of tensor memory during a forward and a backward pass, beyond inputs and results."""
    run = Pass(bench, bench.function_of(peer), "both", forward_only=False).timed
    results = bytes_of(bench.grad_out, *bench.leaves)
    run()
    gc.collect()
    if bench.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - results
    return _profiled_peak(run) - results


def _profiled_peak(run: Call) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        results = run()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del results
    return peak
