"""The recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

import yaml

from greenmim.config import ModelConfig
from greenmim.finetune_recipe import FinetuneRecipe
from greenmim.guards import UserError, one_line
from greenmim.messages import columns, nearest
from greenmim.recipe import DataConfig, OptimConfig, Recipe, RunRecipe

CONFIGS = Path(__file__).parent / "configs"
_MOST_VALUES = 10_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # jsonargparse's: they differ in details


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


def check_recipe_file(path: str) -> None:
    """Raises UserError unless a file is text that unfolds to no more than a recipe can hold.

    A list of a list of lists, each named once and repeated, is a few lines and fills the memory.
    """
    try:
        top = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=_LOADER)
        size = _unfolded(top, {})
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {one_line(error)}.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} is no recipe: {one_line(error)}.") from error
    if size > _MOST_VALUES:
        raise UserError(
            f"--config {path} unfolds to more than {_MOST_VALUES} values, which is no recipe; write"
            " out what it repeats by name."
        )


def _unfolded(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a part of a file is, where what is repeated by name counts each time."""
    if isinstance(node, yaml.CollectionNode) and id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # of one that holds itself
        inner = [part for item in node.value for part in (item if type(item) is tuple else (item,))]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in inner)
    return known.get(id(node), 1)


def preset_table() -> str:
    """List the presets, their commands and sizes; docs/ has a page for each command."""
    rows = []
    kinds: dict[str, type[RunRecipe]] = {"pretrain": Recipe, "finetune": FinetuneRecipe}
    for name in [*preset_names("pretrain"), *preset_names("finetune")]:
        values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        epochs = kinds[command_of(name)].epochs
        window = values.get("model", {}).get("window_size", ModelConfig.window_size)
        batch = values.get("data", {}).get("batch_size", DataConfig.batch_size)
        update = batch * values.get("optim", {}).get("accumulate", OptimConfig.accumulate)
        sizes = (window, values.get("epochs", epochs), update)
        rows.append((name, command_of(name), *map(str, sizes)))
    head = ("preset", "command", "window", "epochs", "images per update and process")
    return "\n".join(columns([head, *rows]))
