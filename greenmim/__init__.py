"""GreenMIM: masked image modelling on the visible patches of hierarchical vision transformers."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import convert_checkpoint
    from .config import ModelConfig
    from .mim import GreenMIM, create_model

__all__ = ["GreenMIM", "ModelConfig", "convert_checkpoint", "create_model"]
_HOMES = {
    "GreenMIM": "mim",
    "ModelConfig": "config",
    "convert_checkpoint": "checkpoint",
    "create_model": "mim",
}

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> object:
        # PyTorch takes seconds to import: not before the command line has set up what Ctrl-C does.
        if name == "__version__":
            return _version()
        if name in _HOMES.values():
            return _module(name)
        if name in _HOMES:
            return getattr(_module(_HOMES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        from .guards import missing_package

        if said := missing_package(error):
            raise ModuleNotFoundError(said, name=error.name) from error
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("greenmim")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
