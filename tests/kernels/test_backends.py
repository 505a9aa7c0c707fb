"""Names of backends, availability, forcing, and what "auto" takes."""

from __future__ import annotations

import dataclasses
import functools
import threading

import pytest
import torch

import greenmim_kernels as gk
from greenmim_kernels import backends
from greenmim_kernels.testing import Case, make_inputs


def attention(inputs):
    return gk.group_window_attention(inputs.qkv, inputs.table, inputs.part, inputs.num_heads)


def backend_taken(inputs) -> str:
    return backends.choose_backend("group_window_attention", inputs.qkv.device, inputs.qkv.dtype)


def test_available_backends():
    available = gk.available_backends()
    assert list(available) == ["reference", "cpp", "cuda", "triton"]
    assert available["reference"] is None
    assert available["cpp"] is None
    for reason in available.values():
        assert reason is None or len(reason) > 10


@pytest.fixture
def without_half(monkeypatch):
    """A cpp backend that cannot do float16."""
    cpp = dataclasses.replace(backends.BACKENDS["cpp"], dtypes=(torch.float32,))
    monkeypatch.setitem(backends.BACKENDS, "cpp", cpp)


@pytest.mark.usefixtures("without_half")
def test_auto_takes_the_compiled_kernels_and_falls_back_to_the_reference():
    inputs = make_inputs(Case())
    assert backend_taken(inputs) == "cpp"
    half = inputs.to(torch.float16)
    assert backend_taken(half) == "reference"
    assert attention(half).dtype == torch.float16


@pytest.mark.usefixtures("without_half")
def test_a_forced_backend_never_falls_back():
    half = make_inputs(Case(dtype=torch.float16))
    with gk.use_backend("cpp"):
        with pytest.raises(ValueError, match="cpp backend computes in .*, not float16"):
            attention(half)
        with gk.use_backend("auto"):
            attention(half)
        with gk.use_backend("reference"):
            assert backend_taken(half) == "reference"
        assert backends.backend_in_force() == "cpp"
    assert backends.backend_in_force() == "auto"


def test_what_a_backend_lacks_is_said():
    why = backends._why_unsupported
    assert "runs on cpu tensors" in why("cpp", "cuda", torch.float32)
    assert "runs on cuda tensors" in why("cuda", "cpu", torch.float32)
    assert "not float64" in why("cuda", "cuda", torch.float64)
    assert why("cuda", "cuda", torch.float32) is None


def test_unknown_and_unusable_names():
    with pytest.raises(ValueError, match="unknown backend 'metal'; choose one of auto, reference"):
        with gk.use_backend("metal"):
            pass
    for name, reason in gk.available_backends().items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"the {name} backend cannot be used here"):
                with gk.use_backend(name):
                    pass


def test_the_environment_is_read_at_each_call(monkeypatch):
    inputs = make_inputs(Case())
    monkeypatch.setenv("GREENMIM_BACKEND", "reference")
    assert backend_taken(inputs) == "reference"
    with gk.use_backend("cpp"):
        assert backend_taken(inputs) == "cpp"
    with gk.use_backend("auto"):
        assert backend_taken(inputs) == "cpp"
    monkeypatch.setenv("GREENMIM_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="'nonsense' \\(from GREENMIM_BACKEND\\)"):
        attention(inputs)
    monkeypatch.setenv("GREENMIM_BACKEND", "triton")
    if gk.available_backends()["triton"]:
        with pytest.raises(RuntimeError, match="GREENMIM_BACKEND"):
            attention(inputs)
    monkeypatch.delenv("GREENMIM_BACKEND")
    assert backend_taken(inputs) == "cpp"


def test_forcing_is_local_to_the_thread():
    seen = []
    with gk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.backend_in_force()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_a_missing_library_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "library_file", lambda name: None)
    assert "was not built" in backends.load_library.__wrapped__("_C")
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(backends, "library_file", lambda name: broken)
    assert "does not load: " in (reason := backends.load_library.__wrapped__("_C"))
    assert "invalid ELF header" in reason or "file too short" in reason
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in backends.load_library.__wrapped__("_C_cuda")


