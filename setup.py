"""Build of the compiled modules; everything else about the package is in pyproject.toml.

Switches (environment): USE_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, DEBUG=0|1,
MANYLINUX=0|1 (binaries that need glibc 2.28 and no newer one),
MODULES (the names of those to build, such as "_C_partition"; all if empty).

- greenmim_kernels._C_partition: the planner, a C interface.
- greenmim_kernels._C: CPU operators, on libtorch's stable ABI.
- greenmim_kernels._C_cuda: CUDA operators, built when a toolkit and a torch with CUDA are there. A
  GPU is never asked for: the machine that builds often has none.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

from setuptools import Extension, setup

ROOT = pathlib.Path(__file__).parent
# The oldest torch that the binaries load under: 2.11.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CUDA_ARCHITECTURES = "8.0;8.6;9.0;10.0;12.0+PTX"
# Names that TORCH_CUDA_ARCH_LIST may hold for what is older than the 8.0 of the kernels.
OLDER_NAMES = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")


def say(message: str) -> None:
    print(f"greenmim build: {message}", file=sys.stderr, flush=True)


def stop(message: str) -> None:
    raise SystemExit(f"greenmim build: {message}")


def switch(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        stop(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def toolkit_of_nvcc() -> str | None:
    """Where the nvcc on PATH has its headers: it may be a script that calls the real one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run(
        [nvcc, "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    here = pathlib.Path(top[1].strip() if top else pathlib.Path(nvcc).resolve().parent.parent)
    return str(here.resolve())


def toolkit() -> str | None:
    """The CUDA toolkit to build with, if there is one."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or toolkit_of_nvcc()


def toolkit_problem(home: str | None, torch_cuda: str | None) -> str | None:
    """One sentence that says why the CUDA module cannot be built, or None."""
    if torch_cuda is None:
        return "this torch was built without CUDA, so install a CUDA build of torch first"
    if home is None:
        return "no CUDA toolkit was found, so put nvcc on PATH or set CUDA_HOME"
    root = pathlib.Path(home)
    if not (root / "bin" / "nvcc").exists() or not (root / "include" / "cuda_runtime.h").exists():
        return (
            f"{home} has no bin/nvcc or include/cuda_runtime.h, so set CUDA_HOME to a whole toolkit"
        )
    if not any(root.glob("lib*/libcudart*")) and not any(root.glob("targets/*/lib/libcudart*")):
        return f"{home} has no libcudart, so set CUDA_HOME to a whole toolkit"
    version = subprocess.run(
        [str(root / "bin" / "nvcc"), "--version"], capture_output=True, text=True
    ).stdout
    found = re.search(r"release (\d+)\.(\d+)", version)
    if found is None:
        return f"{home}/bin/nvcc does not say its version, so set CUDA_HOME to a working toolkit"
    if found[1] != torch_cuda.split(".")[0]:
        return (
            f"the toolkit in {home} is CUDA {found[1]}.{found[2]} and torch was built for CUDA"
            f" {torch_cuda}, so use a toolkit of the same major version"
        )
    return None


def is_too_old(architecture: str) -> bool:
    """Whether an entry of TORCH_CUDA_ARCH_LIST, such as 7.5, 9.0a+PTX or Volta, is below 8.0."""
    number = re.match(r"(\d+)\.\d", architecture)
    return int(number[1]) < 8 if number else architecture.startswith(OLDER_NAMES)


def chosen_architectures(home: str, listed: str, is_required: bool) -> str:
    """The value of TORCH_CUDA_ARCH_LIST to build with, from the one that was found.

    Images list the architectures of everything they run, so entries that the kernels cannot be
    compiled for are left out.
    """
    entries = re.findall(r"[^;\s]+", listed)
    kept = [entry for entry in entries if not is_too_old(entry)]
    if len(kept) < len(entries):
        dropped = " ".join(entry for entry in entries if is_too_old(entry))
        if is_required and not kept:
            stop(
                f"TORCH_CUDA_ARCH_LIST={listed!r} has only architectures older than 8.0, which the"
                " kernels need, so add one or unset it (USE_CUDA=1)."
            )
        say(f"{dropped} of TORCH_CUDA_ARCH_LIST left out: the kernels need 8.0 or newer")
    return ";".join(kept) or architectures(home)


def architectures(home: str, wanted: str = CUDA_ARCHITECTURES) -> str:
    """Those of `wanted` that this toolkit's nvcc knows; the last one kept carries the PTX."""
    listed = subprocess.run(
        [str(pathlib.Path(home) / "bin" / "nvcc"), "--list-gpu-arch"],
        capture_output=True,
        text=True,
    ).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    names = wanted.removesuffix("+PTX").split(";")
    kept = [name for name in names if name.replace(".", "") in known]
    return ";".join(kept) + "+PTX" if kept else wanted


def sources(folder: str, *suffixes: str) -> list[str]:
    found = [p for p in (ROOT / "csrc" / folder).iterdir() if p.suffix in suffixes]
    return sorted(str(p.relative_to(ROOT)) for p in found)


def headers() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*h"))


def main() -> None:
    use_cuda = switch("USE_CUDA", "auto", ("auto", "0", "1"))
    debug = switch("DEBUG", "0", ("0", "1")) == "1"
    manylinux = switch("MANYLINUX", "0", ("0", "1")) == "1"
    try:
        import torch
    except ImportError as error:
        stop(f"{error.name} is needed to build; install it, or let pip build in isolation.")
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        stop(f"torch 2.11 or newer is needed, found {torch.__version__}.")
    if use_cuda != "0":
        home = toolkit()
        problem = toolkit_problem(home, torch.version.cuda)
        if problem is None:
            # torch reads both when its build helpers are imported, so this comes first.
            os.environ["CUDA_HOME"] = home
            os.environ["TORCH_CUDA_ARCH_LIST"] = chosen_architectures(
                home, os.environ.get("TORCH_CUDA_ARCH_LIST", ""), use_cuda == "1"
            )
        elif use_cuda == "1":
            stop(f"{problem} (USE_CUDA=1).")
    else:
        problem = "USE_CUDA=0"
    switches = {
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "USE_CUDA": f"{use_cuda} -> {'yes' if problem is None else 'no: ' + problem}",
        "CUDA_HOME": os.environ.get("CUDA_HOME", "") if problem is None else "-",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "-"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", "all cores"),
        "DEBUG": int(debug),
        "MANYLINUX": int(manylinux),
    }
    for name, value in switches.items():
        say(f"{name:<20} {value}")

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    optimise = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    older_glibc = ["-include", str(ROOT / "csrc" / "glibc_2_28.h")] if manylinux else []
    # Messages name files as in the repository, wherever it was built.
    relative = f"-ffile-prefix-map={ROOT}=."
    cxx = [*optimise, "-fvisibility=hidden", "-Wall", "-Wno-psabi", relative, *older_glibc]
    modules = [
        Extension(
            "greenmim_kernels._C_partition",
            sources("partition", ".cpp"),
            py_limited_api=True,
            extra_compile_args={"cxx": [*cxx, "-std=c++17"]},
            depends=headers(),
        ),
        CppExtension(
            "greenmim_kernels._C",
            sources("cpu", ".cpp"),
            py_limited_api=True,
            extra_compile_args={"cxx": [*cxx, STABLE_ABI]},
            depends=headers(),
        ),
    ]
    if problem is None:
        built_for = f'-DGREENMIM_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"'
        nvcc = ["-O0", "-g", "-G"] if debug else ["-O3"]
        # Else static variables of inline functions are shared with another build in the process.
        nvcc.append("-Xcompiler=-fvisibility=hidden")
        modules.append(
            CUDAExtension(
                "greenmim_kernels._C_cuda",
                sources("cuda", ".cu", ".cpp"),
                py_limited_api=True,
                extra_compile_args={
                    "cxx": [*cxx, STABLE_ABI, "-DUSE_CUDA"],
                    "nvcc": [*nvcc, STABLE_ABI, "-DUSE_CUDA", built_for, *older_glibc],
                },
                depends=headers(),
            )
        )
    if wanted := os.environ.get("MODULES", "").split():
        known = {module.name.split(".")[-1]: module for module in modules}
        if unknown := [name for name in wanted if name not in known]:
            stop(f"MODULES names {', '.join(unknown)}; this builds {', '.join(known)}.")
        modules = [module for name, module in known.items() if name in wanted]
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": BuildExtension},
        # One wheel for every version of Python: nothing that is compiled knows of any.
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
