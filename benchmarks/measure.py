"""How everything here is timed: samples, rates of the device, energy.

    timing = measure(function, "cuda")          # seconds: median, p20, p80, spread, n
    timing = measure([f1, f2, f3], "cuda")      # the same work on copies of its inputs, in turn
    rates = measure_rates("cuda", [torch.bfloat16])
    with Energy("cuda") as energy: ...          # energy.joules, None where nothing counts them

A sample is one pass over all copies, divided by their number. With copies that together exceed the
last cache (``copies_beyond_cache``) every call finds its inputs in memory, as in a step of
training, where the rest of the network ran in between. CUDA work is timed between two events on
the device, CPU work by the wall clock. `capture` makes a CUDA graph, whose replay has no launches
to wait for, and `measure_graph` times one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Call = Callable[[], object]
MIN_SAMPLES = 5
AHEAD = 200_000  # cycles, a tenth of a millisecond
REPLAYS = 4  # of a graph, one after the other, in a sample
CPU_COPY_BYTES, CUDA_COPY_BYTES = 256 << 20, 1 << 30
CPU_MATRIX, CUDA_MATRIX = 2048, 8192
DEFAULT_CPU_CACHE = 32 << 20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call over n samples; spread is (p80 - p20) / median."""

    median: float
    p20: float
    p80: float
    spread: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Raises ValueError without samples."""
        if not samples:
            raise ValueError("no samples were taken; give at least one round")
        ordered, last = sorted(samples), len(samples) - 1
        median = statistics.median(ordered)
        p20, p80 = (ordered[round(share * last)] for share in (0.2, 0.8))
        return cls(median, p20, p80, (p80 - p20) / median if median else 0.0, len(ordered))


class Sampler:
    """Times one pass over `calls`, each with its own copy of the inputs.

    Args:
        calls: what is timed.
        device: "cpu" or a CUDA device.
        setups: run before each pass, all of them and untimed: the forward passes whose backward
            passes are the calls.
        copies: that a call goes over; a graph has all of them in it.
    """

    def __init__(
        self,
        calls: Call | Sequence[Call],
        device: str = "cpu",
        setups: Sequence[Call] = (),
        copies: int = 1,
    ) -> None:
        self.calls = (calls,) if callable(calls) else tuple(calls)
        self.setups = tuple(setups)
        self.copies = copies
        self.is_cuda = torch.device(device).type == "cuda"

    def __call__(self) -> float:
        """Seconds of one call, averaged over one pass."""
        self.set_up()
        return self.run()

    def set_up(self) -> None:
        """What goes before a pass."""
        for setup in self.setups:
            setup()

    def run(self) -> float:
        """`__call__` after `set_up`."""
        seconds = self._events() if self.is_cuda else self._wall()
        return seconds / len(self.calls) / self.copies

    def _wall(self) -> float:
        start = time.perf_counter()
        for call in self.calls:
            call()
        return time.perf_counter() - start

    def _events(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits until the host is ahead of it: else the first launch would count.
        torch.cuda._sleep(AHEAD)
        start.record()
        for call in self.calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@contextlib.contextmanager
def no_garbage_collection():
    """Collect now, not while the clock runs."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def measure(
    calls: Call | Sequence[Call],
    device: str = "cpu",
    rounds: int = 20,
    warmup: int = 3,
    seconds: float = math.inf,
    setups: Sequence[Call] = (),
) -> Timing:
    """Time a function, or the same work on several copies of its inputs.

    Args:
        calls, device, setups: see `Sampler`.
        rounds: samples at most.
        warmup: passes that are not counted.
        seconds: stop early once this much time went by and 5 samples are taken.
    """
    sample = Sampler(calls, device, setups)
    with no_garbage_collection():
        for _ in range(warmup):
            sample()
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while len(samples) < rounds and (len(samples) < MIN_SAMPLES or time.perf_counter() < end):
            samples.append(sample())
    return Timing.of(samples)


def cache_bytes(device: str) -> int:
    """The last cache before memory: L2 of a GPU, the largest one that Linux lists of a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for file in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := file.read_text().strip()) and text[-1] in units
    ]
    return max(sizes, default=DEFAULT_CPU_CACHE)


def copies_beyond_cache(bytes_each: int, device: str, most: int = 64) -> int:
    """Copies of inputs of so many bytes that together are twice the last cache; 2 to `most`."""
    return max(2, min(most, math.ceil(2 * cache_bytes(device) / max(1, bytes_each))))


def capture(call: Call, pool=None, warmup: int = 3) -> tuple[torch.cuda.CUDAGraph, object]:
    """Record a call in a CUDA graph. Returns the graph and what the call returned, which each
    ``graph.replay()`` writes anew. With ``pool=other.pool()`` it may use the other's results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return graph, result


