"""The build's switches: printed first, and a wrong one is one clear sentence."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import setup as setup_py

ROOT = pathlib.Path(__file__).resolve().parent.parent


# Of whoever runs the tests, as in `USE_CUDA=0 make test`.
SWITCHES = {
    "USE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "DEBUG", "MANYLINUX",
    "MODULES",
}  # fmt: skip


def setup(**environment: str) -> subprocess.CompletedProcess:
    """`setup.py --name` evaluates every switch and builds nothing."""
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_switches_are_printed():
    done = setup(USE_CUDA="0", MAX_JOBS="3")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("greenmim build:")]
    shown = {line.split()[2]: line.split()[3:] for line in lines}
    assert set(shown) == {
        "torch", "USE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "DEBUG",
        "MANYLINUX",
    }  # fmt: skip
    assert shown["USE_CUDA"][:3] == ["0", "->", "no:"]
    assert shown["MAX_JOBS"] == ["3"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"USE_CUDA": "yes"}, "USE_CUDA must be one of auto, 0, 1, got 'yes'."),
        ({"DEBUG": "2"}, "DEBUG must be one of 0, 1, got '2'."),
        (
            {"USE_CUDA": "0", "MODULES": "_C typo"},
            "MODULES names typo; this builds _C_partition, _C.",
        ),
    ],
)
def test_a_wrong_switch_is_one_sentence(environment, message):
    done = setup(**environment)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == f"greenmim build: {message}"


def test_a_missing_or_wrong_toolkit_is_one_sentence(tmp_path):
    done = setup(USE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    if torch.version.cuda is None:
        assert "this torch was built without CUDA" in last
        return
    assert f"{tmp_path} has no bin/nvcc" in last
    # A whole toolkit of another major version.
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2'\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    done = setup(USE_CUDA="1", CUDA_HOME=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert "is CUDA 9.2 and torch was built for CUDA" in last
    assert done.returncode != 0
    # Without USE_CUDA=1 the same is only told, and the rest is built.
    done = setup(CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "is CUDA 9.2" in done.stderr


@pytest.mark.parametrize(
    ("listed", "built", "dropped"),
    [
        ("7.0 7.5 8.0 8.6 9.0+PTX", "8.0;8.6;9.0+PTX", "7.0 7.5"),
        ("5.2;7.5+PTX;8.0", "8.0", "5.2 7.5+PTX"),
        (" 9.0a; 12.0+PTX ", "9.0a;12.0+PTX", None),
        ("Volta+Tegra;Turing;Ampere;Hopper", "Ampere;Hopper", "Volta+Tegra Turing"),
        ("10.0 12.1", "10.0;12.1", None),
        ("native", "native", None),
        ("7.0 7.5+PTX", "8.0;9.0+PTX", "7.0 7.5+PTX"),  # nothing left: what is built otherwise
        ("", "8.0;9.0+PTX", None),
    ],
)
def test_architectures_older_than_the_kernels_are_left_out(
    listed, built, dropped, tmp_path, capsys
):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    choose = setup_py.chosen_architectures
    assert choose(str(tmp_path), listed, False) == built
    line = f"{dropped} of TORCH_CUDA_ARCH_LIST left out: the kernels need 8.0 or newer"
    assert capsys.readouterr().err.splitlines() == ([f"greenmim build: {line}"] if dropped else [])
    if dropped == listed:
        with pytest.raises(SystemExit, match="has only architectures older than 8.0") as stopped:
            choose(str(tmp_path), listed, True)
        assert "\n" not in str(stopped.value)
    else:
        assert choose(str(tmp_path), listed, True) == built


def test_the_build_takes_the_architectures_that_are_left(tmp_path):
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'release {torch.version.cuda}'\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    done = setup(CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST="7.0 7.5 8.0 9.0+PTX")
    assert done.returncode == 0, done.stderr
    if torch.version.cuda is None:
        assert "this torch was built without CUDA" in done.stderr
        return
    assert "7.0 7.5 of TORCH_CUDA_ARCH_LIST left out" in done.stderr
    assert "TORCH_CUDA_ARCH_LIST 8.0;9.0+PTX\n" in done.stderr


def test_architectures_that_the_toolkit_does_not_know_are_left_out(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_86\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    assert setup_py.architectures(str(tmp_path)) == "8.0;8.6;9.0+PTX"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_90\\ncompute_100\\ncompute_120\\n'\n")
    assert setup_py.architectures(str(tmp_path)) == "8.0;9.0;10.0;12.0+PTX"


def test_the_sources_build_against_the_oldest_torch():
    """Names of torch's headers that 2.11 does not have; the target version hides only functions."""
    newer = ("STABLE_TORCH_ERROR_CODE_CHECK",)
    for file in sorted((ROOT / "csrc").rglob("*.*")):
        found = [name for name in newer if name in file.read_text()]
        assert not found, f"{file} uses {found}: take TORCH_ERROR_CODE_CHECK"


def test_what_is_cleaned_is_built_again(tmp_path):
    """By `make test` after `make clean`, which leaves what was made to be given away."""

    def lines(target: str, environment: str = ".venv") -> list[str]:
        command = ["make", "--no-print-directory", "-n", target, f"VENV={environment}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (cleaned,) = lines("clean")
    assert ".venv/.ready" in cleaned.split() and "dist" not in cleaned.split()
    assert not any(word.endswith(".ready") for word in lines("clean", "")[0].split())
    # What builds by itself needs no build before.
    for target in ("gpu-check", "gpu-check-more", "gpu-check-steps"):
        done = lines(target, str(tmp_path / "new"))
        assert any("pip install" in line and "hypothesis" in line for line in done)
        assert not any("--editable" in line for line in done), done
