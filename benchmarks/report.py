"""Tables and plots, made from the result files alone.

python -m benchmarks.report           # tables of README and docs, a page and plots per device
python -m benchmarks.report --check   # exit 1 if those tables are not what the files say
python -m benchmarks.report --compare old/operators.json new/operators.json
"""

from __future__ import annotations

import argparse
import json
import operator
import pathlib
import sys
from collections.abc import Callable

from . import predicted, tables
from .environment import MEASURED_CODE, RESULTS, ROOT, changed_since
from .peers import NAIVE
from .tables import measured_rows

# What each file's figures depend on.
STEP_CODE = (
    *MEASURED_CODE,
    *(f"benchmarks/{name}.py" for name in ("steps", "step_variants", "step_processes", "costs")),
    "benchmarks/measure.py",
    *(f"greenmim/{name}" for name in ("encoders", "mim.py", "planning.py")),
    "greenmim/training/passes.py",
    "greenmim_kernels/onednn.py",
    "benchmarks/naive_model.py",
    "benchmarks/simmim_model.py",
)
CODE = {
    "operators.json": MEASURED_CODE,
    "steps.json": STEP_CODE,
    "step_profile.json": STEP_CODE,
    "swap.json": (*MEASURED_CODE, "benchmarks/swap.py"),
    "loader.json": ("greenmim/data", "greenmim/planning.py", "greenmim/masking.py"),
}
SLOWER = 1.15  # a row this many times the old one's time is slower, if the spread allows it


def all_tables(results: pathlib.Path = RESULTS) -> str:
    """All tables of the page of benchmarks, in the order of the devices' names."""
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if (file := folder / "operators.json").exists():
            result = json.loads(file.read_text())
            for row in measured_rows(result, study="stages")[:1]:
                parts.append(
                    "One attention layer of Swin-B, forward + backward, three quarters hidden,"
                    f" batch {row['batch']}, {row['dtype']}. In brackets the share of the limit."
                    " *Capacity*: the partitions of a training step.\n\n"
                    f"{tables.where(result['environment'])}\n{tables.stages_table(result, 'both')}"
                )
        if (file := folder / "steps.json").exists():
            result = json.loads(file.read_text())
            parts.append(
                "Whole training steps: forward, backward and AdamW, images on the device. *To"
                " naive* compares with the naive path, whose masks are planned before the step."
                " *Graphed*: recorded as a CUDA graph, and compiled unless it says not. Floor: what"
                " the step's shapes take at measured rates"
                f" ([table](../benchmarks/step_costs.md)).\n\n"
                f"{tables.where(result['environment'])}\n{tables.steps_table(result)}"
            )
        if (folder / "report.md").exists():
            page = pathlib.Path("..") / (folder / "report.md").relative_to(ROOT)
            parts.append(f"More of this machine: [{folder.name}]({page}).\n")
    return "\n".join(parts)


def swap_tables(results: pathlib.Path = RESULTS) -> str:
    """The tables of other people's models, in the order of the devices' names."""
    found = [json.loads(file.read_text()) for file in sorted(results.glob("*/swap.json"))]
    parts = [f"{tables.where(x['environment'])}{tables.swap_table(x)}" for x in found]
    return (
        "Before: the faster of the library's attention settings, eager and SDPA, not compiled. A"
        " ratio is the median over rounds in which the two take turns. Training: forward,"
        " backward and AdamW.\n\n" + "\n".join(parts)
    )


def summary_table(results: pathlib.Path = RESULTS) -> str:
    """The few figures that the README begins with: a GPU's layer and step, a CPU's step."""
    lines = [
        "| Swin-B, three quarters hidden | naive | another | GreenMIM | to naive |\n",
        "|---|---:|---:|---:|---:|\n",
    ]
    notes = []
    for folder in sorted((path for path in results.iterdir() if path.is_dir()), reverse=True):
        if (file := folder / "operators.json").exists():
            found = _layer_line(json.loads(file.read_text()))
            lines += found
            notes += [ONE_ROW for line in found if MARK in line]
        if (file := folder / "steps.json").exists():
            result = json.loads(file.read_text())
            if found := _step_lines(result):
                lines += found
                notes += _sessions(result)
    return "".join([*lines, *(f"\n{note}\n" for note in dict.fromkeys(notes))])


MARK = "¹"
ONE_ROW = (
    f"{MARK} Most of the naive path's time is probably additions to one row of the bias table;"
    " without them the ratio is under a fifth of this: [why](docs/benchmarks.md#in-plain-words)."
)
# Rows of steps that the summary has: how they are run, like with like first.
WAYS = {"cuda": "", "cuda-graphed, not compiled": ", as a CUDA graph",
        "cuda-graphed": ", as a CUDA graph and compiled", "cpp": ""}  # fmt: skip
NAIVE_STEPS = ("naive", "naive, rows spread")


def _base_rows(result: dict) -> dict[str, dict]:
    """The timed steps of the summary's model by variant."""
    return {
        row["variant"]: row
        for row in result["rows"]
        if row["model"] == "base-224" and "images_per_second" in row
    }


