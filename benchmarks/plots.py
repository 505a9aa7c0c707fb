"""Result files as plots: PNG for pages, SVG for print."""

from __future__ import annotations

import pathlib

import numpy as np

from .tables import STUDIES, growth, measured_rows, stage_name

NAMES = {
    "greenmim-cpp": "GreenMIM (C++)", "greenmim-cuda": "GreenMIM (CUDA)",
    "greenmim-triton": "GreenMIM (Triton)", "three-operators": "GreenMIM, not fused",
    "naive": "naive (eager)", "naive-spread": "naive (spread)",
    "naive-compiled": "naive (compiled)",
    "padded-sdpa": "padded windows, SDPA", "flex": "FlexAttention",
    "varlen": "varlen, no bias", "xformers": "xFormers, no bias",
}  # fmt: skip
# Colours that people with any colour vision tell apart (Okabe and Ito).
COLOURS = {
    "greenmim-cpp": "#009E73", "greenmim-cuda": "#009E73", "greenmim-triton": "#56B4E9",
    "three-operators": "#8FD3BF", "naive": "#E69F00", "naive-spread": "#F0E442",
    "naive-compiled": "#D55E00",
    "padded-sdpa": "#CC79A7", "flex": "#0072B2", "varlen": "#999999", "xformers": "#555555",
}  # fmt: skip
FINDINGS_COLOURS = ("#999999", "#009E73", "#D55E00", "#0072B2", "#CC79A7")


def draw(result: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw everything that an operators.json holds; the files written."""
    _settle()
    figures = {"speedup": speedup, "memory": memory, "roofline": roofline, "growth": growing}
    made = {name: make(result) for name, make in figures.items()}
    return [file for name, figure in made.items() if figure for file in _save(figure, folder, name)]


def draw_findings(result: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw what a findings.json holds: top-1 by the number of labels; the files written."""
    from matplotlib.figure import Figure

    _settle()
    rows, tuned = result["rows"], result.get("finetuned", [])
    numbers = list(rows[0]["top1"])
    contents = [
        (title, numbers, [(row["arm"], number, row["top1"][number][kind]) for row in rows
                          for number in numbers])
        for kind, title in (("knn", "kNN"), ("probe", "linear probe"))
    ]  # fmt: skip
    if tuned:
        points = [(row["arm"], row["labels"], row["top1"]) for row in tuned]
        contents.append(("fine-tuned", list(dict.fromkeys(row["labels"] for row in tuned)), points))
    figure = Figure(figsize=(4 * len(contents), 3.4))
    panels = figure.subplots(1, len(contents), sharey=True)
    colours = dict(zip(dict.fromkeys(row["arm"] for row in rows), FINDINGS_COLOURS, strict=False))
    for axes, (title, numbers, points) in zip(panels, contents, strict=True):
        found = {
            arm: [[100 * top1 for name, labels, top1 in points if (name, labels) == (arm, number)]
                  for number in numbers]
            for arm in dict.fromkeys(name for name, *_ in points)
        }  # fmt: skip
        whole = {arm: columns for arm, columns in found.items() if all(columns)}
        for shift, (arm, columns) in enumerate(whole.items()):
            base, changed, _ = arm.partition(", ")
            means = [np.mean(values) for values in columns]
            spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in columns]
            places = np.arange(len(numbers)) + 0.04 * (shift - len(whole) / 2)
            axes.errorbar(
                places, means, spread, label=arm, color=colours.get(base, "black"), marker="o",
                capsize=3, linestyle="--" if changed else "-",
            )  # fmt: skip
        axes.set_xticks(range(len(numbers)), numbers)
        axes.set(title=title, xlabel="labelled drawings of each kind")
        axes.grid(axis="y", alpha=0.3)
        axes.margins(x=0.1)
        if axes is panels[0] or title == "fine-tuned":
            axes.legend(frameon=False, fontsize=9, loc="lower right")
    panels[0].set_ylabel("top-1, %")
    return _save(figure, folder, "findings")


def _settle() -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.size": 10,
            "svg.hashsalt": "greenmim",  # the same file for the same figures
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
        }
    )


