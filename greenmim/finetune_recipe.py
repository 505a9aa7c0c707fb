"""The recipe of a fine-tuning run: an encoder learns to classify labelled images.

The defaults are the published recipe of Swin-B (Huang et al., NeurIPS 2022, arXiv 2205.13515). It
uses SimMIM's augmentation and reference batch (Xie et al., CVPR 2022, arXiv 2111.09886).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from greenmim.config import ModelConfig
from greenmim.guards import UserError
from greenmim.recipe import ImagesConfig, OptimConfig, RunRecipe, ScheduleConfig, need


@dataclass
class EncoderConfig:
    """Sizes of the encoder; null takes a value from the checkpoint of --init.

    Args:
        image_size: Pixels, one side or (height, width); multiples of 32.
        window_size: Side of a window, in tokens; tables of other windows are interpolated.
        embed_dim: Channels of stage 1, doubled by each later stage; or of each stage.
        depths: Blocks of each of the four stages.
        num_heads: Attention heads of each of the four stages.
        norm_eps: Epsilon of every LayerNorm.
        drop_path: Stochastic depth rate of the last block, growing from 0.
        encoder: swin, swinv2 or twins_svt.
        pretrained_window_sizes: For swinv2, the side of each stage's windows in earlier training.
        sr_ratios: For twins_svt, the side in tokens of the cells that are one key of global
            attention.
    """

    image_size: int | tuple[int, int] | None = None
    window_size: int | None = None
    embed_dim: int | tuple[int, int, int, int] | None = None
    depths: tuple[int, int, int, int] | None = None
    num_heads: tuple[int, int, int, int] | None = None
    norm_eps: float | None = None
    drop_path: float = 0.1
    encoder: str | None = None
    pretrained_window_sizes: tuple[int, int, int, int] | None = None
    sr_ratios: tuple[int, int, int, int] | None = None

    def given(self) -> dict[str, Any]:
        """The values that are not null."""
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in values if value is not None}

    def model_config(self) -> ModelConfig:
        """The sizes as a `ModelConfig`; UserError where one is null or they do not fit together."""
        for name in ("embed_dim", "depths", "num_heads"):
            if getattr(self, name) is None:
                raise UserError(
                    f"--model.{name.replace('_', '-')} is missing; name a checkpoint with --init,"
                    " or a preset (`greenmim presets`)."
                )
        try:
            return ModelConfig(**self.given())
        except ValueError as error:
            raise UserError(f"{error}.") from error

    def filled(self, sizes: dict[str, Any]) -> EncoderConfig:
        """A copy whose null values are taken from `sizes`."""
        names = {f.name for f in dataclasses.fields(self)}
        known = {name: value for name, value in sizes.items() if name in names}
        return EncoderConfig(**(known | self.given()))


@dataclass
class LabelledImagesConfig(ImagesConfig):
    """Where the labelled images are and how they are augmented.

    Args:
        root: Folder with a folder for each class; or, by a prefix: tar/FILE_OR_FOLDER with folders,
            wds/SHARDS with .cls, hfds/DATASET[:SPLIT] with a column of classes.
        val_root: Held-out images, named in the same way, whose accuracy is measured (see
            log.val_every_epochs); null for none.
        classes: File with one class per line, in the order of the scores; null takes those of the
            images, in alphabetical order. Shards need the file. Images of other classes are left
            out.
        rand_augment: timm's string for RandAugment; null leaves it out.
        erase: Probability that a rectangle of an image becomes noise.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    classes: str | None = None
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25


@dataclass
class MixConfig:
    """Mixing of images and labels (timm's Mixup), and label smoothing.

    Args:
        mixup: Alpha of mixup (Beta distribution); 0 never blends.
        cutmix: Alpha of cutmix; 0 never pastes.
        prob: Probability that a batch is mixed at all.
        switch_prob: Probability of cutmix where both are on.
        smoothing: Label smoothing: share of the target spread evenly over all classes.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer-wise learning-rate decay.

    Args:
        layer_decay: Learning rate of a layer as a share of the next layer's; 1 for none.
    """

    base_lr: float = 1.25e-3
    base_batch: int = 512
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 5.0
    layer_decay: float = 0.9


def _schedule() -> ScheduleConfig:
    return ScheduleConfig(warmup_epochs=20.0, min_lr=2.5e-7)


@dataclass
class FinetuneRecipe(RunRecipe):
    """One fine-tuning run.

    Args:
        init: Weights that a new run starts from: the encoder's in a checkpoint of this package, an
            official one, timm's or Microsoft's. Tables of other windows are interpolated.
        ema_decay: Largest decay of the moving average of the weights, which is measured and saved
            beside them. timm's warm-up keeps it to 1 - (1 + updates)^(-2/3): 0.99 after 1,000,
            0.9996 after 125,000. null keeps no average.
        mix: How images are mixed.
    """

    data: LabelledImagesConfig = field(default_factory=LabelledImagesConfig)
    # What --init tells is filled in later.
    model: EncoderConfig = field(default_factory=EncoderConfig)  # type: ignore[assignment]
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    schedule: ScheduleConfig = field(default_factory=_schedule)
    ema_decay: float | None = 0.9999
    mix: MixConfig = field(default_factory=MixConfig)

    def check(self) -> None:
        super().check()
        mix, data = self.mix, self.data
        for name, value in (
            ("mix.prob", mix.prob),
            ("mix.switch-prob", mix.switch_prob),
            ("data.erase", data.erase),
        ):
            need(0 <= value <= 1, name, value, "between 0 and 1")
        for name, value in (("mix.mixup", mix.mixup), ("mix.cutmix", mix.cutmix)):
            need(0 <= value < math.inf, name, value, "0 or more")
        need(0 <= mix.smoothing < 1, "mix.smoothing", mix.smoothing, "at least 0 and less than 1")
        decay = self.optim.layer_decay
        need(0 < decay <= 1, "optim.layer-decay", decay, "above 0 and at most 1")
        if self.ema_decay is not None:
            need(0 < self.ema_decay < 1, "ema-decay", self.ema_decay, "between 0 and 1, or null")
        if (mix.mixup or mix.cutmix) and data.batch_size % 2:
            raise UserError(
                f"--data.batch-size is {data.batch_size}; it has to be even, for images are mixed"
                " in pairs (or set --mix.mixup 0 --mix.cutmix 0)."
            )
        if data.rand_augment is not None:
            check_rand_augment(data.rand_augment)


def check_rand_augment(text: str) -> None:
    """Raises UserError for a string that timm cannot read."""
    from timm.data.auto_augment import rand_augment_transform

    try:
        rand_augment_transform(text, {})
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"--data.rand-augment is {text!r}; give timm's form, such as rand-m9-mstd0.5-inc1, or"
            " null."
        ) from error
