"""Damaged and hostile files are read or refused in a sentence, and run nothing."""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from greenmim.checkpoint import load_checkpoint
from greenmim.tools.export import timm_line

ROOT = pathlib.Path(__file__).resolve().parents[2]


def fuzz(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_sample_of_damaged_files(tmp_path):
    """`python -m tests.fuzz --files 10000` reads more of them."""
    done = fuzz("--files", 200, "--first", 6600, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    words = [outcome["word"] for outcome in found]
    assert len(words) == 200 and set(words) == {"read", "refused"}
    assert words.count("read") > 20


# What a reader that trusts its file would do, and what is then said of it.
PLANTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (lambda path: pickle.loads(path.read_bytes()), "ran code"),
    "raises": (lambda path: {}["key"], "raised"),
    "is long": (lambda path: _forever(), "hangs"),
    "memory": (lambda path: bytearray(2**29).count(1), "memory"),
    "crash": (lambda path: (faulthandler.disable(), os.kill(os.getpid(), 11)), "crashed"),
    "leaves": (lambda path: os._exit(0), "ended"),
}


def _forever() -> None:
    while True:
        pass


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(plant, tmp_path, monkeypatch):
    read, word = PLANTS[plant]
    from tests.fuzz import __main__ as harness
    from tests.fuzz import mutations

    if word == "hangs":
        monkeypatch.setattr(harness, "MOST_SECONDS", 1)

    def make(folder: Path) -> None:
        (folder / "file.pth").write_bytes(b"")

    def broken(path: Path, marker: Path) -> tuple:
        return (lambda data, rng: pickle.dumps(mutations.Evil(os.system, f"touch {marker}")),)

    monkeypatch.setattr(harness, "mutations", broken)
    kind = harness.Kind(make, lambda folder: read(folder / "file.pth"), "file.pth")
    found = list(harness.Fuzz(0, tmp_path, {"planted": kind}).run([0]))
    assert [outcome.word for outcome in found] == [word], found


def test_memory_is_seen_where_a_process_keeps_what_it_freed(tmp_path):
    """As in a process that measured something before: the allocation would cost nothing new."""
    code = """
import sys, pathlib
from greenmim_kernels.host_memory import keep_freed_memory
keep_freed_memory()
kept = [bytearray(2**20) for _ in range(700)]
for one in kept: one[::4096] = bytes(256)
del kept, one
from tests.fuzz.__main__ import Fuzz, Kind
make = lambda folder: (folder / "file.pth").write_bytes(b"")
kind = Kind(make, lambda folder: bytearray(2**29).count(1), "file.pth")
print([o.word for o in Fuzz(0, pathlib.Path(sys.argv[1]), {"planted": kind}).run([0])])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["['memory']"], done.stdout + done.stderr


def test_cases_are_the_same_for_a_seed(tmp_path):
    from tests.fuzz.__main__ import Fuzz
    from tests.fuzz.kinds import KINDS

    names = ("classes", "tar", "features")
    kinds = {name: KINDS[name] for name in names}
    contents = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        cases = Fuzz(3, folder, kinds)
        for number in range(len(cases.order)):
            _, case = cases.prepare(number)
            contents.append({p.name: p.read_bytes() for p in case.rglob("*") if p.is_file()})
    half = len(contents) // 2
    same = [a == b for a, b in zip(contents[:half], contents[half:], strict=True)]
    assert same.count(False) == 0


# ---- what the fuzz found ------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [(2**40,), (3, 2**34)])
def test_a_tensor_that_claims_more_than_its_file_holds(claimed, tmp_path):
    torch.save({"model": {"a.weight": torch.zeros(1).expand(claimed)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="a.weight claims .* bytes, and the file has"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_compressed_checkpoint_is_refused_before_it_swells(tmp_path):
    from tests.fuzz.mutations import zip_bomb

    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "x.pth")
    bomb = zip_bomb((tmp_path / "x.pth").read_bytes(), random.Random(0))
    (tmp_path / "bomb.pth").write_bytes(bomb)
    with pytest.raises(ValueError, match="it is a compressed zip"):
        load_checkpoint(tmp_path / "bomb.pth")


def test_a_block_with_a_huge_number_asks_for_no_network_of_as_many():
    from greenmim.config import ModelConfig

    with pytest.raises(ValueError, match="depths must be at most 1000"):
        ModelConfig(depths=(2, 2, 10**9, 2))


def test_sizes_are_believed_as_far_as_there_are_weights_for_them(tmp_path):
    sizes = {"embed_dim": 2048, "decoder_dim": 65536, "decoder_depth": 1000}
    content = {
        "format": "greenmim.pretrain", "step": 1, "epoch": 1.0, "steps_per_epoch": 1,
        "model": {"a": torch.zeros(3)}, "recipe": {"model": sizes},
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="its sizes need [0-9]+ weights, it has 3"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_tensor_that_claims_more_than_its_file_is_found_at_any_depth(tmp_path):
    inside = {"model": {"state": [{"a": torch.zeros(1).expand(10**6, 10**6)}]}}
    torch.save(inside, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="its a claims 4000000000000 bytes"):
        load_checkpoint(tmp_path / "x.pth")


def test_facts_nested_deeply_are_damaged_ones():
    """Found by 10,000 files; 3 of them."""
    with pytest.raises(ValueError, match="what it says of its timm is damaged"):
        timm_line({"timm": "[" * 100_000}, "file.safetensors")
