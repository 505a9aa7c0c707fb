"""Sizes of a model, and the named models."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

UNIT_PIXELS = 32
PATCH_PIXELS = 4
NUM_STAGES = 4
# Limits, so that a damaged or hostile file cannot ask for a network that fills the memory.
_LIMITS = {
    "image_size": 2**14, "window_size": 2**10, "embed_dim": 2**14, "depths": 1000,
    "decoder_dim": 2**16, "decoder_depth": 1000,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EncoderTraits:
    """What sizes and plans depend on in an encoder.

    Args:
        class_name: its class, in the file of encoders/ that has the encoder's name.
        fields: fields of `ModelConfig` that this encoder has and others do not.
        is_swin: whether odd blocks shift their windows, no window is larger than its grid, and each
            stage doubles the channels.
        least_window: side of the smallest window it can have, in tokens.
        has_neighbours: whether plans list the neighbours of each visible token.
    """

    class_name: str
    fields: tuple[str, ...] = ()
    is_swin: bool = True
    least_window: int = 1
    has_neighbours: bool = False


ENCODERS = {
    "swin": EncoderTraits("SwinEncoder"),
    "swinv2": EncoderTraits("SwinV2Encoder", ("pretrained_window_sizes",)),
    "twins_svt": EncoderTraits(
        "TwinsSVTEncoder",
        ("sr_ratios", "pos_conv_residual"),
        is_swin=False,
        least_window=2,  # timm reads a window of 1 as global attention
        has_neighbours=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a GreenMIM model: a hierarchical encoder and an MAE-like decoder.

    The defaults are Swin-B with windows of 7 at 224 px (Huang et al., NeurIPS 2022,
    arXiv 2205.13515).

    Args:
        image_size: pixels, one side or (height, width); multiples of 32.
        window_size: side M of a window, in tokens.
        embed_dim: channels of stage 1, doubled by each later stage; for twins_svt also one number
            per stage.
        depths: blocks of each of the four stages.
        num_heads: attention heads of each of the four stages.
        norm_eps: epsilon of every LayerNorm (published: 1e-6; timm's own Swin: 1e-5).
        drop_path: stochastic depth rate of the encoder's last block; it grows from 0 at the first.
        decoder_dim: channels of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        norm_pix_loss: normalise the target of each unit by its own mean and standard deviation.
        encoder: swin, swinv2 or twins_svt.
        pretrained_window_sizes: for swinv2, the side of each stage's windows in earlier training,
            so that relative positions keep their meaning; 0 where it was the same.
        sr_ratios: for twins_svt, the side in tokens of the cells that are one key of global
            attention, per stage; powers of two, at most 8, 4, 2 and 1 (the tokens along a unit).
        pos_conv_residual: for twins_svt, start the positional convolutions as timm's, which add
            their input; the published ones do not. Only fresh weights differ: to add the input is
            to add 1 to the middle weight, and conversion to and from timm takes care of that.

    Raises:
        ValueError: an unknown encoder, a field that the encoder does not have, or sizes that do not
            fit together.
    """

    image_size: int | tuple[int, int] = 224
    window_size: int = 7
    embed_dim: int | tuple[int, ...] = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    decoder_dim: int = 512
    decoder_depth: int = 1
    decoder_heads: int = 16
    norm_pix_loss: bool = True
    encoder: str = "swin"
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    pos_conv_residual: bool = False

    def __post_init__(self) -> None:
        # YAML gives lists, NumPy its own integers; a frozen dataclass can only be set this way.
        sides = check_image_size(self.image_size)
        pair = isinstance(self.image_size, (tuple, list))
        object.__setattr__(self, "image_size", sides if pair else sides[0])
        for name in ("depths", "num_heads", "sr_ratios"):
            object.__setattr__(self, name, _integers(getattr(self, name), name, 1))
        windows = _integers(self.pretrained_window_sizes, "pretrained_window_sizes", 0)
        object.__setattr__(self, "pretrained_window_sizes", windows)
        object.__setattr__(self, "embed_dim", _channels(self.embed_dim))
        for name in ("window_size", "decoder_dim", "decoder_heads"):
            object.__setattr__(self, name, _integer(getattr(self, name), name, 1))
        object.__setattr__(self, "decoder_depth", _integer(self.decoder_depth, "decoder_depth", 0))
        self._check()

    def _check(self) -> None:
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {self.encoder!r}")
        default: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self)}
        for name in {name for traits in ENCODERS.values() for name in traits.fields}:
            if name not in self.traits.fields and getattr(self, name) != default[name]:
                raise ValueError(f"the encoder {self.encoder} has no {name}; leave it out")
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if max(value if isinstance(value, tuple) else (value,)) > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        if self.traits.is_swin and isinstance(self.embed_dim, tuple):
            raise ValueError(
                f"the encoder {self.encoder} takes one embed_dim; later stages double it"
            )
        if self.window_size < self.traits.least_window:
            raise ValueError(
                f"the encoder {self.encoder} needs windows of at least {self.traits.least_window}"
                f" tokens a side, got {self.window_size}"
            )
        for ratio, most in zip(self.sr_ratios, default["sr_ratios"], strict=True):
            if ratio & (ratio - 1) or ratio > most:
                raise ValueError(
                    "sr_ratios must be powers of two and at most"
                    f" {default['sr_ratios']}, got {self.sr_ratios}"
                )
        for name in ("norm_eps", "drop_path"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path}")
        for stage, (dim, heads) in enumerate(zip(self.stage_dims, self.num_heads, strict=True), 1):
            if dim % heads:
                raise ValueError(
                    f"the {dim} channels of stage {stage} cannot be split into {heads} heads;"
                    " change embed_dim or num_heads"
                )
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_dim must be a multiple of 4 and of decoder_heads = {self.decoder_heads},"
                f" got {self.decoder_dim}"
            )

    @classmethod
    def of_saved(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration that a run saved; what it lacks, or holds as None, gets its default.

        Args:
            values: fields by name; other names are ignored.

        Raises:
            ValueError: sizes that do not fit together.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{n: value for n, value in values.items() if n in known and value is not None})

    @property
    def traits(self) -> EncoderTraits:
        """The encoder's entry in `ENCODERS`."""
        return ENCODERS[self.encoder]

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return check_image_size(self.image_size)

    @property
    def unit_grid(self) -> tuple[int, int]:
        """(height, width) in units of 32 px."""
        height, width = self.image_hw
        return height // UNIT_PIXELS, width // UNIT_PIXELS

    @property
    def num_units(self) -> int:
        """Units L of an image."""
        height, width = self.unit_grid
        return height * width

    @property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        if isinstance(self.embed_dim, tuple):
            return self.embed_dim
        return tuple(self.embed_dim * 2**stage for stage in range(NUM_STAGES))

    def stage_windows(
        self, image_size: int | Sequence[int] | None = None
    ) -> tuple[tuple[tuple[int, int], tuple[int, int], tuple[int, int]], ...]:
        """(token grid, window, shift of odd blocks), each (height, width) in tokens, per stage.

        In a Swin, per axis: where the grid is no longer than M, the window is the grid and the
        shift 0.

        Args:
            image_size: pixels, one side or (height, width); None for the model's own.

        Raises:
            ValueError: a side is not a positive multiple of 32.
        """
        sides = check_image_size(self.image_size if image_size is None else image_size)
        stages: list[Any] = []
        for stage in range(NUM_STAGES):
            grid = tuple(side // (PATCH_PIXELS * 2**stage) for side in sides)
            window: tuple[int, ...] = (self.window_size,) * 2
            shift: tuple[int, ...] = (0, 0)
            if self.traits.is_swin:
                shift = tuple(window[0] // 2 if side > window[0] else 0 for side in grid)
                window = tuple(min(window[0], side) for side in grid)
            stages.append((grid, window, shift))
        return tuple(stages)


def check_image_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels.

    Raises:
        ValueError: a side is not a positive multiple of 32.
    """
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    try:
        sides = tuple(index(side) for side in sides)
    except TypeError:
        sides = ()
    if len(sides) != 2 or any(side < UNIT_PIXELS or side % UNIT_PIXELS for side in sides):
        raise ValueError(
            f"image_size must be one or two positive multiples of {UNIT_PIXELS}, got {image_size!r}"
        )
    return sides


def _channels(embed_dim: int | Sequence[int]) -> int | tuple[int, ...]:
    """One number where each stage doubles it, so that equal sizes compare equal."""
    if not isinstance(embed_dim, (tuple, list)):
        return _integer(embed_dim, "embed_dim", 1)
    dims = _integers(embed_dim, "embed_dim", 1)
    doubled = tuple(dims[0] * 2**stage for stage in range(NUM_STAGES))
    return dims[0] if dims == doubled else dims


def _integer(value: Any, name: str, least: int) -> int:
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number


def _integers(values: Sequence[int], name: str, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(index(value) for value in values)
    except TypeError:
        numbers = ()
    if len(numbers) != NUM_STAGES or min(numbers) < least:
        which = "positive integers" if least == 1 else f"integers of at least {least}"
        raise ValueError(f"{name} must be {NUM_STAGES} {which}, got {values!r}")
    return numbers


_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
# No SwinV2 was published with GreenMIM; epsilon is that of timm and Microsoft.
_V2 = {"encoder": "swinv2", "image_size": 256, "window_size": 8, "norm_eps": 1e-5}
# Chu et al., NeurIPS 2021 (arXiv 2104.13840).
_TWINS = {"encoder": "twins_svt"}

MODELS: dict[str, dict] = {
    "greenmim_swin_tiny_patch4_window7_224": {**_TINY, "window_size": 7},
    "greenmim_swin_small_patch4_window7_224": {**_SMALL, "window_size": 7},
    "greenmim_swin_base_patch4_window7_224": {**_BASE, "window_size": 7},
    "greenmim_swin_base_patch4_window14_224": {**_BASE, "window_size": 14},
    "greenmim_swin_large_patch4_window14_224": {**_LARGE, "window_size": 14},
    "greenmim_swinv2_tiny_patch4_window8_256": {**_TINY, **_V2},
    "greenmim_swinv2_small_patch4_window8_256": {**_SMALL, **_V2},
    "greenmim_swinv2_base_patch4_window8_256": {**_BASE, **_V2},
    "greenmim_twins_svt_small_patch4_224": {
        **_TWINS,
        "embed_dim": 64,
        "depths": (2, 2, 10, 4),
        "num_heads": (2, 4, 8, 16),
    },
    "greenmim_twins_svt_base_patch4_224": {
        **_TWINS,
        "embed_dim": 96,
        "depths": (2, 2, 18, 2),
        "num_heads": (3, 6, 12, 24),
    },
    "greenmim_twins_svt_large_patch4_224": {**_TWINS, **_BASE},
}


def models_like(config: ModelConfig, fields: Sequence[str]) -> list[str]:
    """Names in `MODELS` with the encoder of a configuration and its values of these fields."""
    return [
        name
        for name, values in MODELS.items()
        if all(
            values.get(field, getattr(ModelConfig, field)) == getattr(config, field)
            for field in ("encoder", *fields)
        )
    ]


def model_config(name: str, **overrides) -> ModelConfig:
    """The configuration of a named model, with some values changed.

    Args:
        name: one of `MODELS`.
        overrides: fields of `ModelConfig` to change.

    Raises:
        ValueError: unknown name (the nearest ones are named) or sizes that do not fit together.
        TypeError: an override that ModelConfig does not have.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5) or list(MODELS)
        raise ValueError(f"unknown model {name!r}; did you mean {' or '.join(near)}?")
    return ModelConfig(**{**MODELS[name], **overrides})
