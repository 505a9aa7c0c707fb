"""State dicts of three kinds, and files that hold them.

- greenmim: ``encoder.`` + timm's keys, and the decoder's keys as published, or a classifier's head.
- official: the published checkpoints: patch merging stands at the end of the stage before, and
  every block has a ``relative_position_index`` buffer; of a Twins, strided convolutions have their
  input channels last.
- timm: an encoder as in timm, without decoder; files of Microsoft's Swins and Meituan's Twins are
  read as this kind.

The head of a classifier is left out of what is converted.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .config import ModelConfig
from .encoders import VisibleEncoder, encoder_class, encoder_of
from .guards import first_line

KINDS = ("official", "timm", "greenmim")
MERGE_ORDERS = ("swin", "row-major")
_ENCODER, _HEAD, _RUN = "encoder.", "head.", "greenmim."
# Buffers that follow from the sizes: dropped on reading, rebuilt for the kind that has them.
_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
# What official files hold beside tensors and plain values: the command line they were made with.
_PLAIN_CLASSES: list[Any] = [argparse.Namespace, pathlib.PosixPath]
# A pattern in a name, and whose files have such names; the first match counts.
_MAKERS = (
    (r"^encoder\.mask_token|^decoder\.0\.", "SimMIM's, of which only the encoder's would be read"),
    (r"^(swin|swinv2|donut)\.|^encoder\.layers\.\d+\.blocks\.\d+\.layernorm", "transformers' Swin"),
    (r"^features\.", "torchvision's Swin"),
    (r"^backbone\.|^stages\.\d+\.blocks", "MMDetection's Swin"),
    (r"^swinViT\.", "MONAI's"),
    (r"^blocks\.0\.0\.attn\.q\.", "a Twins-PCPVT, which has no windows"),
    (r"^encoder\.pos_block\.", "a Twins-SVT of GreenMIM or of this package"),
    (r"^pos_block\.", "a Twins-SVT of timm or Meituan (kind 'timm')"),
    (r"^encoder\.layers\.0\.downsample", "GreenMIM's published ones (kind 'official')"),
    (r"^encoder\.layers\.3\.downsample", "those of this package (kind 'greenmim')"),
    (r"^layers\.0\.downsample", "Microsoft's Swin (read as kind 'timm')"),
    (r"^layers\.3\.downsample", "timm's Swin (kind 'timm')"),
)
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
# Fields of a run's checkpoint with their types, and those that every reader needs.
_RUN_FIELDS: dict[str, Any] = {
    "version": (int, str), "greenmim": str, "step": int, "epoch": (int, float),
    "updates": int, "steps_per_epoch": int,
    "images_per_update": int, "skipped": int, "model": dict, "ema": dict, "scaler": dict,
    "moments": dict, "recipe": dict, "classes": list,
}  # fmt: skip
_ALWAYS = ("step", "epoch", "steps_per_epoch", "model", "recipe")
# Errors of file systems that cannot fsync a folder: FUSE, some network file systems.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def convert_checkpoint(
    state_dict: Mapping[str, Tensor], source: str, target: str, merge_order: str = "swin"
) -> dict[str, Tensor]:
    """Convert a state dict from one kind to another.

    Args:
        state_dict: tensors by name, as `source` names them.
        source: "official", "timm" or "greenmim".
        target: "official", "timm" or "greenmim". "timm" leaves the decoder out; from "timm" there
            is no decoder to convert, so only the encoder comes out.
        merge_order: order in which patch merging concatenates the 2 x 2 cell in the given weights:
            "swin" (0,0), (1,0), (0,1), (1,1), or "row-major" (0,0), (0,1), (1,0), (1,1), as in
            official weights published before 2023. The result has Swin's order.

    Returns:
        A new dict; tensors that need no change are those of `state_dict`.

    Raises:
        ValueError: unknown kind or order, a state dict that is not of kind `source`, or a model
            that `target` does not have (as "official" a SwinV2, or windows that are not square).
    """
    for name, value, allowed in (
        ("source", source, KINDS),
        ("target", target, KINDS),
        ("merge_order", merge_order, MERGE_ORDERS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    network, encoder, decoder = _read(plain_names(state_dict), source)
    if merge_order == "row-major":
        encoder = network.to_swin_order(encoder)
    if target == "timm":
        return network.to_timm(encoder)
    if target == "official":
        encoder = network.to_official(encoder)
    return {**{_ENCODER + name: tensor for name, tensor in encoder.items()}, **decoder}


def kind_of(state_dict: Mapping[str, Tensor]) -> str:
    """Which of `KINDS` a state dict is.

    Raises:
        ValueError: it is none of them; the message says whose it looks like.
    """
    tensors = plain_names(state_dict)
    for kind in KINDS:
        try:
            _read(tensors, kind)
        except ValueError:
            continue
        return kind
    raise ValueError(f"this state dict is of no known kind; it looks like {_maker(tensors)}")


def plain_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the prefixes of DistributedDataParallel and torch.compile in their names."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): tensor
        for name, tensor in state_dict.items()
    }


def _read(
    tensors: dict[str, Tensor], source: str
) -> tuple[type[VisibleEncoder], dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's class, its weights under that class's names, and the decoder's weights."""
    tensors = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in _BUFFERS}
    if source == "timm":
        encoder = {n: t for n, t in tensors.items() if not n.startswith(_HEAD)}
        decoder = {}
    else:
        encoder = {
            n.removeprefix(_ENCODER): t for n, t in tensors.items() if n.startswith(_ENCODER)
        }
        decoder = {n: t for n, t in tensors.items() if not n.startswith((_ENCODER, _HEAD))}
    try:
        network = encoder_class(encoder_of(encoder))
        encoder = network.to_own(encoder, source)
        strangers = [n for n in decoder if not n.startswith(("decoder_", "mask_token"))]
        if strangers:
            raise ValueError(f"holds {strangers[0]!r}")
    except ValueError as error:
        raise ValueError(
            f"this is not a state dict of kind {source!r}: it {error}; it looks like"
            f" {_maker(tensors)}"
        ) from error
    return network, encoder, decoder


