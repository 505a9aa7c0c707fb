"""Other people's models before and after `fuse_window_attention`: inference and training steps.

    python -m benchmarks.swap                             # what is installed, on this CPU
    python -m benchmarks.swap --device cuda --batch 64    # in bfloat16 by autocast
    python -m benchmarks.swap --problem timm-swin-t-224 --compile --no-save

The small model of each library, in each setting that the library has for its attention, and fused.
A training step is forward, backward and AdamW, with stochastic depth off, on random images. Outputs
are compared before anything is timed. The variants take turns, and a ratio is the median over
the rounds of the fastest setting's time to ours in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from greenmim_kernels.integrations import fuse_window_attention

from .environment import (
    describe,
    earlier,
    folder_of,
    put,
    rows_with_commits,
    version_of,
    write_json,
)
from .measure import no_garbage_collection

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Problem:
    library: str
    settings: dict[str, Make]  # of the library
    shape: tuple[int, ...]  # of one input
    share: int = 1  # of the batch; a volume has more tokens than an image


def _timm(name: str, sdpa: bool = False, **more) -> nn.Module:
    import timm

    model = timm.create_model(name, drop_path_rate=0.0, **more)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = sdpa
    return model


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model = getattr(torchvision.models, name)()
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def _hugging_face(version: int, implementation: str, image: int, window: int) -> nn.Module:
    import transformers

    config, kind = {
        1: (transformers.SwinConfig, transformers.SwinModel),
        2: (transformers.Swinv2Config, transformers.Swinv2Model),
    }[version]
    sizes = dict(image_size=image, window_size=window, drop_path_rate=0.0)
    return kind._from_config(config(**sizes), attn_implementation=implementation)


def _monai(whole: bool, sdpa: bool = False) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(in_channels=1, out_channels=14, feature_size=24, spatial_dims=3)
    for module in model.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = sdpa  # it takes it in inference alone
    return model if whole else model.swinViT


def _spandrel(name: str, window: int, **more) -> nn.Module:
    """As published for magnification by four."""
    architectures = importlib.import_module(f"spandrel.architectures.{name}")
    sizes = dict(img_size=64, window_size=window, embed_dim=180, mlp_ratio=2, drop_path_rate=0.0)
    sizes |= dict(depths=[6] * 6, num_heads=[6] * 6, upscale=4, upsampler="pixelshuffle")
    return getattr(architectures, name)(**(sizes | more))


_of = functools.partial


def _timm_problem(name: str, image: int) -> Problem:
    settings = {
        key: _of(_timm, name, sdpa, img_size=image)
        for key, sdpa in (("eager", False), ("sdpa", True))
    }
    return Problem("timm", settings, (3, image, image))


PROBLEMS = {
    "timm-swin-t-224": _timm_problem("swin_tiny_patch4_window7_224", 224),
    "timm-swin-t-256-padded": _timm_problem("swin_tiny_patch4_window7_224", 256),
    "timm-swinv2-t-256": Problem(
        "timm", {"eager": _of(_timm, "swinv2_tiny_window8_256")}, (3, 256, 256)
    ),
    "torchvision-swin-t-224": Problem(
        "torchvision", {"eager": _of(_torchvision, "swin_t")}, (3, 224, 224)
    ),
    "torchvision-swin-v2-t-256": Problem(
        "torchvision", {"eager": _of(_torchvision, "swin_v2_t")}, (3, 256, 256)
    ),
    "timm-maxvit-t-224": _timm_problem("maxvit_tiny_tf_224", 224),
    "torchvision-maxvit-t-224": Problem(
        "torchvision", {"eager": _of(_torchvision, "maxvit_t")}, (3, 224, 224)
    ),
    "transformers-swin-t-224": Problem(
        "transformers",
        {name: _of(_hugging_face, 1, name, 224, 7) for name in ("eager", "sdpa")},
        (3, 224, 224),
    ),
    "transformers-swinv2-t-256": Problem(
        "transformers", {"eager": _of(_hugging_face, 2, "eager", 256, 8)}, (3, 256, 256)
    ),
    **{
        name: Problem(
            "monai",
            {key: _of(_monai, whole, sdpa) for key, sdpa in (("eager", False), ("sdpa", True))},
            (1, 64, 64, 64),
            share=4,
        )
        for name, whole in (("monai-swinvit-64", False), ("monai-swinunetr-64", True))
    },
    **{
        f"spandrel-{name.lower()}-64": Problem(
            "spandrel", {"eager": _of(_spandrel, name, window)}, (3, 64, 64), share=4
        )
        for name, window in (("SwinIR", 8), ("DRCT", 16), ("HAT", 16))
    },
    # Of another size than it was made for, as most images are.
    "spandrel-swinir-s-96": Problem(
        "spandrel",
        {
            "eager": _of(
                _spandrel,
                "SwinIR",
                8,
                embed_dim=60,
                depths=[6] * 4,
                num_heads=[6] * 4,
                upsampler="pixelshuffledirect",
            )
        },
        (3, 96, 96),
        share=4,
    ),
}
# What a GPU is for; on a CPU they take long.
GPU_PROBLEMS = {"timm-swin-b-224": _timm_problem("swin_base_patch4_window7_224", 224)}


def main_output(out) -> Tensor:
    """Of whatever a library returns, the last and deepest tensor."""
    if isinstance(out, Tensor):
        return out
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out[-1]


class Variant:
    """A model, and an optimizer for its steps."""

    def __init__(self, model: nn.Module, x: Tensor, precision: torch.dtype, compiled: bool):
        self.model, self.x, self.precision = model.to(x.device), x, precision
        if compiled:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.precision != torch.float32
        return torch.autocast(self.x.device.type, self.precision, enabled=enabled)

    def inference(self) -> Tensor:
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            return main_output(self.model(self.x))

    def training(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        with self.autocast():
            loss = main_output(self.model(self.x)).square().mean()
        loss.backward()
        self.optimizer.step()


def variants_of(
    problem: Problem, batch: int, device: str, precision: torch.dtype, compiled: bool
) -> dict[str, Variant]:
    """The library's settings and "fused", with the same weights; their outputs agree."""
    torch.manual_seed(0)
    x = torch.randn(max(1, batch // problem.share), *problem.shape, device=device)
    found, weights = {}, None
    for name, make in [*problem.settings.items(), ("fused", next(iter(problem.settings.values())))]:
        model = make()
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        if name == "fused" and not fuse_window_attention(model).fused:
            raise RuntimeError("nothing was fused")
        found[name] = Variant(model, x, precision, compiled)
    outputs = {name: one.inference().float() for name, one in found.items()}
    limit = 1e-4 if precision == torch.float32 and device == "cpu" else 5e-2
    for name, out in outputs.items():
        off = (out - outputs["fused"]).abs().max() / outputs["fused"].abs().max()
        if off > limit:
            raise RuntimeError(f"the outputs of {name} and fused differ by {off:.1e}")
    return found


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):  # so that the host is not waited for
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 5


def measured(found: dict[str, Variant], device: str, rounds: int) -> Iterator[dict]:
    """A row for inference and one for training."""
    for what in ("inference", "training"):
        calls = {name: getattr(one, what) for name, one in found.items()}
        for call in calls.values():
            for _ in range(2 if device == "cpu" else 5):
                call()
        taken = {name: [] for name in calls}
        with no_garbage_collection():
            for _ in range(rounds):
                for name, call in calls.items():
                    taken[name].append(seconds(call, device))
        times = {
            name: {
                "ms": 1e3 * statistics.median(all_of),
                "p20_ms": 1e3 * sorted(all_of)[rounds // 5],
                "p80_ms": 1e3 * sorted(all_of)[rounds * 4 // 5],
            }
            for name, all_of in taken.items()
        }
        before = min((name for name in times if name != "fused"), key=lambda n: times[n]["ms"])
        ratios = sorted(a / b for a, b in zip(taken[before], taken["fused"], strict=True))
        yield {
            "pass": what,
            "times": times,
            "before": before,
            "faster": statistics.median(ratios),
            "faster_p20": ratios[rounds // 5],
            "faster_p80": ratios[rounds * 4 // 5],
        }


ROW = ("problem", "batch", "precision", "compiled", "pass")


def kept_rows(file: pathlib.Path, result: dict) -> list[dict]:
    """Rows of earlier runs in the same place, with the same versions of their libraries."""
    kept = earlier(file, result["environment"], of_any_commit=True)
    then, now = kept.get("libraries", {}), result["libraries"]
    known = PROBLEMS | GPU_PROBLEMS
    libraries = {name: problem.library for name, problem in known.items()}
    return [
        row
        for row in rows_with_commits(kept)
        if (library := libraries.get(row["problem"])) and then[library] == now.get(library)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", nargs="+", choices=[*PROBLEMS, *GPU_PROBLEMS])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="every variant by torch.compile")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")
    options = parser.parse_args(argv)
    if options.dry_run:
        for name in options.problem or PROBLEMS:
            library = (PROBLEMS | GPU_PROBLEMS)[name].library
            print(f"{name}: {library} {version_of(library) or 'is not installed'}")
        return 0
    torch.set_num_threads(options.threads)
    precision = torch.float32 if options.device == "cpu" else torch.bfloat16
    known = PROBLEMS if options.device == "cpu" else PROBLEMS | GPU_PROBLEMS
    result: dict = {"environment": describe(options.threads, options.device)}
    libraries = sorted({problem.library for problem in known.values()})
    result["libraries"] = {name: version_of(name) for name in libraries}
    file = folder_of(result["environment"]["device"]) / "swap.json"
    result["rows"] = kept_rows(file, result)
    for name in options.problem or known:
        problem = (PROBLEMS | GPU_PROBLEMS)[name]
        if result["libraries"][problem.library] is None:
            print(f"{name}: {problem.library} is not installed")
            continue
        found = variants_of(problem, options.batch, options.device, precision, options.compile)
        for row in measured(found, options.device, options.rounds):
            row = {
                "problem": name,
                "batch": len(found["fused"].x),
                "precision": str(precision).removeprefix("torch."),
                "compiled": options.compile,
                **row,
            }
            row |= {name: result["environment"][name] for name in ("commit", "dirty")}
            put(result["rows"], row, ROW)
            times = ", ".join(f"{key} {one['ms']:.1f} ms" for key, one in row["times"].items())
            print(f"{name}, {row['pass']}: {times}; {row['faster']:.2f}x", flush=True)
        if not options.no_save:
            write_json(file, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
