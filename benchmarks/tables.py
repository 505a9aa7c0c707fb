"""Result files as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np

STUDIES = {"tokens": "visible tokens", "batch": "images", "image": "tokens of the grid"}


def measured_rows(result: dict, **wanted) -> list[dict]:
    """The timed rows that have these values; the best of FlexAttention's blocks is "flex"."""
    rows = [
        row
        for row in result["rows"]
        if "ms" in row and all(row[name] == value for name, value in wanted.items())
    ]
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (row["study"], row["case"], row["pass"])
        if row["peer"].startswith("flex-"):
            best[key] = min(best.get(key, row), row, key=lambda r: r["ms"])
    return rows + [{**row, "peer": "flex"} for row in best.values()]


def stage_name(row: dict) -> str:
    """As tables and plots call a row of the study of stages."""
    kinds = [name for name in ("shifted", "capacity") if row.get(name)]
    return ", ".join([str(row["stage"]), *kinds])


def stages_table(result: dict, which: str = "both") -> str:
    """Milliseconds of every peer at every stage, ours with the fraction of the limit reached."""
    rows = measured_rows(result, study="stages", **{"pass": which})
    stages = list(dict.fromkeys(map(stage_name, rows)))
    # Not the best of FlexAttention's rows a second time.
    peers = [peer for peer in dict.fromkeys(row["peer"] for row in rows) if peer != "flex"]
    lines = [_line(["stage", *stages]), _line(["---", *["---:"] * len(stages)])]
    for peer in peers:
        cells = {stage_name(row): row for row in rows if row["peer"] == peer}
        lines.append(_line([peer, *(_time(cells.get(stage)) for stage in stages)]))
    floors = {stage_name(row): row["floor_ms"] for row in rows if "floor_ms" in row}
    if floors:
        cells = (f"{_three_digits(floors[stage])} ms" for stage in stages)
        lines.append(_line(["*limit*", *cells]))
    return "".join(lines)


def problems_table(result: dict, study: str) -> str:
    """One line for each problem and pass of a study, a column for each peer."""
    rows = measured_rows(result, study=study)
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [_line(["operator", "case", "pass", *peers]), _line(["---"] * (3 + len(peers)))]
    keys = dict.fromkeys((row["operator"], row["case"], row["pass"]) for row in rows)
    for operator, case, which in keys:
        cells = {
            row["peer"]: row
            for row in rows
            if (row["operator"], row["case"], row["pass"]) == (operator, case, which)
        }
        lines.append(_line([operator, case, which, *(_time(cells.get(peer)) for peer in peers)]))
    return "".join(lines)


def growth(result: dict, study: str) -> dict[str, tuple[list[float], list[float], float]]:
    """For each peer, sizes, milliseconds and the exponent of a line through their logarithms."""
    found = {}
    size = {
        "tokens": lambda row: row["tokens"],
        "batch": lambda row: row["batch"],
        "image": lambda row: row["image"][0] * row["image"][1] / 16,
    }[study]
    rows = measured_rows(result, study=study)
    for peer in dict.fromkeys(row["peer"] for row in rows):
        own = sorted((size(row), row["ms"]) for row in rows if row["peer"] == peer)
        if len(own) >= 2:
            sizes, times = (list(values) for values in zip(*own, strict=True))
            exponent = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
            found[peer] = sizes, times, exponent
    return found


def growth_table(result: dict) -> str:
    """The exponents: time grows as size to this power."""
    lines = [_line(["time against", "from", "to", "peer", "exponent"]), _line(["---"] * 5)]
    for study, name in STUDIES.items():
        for peer, (sizes, _, exponent) in growth(result, study).items():
            lines.append(_line([name, f"{sizes[0]:g}", f"{sizes[-1]:g}", peer, f"{exponent:.2f}"]))
    return "".join(lines)