def _sessions(result: dict) -> list[str]:
    """A line where the summary's steps are of several commits, and so of several sessions."""
    own, commits = result["environment"]["commit"], {}
    for name, row in _base_rows(result).items():
        if name in (*NAIVE_STEPS, *WAYS, "simmim"):
            commits[name] = (row.get("commit", own) or "unknown")[:9]
    if len(set(commits.values())) < 2:
        return []
    said = ", ".join(f"{name} {commit}" for name, commit in commits.items())
    device = result["environment"]["device"]
    return [f"{device}: the steps are of several commits, and ratios of several sessions: {said}."]


def _layer_line(result: dict) -> list[str]:
    rows = measured_rows(result, study="stages", stage=1, shifted=False, **{"pass": "both"})
    times = {row["peer"]: row["ms"] for row in rows if not row.get("capacity")}
    flex = [ms for name, ms in times.items() if name.startswith("flex")]
    if not flex or not {"greenmim-cuda", "naive"} <= set(times):  # which a GPU takes by itself
        return []
    ours, naive = times["greenmim-cuda"], min(times[name] for name in NAIVE if name in times)
    mark = "" if set(NAIVE) <= set(times) else MARK
    return [
        f"| {result['environment']['device']}: attention of stage 1, forward + backward{mark} |"
        f" {naive:.2f} ms | {min(flex):.2f} ms (FlexAttention) | **{ours:.2f} ms** |"
        f" {naive / ours:.0f}x |\n"
    ]


def _step_lines(result: dict) -> list[str]:
    rows = _base_rows(result)
    ours = [rows[name] for name in WAYS if name in rows]
    if not ours or "naive" not in rows or "simmim" not in rows:
        return []
    speed = operator.itemgetter("images_per_second")
    naive, dense = max((rows[n] for n in NAIVE_STEPS if n in rows), key=speed), rows["simmim"]
    best = max(ours, key=speed)
    head = f"| {result['environment']['device']}, {naive['precision']}, batch {naive['batch']}: "
    lines = []
    for name, how in WAYS.items():
        if (row := rows.get(name)) is None:
            continue
        speeds = [
            f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}"
            for speed in (one["images_per_second"] for one in (naive, dense, row))
        ]
        ratio = row["images_per_second"] / naive["images_per_second"]
        if (turns := row.get("to_naive")) and naive is rows["naive"]:  # took turns
            ratio = turns["median"]
        lines.append(
            f"{head}training step{how}, images/s | {speeds[0]} | {speeds[1]} (SimMIM) |"
            f" **{speeds[2]}** | {ratio:.3g}x |\n"
        )
    joules = [row.get("joules_per_image") for row in (naive, dense, best)]
    if all(joules):
        lines.append(
            f"{head}energy of an image{WAYS[best['variant']]} | {joules[0]:.3f} J |"
            f" {joules[1]:.3f} J (SimMIM) |"
            f" **{joules[2]:.3f} J** | {joules[0] / joules[2]:.2g}x less |\n"
        )
    return lines


def findings_tables(results: pathlib.Path = RESULTS) -> str:
    """The small runs of all devices."""
    parts = []
    for file in sorted(results.glob("*/findings.json")):
        result = json.loads(file.read_text())
        parts.append(f"{tables.where(result['environment'])}\n{tables.findings_table(result)}")
    return "\n".join(parts)


def finetuned_tables(results: pathlib.Path = RESULTS) -> str:
    """What of them was fine-tuned."""
    parts = []
    for file in sorted(results.glob("*/findings.json")):
        result = json.loads(file.read_text())
        if "finetuned" in result:
            where = tables.where(result["finetuned_environment"])
            parts.append(f"{where}\n{tables.finetuned_table(result)}")
    return "\n".join(parts)


# Between which marks of which page stands what.
GENERATED: dict[pathlib.Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"summary": summary_table},
    ROOT / "docs" / "benchmarks.md": {"measured": all_tables},
    ROOT / "docs" / "kernels.md": {"swap": swap_tables},
    ROOT / "docs" / "findings.md": {
        "findings": findings_tables,
        "finetuned": finetuned_tables,
    },
}


def with_tables(text: str, tables_of: dict[str, Callable[[], str]]) -> str:
    """A page's text with the tables between its marks."""
    for name, made in tables_of.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{made()}{end}{rest.split(end)[1]}"
    return text


