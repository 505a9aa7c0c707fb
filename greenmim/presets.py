"""The recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from greenmim.guards import UserError

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
        f"--config {name_or_path} is neither a file nor a preset; the presets are"
        f" {', '.join(preset_names())}."
    )
