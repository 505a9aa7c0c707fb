"""What the README says: its example runs, its figures stand in result files, its files exist."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 10
    names: dict = {}
    exec(example, names)
    assert names["out"].shape == (8, names["part"].num_tokens, 128)
    assert names["qkv"].grad.isfinite().all() and names["table"].grad.isfinite().all()


def test_the_swap_runs():
    """What people paste into their code, and what the README says that it prints."""
    (example,) = re.findall(r"```python\n(import timm\n.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    (said,) = re.findall(r"print\(.*# (.*)", example)
    assert done.stdout.startswith(said.rstrip(" .")), done.stdout


def test_every_figure_stands_in_a_result_file():
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0, "run python -m benchmarks.report"
    for file in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        environment = json.loads(file.read_text())["environment"]
        assert environment["device"] and environment["commit"] and not environment["dirty"], file
    # Outside the generated tables README and docs claim no speed.
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        outside = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
        assert not re.findall(r"\d+(?:\.\d+)?(?:x\b| ?ms\b| img/s)", outside), page
