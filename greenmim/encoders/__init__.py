"""Hierarchical encoders that compute visible tokens only."""

from __future__ import annotations

import importlib
from collections.abc import Collection

from ..config import ENCODERS, ModelConfig
from .visible import VisibleBlock, VisibleEncoder, take_cells

__all__ = ["VisibleBlock", "VisibleEncoder", "create_encoder", "encoder_class", "encoder_of",
           "take_cells"]  # fmt: skip


def encoder_class(name: str) -> type[VisibleEncoder]:
    """The class of an encoder in `config.ENCODERS`."""
    module = importlib.import_module(f".{name}", __name__)
    return getattr(module, ENCODERS[name].class_name)


def encoder_of(names: Collection[str]) -> str:
    """The encoder whose weights have these names, without a prefix.

    Raises:
        ValueError: there is none; the text goes on after "it".
    """
    for name in ENCODERS:
        if encoder_class(name).claims(names):
            return name
    raise ValueError("has no encoder that is known here")


def create_encoder(config: ModelConfig) -> VisibleEncoder:
    """The encoder of a model, with fresh weights."""
    return encoder_class(config.encoder)(config)