def _save(figure, folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    written = []
    for suffix, options in (("png", {"dpi": 130}), ("svg", {"metadata": {"Date": None}})):
        written.append(folder / f"{name}.{suffix}")
        figure.savefig(written[-1], **options)
    return written


def _bars(result: dict, value, baseline: bool):
    """Grouped bars over the stages of a row's `value(row, row of the naive path)`."""
    from matplotlib.figure import Figure

    rows = measured_rows(result, study="stages", **{"pass": "both"})
    stages = list(dict.fromkeys(map(stage_name, rows)))
    naive = {stage_name(row): row for row in rows if row["peer"] == "naive"}
    peers = [
        peer
        for peer in dict.fromkeys(row["peer"] for row in rows)
        if peer in COLOURS and (baseline or peer != "naive")
    ]
    if not stages or not naive:
        return None
    figure = Figure(figsize=(8.5, 3.6))
    axes = figure.subplots()
    width = 0.84 / len(peers)
    for number, peer in enumerate(peers):
        for place, stage in enumerate(stages):
            found = [r for r in rows if r["peer"] == peer and stage_name(r) == stage]
            if not found or stage not in naive:
                continue
            height = value(found[0], naive[stage])
            x = place + (number - (len(peers) - 1) / 2) * width
            axes.bar(x, height, 0.92 * width, color=COLOURS[peer],
                     label=NAMES[peer] if place == 0 else None)  # fmt: skip
            text = f"{height:.1f}" if height >= 0.95 else f"{height:.2f}"
            axes.text(x, height, text, ha="center", va="bottom", fontsize=7)
    labels = [f"stage {stage}".replace(", ", "\n") for stage in stages]
    axes.set_xticks(range(len(stages)), labels, fontsize=8)
    axes.margins(y=0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center",
                  ncols=min(4, len(peers)), frameon=False, fontsize=8)  # fmt: skip
    return figure, axes


def speedup(result: dict):
    """How many times the naive path each peer is, by stage."""
    drawn = _bars(result, lambda row, naive: naive["ms"] / row["ms"], baseline=False)
    if drawn is None:
        return None
    figure, axes = drawn
    axes.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_ylabel("times the naive path's speed")
    axes.set_title(_title(result, "one attention layer of Swin-B, forward + backward"), fontsize=10)
    return figure


def memory(result: dict):
    """Extra memory beside the naive path's, by stage."""
    rows = measured_rows(result, study="stages", **{"pass": "both"})
    if not all("extra_bytes" in row for row in rows):
        return None

    def share(row: dict, naive: dict) -> float:
        return 100 * max(row["extra_bytes"], 0) / naive["extra_bytes"]

    drawn = _bars(result, share, baseline=False)
    if drawn is None:
        return None
    figure, axes = drawn
    axes.set_ylabel("extra memory, % of the naive path's")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axes.minorticks_off()
    axes.axhline(100, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_title(_title(result, "memory beyond inputs, outputs and gradients"), fontsize=10)
    return figure


def roofline(result: dict):
    """Operations per second against operations per byte, and the measured limits."""
    import numpy as np
    from matplotlib.figure import Figure

    rows = [row for row in measured_rows(result, study="stages") if row["flops"]]
    rows = [row for row in rows if row["peer"] in COLOURS and row["pass"] != "both"]
    if not rows:
        return None
    dtype = rows[0]["dtype"]
    copy = result["rates"]["copy_bytes_per_second"]
    matrix = result["rates"]["matrix_flops_per_second"][dtype]
    figure = Figure(figsize=(8.5, 4.2))
    axes = figure.subplots()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    span = np.geomspace(min(intensity) / 2, 2 * max(*intensity, matrix / copy), 100)
    axes.plot(span, np.minimum(span * copy, matrix) / 1e9, color="#444444", linewidth=1)
    axes.text(
        span[-1], matrix / 1e9, "measured matrix product", ha="right", va="bottom", fontsize=8
    )
    low = span[0] * 1.6
    axes.text(low, 1.15 * low * copy / 1e9, "measured copy", fontsize=8, ha="right", va="bottom")
    for peer in dict.fromkeys(row["peer"] for row in rows):
        for which, marker in (("forward", "o"), ("backward", "s")):
            own = [row for row in rows if row["peer"] == peer and row["pass"] == which]
            axes.plot(
                [row["flops"] / row["bytes"] for row in own],
                [row["flops"] / row["ms"] / 1e6 for row in own],
                marker, color=COLOURS[peer], markersize=5, alpha=0.85,
                label=NAMES[peer] if which == "forward" else None,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must be moved",
             ylabel="GFLOP/s that count")  # fmt: skip
    _plain(axes.xaxis)
    _plain(axes.yaxis, (1,))
    axes.set_title(_title(result, "circles forward, squares backward"), fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False, fontsize=8)  # fmt: skip
    return figure


def growing(result: dict):
    """Time against size, with fitted exponents."""
    from matplotlib.figure import Figure

    studies = {study: growth(result, study) for study in STUDIES}
    studies = {study: found for study, found in studies.items() if found}
    if not studies:
        return None
    figure = Figure(figsize=(3.4 * len(studies), 3.4))
    for axes, (study, found) in zip(figure.subplots(1, len(studies), squeeze=False)[0],
                                    studies.items(), strict=True):  # fmt: skip
        for peer, (sizes, times, exponent) in found.items():
            axes.plot(sizes, times, "o-", color=COLOURS[peer], markersize=4, linewidth=1.2,
                      label=f"{NAMES[peer]}: {exponent:.2f}")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=STUDIES[study])
        ticks = next(iter(found.values()))[0]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        _plain(axes.yaxis)
        axes.legend(frameon=False, fontsize=8, title="exponent", title_fontsize=8)
    figure.axes[0].set_ylabel("ms, forward + backward")
    return figure


def _plain(axis, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """Numbers as people write them on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _title(result: dict, what: str) -> str:
    environment = result["environment"]
    row = next(row for row in result["rows"] if row["study"] == "stages")
    device = environment["device"]
    if not environment.get("driver"):
        device += f", {environment['threads']} threads"
    return f"{device}, batch {row['batch']}, {row['dtype']}: {what}"