def page(folder: pathlib.Path) -> str:
    """The page of a device."""
    found = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    parts = [f"# Measured: {folder.name}\n\nWritten by `python -m benchmarks.report`; how to read"
             " it: [benchmarks](../../README.md).\n"]  # fmt: skip
    if result := found.get("operators.json"):
        rates = result["rates"]
        products = ", ".join(
            f"{rate / 1e12:.2f} TFLOP/s {dtype}"
            for dtype, rate in rates["matrix_flops_per_second"].items()
        )
        parts.append(
            f"## Operators\n\n{tables.where(result['environment'])}\nLimits measured in the run:"
            f" copy {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, products {products}. In"
            " brackets the share of the limit that is reached.\n\nAttention layers of Swin-B:"
            " forward + backward, then each.\n\n"
            + "\n".join(tables.stages_table(result, p) for p in ("both", "forward", "backward"))
            + "\n![speed](speedup.png)\n![memory](memory.png)\n![roofline](roofline.png)\n"
        )
        if table := predicted.beside_table(result):
            parts.append(
                "### Measured beside predicted\n\nPredicted from shapes, static figures and what a"
                " scheduler issues, at this run's rate of a copy ([how](../../predicted.md)).\n\n"
                f"{table}"
            )
        studies = {row["study"] for row in result["rows"]}
        for study, title in (("operators", "Other operators"), ("shapes", "Other shapes")):
            if study in studies:
                parts.append(f"### {title}\n\n{tables.problems_table(result, study)}")
        if studies & {"tokens", "batch", "image"}:
            table = tables.growth_table(result)
            parts.append(f"### Growth\n\n{table}\n![growth](growth.png)\n")
        parts.append(f"### Not timed\n\n{tables.reasons_table(result)}")
        if said := tables.measured_at(result, result["rows"], lambda row: row["study"]):
            parts.append(f"### Of other commits\n{said}")
    if result := found.get("steps.json"):
        parts.append(
            f"## Training steps\n\n{tables.where(result['environment'])}\n"
            f"{tables.steps_table(result)}\n{tables.reasons_table(result)}"
        )
    if result := found.get("step_profile.json"):
        parts.append(
            f"### Where a step's time goes\n\n{tables.where(result['environment'])}\n"
            f"{result['problem']}, batch {result['batch']}, {result['precision']}, in PyTorch's"
            f" profiler, which takes some time itself.\n\n{tables.profile_table(result)}"
        )
    if result := found.get("step_kernels.json"):
        parts.append(
            f"### Where a step's time goes\n\n{tables.where(result['environment'])}\n"
            f"{tables.kernels_table(result)}"
        )
    if result := found.get("swap.json"):
        parts.append(
            "## Other people's models before and after\n\n"
            f"{tables.where(result['environment'])}\n{tables.swap_table(result)}"
        )
    if result := found.get("loader.json"):
        parts.append(
            f"## Loader\n\n{tables.where(result['environment'])}\n{tables.loader_table(result)}"
        )
    if stale := [line for name, content in found.items() if (line := staleness(name, content))]:
        parts.append("## Older than the code\n\n" + "".join(f"- {line}\n" for line in stale))
    return "\n".join(parts)


def staleness(name: str, content: dict) -> str | None:
    """A line where the code that a file measures has changed since."""
    commit = content["environment"]["commit"]
    if name not in CODE or changed_since(commit, CODE[name]) is not True:
        return None
    return f"{name} was measured at {commit[:9]}; what it measures has changed since."


def compare(old: dict, new: dict) -> list[str]:
    """Rows of `new` that are slower than in `old`, or that are not timed any more."""
    steps = any("variant" in row for row in (*old["rows"], *new["rows"]))
    names = ("model", "variant") if steps else ("operator", "case", "peer", "pass")
    before = {tuple(row[n] for n in names): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        label = " ".join(row[n] for n in names)
        then, now = _times(before.get(tuple(row[n] for n in names), {})), _times(row)
        if then and not now:
            found.append(f"{label}: {row['reason']}")
        elif then and now[0] > SLOWER * then[0] and now[1] > then[2]:
            found.append(f"{label}: {now[0] / then[0]:.2f} times the time")
    return found


def _times(row: dict) -> tuple[float, ...]:
    """Median, 20th and 80th percentile of a row's time, of steps that of an image; () if none."""
    if "images_per_second" in row:
        return tuple(1 / row[name] for name in ("images_per_second", "p80", "p20"))
    return tuple(row[name] for name in ("ms", "p20_ms", "p80_ms")) if "ms" in row else ()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--compare", nargs=2, type=pathlib.Path, metavar=("OLD", "NEW"))
    options = parser.parse_args(argv)
    if options.compare:
        found = compare(*(json.loads(file.read_text()) for file in options.compare))
        print("\n".join(found) or "nothing is slower")
        return int(bool(found))
    if options.check:
        pages = {file: file.read_text() for file in GENERATED}
        return int(any(text != with_tables(text, GENERATED[file]) for file, text in pages.items()))
    from .plots import draw, draw_findings

    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        (folder / "report.md").write_text(page(folder))
        if (file := folder / "operators.json").exists():
            draw(json.loads(file.read_text()), folder)
        if (file := folder / "findings.json").exists():
            draw_findings(json.loads(file.read_text()), folder)
        for file in sorted(folder.glob("*.json")):
            if line := staleness(file.name, json.loads(file.read_text())):
                print(line)
    for file, tables_of in GENERATED.items():
        file.write_text(with_tables(file.read_text(), tables_of))
    return 0


if __name__ == "__main__":
    sys.exit(main())
