"""The kernels as the Hugging Face Hub's kernel-builder takes them, from the sources of this clone.

    python -m hub.build                  # dist/hub, for `kernel-builder build-and-upload`
    python -m hub.build --backend cpu    # and a build for this machine, for `get_local_kernel`

kernel-builder makes every build that the Hub asks for, and needs Nix. The build that is made here
needs a compiler, and PyTorch for its headers.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from typing import NoReturn

from setup import CUDA_ARCHITECTURES, STABLE_ABI, architectures, toolkit, toolkit_problem

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME, PYTHON_NAME, VERSION = "greenmim-kernels", "greenmim_kernels", 0
TORCH = "2.11"  # of STABLE_ABI
CAPABILITIES = CUDA_ARCHITECTURES.split(";")
# kernel-builder writes an `_ops` of its own, LIBRARIES stands in the place of `_libraries`, and the
# others are for whoever works on the kernels.
LEFT_OUT = {
    "_ops.py",
    "_libraries.py",
    "onednn.py",
    "testing.py",
    "py.typed",
    "_triton/ahead_of_time.py",
    "_triton/machine_code.py",
    "_triton/static_figures.json",
}
NAMESPACE = "-DGREENMIM_NAMESPACE=TORCH_EXTENSION_NAME"
FLAGS = ["-O3", NAMESPACE, "-fvisibility=hidden", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", NAMESPACE, "-Xcompiler=-fvisibility=hidden"]
FOLDERS = {"cpu": ("partition", "cpu"), "cuda": ("partition", "cpu", "cuda")}
BINDING = """// The operators are registered beside their code, under this library's name.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""
LIBRARIES = '''"""Where the compiled code is: in one library, which `_ops` has loaded."""

from __future__ import annotations

import pathlib

from ._ops import ops


def library_file(name: str) -> pathlib.Path | None:
    """The file with what is else ``_C``, ``_C_cuda`` or ``_C_partition``; None if it lacks that."""
    if name == "_C_cuda" and "_cpu_" in ops.name:
        return None
    return next(pathlib.Path(__file__).parent.glob(f"{ops.name}.*so"), None)
'''
MORE = """
from . import integrations, layers  # noqa: E402

__all__ += ["integrations", "layers"]
"""
FLAKE = """{
  description = "GreenMIM: attention on ragged windows";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs {
    inherit self;
    path = ./.;
  };
}
"""


def stop(message: str) -> NoReturn:
    raise SystemExit(f"hub.build: {message}")


def sources(project: pathlib.Path, backend: str) -> list[str]:
    """Files of csrc/ that a build for a backend reads, headers too."""
    found = [file for name in FOLDERS[backend] for file in (project / "csrc" / name).iterdir()]
    found += (project / "csrc").glob("*.h")
    return sorted(str(file.relative_to(project)) for file in found)


def build_toml(project: pathlib.Path) -> str:
    """kernel-builder's configuration, edition 5."""
    text = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch]
src = ["torch-ext/torch_binding.cpp"]
pyext = ["py", "json"]

[torch.stable-abi]
cpu = "{TORCH}"
cuda = "{TORCH}"
"""
    more = {
        "cpu": {},
        "cuda": {"cuda-capabilities": CAPABILITIES, "cuda-flags": NVCC_FLAGS},
    }
    for backend, options in more.items():
        entries = {
            "backend": backend,
            "depends": ["torch"],
            "cxx-flags": FLAGS,
            **options,
            "src": sources(project, backend),
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in entries.items()]
        text += f"\n[kernel.greenmim_{backend}]\n" + "\n".join(lines) + "\n"
    return text


def tracked() -> list[str]:
    """The files of csrc/ and of the package that git knows."""
    command = ["git", "ls-files", "csrc", PYTHON_NAME]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        listed = []
    if not listed:
        stop("git knows no files here: run it in a clone of the repository, with git on PATH.")
    if missing := [name for name in listed if not (ROOT / name).exists()]:
        stop(f"{missing[0]} is gone: `git restore` it, or `git rm` it.")
    return listed


def write_project(project: pathlib.Path) -> None:
    """Everything that kernel-builder reads."""
    names = tracked()
    if project.exists():
        # Only what this script has made is removed: others' projects have a build.toml, too.
        told = project / "build.toml"
        is_ours = told.is_file() and f'name = "{NAME}"' in told.read_text().splitlines()
        if any(project.iterdir()) and not is_ours:
            stop(f"{project} holds other files: give an empty folder, or one that is not there.")
        shutil.rmtree(project)
    package = project / "torch-ext" / PYTHON_NAME
    for name in names:
        to = project / name
        if name.startswith(PYTHON_NAME):
            name_in_package = name.partition("/")[2]
            if name_in_package in LEFT_OUT:
                continue
            to = package / name_in_package
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to)
    (package / "_libraries.py").write_text(LIBRARIES)
    with open(package / "__init__.py", "a") as file:
        file.write(MORE)
    (project / "torch-ext" / "torch_binding.cpp").write_text(BINDING)
    (project / "build.toml").write_text(build_toml(project))
    (project / "flake.nix").write_text(FLAKE)
    shutil.copy(ROOT / "hub" / "CARD.md", project)
    shutil.copy(ROOT / "LICENSE", project)


# --- a build for this machine -------------------------------------------------------------------

# What kernel-builder writes itself.
REGISTRATION = """#pragma once
#include <Python.h>
#define GREENMIM_INIT(name) PyInit_##name
#define GREENMIM_EXPANDED_INIT(name) GREENMIM_INIT(name)
#define REGISTER_EXTENSION(name)                                                 \\
  PyMODINIT_FUNC GREENMIM_EXPANDED_INIT(name)() {                                \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "greenmim", nullptr, 0}; \\
    return PyModule_Create(&module);                                             \\
  }