def _maker(tensors: Mapping[str, Tensor]) -> str:
    """Whose file it looks like, and how it is read."""
    for sign, maker in _MAKERS:
        if any(re.search(sign, name) for name in tensors):
            return maker
    return "nobody's that is known here"


def load_checkpoint(path: str | os.PathLike, lazily: bool = False) -> dict[str, Any]:
    """The whole content of a checkpoint file, on the CPU.

    Pickles are read with ``weights_only``: tensors and plain values, the ``argparse.Namespace`` of
    official files with its paths, and no code.

    Args:
        path: a .safetensors file, or one written by ``torch.save``.
        lazily: map a file of ``torch.save`` into memory: tensors are read when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds an object of another class (which is named),
            or something else than a dict.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_zip(path)
        with torch.serialization.safe_globals(_PLAIN_CLASSES):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except OSError:
        raise
    except MemoryError as error:
        raise ValueError(f"{path} needs more memory than this machine has") from error
    except Exception as error:  # pickle, zip and torch raise anything on a damaged file
        refused = _REFUSED.search(str(error))
        if refused:
            raise ValueError(
                f"{path} holds a {refused[1]}, and only tensors and plain values are read, as a"
                " pickle can run code; save only the model's state dict"
            ) from error
        why = first_line(error)
        why = "" if "weights_only" in why else f": {why}"  # which is torch's advice, not a reason
        raise ValueError(f"{path} is damaged or no checkpoint{why}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a checkpoint; save a model's state dict"
        )
    problem = _tensor_problem(content, path.stat().st_size) or _field_problem(content)
    if problem:
        raise ValueError(f"{path} is damaged: {problem}; use another checkpoint")
    return content


def _check_zip(path: pathlib.Path) -> None:
    """Raises ValueError for a zip that swells: a small file could fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            claimed, there = sum(e.file_size for e in file.infolist()), path.stat().st_size
        if claimed > there:
            raise ValueError(
                f"it is a compressed zip ({claimed} bytes in {there}); torch.save writes none, so"
                " write it again"
            )


def _tensor_problem(content: dict[str, Any], size: int) -> str | None:
    """What is wrong with a tensor in a file of `size` bytes; None if nothing.

    A tensor of a few bytes can claim billions of elements, which a copy would allocate.
    """
    left: list[tuple[object, object]] = list(content.items())
    seen: set[int] = set()
    while left:
        name, value = left.pop()
        if isinstance(value, (dict, list, tuple)):
            if id(value) not in seen:  # a pickle's list may hold itself, or another many times
                seen.add(id(value))
                left += value.items() if isinstance(value, dict) else ((name, x) for x in value)
            continue
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.device.type != "cpu":
            return f"its {name} is a tensor without values of its own or a sparse one"
        if value.nbytes > size:
            return f"its {name} claims {value.nbytes} bytes, and the file has {size}"
    return None


