"""README and docs: programs run, commands run or say what they need, links lead somewhere.

A block of commands is marked after `sh` with what it needs beyond an installed greenmim: "install",
"make", "gpu" or "cluster". Of those the options are read, and nothing runs.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from tests.train.crew import Crew

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
MARKS = ("", "install", "make", "gpu", "cluster")
FIRST_RUN = (
    "greenmim pretrain --config greenmim_swin-demo-cpu --data.root photos --work-dir runs/first"
    " --max-steps 2"
)
# Pages that go on with what another one leaves, and with labelled images.
CONTINUED = ("evaluation.md", "finetuning.md")
# So that a run takes seconds.
SHORT = ("--epochs", "1", "--schedule.warmup-epochs", "0", "--data.repeats", "1")


def blocks(page: pathlib.Path, language: str) -> list[tuple[str, str]]:
    """(mark, text) of the page's blocks of a language."""
    return re.findall(rf"^```{language}\b *([^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The words of each command."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def all_commands(*marks: str) -> list[list[str]]:
    found = [pair for page in PAGES for pair in blocks(page, "sh") if pair[0] in marks]
    return [words for _, text in found for words in commands(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_runs_or_says_what_it_needs(page):
    assert {mark for mark, _ in blocks(page, "sh")} <= set(MARKS)
    # No other kind of block holds commands.
    assert set(re.findall(r"^```(\w+)", page.read_text(), re.M)) <= {"sh", "python"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(12):
        picture = Image.effect_noise((240, 240), 20 + number).convert("RGB")
        picture.save(tmp_path / "photos" / f"{number}.jpg")
    todo = [words for mark, text in blocks(page, "sh") if mark == "" for words in commands(text)]
    if page.name in CONTINUED:
        for number in range(40):
            folder = tmp_path / "labelled" / ("val" if number > 25 else "train") / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), ("red", "blue")[number % 2]).save(folder / f"{number}.png")
        todo.insert(0, commands(FIRST_RUN)[0])
    for words in todo:
        assert words[0] == "greenmim", words
        short = SHORT if words[1] == "pretrain" else ()
        folder = {"FOLDER": str(tmp_path)}
        with Crew([*words[1:], *short], 1, tmp_path, enter_folder, folder) as crew:
            assert crew.wait() == [0], f"{shlex.join(words)}\n{crew.text()}"
    if page.name in CONTINUED:
        Image.new("RGB", (90, 70), "red").save(tmp_path / "picture.jpg")
        run_programs(page, tmp_path)


def enter_folder(rank: int) -> None:
    os.chdir(os.environ["FOLDER"])


def run_programs(page, folder):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    for _, text in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", text],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stderr[-1500:]}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if page.name not in CONTINUED], ids=lambda page: page.name
)
def test_programs_run(page):
    run_programs(page, ROOT)


def test_options_of_other_commands_are_known():
    """Of runs on GPUs and clusters."""
    from greenmim.cli import RUNS, _config_first, _underscores, build_parser

    seen = []
    for words in all_commands("gpu", "cluster"):
        for command in RUNS.keys() & set(words):
            parser, *_ = build_parser(command)
            own = [_underscores(word) for word in words[words.index(command) :]]
            parser.parse_args(_config_first(own))
            seen.append(command)
    assert len(seen) >= 7 and set(seen) == set(RUNS)


def test_targets_of_make_are_there():
    targets = {words[1] for words in all_commands("make", "gpu") if words[0] == "make"}
    targets |= {"lint", "docs"}
    assert targets >= {"demo", "test", "bench", "gpu-check", "gpu-check-more"}
    for target in targets:
        done = subprocess.run(["make", "-n", target, "VENV="], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_every_extra_stands_in_the_table():
    page = (ROOT / "docs" / "install.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    for extra in re.findall(r"^(\w+) = ", section, re.M):
        assert f"| `{extra}` |" in page, extra


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, (target, anchor)


def test_files_that_contributors_are_led_to_are_there():
    folders = [ROOT, *(ROOT / name for name in ("greenmim", "greenmim_kernels", "benchmarks"))]
    folders += [folder for top in (*folders[1:], ROOT / "tests") for folder in top.glob("*/")]
    names = re.findall(r"[\w/]+\.(?:py|cu|yaml|md)\b|\b[\w/]+/(?=[` ,])", CONTRIBUTING.read_text())
    missing = [name for name in names if not any((folder / name).exists() for folder in folders)]
    assert len(names) > 40 and {name for name in missing if "NAME" not in name} == set()


def test_the_readme_is_read_to_the_end():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in index, page
