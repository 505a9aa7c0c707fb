"""The kernels on the Hugging Face Hub: the project, and a build of it as `kernels` reads them."""

from __future__ import annotations

import ast
import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import greenmim_kernels as gk
import hub.build as hub
from greenmim_kernels.integrations import fuse_window_attention
from tests.integrations.cases import hugging_face

kernels = pytest.importorskip("kernels")
ObjectFile = pytest.importorskip("kernel_abi_check").ObjectFile
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the build is one for Linux")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project(made_once) -> pathlib.Path:
    def make(folder: pathlib.Path) -> None:
        command = [sys.executable, "-m", "hub.build", "--backend", "cpu", "--out", folder / "hub"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once("hub", make) / "hub"


@pytest.fixture(scope="module")
def build(project) -> pathlib.Path:
    (folder,) = (project / "build").iterdir()
    return folder


@pytest.fixture(scope="module")
def loaded(project):
    return kernels.get_local_kernel(project, backend="cpu")


def test_kernel_builder_reads_the_project(project):
    from kernels._rust import Backend, Build

    assert Build.open(project).general.backends == [Backend.CPU, Backend.CUDA]
    # A build for CUDA has all of the sources; each is where it is said to be.
    told = (project / "build.toml").read_text()
    for name in hub.tracked():
        if not name.startswith("csrc/"):
            continue
        assert (project / name).read_bytes() == (ROOT / name).read_bytes()
        expected = 1 if name.startswith("csrc/cuda/") else 2
        assert told.count(f'"{name}"') == expected, name
    major, minor = map(int, hub.TORCH.split("."))
    assert hub.STABLE_ABI.endswith(f"=0x{major:02x}{minor:02x}{0:012x}")


def test_its_python_imports_itself_by_relative_names(project):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "numpy"}
    files = list((project / "torch-ext").rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, file.name


def test_a_build_is_as_the_hub_asks(build):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    metadata = Metadata.read_from_file(build / "metadata.json")
    (library,) = build.glob("*.so")
    assert library.name == f"{metadata.id}.abi3.so" and metadata.id.isidentifier()
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
    assert ObjectFile(library).check_manylinux("manylinux_2_28") == []
    assert ObjectFile(library).check_python_abi("3.9") == []
    shown = subprocess.run(["nm", "-DC", "--defined-only", library], capture_output=True, text=True)
    assert "greenmim_" in shown.stdout and "greenmim::" not in shown.stdout


def test_it_runs_beside_the_installed_package(loaded):
    visible = np.random.default_rng(0).random((2, 12, 12)) < 0.4
    visible[1] = np.random.default_rng(1).permuted(visible[0])  # as many tokens
    x = torch.randn(2, visible[0].sum(), 48)
    table = torch.randn(169, 2)
    found = []
    for package in (gk, loaded):
        part = package.group_partition(visible, 7, 3)
        leaf = x.clone().requires_grad_()
        with package.use_backend("cpp"):
            out = package.group_window_attention(leaf, table, part, 2)
        out.square().sum().backward()
        found.append((out, leaf.grad, out.grad_fn.name()))
    (ours, ours_grad, ours_name), (theirs, theirs_grad, theirs_name) = found
    assert torch.equal(ours, theirs) and torch.equal(ours_grad, theirs_grad)
    assert ours_name != theirs_name  # operators of two namespaces
    assert loaded._libraries.library_file("_C_cuda") is None
    assert loaded.automatic.table() == gk.automatic.table()


def test_triton_runs_in_it(project):
    """In the interpreter, and with the files that it reads."""
    pytest.importorskip("triton")
    program = f"""
import pathlib, kernels, torch
hub = kernels.get_local_kernel(pathlib.Path({str(project)!r}), backend="cpu")
part = hub.group_partition(torch.ones(4, 4, dtype=torch.bool), 4, 0)
x, table = torch.randn(1, 16, 48), torch.randn(49, 2)
with hub.use_backend("reference"):
    expected = hub.group_window_attention(x, table, part, 2)
with hub.use_backend("triton"):
    torch.testing.assert_close(hub.group_window_attention(x, table, part, 2), expected)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_name_follows_the_sources(project, tmp_path):
    name = hub.unique_name(project, "cpu")
    shutil.copytree(project, tmp_path / "hub", ignore=shutil.ignore_patterns("build"))
    assert hub.unique_name(tmp_path / "hub", "cpu") == name
    with open(tmp_path / "hub" / "csrc" / "library.h", "a") as file:
        file.write("\n")
    assert hub.unique_name(tmp_path / "hub", "cpu") != name


def test_it_removes_what_it_has_made_alone(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds other files"):
        hub.write_project(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    # Another project of kernel-builder's.
    (tmp_path / "build.toml").write_text('[general]\nname = "thesis"\n')
    with pytest.raises(SystemExit, match="holds other files"):
        hub.write_project(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    hub.write_project(tmp_path / "hub")
    (tmp_path / "hub" / "csrc" / "old.cpp").touch()
    # What stops it stops it before it removes anything.
    monkeypatch.setattr(hub, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="git knows no files"):
        hub.write_project(tmp_path / "hub")
    monkeypatch.undo()
    assert (tmp_path / "hub" / "csrc" / "old.cpp").exists()
    hub.write_project(tmp_path / "hub")
    assert not (tmp_path / "hub" / "csrc" / "old.cpp").exists()


def test_a_build_has_the_architectures_that_nvcc_knows(tmp_path, monkeypatch):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_86\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(hub, "toolkit", lambda: str(nvcc.parent.parent))
    monkeypatch.setattr(hub, "toolkit_problem", lambda *_: None)
    monkeypatch.setattr(hub.shutil, "which", lambda _: None)  # it stops before it compiles
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")  # taken back at the end
    with pytest.raises(SystemExit, match="no C"):
        hub.build(tmp_path, "cuda")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;8.6;9.0+PTX"
    hub.write_metadata(tmp_path, "name", "cuda")
    told = json.loads((tmp_path / "metadata.json").read_text())
    assert told["backend"]["archs"] == ["8.0", "8.6", "9.0+PTX"]


# --- layers -------------------------------------------------------------------------------------


class Repository:
    """A layer of the build for the CPU, whatever PyTorch was built for."""

    def __init__(self, loaded, layer_name: str) -> None:
        self.loaded, self.layer_name = loaded, layer_name

    def load(self) -> type[nn.Module]:
        return getattr(self.loaded.layers, self.layer_name)


@pytest.fixture
def kernelized(loaded, monkeypatch):
    """A copy of a model with the forward of the Hub's layer in its modules of a class."""

    def get(model: nn.Module, cls: type[nn.Module], name: str) -> nn.Module:
        for attribute in ("kernel_layer_name", "kernel_condition"):
            monkeypatch.setattr(cls, attribute, None, raising=False)  # taken back at the end
        kernels.replace_kernel_forward_from_hub(cls, name)
        model = copy.deepcopy(model)
        with kernels.use_kernel_mapping({name: {"cpu": Repository(loaded, name)}}):
            mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
            return kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)

    return get