def reasons_table(result: dict) -> str:
    """Who was not timed, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for row in result["rows"]:
        if "reason" in row:
            key = (row.get("peer", row.get("variant")), row["reason"])
            reasons[key] = reasons.get(key, 0) + 1
    if not reasons:
        return "All that was tried was timed.\n"
    lines = [_line(["not timed", "rows", "reason"]), _line(["---", "---:", "---"])]
    lines += [_line([peer, str(n), why.replace("|", "/")]) for (peer, why), n in reasons.items()]
    return "".join(lines)


def steps_table(result: dict) -> str:
    """Training steps: images per second beside the naive path's and the floor's."""
    lines = [
        _line(["model", "batch", "precision", "variant", "images/s", "20 to 80 %", "to naive",
               "of the floor", "peak memory (reserved)", "joules/image"]),
        _line(["---", "---:", "---", "---", *["---:"] * 6]),
    ]  # fmt: skip
    for row in result["rows"]:
        if "images_per_second" not in row:
            continue
        naive = [
            other["images_per_second"]
            for other in result["rows"]
            if other["model"] == row["model"] and other["variant"] == "naive"
            and "images_per_second" in other
        ]  # fmt: skip
        ratio = f"{row['images_per_second'] / naive[0]:.2f}x" if naive else ""
        if turns := row.get("to_naive"):  # took turns
            ratio = f"{turns['median']:.2f}x ({turns['p20']:.2f} to {turns['p80']:.2f})"
        share = f"{row['of_floor']:.0%}" if row.get("of_floor") else ""
        peak, joules = row.get("peak_memory_bytes"), row.get("joules_per_image")
        memory = ""
        if peak:
            reserved = row["reserved_memory_bytes"]
            memory = f"{peak / 2**30:.1f} GiB ({reserved / 2**30:.1f})"
        lines.append(
            _line([
                row["model"], str(row["batch"]), row["precision"], row["variant"],
                _three_digits(row["images_per_second"]),
                f"{_three_digits(row['p20'])} to {_three_digits(row['p80'])}", ratio, share,
                memory, f"{joules:.3f}" if joules else "",
            ])
        )  # fmt: skip
    timed = [row for row in result["rows"] if "images_per_second" in row]
    if said := measured_at(result, timed, lambda row: f"{row['model']}, {row['variant']}"):
        lines.append("\nA ratio between rows of two commits is one between two sessions.\n" + said)
    return "".join(lines)


def measured_at(result: dict, rows: list[dict], name_of: Callable[[dict], str]) -> str:
    """Which rows are of a commit that is not the file's."""
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        commit = row.get("commit", result["environment"]["commit"])
        if commit != result["environment"]["commit"]:
            commits.setdefault(commit, {})[name_of(row)] = None
    return "".join(
        f"\nMeasured at {c[:9] if c else 'an unknown commit'}: {'; '.join(names)}.\n"
        for c, names in commits.items()
    )


def kernels_table(result: dict) -> str:
    """Milliseconds of a step's kernels on a GPU, by kind; the sum may overlap."""
    rows = result["rows"]
    lines = [
        _line(["", *(row["variant"] for row in rows)]),
        _line(["---", *["---:"] * len(rows)]),
    ]
    for kind in rows[0]["kinds"]:
        if any(row["kinds"][kind] for row in rows):
            lines.append(_line([kind, *(f"{row['kinds'][kind]:.2f} ms" for row in rows)]))
    lines.append(_line(["kernels", *(f"{row['launches']:.0f}" for row in rows)]))
    lines.append(_line(["*step*", *(f"{row['step_ms']:.1f} ms" for row in rows)]))
    return "".join(lines)


def swap_table(result: dict) -> str:
    """Other people's models before and after: the fastest setting of the library, and fused."""
    versions = [f"{name} {number}" for name, number in result["libraries"].items() if number]
    lines = [
        f"{', '.join(versions)}; {result['rows'][0]['precision']}\n\n",
        _line(["model", "batch", "pass", "before", "fused", "faster", "20 to 80 %"]),
        _line(["---", "---:", "---", *["---:"] * 4]),
    ]
    for row in result["rows"]:
        before, fused = row["times"][row["before"]], row["times"]["fused"]
        compiled = ", compiled" if row["compiled"] else ""
        lines.append(
            _line([
                row["problem"], str(row["batch"]), row["pass"] + compiled,
                f"{_three_digits(before['ms'])} ms ({row['before']})",
                f"{_three_digits(fused['ms'])} ms", f"{row['faster']:.2f}x",
                f"{row['faster_p20']:.2f} to {row['faster_p80']:.2f}",
            ])
        )  # fmt: skip
    named = measured_at(result, result["rows"], lambda row: f"{row['problem']}, {row['pass']}")
    return "".join(lines) + named


