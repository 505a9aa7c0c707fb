"""The recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

import yaml

from greenmim.config import ModelConfig
from greenmim.finetune_recipe import FinetuneRecipe
from greenmim.guards import UserError
from greenmim.messages import columns, nearest
from greenmim.recipe import DataConfig, OptimConfig, Recipe, RunRecipe

CONFIGS = Path(__file__).parent / "configs"


def preset_names(command: str | None = None) -> list[str]:
    """Names of the presets that come with the package, of one command or of all."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return [name for name in names if command in (None, command_of(name))]


def command_of(preset: str) -> str:
    """The command that a preset is for."""
    return "finetune" if preset.startswith("finetune_") else "pretrain"


def resolve_config(name_or_path: str, command: str = "pretrain") -> str:
    """Path of a recipe file: a file given as such, or the command's preset of that name.

    Raises:
        UserError: neither a file nor such a preset; the message says what may be meant.
    """
    if Path(name_or_path).is_file():
        return str(name_or_path)
    name, names = name_or_path.removesuffix(".yaml"), preset_names(command)
    if name in names:
        return str(CONFIGS / f"{name}.yaml")
    if name in preset_names():
        raise UserError(f"--config {name} is a preset of `greenmim {command_of(name)}`.")
    raise UserError(
        f"--config {name_or_path} is neither a file nor a preset.{nearest(name, names)}"
        " `greenmim presets` lists them."
    )


def preset_table() -> str:
    """List the presets, their commands and sizes; docs/ has a page for each command."""
    rows = []
    for name in [*preset_names("pretrain"), *preset_names("finetune")]:
        values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        kinds: dict[str, type[RunRecipe]] = {"pretrain": Recipe, "finetune": FinetuneRecipe}
        epochs = kinds[command_of(name)].epochs
        window = values.get("model", {}).get("window_size", ModelConfig.window_size)
        batch = values.get("data", {}).get("batch_size", DataConfig.batch_size)
        update = batch * values.get("optim", {}).get("accumulate", OptimConfig.accumulate)
        sizes = (window, values.get("epochs", epochs), update)
        rows.append((name, command_of(name), *map(str, sizes)))
    head = ("preset", "command", "window", "epochs", "images of an update, in each process")
    return "\n".join(columns([head, *rows]))