def step(model: nn.Module, *inputs) -> list[torch.Tensor]:
    """Output and all gradients."""
    out = model(*inputs)
    out = getattr(out, "last_hidden_state", out)
    out.square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return [out.detach(), *grads]


def test_swin_of_transformers_runs_on_it(kernelized, loaded):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    torch.manual_seed(0)
    # The softmax of its eager attention is in float32 in any case.
    model = hugging_face(implementation="sdpa").double()
    ours = kernelized(model, swin.SwinAttention, "SwinAttention")
    x = torch.randn(2, 3, 36, 36, dtype=torch.float64)
    namespace = loaded.ops.ops.name
    with torch.profiler.profile() as profile:
        found = step(ours, x)
    called = [event for event in profile.events() if event.name.startswith(f"{namespace}::")]
    assert sum(event.name.endswith("::group_window_attention") for event in called) == 4
    expected = step(model, x)
    assert len(found) == len(expected) > 60
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_what_the_kernels_do_not_do_is_the_librarys_own(kernelized):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    torch.manual_seed(0)
    model = hugging_face()
    ours = kernelized(model, swin.SwinAttention, "SwinAttention")
    x = torch.randn(2, 3, 36, 36)
    with pytest.warns(UserWarning, match="attention maps"):
        maps = ours(x, output_attentions=True).attentions
    assert len(maps) == 2
    for one, other in zip(maps, model(x, output_attentions=True).attentions, strict=True):
        assert torch.equal(one, other)


def test_its_attention_compiles_whole(kernelized):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    torch.manual_seed(0)
    ours = kernelized(hugging_face().double(), swin.SwinAttention, "SwinAttention")
    attention = next(m for m in ours.modules() if isinstance(m, swin.SwinAttention))
    windows = torch.randn(8, 16, 16, dtype=torch.float64)
    part = torch.randint(0, 2, (4, 16))
    mask = torch.where(part[:, None] == part[:, :, None], 0.0, -100.0).double()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for given in (None, mask):
        torch.testing.assert_close(compiled(windows, given), attention(windows, given))


def test_group_window_attention_runs_on_it(kernelized):
    torch.manual_seed(0)
    layer = nn.Sequential(gk.GroupWindowAttention(24, 7, 3))
    ours = kernelized(layer, gk.GroupWindowAttention, "GroupWindowAttention")
    visible = np.random.default_rng(0).random((14, 14)) < 0.3
    part = gk.group_partition(visible, 7, 3)
    x = torch.randn(2, int(visible.sum()), 24)
    assert ours[0].forward.__func__ is not gk.GroupWindowAttention.forward
    for one, other in zip(step(ours[0], x, part), step(layer[0], x, part), strict=True):
        assert torch.equal(one, other)


def test_it_runs_within_layers_that_the_installed_package_fused(kernelized):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    torch.manual_seed(0)
    model = hugging_face(implementation="sdpa").double()
    fused = copy.deepcopy(model)
    fuse_window_attention(fused)
    ours = kernelized(fused, swin.SwinAttention, "SwinAttention")
    x = torch.randn(2, 3, 36, 36, dtype=torch.float64)
    for one, other in zip(step(ours, x), step(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
