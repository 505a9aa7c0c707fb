"""Fixtures for every test."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Before torch is loaded: each process of pytest-xdist has a processor of its own. Programs that it
# starts are none of pytest-xdist.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch

# Libraries have made a million objects, which last as long as the tests. To look through them again
# and again for garbage takes up to a fifth of the time.
gc.set_threshold(10_000, 10, 10)


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if share := os.environ.get("GREENMIM_TEST_SHARE"):  # such as 1/3
        number, of = map(int, share.split("/"))
        items[:] = items[number - 1 :: of]
    # Files that take long are begun first, so that processes end together.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    # Listed in the summary (-ra), so that a run without a GPU says what it left out.
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def locked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Gives a folder that all processes of pytest-xdist share, to one of them at a time.

    Who has it must not ask for it again by the same name.
    """
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent

    @contextlib.contextmanager
    def lock(name: str) -> Iterator[Path]:
        with open(root / f"{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield root

    return lock


@pytest.fixture(scope="session")
def remembered(request: pytest.FixtureRequest, locked):
    """What was computed from the same files before, here or in an earlier run of the tests; else
    anew, by one process.

    For what a compiler makes of sources, which takes minutes to read.
    """

    def get(name: str, files: Iterable[str | Path], compute: Callable[[], Any], *more: str) -> Any:
        contents = hashlib.sha256(repr(more).encode())
        for file in files:
            contents.update(Path(file).read_bytes())
        key = f"greenmim/{name}/{contents.hexdigest()}"
        cache = getattr(request.config, "cache", None)
        with locked(f"remembered-{name}"):
            found = cache.get(key, None) if cache else None
            if found is None:
                found = compute()
                if cache:
                    cache.set(key, found)
        return found

    return get


@pytest.fixture(scope="session")
def made_once(locked):
    """A folder that one process of pytest-xdist fills for all; the others wait, then read it."""

    def get(name: str, fill: Callable[[Path], None]) -> Path:
        with locked(name) as root:
            folder, done = root / name, root / f"{name}.done"
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests must not choose their backend."""
    monkeypatch.delenv("GREENMIM_BACKEND", raising=False)


@pytest.fixture
def one_thread():
    """What is small gains nothing from a second thread, and waits for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN instead of whatever the memory held: nothing may be left unwritten."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
