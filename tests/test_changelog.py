"""CHANGELOG.md keeps its form and knows every public name; what else changed, reviewers see."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
GROUPS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def problems(text: str, version: str, names: list[str]) -> list[str]:
    """What is wrong with a changelog of a package of this version with these public names."""
    found = []
    title, *sections = re.split(r"^## ", text, flags=re.M)
    heads = [section.partition("\n")[0] for section in sections]
    if not title.startswith("# Changelog\n") or heads[:1] != ["[Unreleased]"]:
        found.append("it begins with # Changelog and ## [Unreleased]")
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", h) for h in heads[1:]]
    numbers = [tuple(map(int, match.groups())) for match in released if match]
    if None in released or numbers != sorted(set(numbers), reverse=True):
        found.append("versions are ## [1.2.3] - 2026-01-31, the newest first")
    if not numbers or tuple(map(int, version.split("."))) < numbers[0]:
        found.append(f"the package is {version}, older than the newest version here")
    for head, section in zip(heads, sections, strict=True):
        groups = re.findall(r"^### (.*)", section, re.M)
        if len(groups) != len(set(groups)) or not set(groups) <= GROUPS:
            found.append(f"{head} has the groups {', '.join(groups)}: each of Added, ... once")
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", text))))
    return found + [f"it says nothing of {name}" for name in names if name not in told]


def test_the_changelog_is_complete():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    modules = ("greenmim", "greenmim_kernels", "greenmim_kernels.integrations")
    names = [name for module in modules for name in importlib.import_module(module).__all__]
    assert problems(CHANGELOG, version, names) == []


def test_what_is_wrong_is_found():
    good = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- `a`\n\n## [0.1.0] - 2026-01-31\n"
    assert problems(good, "0.1.0", ["a"]) == problems(good, "0.2.0", ["a"]) == []
    for text, version, names in (
        (good.replace("[Unreleased]", "[0.2.0] - 2026-02-01"), "0.2.0", ["a"]),
        (good.replace("2026-01-31", "31 January"), "0.1.0", ["a"]),
        (good + "\n## [0.2.0] - 2026-02-01\n", "0.2.0", ["a"]),
        (good, "0.0.9", ["a"]),
        (good.replace("Added", "New"), "0.1.0", ["a"]),
        (good.replace("- `a`\n", "- `a`\n\n### Added\n"), "0.1.0", ["a"]),
        (good, "0.1.0", ["a", "b"]),
    ):
        assert len(problems(text, version, names)) >= 1, text