"""
OPS = """import torch

from . import {name}

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name):
    return "{name}::" + op_name
"""


def unique_name(project: pathlib.Path, backend: str) -> str:
    """One for each state of the sources, so that a process can load builds of several."""
    digest = hashlib.sha256()
    for file in sorted([*(project / "csrc").rglob("*"), *(project / "torch-ext").rglob("*")]):
        if file.is_file():
            digest.update(f"{file.relative_to(project)}\0".encode() + file.read_bytes())
    return f"_{PYTHON_NAME}_{backend}_{digest.hexdigest()[:7]}"


def build(project: pathlib.Path, backend: str) -> pathlib.Path:
    """The folder of a build under project/build, as on the Hub."""
    try:
        import torch
    except ImportError:
        stop("torch is needed to build: install it.")
    if backend == "cuda":
        home = toolkit()
        if problem := toolkit_problem(home, torch.version.cuda):
            stop(f"{problem}.")
        # torch reads both when its build helpers are imported; an older nvcc does not know all.
        os.environ["CUDA_HOME"], os.environ["TORCH_CUDA_ARCH_LIST"] = home, architectures(home)
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        stop("there is no C++ compiler: install g++, or name one in CXX.")
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    name = unique_name(project, backend)
    digits = TORCH.replace(".", "")
    computes = "cpu" if backend == "cpu" else "cu" + torch.version.cuda.replace(".", "")
    folder = project / "build" / f"torch-stable-abi{digits}-{computes}-{platform.machine()}-linux"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(project / "torch-ext" / PYTHON_NAME, folder)
    (folder / "_ops.py").write_text(OPS.format(name=name))

    older_glibc = ["-include", str(project / "csrc" / "glibc_2_28.h")]
    compiled = [file for file in sources(project, backend) if file.endswith((".cpp", ".cu"))]
    with tempfile.TemporaryDirectory() as scratch:
        (pathlib.Path(scratch) / "registration.h").write_text(REGISTRATION)
        flags = {
            "cxx": [*FLAGS, STABLE_ABI, *older_glibc],
            "nvcc": [*NVCC_FLAGS, STABLE_ABI, *older_glibc],
        }
        kind = CppExtension
        if backend == "cuda":
            kind = CUDAExtension
            flags = {compiler: [*given, "-DUSE_CUDA"] for compiler, given in flags.items()}
        extension = kind(
            name,
            [str(project / file) for file in ["torch-ext/torch_binding.cpp", *compiled]],
            include_dirs=[scratch],
            extra_compile_args=flags,
            py_limited_api=True,
        )
        command = BuildExtension(Distribution({"ext_modules": [extension]}))
        command.build_lib, command.build_temp = scratch, f"{scratch}/objects"
        command.ensure_finalized()
        command.run()
        (library,) = pathlib.Path(scratch).glob(f"{name}.*so")
        shutil.copy(library, folder / f"{name}.abi3.so")
    write_metadata(folder, name, backend)
    return folder


def write_metadata(folder: pathlib.Path, name: str, backend: str) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    hashed = {
        str(file.relative_to(folder)): base64.b64encode(
            hashlib.sha256(file.read_bytes()).digest()
        ).decode()
        for file in files
    }
    facts: dict[str, object] = {"type": backend}
    if backend == "cuda":
        facts["archs"] = os.environ["TORCH_CUDA_ARCH_LIST"].split(";")  # those of this build
    metadata = {
        "id": name,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": facts,
        "digest": {"algorithm": "sha256", "files": hashed},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist" / "hub")
    parser.add_argument("--backend", choices=list(FOLDERS), help="also build for this machine")
    given = parser.parse_args()
    project = given.out.resolve()
    write_project(project)
    print(project)
    if given.backend:
        print(build(project, given.backend))


if __name__ == "__main__":
    main()