def measure_graph(call: Call, rounds: int = 20) -> Timing:
    """Time a call on the GPU without the host's share: replays of a CUDA graph.

    For a call whose inputs and results are together larger than the cache.
    """
    graph, _ = capture(call)
    return measure([graph.replay] * REPLAYS, "cuda", rounds)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device does at best, measured in this run.

    Attributes:
        copy_bytes_per_second: read + written in tensors far beyond the cache, see `copy_rate`.
        matrix_flops_per_second: of a large square product, by dtype ("float32", ...).
    """

    copy_bytes_per_second: float
    matrix_flops_per_second: dict[str, float]

    def floor(self, num_bytes: float, flops: float = 0.0, dtype: str = "") -> tuple[float, str]:
        """The least seconds for so many bytes and operations, and what binds: "copy", "matrix"."""
        copy = num_bytes / self.copy_bytes_per_second
        rate = self.matrix_flops_per_second.get(dtype)
        matrix = flops / rate if rate else 0.0
        return (matrix, "matrix") if matrix > copy else (copy, "copy")


def copy_rate(device: str, scale: float = 1.0) -> float:
    """Bytes per second, read + written: the fastest of three passes over large tensors.

    A copy; a multiplication in place, and AdamW. A CPU reads what a copy is to overwrite before it
    writes there, so the others can be twice as fast.
    """
    is_cuda = torch.device(device).type == "cuda"
    size = int((CUDA_COPY_BYTES if is_cuda else CPU_COPY_BYTES) * scale) // 4
    source = torch.ones(size, device=device)
    target = nn.Parameter(torch.ones_like(source))
    target.grad = torch.zeros_like(source)
    adamw = torch.optim.AdamW([target], fused=True)
    passes: list[tuple[int, Call]] = [  # values read and written by each
        (2, lambda: target.detach().copy_(source)),
        (2, lambda: source.mul_(1.0)),
        (7, adamw.step),
    ]
    # One of the best samples counts: a limit is what can be reached.
    return max(4 * size * n / measure(work, device, rounds=10).p20 for n, work in passes)


def matrix_rate(device: str, dtype: torch.dtype, scale: float = 1.0) -> float:
    """Operations per second of a large square matrix product, by the fastest library there is."""
    is_cuda = torch.device(device).type == "cuda"
    side = max(16, int((CUDA_MATRIX if is_cuda else CPU_MATRIX) * scale))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    products: list[Call] = [lambda: a @ b]
    if not is_cuda and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    timings = [measure(product, device, rounds=10, seconds=2.0) for product in products]
    return 2 * side**3 / min(timing.p20 for timing in timings)


def measure_rates(device: str, dtypes: Sequence[torch.dtype], scale: float = 1.0) -> Rates:
    """Copy and matrix rates of the device. `scale` shrinks the problems, for tests."""
    matrix = {str(dtype).split(".")[1]: matrix_rate(device, dtype, scale) for dtype in dtypes}
    rates = Rates(copy_rate(device, scale), matrix)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what is measured may be in another process
    return rates


class Energy:
    """Joules that a GPU took while the block ran: ``energy.joules``, None where unknown.

    From NVML's counter, which the driver brings up to date about every 100 ms, so the block should
    run for seconds; without pynvml, from the power that nvidia-smi samples. `source` says which.
    The block waits for the device at both ends.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self.joules: float | None = None
        self.source: str | None = None
        self._sampler: subprocess.Popen | None = None

    def __enter__(self) -> Energy:
        if self.device.type != "cuda":
            return self
        torch.cuda.synchronize(self.device)
        self._uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        self._start_joules, self._start = _nvml_joules(self._uuid), time.perf_counter()
        if self._start_joules is None:
            self._sampler = _start_power_sampling(self._uuid)
        return self

    def __exit__(self, *failure: object) -> None:
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._start
        if self._start_joules is not None:
            end = _nvml_joules(self._uuid)
            if end is not None:
                self.joules, self.source = end - self._start_joules, "nvml"
        elif self._sampler is not None:
            self._sampler.terminate()
            watts = watts_of(self._sampler.communicate()[0])
            if watts is not None:
                self.joules, self.source = watts * seconds, "nvidia-smi"


def _nvml_joules(uuid: str) -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception:  # not installed, or a GPU or container that does not count
        return None


def _start_power_sampling(uuid: str) -> subprocess.Popen | None:
    command = ["nvidia-smi", "-i", uuid, "--query-gpu=power.draw",
               "--format=csv,noheader,nounits", "-lms", "100"]  # fmt: skip
    try:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None


def watts_of(lines: str) -> float | None:
    """Mean of the watts that nvidia-smi printed; None if it printed no number."""
    watts = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            watts.append(float(line))
    return statistics.fmean(watts) if watts else None


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
