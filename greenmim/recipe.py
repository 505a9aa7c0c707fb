"""The recipe of a run: plain dataclasses, read from YAML presets and the command line.

`RunRecipe` is what every run has, `Recipe` is one of pre-training; `greenmim pretrain --help all`
lists its values. The resolved recipe is saved beside each run as `config.yaml` and can be passed
back as `--config`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from greenmim.config import ModelConfig
from greenmim.guards import UserError
from greenmim.masking import num_visible_units

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class ImagesConfig:
    """Where the images are and how they are augmented.

    Args:
        root: Folder of images, nested in any way. Or, by a prefix: tar/FILE_OR_FOLDER, wds/SHARDS,
            hfds/DATASET[:SPLIT].
        val_root: Held-out images to measure with, named in the same way (see
            log.val_every_epochs); null for none.
        batch_size: Images per process and per forward pass.
        repeats: How often an epoch goes through the images, each time with other crops; for small
            datasets.
        num_samples: Number of images in all shards of wds/; null reads their info file, or counts.
        workers: Loader processes; 0 loads in the main process.
        crop_scale: Least and greatest share of the image's area in a random crop.
        crop_ratio: Least and greatest width / height of a random crop, before it is resized.
        flip: Probability of a horizontal flip.
        decode: How JPEGs are decoded: full, or reduced, which decodes to a fraction of the size
            where the crop is large enough. Both make the same crops.
        max_pixels: Images with more pixels are not read: a small file can unpack to a picture that
            fills the memory.
        augment_on_device: Flip and normalise on the device, so that images are sent there in 8
            bits; null does so on a GPU only.
        mean: Mean of each RGB channel, in 0 to 1.
        std: Standard deviation of each RGB channel, in 0 to 1.
    """

    root: str | None = None
    val_root: str | None = None
    batch_size: int = 128
    repeats: int = 1
    num_samples: int | None = None
    workers: int = 4
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    decode: Literal["full", "reduced"] = "reduced"
    # Phone cameras reach 108 million; each pixel takes 4 bytes or more.
    max_pixels: int = 120_000_000
    augment_on_device: bool | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass
class DataConfig(ImagesConfig):
    """Where the images are and how they are augmented.

    Args:
        root: Folder of images, nested in any way; class folders are fine and ignored. Or, by a
            prefix: tar/FILE_OR_FOLDER, wds/SHARDS, hfds/DATASET[:SPLIT].
        val_root: Held-out images, named in the same way, whose loss is measured with the same masks
            each time (see log.val_every_epochs); null for none.
        probe_root: Labelled images, named in the same way; each is classified by its nearest
            neighbours among the others (see log.probe_every_epochs); null for none.
    """

    probe_root: str | None = None


@dataclass
class MaskConfig:
    """What is hidden.

    Args:
        ratio: Share of the 32-px units that is hidden.
        kind: random hides single units; block hides rectangles, the same number of units in all.
        per_image: Draw one mask per image; false draws one per batch and process, as in the paper.
    """

    ratio: float = 0.75
    kind: Literal["random", "block"] = "random"
    per_image: bool = False


@dataclass
class OptimConfig:
    """AdamW.

    Args:
        base_lr: Peak learning rate at base_batch images per update; scaled linearly to the actual
            number.
        base_batch: Images per update that base_lr (and schedule.min_lr) are meant for.
        lr: Peak learning rate, not scaled; null derives it from base_lr.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: Weight decay; biases, norms, position tables and tokens have none.
        clip: Largest gradient norm; null does not clip.
        accumulate: Forward and backward passes per update.
    """

    base_lr: float = 1.5e-4
    base_batch: int = 256
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float | None = None
    accumulate: int = 1


@dataclass
class ScheduleConfig:
    """Cosine decay after a linear warm-up, set anew before every update.

    Args:
        warmup_epochs: Epochs in which the learning rate rises from 0 to its peak; fractions are
            fine.
        min_lr: Learning rate at the end; scaled like optim.base_lr.
    """

    warmup_epochs: float = 40.0
    min_lr: float = 0.0


@dataclass
class CheckpointConfig:
    """When the run is saved and what is kept. A checkpoint is always written at the end.

    Args:
        every_epochs: Epochs between two checkpoints.
        every_steps: Updates between two checkpoints, in addition; null for epochs only.
        keep_last: Number of newest checkpoints to keep.
        keep_every_epochs: Also keep every checkpoint whose epoch is a multiple of this; null keeps
            the newest only.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep_last: int = 2
    keep_every_epochs: int | None = 100


