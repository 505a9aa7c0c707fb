"""What is published: the sdist, and the wheel that is built from it.

GREENMIM_DIST names a folder with the two, as `make dist` does; otherwise they are built here,
without CUDA.
"""

from __future__ import annotations

import email
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

pytest.importorskip("auditwheel")
pytest.importorskip("build")
pytest.importorskip("twine")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info < (3, 11),
    reason="wheels are made on Linux, and torch-abi-audit needs Python 3.11",
)
ROOT = pathlib.Path(__file__).resolve().parent.parent
PLATFORM = f"manylinux_2_28_{platform.machine()}"
# Bytes at most: of the sdist, of a wheel without CUDA, and of one with it (PyPI's limit is 100 MB).
SDIST, WHEEL, CUDA_WHEEL = 2_000_000, 2_000_000, 60_000_000


def run(*command: str | pathlib.Path, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(map(str, command), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def dist(made_once) -> pathlib.Path:
    if folder := os.environ.get("GREENMIM_DIST"):
        return pathlib.Path(folder)

    def make(folder: pathlib.Path) -> None:
        arguments = ("VENV=", f"PYTHON={sys.executable}", f"DIST={folder / 'dist'}")
        run("make", "dist-files", *arguments, cwd=ROOT, env={**os.environ, "USE_CUDA": "0"})

    return made_once("dist", make) / "dist"


@pytest.fixture(scope="module")
def wheel(dist: pathlib.Path) -> pathlib.Path:
    (file,) = dist.glob(f"*_{platform.machine()}.whl")
    return file


@pytest.fixture(scope="module")
def sdist(dist: pathlib.Path) -> pathlib.Path:
    (file,) = dist.glob("*.tar.gz")
    return file


def modules_of(wheel: pathlib.Path) -> set[str]:
    """Names of what is compiled in a wheel."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name.split("/")[1].partition(".")[0] for name in names if name.endswith(".so")}


def test_the_wheel_is_for_every_python_and_every_linux_since_2018(wheel, sdist, tmp_path):
    assert wheel.name == f"greenmim-{version()}-cp310-abi3-{PLATFORM}.whl"
    assert sdist.name == f"greenmim-{version()}.tar.gz"
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    # The versions of glibc and libstdc++ that it asks for, read anew; it has no copy of a library.
    said = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).stdout.split())
    allowed = re.search(r'constrains the platform tag to "manylinux_2_(\d+)_', said)
    assert allowed and int(allowed[1]) <= 28, said


def version() -> str:
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_what_is_in_the_wheel(wheel):
    archive = zipfile.ZipFile(wheel)
    names = {name for name in archive.namelist() if not name.endswith("/")}
    modules = modules_of(wheel)
    assert modules - {"_C_cuda"} == {"_C", "_C_partition"}
    assert wheel.stat().st_size < (CUDA_WHEEL if "_C_cuda" in modules else WHEEL)
    tracked = run("git", "ls-files", "greenmim", "greenmim_kernels", cwd=ROOT).stdout.split()
    compiled = {name for name in names if name.endswith(".so")}
    information = {name for name in names if ".dist-info/" in name}
    assert names - compiled - information == set(tracked)
    (metadata,) = (name for name in information if name.endswith("/METADATA"))
    found = email.message_from_bytes(archive.read(metadata))
    needed = [text for text in found.get_all("Requires-Dist") if "extra ==" not in text]
    assert sorted(needed) == ["numpy", "torch>=2.11"]  # what the kernels need
    assert "train" in found.get_all("Provides-Extra")
    assert any(name.endswith("/licenses/LICENSE") for name in information)


def test_what_is_in_the_sdist(sdist):
    assert sdist.stat().st_size < SDIST
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", "csrc", "greenmim", "greenmim_kernels", "setup.py", cwd=ROOT)
    assert set(tracked.stdout.split()) <= names
    assert not [name for name in names if re.search(r"\.so$|\.pyc$|^tests/|^benchmarks/", name)]


def test_the_modules_use_the_stable_abi_of_torch_2_11_and_nothing_of_python(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for file in sorted((tmp_path / "greenmim_kernels").glob("*.so")):
        symbols = run("nm", "-D", "--undefined-only", file).stdout
        assert " Py" not in symbols and " _Py" not in symbols, file.name
        # What is not hidden may be shared with another build in the process.
        shown = run("nm", "-D", "--defined-only", "--demangle", file).stdout
        assert "greenmim_" in shown and "greenmim::" not in shown, file.name
        if file.name.startswith("_C_partition"):
            assert "torch" not in symbols
            continue
        command = (sys.executable, "-m", "torch_abi_audit.cli", file, "--json")
        (found,) = json.loads(run(*command).stdout)["bundled_libs"]
        assert found["torch"]["stable"] and found["torch"]["min_torch_version"] == "2.11.0", found
