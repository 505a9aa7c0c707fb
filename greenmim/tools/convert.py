"""Converting checkpoint files; the conversion itself is `checkpoint.convert_checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import greenmim
from greenmim.checkpoint import (
    convert_checkpoint,
    run_command,
    save_atomic,
    save_safetensors,
)
from greenmim.guards import UserError
from greenmim.tools.loading import check_output, check_there, not_written, read_weights

OUTPUT_SUFFIXES = (".safetensors", ".pth", ".pt")


def convert_file(
    input: str | Path,
    output: str | Path,
    *,
    source: Literal["official", "timm", "greenmim"] | None = None,
    target: Literal["official", "timm", "greenmim"] = "timm",
    merge_order: Literal["swin", "row-major"] = "swin",
    overwrite: bool = False,
) -> int:
    """Convert checkpoints: official, greenmim, timm.

    Args:
        input: A .safetensors or PyTorch file; a run's own checkpoint is recognised.
        output: Written whole or not at all; the suffix says how: .safetensors holds the tensors,
            .pth and .pt {"model": tensors}.
        source: What the input is; a run's own checkpoint need not be named.
        target: What to write.
        merge_order: row-major for official weights published before 2023, else swin.
        overwrite: Replace an output that is there already.

    Returns:
        Number of tensors written.

    Raises:
        UserError: a file is missing, unreadable or there already, or not what `source` says.
    """
    input, output = Path(input), Path(output)
    check_there(input)
    check_output(output, OUTPUT_SUFFIXES, overwrite)
    content, weights = read_weights(input)
    if command := run_command(content):
        if command == "finetune":
            raise UserError(
                f"{input} is a checkpoint of `greenmim finetune`; `greenmim export` writes it for"
                " timm, with its head."
            )
        if source not in (None, "greenmim"):
            raise UserError(
                f"{input} is a checkpoint of `greenmim {command}`, not --source {source}."
            )
        source = "greenmim"
    if source is None:
        raise UserError(
            f"{input} does not say what it is; pass --source official, timm or greenmim."
        )
    if merge_order == "row-major" and source != "official":
        raise UserError(
            f"--merge-order row-major is of official weights, and {input} is --source {source};"
            " leave it out."
        )
    try:
        converted = convert_checkpoint(
            weights, source=source, target=target, merge_order=merge_order
        )
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{input} cannot be converted: {' '.join(str(error).split())}") from error
    converted = {name: tensor.detach().cpu() for name, tensor in converted.items()}
    facts = {"greenmim": greenmim.__version__, "source": source, "target": target}
    try:
        if output.suffix == ".safetensors":
            save_safetensors(converted, output, facts)
        else:
            save_atomic({"model": converted}, output)
    except OSError as error:
        raise not_written(output, error) from error
    return len(converted)