@pytest.mark.parametrize(
    ("built", "device", "works"),
    [
        ("8.0;9.0;12.0+PTX", (8, 0), True),
        ("8.0;9.0;12.0+PTX", (8, 9), True),  # machine code of the same major version
        ("8.6;9.0", (8, 0), False),  # of a later minor one
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (10, 0), True),
        ("9.0a+PTX", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),  # its PTX is specific, too
        ("8.0;9.0;12.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("Hopper", (9, 0), True),
    ],
)
def test_which_gpus_a_build_runs_on(built, device, works):
    reason = backends._not_built_for(tuple(built.split(";")), device)
    assert (reason is None) == works
    assert works or f"TORCH_CUDA_ARCH_LIST={device[0]}.{device[1]}" in reason


def test_the_gpu_of_the_tensor_decides_not_the_current_one(monkeypatch):
    old, new = torch.device("cuda:1"), torch.device("cuda:0")
    capability = {old: (7, 5), new: (9, 0), None: (9, 0)}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[device])
    monkeypatch.setattr(backends, "load_library", lambda name: None)
    monkeypatch.setattr(backends, "cuda_architectures", lambda: ("8.0", "9.0"))
    monkeypatch.setattr(backends, "_cuda_fits", lambda *question: True)
    choose = functools.partial(
        backends.choose_backend, "group_window_attention", dtype=torch.bfloat16, head_dim=32,
        group_size=64, table_rows=169,
    )  # fmt: skip
    assert choose(device=new) in ("cuda", "triton")
    assert choose(device=old) == "reference"
    with gk.use_backend("cuda"):
        assert choose(device=new) == "cuda"
        with pytest.raises(RuntimeError, match="cannot be used on cuda:1: .* capability 7.5"):
            choose(device=old)


@pytest.mark.skipif(
    backends.load_library("_C_cuda") is not None, reason="the CUDA module is not usable here"
)
def test_the_build_says_what_it_is_for():
    names = backends.cuda_architectures()
    assert names and all(name.split("+")[0].replace(".", "").isalnum() for name in names)


def test_what_triton_takes_for_true(monkeypatch):
    for value, expected in (("1", True), ("true", True), ("ON", True), ("0", False), ("", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert backends.triton_interprets() == expected, value
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not backends.triton_interprets()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_a_gpu_that_cannot_be_asked_is_an_error():
    """No C++ exception may reach ctypes: it would end the process."""
    if backends.library_file("_C_cuda") is None:
        pytest.skip("without the CUDA module")
    for _ in range(2):  # an error is not kept as an answer
        with pytest.raises(RuntimeError, match="CUDA|driver|kernel"):
            backends._cuda_fits(0, torch.float32, 32, 49, 169)


def test_what_fits_a_gpu_is_asked_while_tracing(monkeypatch):
    """The question is the library's, which Dynamo cannot look into."""
    asked = []

    def fits(*question):
        asked.append(question)
        return question[-1] < 1000

    monkeypatch.setattr(backends, "_cuda_fits", fits)
    device = torch.device("cuda:1")

    def call(x, rows):
        reason = backends._why_sizes_unsupported("cuda", device, x.dtype, 32, 49, rows)
        return x + 1 if reason is None else x

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    assert compiled(x, 169)[0] == 1 and compiled(x, 2000)[0] == 0
    assert asked[0] == (1, torch.float32, 32, 49, 169)
    assert backends._why_sizes_unsupported("cuda", device, x.dtype, 32, 49, 2000) == (
        "the cuda backend has no room on this GPU for groups of 49 slots with a bias table of 2000"
        " rows"
    )
    said = backends._why_sizes_unsupported("triton", device, x.dtype, 7, 49, 169)
    assert "multiples of 2 up to 64, not 7" in said