def profile_table(result: dict) -> str:
    """Where the time of a step goes."""
    names = list(result["steps"])
    lines = [_line(["kind", *names]), _line(["---", *["---:"] * len(names)])]
    for kind in result["steps"][names[0]]:
        cells = [f"{result['steps'][name][kind]:.0f} ms" for name in names]
        lines.append(_line([kind, *cells]))
    return "".join(lines)


def loader_table(result: dict) -> str:
    """Images per second of one loader process."""
    lines = [
        _line(["JPEGs", "path", "images/s", "20 to 80 %", "processor time of an image",
               f"cores for {result['need']:.0f} images/s"]),
        _line(["---", "---", *["---:"] * 4]),
    ]  # fmt: skip
    for row in result["rows"]:
        side = row["long_side"]
        size = result["bytes_per_image"][str(side)]
        lines.append(
            _line([
                f"{side} px, {size / 1e3:.0f} kB", row["path"],
                f"{row['images_per_second']:.0f}", f"{row['p20']:.0f} to {row['p80']:.0f}",
                f"{1e3 * row['cpu_seconds_per_image']:.2f} ms", f"{row['cores']:.1f}",
            ])
        )  # fmt: skip
    batches = sorted({row["batch"] for row in result["rows"]})
    noise = ", ".join(f"{value:.0f} dB at {side} px" for side, value in result["psnr_db"].items())
    need = f" The need is that of {result['need_of']}." if result["need_of"] else ""
    return "".join(lines) + (
        "\nOne loader process, batches of " + " or ".join(map(str, batches)) + ", the main process"
        f" receiving alone.{need} A reduced decode begins at crops of twice the output. Reduced"
        f" decodes against whole ones: {noise}.\n"
    )


def where(environment: dict) -> str:
    """One line on where a file was made."""
    parts = [environment["device"]]
    if environment.get("driver"):
        parts.append(f"driver {environment['driver']}")
    parts += [f"{environment['threads']} threads", f"torch {environment['torch']}"]
    if environment.get("triton"):
        parts.append(f"triton {environment['triton']}")
    changes = " + changes" if environment["dirty"] else ""
    parts.append(f"commit {(environment['commit'] or 'unknown')[:9]}{changes}")
    return ", ".join(parts) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _time(row: dict | None) -> str:
    if row is None:
        return ""
    limit = f" ({row['fraction']:.0%})" if row["peer"].startswith("greenmim") else ""
    return f"{_three_digits(row['ms'])} ms{limit}"


def _three_digits(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def findings_table(result: dict) -> str:
    """What arms of the small runs learned: top-1 in percent by labels of each kind, as mean and
    standard deviation over seeds."""
    arms = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    numbers = list(result["rows"][0]["top1"])

    kinds = [(kind, number) for kind in ("knn", "probe") for number in numbers]
    head = ["arm", "seeds", "held-out loss"]
    head += [f"{'kNN' if kind == 'knn' else kind}, {number}" for kind, number in kinds]
    text = _line(head) + _line(["---", *["---:"] * (len(head) - 1)])
    for arm in arms:
        rows = [row for row in result["rows"] if row["arm"] == arm]
        losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
        found = [[row["top1"][number][kind] for row in rows] for kind, number in kinds]
        cells = [_with_spread(values, 100, 1) for values in found]
        text += _line([arm, str(len(rows)), _with_spread(losses, 1, 4), *cells])
    return text


def finetuned_table(result: dict) -> str:
    """Top-1 of what was fine-tuned, in percent, by labels of each kind; as `findings_table`."""
    rows = result["finetuned"]
    arms, numbers = ([*dict.fromkeys(row[name] for row in rows)] for name in ("arm", "labels"))
    head = ["starts from", *(f"{number} labels of each kind" for number in numbers)]
    text = _line(head) + _line(["---", *["---:"] * len(numbers)])
    for arm in arms:
        found = [
            [row["top1"] for row in rows if (row["arm"], row["labels"]) == (arm, number)]
            for number in numbers
        ]
        cells = [f"{_with_spread(v, 100, 1)} ({len(v)} seeds)" if v else "" for v in found]
        text += _line([arm, *cells])
    return text


def _with_spread(values: list[float], scale: float, digits: int) -> str:
    """Mean and standard deviation; empty of none."""
    if not values:
        return ""
    mean = scale * statistics.fmean(values)
    spread = scale * statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"
