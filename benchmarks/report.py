"""The README's table of measurements, made from the result files alone.

python -m benchmarks.report           # rewrite the table in README.md
python -m benchmarks.report --check   # exit 1 if it is not what the files say
"""

from __future__ import annotations

import argparse
import json
import sys

from .environment import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
HEADER = """\
Forward + backward of one attention layer of Swin-B (window 7, three quarters hidden) on {device},
{threads} threads ({cpu_capability}), {system}, torch {torch}, commit {commit:.9}. *Naive* is
grouped masked attention in eager PyTorch (gather, dense scores, dense bias, mask, softmax,
scatter). *Faster* compares each running by itself, *in turn* taking turns, where each finds the
caches full of the other's arrays. *Memory* is extra memory, the peak minus inputs, outputs and
gradients of the inputs, from PyTorch's record of tensor allocations, and in brackets from the
resident memory of the process.

| stage | tokens per image | naive | fused | faster | in turn | memory |
|---|---|---|---|---|---|---|
"""
TOKENS = {1: 768, 2: 192, 3: 48, 4: 12}


def cpu_table(result: dict) -> str:
    """Markdown of one cpu_attention.json."""
    environment = result["environment"]
    lines = [HEADER.format(**environment)]
    for row in result["rows"]:
        _, stage, window, batch, _, _, dtype = row["case"].split("-")
        number = int(stage.removeprefix("stage"))
        name = f"{number}{', shifted' if window.endswith('s') else ''} (batch {batch[1:]}, {dtype})"
        naive, fused = (row["peers"][peer]["total_ms"] for peer in ("naive", "fused"))
        lines.append(
            f"| {name} | {TOKENS[number]} | {naive:.1f} ms | {fused:.1f} ms |"
            f" {row['speedup']:.1f}x | {row['speedup_in_turn']:.1f}x |"
            f" {row['memory_share']:.1%} ({row['resident_share']:.1%}) |\n"
        )
    return "".join(lines)


def tables() -> str:
    """All tables, in the order of the devices' names."""
    files = sorted(RESULTS.glob("*/cpu_attention.json"))
    return "\n".join(cpu_table(json.loads(file.read_text())) for file in files)


def with_tables(readme: str) -> str:
    """The README's text with the tables between its marks."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(argv)
    text = README.read_text()
    wanted = with_tables(text)
    if options.check:
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
