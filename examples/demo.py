"""Pre-train a small GreenMIM Swin on real photographs, on the CPU, in about three minutes.

    make demo                                    # sets up an environment and runs this
    python examples/demo.py --out runs/demo      # in an environment where greenmim is installed

The photographs come with scikit-image's wheel, so nothing is downloaded. Every call makes a new run
folder under `--out`; in it are the checkpoint, the log, the loss curve and a picture of what the
model makes of hidden patches.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

# Read when PyTorch loads: threads that wait then sleep instead of spinning, which on a machine with
# few cores leaves them to the loader and to whatever else is running.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from jsonargparse import auto_cli
from matplotlib.figure import Figure
from PIL import Image

from greenmim import cli
from greenmim.guards import EXIT_STOPPED
from greenmim.training.log import read_log

# The photographs among the wheel's pictures; drawings, text and test patterns are left out.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
SHORT_SIDE = 288  # px; the crops have 224, so decoding larger files would only cost time


def demo(
    out: str = "runs/demo", preset: str = "greenmim_swin-demo-cpu", epochs: int | None = None
) -> int:
    """Pre-train on scikit-image's photographs and show the result.

    Args:
        out: Folder for the photographs and the runs.
        preset: Its name, or a recipe file. Not --config, which jsonargparse keeps for itself.
        epochs: Other number of epochs than the recipe's.

    Returns:
        Exit code: 0, or that of the part that failed.
    """
    folder = Path(out)
    photos = gather_photographs(folder / "photos")
    run = new_run_folder(folder)
    arguments = ["pretrain", "--config", preset, "--data.root", str(photos), "--work-dir", str(run)]
    arguments += ["--threads", str(len(os.sched_getaffinity(0)))]
    if epochs is not None:
        arguments += ["--epochs", str(epochs)]
    print("greenmim", *arguments, flush=True)
    started = time.perf_counter()
    if code := cli.main(arguments):
        if code == EXIT_STOPPED:
            print("to go on:", shlex.join(["greenmim", *arguments, "--resume"]))
        return code
    seconds = time.perf_counter() - started

    records = [record for record in read_log(run / "log.jsonl") if record["event"] == "train"]
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    draw_loss_curve(steps, losses, run / "loss.png")
    checkpoint, picture = run / "checkpoints" / "last.pth", run / "reconstruction.png"
    arguments = ["reconstruct", "--checkpoint", str(checkpoint), "--images", str(photos)]
    if code := cli.main([*arguments, "--output", str(picture), "--overwrite"]):
        return code

    print(f"\ntrained {steps[-1]} updates in {seconds / 60:.1f} minutes")
    print(f"loss            {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print(f"checkpoint      {checkpoint}")
    print(f"log             {run / 'log.jsonl'} (and tensorboard --logdir {run / 'tensorboard'})")
    print(f"loss curve      {run / 'loss.png'}")
    print(f"reconstruction  {picture}")
    return 0


def gather_photographs(folder: Path) -> Path:
    """Write scikit-image's photographs into a folder, as JPEG files of moderate size."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The demo needs scikit-image for its photographs: pip install scikit-image"
        )
    source = Path(spec.origin).parent / "data"
    found = [source / name for name in PHOTOGRAPHS if (source / name).is_file()]
    if len(found) < len(PHOTOGRAPHS) // 2:
        raise SystemExit(f"This scikit-image holds too few photographs in {source}; update it.")
    folder.mkdir(parents=True, exist_ok=True)
    for path in found:
        with Image.open(path) as image:
            scale = SHORT_SIDE / min(image.size)
            size = tuple(round(side * scale) for side in image.size)
            image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        image.save(folder / f"{path.stem}.jpg", quality=95)
    return folder


def new_run_folder(folder: Path) -> Path:
    """The first of run-1, run-2, ... that is not there yet."""
    number = 1
    while (folder / f"run-{number}").exists():
        number += 1
    return folder / f"run-{number}"


def draw_loss_curve(steps: list[int], losses: list[float], path: Path) -> None:
    """Loss over updates: as logged, and averaged over a window of about a tenth of the run."""
    smooth = []
    for i in range(len(losses)):
        # Narrower towards the ends, so that it stays centred and follows a steep start.
        reach = min(max(len(losses) // 20, 1), i, len(losses) - 1 - i)
        smooth.append(statistics.fmean(losses[i - reach : i + reach + 1]))
    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="loss as logged")
    axes.plot(steps, smooth, color="#08519c", linewidth=2, label="smoothed")
    axes.set(xlabel="update", ylabel="loss on hidden patches")
    axes.set_title(f"GreenMIM pre-training on {len(PHOTOGRAPHS)} photographs")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(auto_cli(demo))
