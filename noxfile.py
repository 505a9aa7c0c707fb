"""The wheel in empty environments, without a compiler: `make dist`, then `nox`.

    nox --session 'wheel-3.12(torch="2.11.0")'    # one of them
    nox --no-reuse-existing-virtualenvs           # all; six gigabytes each

It installs the newest wheel in dist/ with what the kernels need and nothing else, and runs their
tests. The last session has everything that a run needs.
"""

import pathlib
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

nox.options.default_venv_backend = "venv"


def copied(session: nox.Session, *names: str) -> None:
    """Work in a folder with these of the clone alone: what is imported is what is installed."""
    folder = pathlib.Path(session.create_tmp()) / "clone"
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    session.chdir(folder)


def wheel_of(session: nox.Session) -> str:
    found = sorted((ROOT / "dist").glob("*.whl"), key=lambda file: file.stat().st_mtime)
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
    files = [f"tests/kernels/test_{name}.py" for name in KERNELS]
    # Inductor itself calls a compiler on a CPU.
    options = ("-q", "-p", "no:cacheprovider", "-k", "not another_layout_compiles")
    session.run("python", "-m", "pytest", *options, *files, env=only)


@nox.session(python=PYTHONS[-1])
def train(session: nox.Session) -> None:
    """A run from its first update to timm's weights."""
    torch, vision = list(TORCH.items())[-1]
    wheel = f"{wheel_of(session)}[train]"
    session.install(f"torch=={torch}", f"torchvision=={vision}", wheel, "pytest")
    copied(session, "tests", "pyproject.toml")
    session.run("python", "-m", "pytest", "-q", "tests/train/test_tools.py")