@dataclass
class RunLogConfig:
    """What is written while training.

    Args:
        every_steps: Updates between two log lines; each line averages the loss over them.
        tensorboard: Write TensorBoard event files beside log.jsonl.
        wandb: Project of Weights & Biases to log to as well (needs the package wandb).
        val_every_epochs: Epochs between measurements with data.val_root; the run ends with one.
    """

    every_steps: int = 20
    tensorboard: bool = True
    wandb: str | None = None
    val_every_epochs: int = 1


@dataclass
class LogConfig(RunLogConfig):
    """What is written while training.

    Args:
        pictures_every_epochs: Epochs between drawings of reconstructions; the run ends with one;
            null draws none.
        pictures: Number of images drawn.
        probe_every_epochs: Epochs between classifications of data.probe_root; the run ends with
            one.
    """

    pictures_every_epochs: int | None = 10
    pictures: int = 6
    probe_every_epochs: int = 10


@dataclass
class RunRecipe:
    """One run.

    Args:
        work_dir: Folder of the run: config.yaml, log.jsonl, TensorBoard events, checkpoints.
        init: Weights that a new run starts from: a checkpoint of this package, an official one,
            timm's or Microsoft's. A decoder of other sizes starts anew. Tables of other windows are
            interpolated.
        epochs: Passes over the data; each goes through the images data.repeats times.
        seed: Seed of weights, masks, crops and order.
        device: Where to train; auto uses CUDA if there is a GPU.
        precision: Autocast type; auto is bf16 on CUDA and fp32 on the CPU.
        strategy: How processes share the model: ddp keeps a copy in each, fsdp (FSDP2) a shard of
            weights, gradients and moments.
        activation_checkpointing: Recompute activations in the backward pass: less memory, more
            time.
        compile: Compile the training step's model with torch.compile.
        recompute_pointwise: With compile, recompute GELU, norms and casts of weights in the
            backward pass instead of keeping them: a third less is kept, and no matrix product or
            attention runs twice.
        cuda_graph: Record the passes of a step as a CUDA graph and replay it, so that kernels are
            not launched one by one. Not with fsdp.
        backend: Kernel backend: auto, or one that `greenmim doctor` lists.
        threads: CPU threads of the training process; null leaves the choice to PyTorch.
        max_skipped: Stop after this many updates in a row with a loss or gradient that is not
            finite.
        hang_minutes: With several processes, end the run when one has waited this many minutes for
            another (the timeout of Gloo's and NCCL's collectives); null waits for ever.
        model: The network.
        data: The images.
        optim: The optimiser.
        schedule: The learning rate over time.
        checkpoint: When the run is saved.
        log: What is written while training.
    """

    work_dir: str | None = None
    init: str | None = None
    epochs: int = 100
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    compile: bool = False
    recompute_pointwise: bool = False
    cuda_graph: bool = False
    backend: Literal["auto", "reference", "cpp", "cuda", "triton"] = "auto"
    threads: int | None = None
    max_skipped: int = 20
    hang_minutes: float | None = 30.0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: RunLogConfig = field(default_factory=RunLogConfig)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises UserError where a value cannot be, or values do not go together."""
        _check(self)

    @property
    def folder(self) -> Path:
        """The run's, of a recipe that was checked to name one."""
        assert self.work_dir is not None
        return Path(self.work_dir)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values (no tuples), the same after a trip through YAML or a checkpoint."""
        return _plain(dataclasses.asdict(self))


@dataclass
class Recipe(RunRecipe):
    """One pre-training run.

    Args:
        mask: What is hidden.
    """

    epochs: int = 800
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        super().check()
        _check_mask(self)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under names with dots, as on the command line."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def need(ok: bool, name: str, value: Any, wanted: str) -> None:
    """Raises UserError, naming an option and what it has to be, unless `ok`."""
    if not ok:
        raise UserError(f"--{name} is {value!r}; it has to be {wanted}.")


def _check_mask(recipe: Recipe) -> None:
    for name, value in (
        ("log.pictures-every-epochs", recipe.log.pictures_every_epochs),
        ("log.pictures", recipe.log.pictures),
        ("log.probe-every-epochs", recipe.log.probe_every_epochs),
    ):
        need(value is None or value >= 1, name, value, "at least 1")
    ratio, units = recipe.mask.ratio, recipe.model.num_units
    need(0 < ratio < 1, "mask.ratio", ratio, "above 0 and less than 1")
    try:
        hidden = units - num_visible_units(units, ratio)
    except ValueError as error:
        raise UserError(f"--mask.ratio: {error}.") from error
    need(hidden > 0, "mask.ratio", ratio, f"large enough to hide at least one of the {units} units")


def _check_given(values: Any, prefix: str = "") -> None:
    """Raises UserError for an option that a line of YAML leaves without a value."""
    for entry in dataclasses.fields(values):
        value, name = getattr(values, entry.name), prefix + entry.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            _check_given(value, f"{name}.")
        else:
            need(value is not None or "None" in entry.type, name, value, "given a value")


def _check(recipe: RunRecipe) -> None:
    _check_given(recipe)
    data, optim, every = recipe.data, recipe.optim, recipe.checkpoint
    value: Any
    for name, value in (("data.root", data.root), ("work-dir", recipe.work_dir)):
        if not value:
            kept = Path(recipe.work_dir or "", "config.yaml")
            hint = f", or the run's own values with --config {kept}" if kept.is_file() else ""
            raise UserError(f"--{name} is missing; pass a folder{hint}.")
    for name, value in (
        ("epochs", recipe.epochs),
        ("max-skipped", recipe.max_skipped),
        ("data.batch-size", data.batch_size),
        ("data.repeats", data.repeats),
        ("data.num-samples", data.num_samples),
        ("data.max-pixels", data.max_pixels),
        ("optim.accumulate", optim.accumulate),
        ("optim.base-batch", optim.base_batch),
        ("checkpoint.every-epochs", every.every_epochs),
        ("checkpoint.every-steps", every.every_steps),
        ("checkpoint.keep-last", every.keep_last),
        ("checkpoint.keep-every-epochs", every.keep_every_epochs),
        ("log.every-steps", recipe.log.every_steps),
        ("log.val-every-epochs", recipe.log.val_every_epochs),
        ("threads", recipe.threads),
    ):
        need(value is None or value >= 1, name, value, "at least 1")
    for name, value in (
        ("optim.base-lr", optim.base_lr),
        ("optim.lr", optim.lr),
        ("optim.eps", optim.eps),
        ("optim.clip", optim.clip),
    ):
        need(value is None or 0 < value < math.inf, name, value, "above 0")
    for name, value in (
        ("optim.weight-decay", optim.weight_decay),
        ("schedule.min-lr", recipe.schedule.min_lr),
        ("data.workers", data.workers),
    ):
        need(0 <= value < math.inf, name, value, "0 or more")
    need(0 <= recipe.seed < 2**63, "seed", recipe.seed, "0 or more and below 2**63")
    if recipe.cuda_graph and recipe.strategy == "fsdp":
        raise UserError(
            "--cuda-graph does not go with --strategy fsdp, which moves weights between processes"
            " within a step; use --strategy ddp, or --compile alone."
        )
    if recipe.recompute_pointwise and not recipe.compile:
        raise UserError(
            "--recompute-pointwise needs the compiler: add --compile true, or use"
            " --activation-checkpointing true instead."
        )
    if recipe.cuda_graph and recipe.activation_checkpointing and recipe.model.drop_path > 0:
        raise UserError(
            "--cuda-graph with --activation-checkpointing cannot repeat stochastic depth; set"
            " --model.drop-path 0 or leave one of them out."
        )
    hang = recipe.hang_minutes
    in_range = hang is None or 0 < hang <= 1e6
    need(in_range, "hang-minutes", hang, "above 0 and at most 1e6, or null for no limit")
    need(recipe.log.wandb != "", "log.wandb", recipe.log.wandb, "the name of a project")
    need(0 <= data.flip <= 1, "data.flip", data.flip, "between 0 and 1")
    low, high = data.crop_scale
    need(
        0 < low <= high <= 1,
        "data.crop-scale",
        [low, high],
        "two values above 0 and at most 1, the smaller first",
    )
    low, high = data.crop_ratio
    in_range = 0 < low <= high < math.inf
    need(in_range, "data.crop-ratio", [low, high], "two values above 0, the smaller first")
    need(all(map(math.isfinite, data.mean)), "data.mean", list(data.mean), "finite numbers")
    in_range = all(0 < value < math.inf for value in data.std)
    need(in_range, "data.std", list(data.std), "above 0")
    in_range = all(0 <= beta < 1 for beta in optim.betas)
    need(in_range, "optim.betas", list(optim.betas), "at least 0 and less than 1")
    warmup = recipe.schedule.warmup_epochs
    wanted = f"between 0 and the run's {recipe.epochs} epochs"
    need(0 <= warmup <= recipe.epochs, "schedule.warmup-epochs", warmup, wanted)
