"""GreenMIM: masked image modelling on the visible patches of hierarchical vision transformers."""

import importlib.metadata

from .checkpoint import convert_checkpoint
from .config import ModelConfig
from .mim import GreenMIM, create_model

try:
    __version__ = importlib.metadata.version("greenmim")
except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["GreenMIM", "ModelConfig", "convert_checkpoint", "create_model"]