def _field_problem(content: dict[str, Any]) -> str | None:
    """What a run's checkpoint lacks, or has of another type than a run writes."""
    if run_command(content) is None:
        return None
    for name, kind in _RUN_FIELDS.items():
        if name not in content:
            if name in _ALWAYS:
                return f"it lacks its {name}"
        elif not isinstance(content[name], kind) or isinstance(content[name], bool):
            return f"its {name} is a {type(content[name]).__name__}"
        elif name.endswith(("per_epoch", "per_update")) and content[name] < 1:
            return f"its {name} is {content[name]}"
    if not isinstance(content["recipe"].get("model"), dict):
        return "its recipe has no model"
    return _size_problem(content)


def _size_problem(content: dict[str, Any]) -> str | None:
    """Whether a run's sizes ask for more weights than its file has.

    No small file may make a huge network.
    """
    try:
        config = ModelConfig.of_saved(content["recipe"]["model"])
    except (ValueError, TypeError, KeyError) as error:
        return f"its sizes: {first_line(error)}"
    blocks = list(zip(config.depths, config.stage_dims, strict=True))
    if run_command(content) == "pretrain":
        blocks.append((config.decoder_depth, config.decoder_dim))
    least = sum(8 * depth * width**2 for depth, width in blocks)  # of the MLPs alone
    there = sum(value.numel() for value in content["model"].values() if isinstance(value, Tensor))
    return f"its sizes need {least} weights, it has {there}" if least > there else None


def run_command(content: Mapping[str, Any]) -> str | None:
    """The command whose run wrote this content, "pretrain" or "finetune"; None for other files."""
    name = content.get("format")
    is_run = isinstance(name, str) and name.startswith(_RUN)
    return str(name).removeprefix(_RUN) if is_run else None


def load_state_dict_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint file, under whichever of the usual keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or holds no state dict.
    """
    return find_state_dict(load_checkpoint(path), path)


def find_state_dict(content: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Tensor]:
    """The model's state dict in what :func:`load_checkpoint` gave for `path`.

    These are the averaged weights, where a fine-tuning run kept some.

    Raises:
        ValueError: there is none.
    """
    for inner in (*map(content.get, ("ema", "model", "state_dict")), content):
        if isinstance(inner, Mapping) and inner:
            if all(isinstance(n, str) and isinstance(t, Tensor) for n, t in inner.items()):
                return dict(inner)
    raise ValueError(f"{path} holds no state dict under 'ema', 'model', 'state_dict' or at its top")


def save_atomic(content: Any, path: str | os.PathLike) -> None:
    """``torch.save``, so that the file is there whole or not at all, even after a power cut.

    Args:
        content: what to save.
        path: the file to write or replace; its folder must be there.

    Raises:
        OSError: the folder is not there or cannot be written to, or the disk is full. What was at
            `path` is untouched then, and nothing is left beside it.
    """

    def write(beside: pathlib.Path) -> None:
        with open(beside, "wb") as file:  # Python's: torch's own hides why a write failed
            torch.save(content, file)

    write_atomic(write, pathlib.Path(path))


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, facts: Mapping[str, str]
) -> None:
    """A safetensors file with `facts` in its metadata, written like :func:`save_atomic`.

    Args:
        tensors: tensors by name.
        path: the file to write or replace; its folder must be there.
        facts: strings by name; "format": "pt" is added.

    Raises:
        OSError: as :func:`save_atomic`.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **facts}
    write_atomic(
        lambda beside: safetensors.torch.save_file(whole, beside, metadata), pathlib.Path(path)
    )


def save_text(text: str, path: str | os.PathLike) -> None:
    """A file of text in UTF-8, written like :func:`save_atomic`.

    Args:
        text: its content.
        path: the file to write or replace; its folder must be there.

    Raises:
        OSError: as :func:`save_atomic`.
    """
    write_atomic(lambda beside: beside.write_text(text, encoding="utf-8"), pathlib.Path(path))


def write_atomic(write: Callable[[pathlib.Path], object], path: pathlib.Path) -> None:
    """A file written like :func:`save_atomic` by `write`, which gets the path to write to."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            write(beside)
        except (RuntimeError, safetensors.SafetensorError) as error:
            # Their writers turn a failed write into an error of their own.
            raise OSError(f"{path} could not be written: {error}") from error
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def free_name(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The first of name.format(1), name.format(2) and so on that is not in a folder yet."""
    numbered = (folder / name.format(number) for number in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def sync_folder(path: pathlib.Path) -> None:
    """Flush the names in a folder to the disk, so that a power cut does not undo a rename.

    It does nothing on file systems that flush files only.

    Raises:
        OSError: the folder cannot be opened or flushed.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(folder)
