"""The recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

import yaml

from greenmim.config import ModelConfig
from greenmim.guards import UserError
from greenmim.messages import columns, nearest
from greenmim.recipe import DataConfig, OptimConfig, Recipe

CONFIGS = Path(__file__).parent / "configs"


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def resolve_config(name_or_path: str) -> str:
    """Path of a recipe file: a file given as such, or the preset of that name.

    Raises:
        UserError: neither a file nor a preset; the message lists the presets.
    """
    if Path(name_or_path).is_file():
        return str(name_or_path)
    name = name_or_path.removesuffix(".yaml")
    if name in preset_names():
        return str(CONFIGS / f"{name}.yaml")
    raise UserError(
        f"--config {name_or_path} is neither a file nor a preset.{nearest(name, preset_names())}"
        " `greenmim presets` lists them."
    )


def preset_table() -> str:
    """List the presets: window, epochs, images of an update. docs/pretraining.md says more."""
    rows = []
    for name in preset_names():
        values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        window = ModelConfig(**values.get("model", {})).window_size
        batch = DataConfig(**values.get("data", {})).batch_size
        update = batch * OptimConfig(**values.get("optim", {})).accumulate
        rows.append((name, str(window), str(values.get("epochs", Recipe.epochs)), str(update)))
    head = ("preset", "window", "epochs", "images of an update, in each process")
    return "\n".join(columns([head, *rows]))
