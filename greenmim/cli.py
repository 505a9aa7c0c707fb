"""The command line: training (`pretrain`, `finetune`), evaluation and tools."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

import greenmim
from greenmim import messages
from greenmim.checkpoint import KINDS
from greenmim.finetune_recipe import FinetuneRecipe
from greenmim.guards import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    UserError,
    end_of_imports,
    exit_code,
    one_line,
    silence,
)
from greenmim.launch import SlurmJob, World, speaks
from greenmim.presets import check_recipe_file, preset_table, resolve_config
from greenmim.recipe import Recipe, RunRecipe

EXIT_CODES = (
    "exit codes: 0 finished; 1 an internal error, with its traceback; 2 bad input or a full disk,"
    " explained in one line; 3 stopped because losses or gradients were not finite; 4 another"
    " process of the run died or hung; 75 stopped by SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 and saved,"
    " repeat the command with --resume; 130 the same after Ctrl-C"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (see `EXIT_CODES`).

    Args:
        argv: Arguments without the program name; None means `sys.argv[1:]`.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in typed or os.environ.get("GREENMIM_DEBUG", "0") not in ("", "0")
    typed = [argument for argument in typed if argument != "--debug"]
    end = typed.index("--") if "--" in typed else len(typed)
    arguments = [*map(_underscores, typed[:end]), *typed[end:]]
    try:
        return exit_code(lambda: _run(arguments, typed, debug), debug)
    except SystemExit as leaving:  # --help and --print-config
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        print("greenmim: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` closed stdout; a run handles that itself (`RunLog`)
        asked, _ = messages.asked_for_help(typed)
        is_run = bool(arguments) and arguments[0] in RUNS
        if is_run and not asked and "--dry_run" not in arguments:
            raise
        silence(sys.stdout)
        return 0


def _run(arguments: list[str], typed: list[str], debug: bool) -> int:
    parser, subparser, function = build_parser(next(iter(arguments), ""))
    asked, topic = messages.asked_for_help(typed)
    if asked and subparser is not None and arguments[0] not in RUNS:
        print(messages.tool_help(subparser), end="")
        return 0
    if asked and subparser is not None:
        of_slurm = [field.name for field in dataclasses.fields(SlurmJob)]
        try:
            print(messages.help_text(subparser, topic, of_slurm), end="")
        except ValueError as error:
            raise _told_once(f"{error}.") from error
        return 0
    try:
        options = parser.parse_args(_config_first(arguments))
    except argparse.ArgumentError as error:
        if debug:
            raise
        said = messages.in_words(error, subparser or parser, typed)
        command = f" {arguments[0]}" if arguments[0] in COMMANDS else ""
        where = "all" if command.strip() in RUNS else ""
        hint = f"`greenmim{command} --help {where}".rstrip() + "` lists the options"
        raise _told_once(f"{said} ({hint})") from error
    if options.command:
        return function(subparser, options[options.command])
    parser.print_help(sys.stderr)
    return EXIT_BAD_INPUT


def _told_once(text: str) -> UserError:
    """A UserError that every process of a run finds: only one of them prints it."""
    error = UserError(text)
    error.quiet = not speaks()
    return error


def _underscores(argument: str) -> str:
    """`--work-dir=x` as `--work_dir=x`: both spellings of an option's name are understood."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _config_first(arguments: list[str]) -> list[str]:
    """Moves --config to the front: a file would override the options before it."""
    if not arguments or arguments[0] not in RUNS:
        return arguments
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    found, rest = finder.parse_known_args(arguments[1:])
    configs = [part for config in found.config for part in ("--config", config)]
    return [arguments[0], *configs, *rest]


def _parser(**options: Any) -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)


def build_parser(command: str = "pretrain") -> tuple[ArgumentParser, ArgumentParser, Callable]:
    """The whole parser, and one command's own parser and function.

    The other commands are listed without options: their imports are slow, or may be missing.
    """
    parser = _parser(
        prog="greenmim",
        version=greenmim.__version__,
        usage="greenmim COMMAND [options]",
        description="Masked image modelling that computes only the visible quarter of the image.",
        epilog="--debug (or GREENMIM_DEBUG=1) shows the traceback of an error.",
    )
    subcommands = parser.add_subcommands(dest="command", required=False, title="commands")
    made: tuple[Any, Any] = COMMANDS[command][1]() if command in COMMANDS else (None, None)
    subparser, function = made
    for name, (text, _) in COMMANDS.items():
        subcommands.add_subcommand(name, subparser if name == command else _parser(), help=text)
    return parser, subparser, function


# ---- runs ---------------------------------------------------------------------------------------

# The recipe of each command that trains, and what it does.
RUNS: dict[str, tuple[type[RunRecipe], str]] = {
    "pretrain": (Recipe, "Pre-train on a folder of images, with a preset (`greenmim presets`)."),
    "finetune": (
        FinetuneRecipe,
        "Fine-tune the encoder of a checkpoint (--init) to classify images in class folders.",
    ),
}
# Options of one command, not of the recipe: config.yaml does not have them.
OF_A_CALL = ("config", "resume", "max_steps", "profile", "mask_per_image", "dry_run", "launcher")


class _Preset(ActionConfigFile):
    """`--config` that takes the name of a preset as well as a file."""

    @staticmethod
    def apply_config(parser: Any, cfg: Namespace, dest: str, value: str) -> None:
        file = resolve_config(value, parser.of_command)
        check_recipe_file(file)
        try:
            ActionConfigFile.apply_config(parser, cfg, dest, file)
        except (argparse.ArgumentError, UserError):
            raise
        except Exception as error:  # PyYAML's constructors raise anything
            raise UserError(f"--config {file} is not a recipe: {one_line(error)}.") from error


def _run_command(command: str) -> tuple[ArgumentParser, Callable]:
    kind, text = RUNS[command]
    parser = _parser(
        usage=f"greenmim {command} --config NAME_OR_FILE --data.root FOLDER --work-dir FOLDER"
        " [--init CHECKPOINT] [--resume [CHECKPOINT]] [--dry-run] [--launcher slurm]"
        " [--any.value X]",
        description=text,
        epilog=EXIT_CODES,
    )
    parser.of_command = command  # type: ignore[attr-defined]  # for `_Preset`
    texts = {
        "config": "a preset or a YAML file; options override its values",
        "resume": "continue the run in --work-dir (or start it), or continue from CHECKPOINT",
        "launcher": "slurm submits the run as a job, with the Slurm options; not needed under"
        " torchrun or srun",
        "dry_run": "only check, and print what would run at what cost",
        "max_steps": "stop after N updates in all, with a checkpoint; the schedule is unchanged",
        "profile": "record a trace of a few updates, on a GPU also their memory, in the work dir",
        "mask_per_image": "short for --mask.per-image true",
    }
    add = parser.add_argument
    add("--config", action=_Preset, metavar="NAME_OR_FILE", help=texts["config"])
    add("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=texts["resume"])
    add("--max_steps", type=int | None, metavar="N", help=texts["max_steps"])
    for name in ("mask_per_image", "dry_run", "profile"):
        if name != "mask_per_image" or kind is Recipe:
            add(f"--{name}", action="store_true", help=texts[name])
    add("--launcher", choices=("none", "slurm"), default="none", help=texts["launcher"])
    parser.add_class_arguments(SlurmJob, None, as_group=False)
    parser.add_class_arguments(kind, None, as_group=False)
    _hide_groups(parser, {f.name for f in dataclasses.fields(kind) if "Config" in str(f.type)})
    return parser, functools.partial(_train, kind)


def _hide_groups(parser: ArgumentParser, names: set[str]) -> None:
    """`--model FILE` and the like work, but only clutter the help."""
    for action in parser._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS


def _train(kind: type[RunRecipe], parser: ArgumentParser, options: Namespace) -> int:
    import torch
    from torch.distributed.elastic.multiprocessing.errors import record

    from greenmim.training.dry_run import dry_run
    from greenmim.training.slurm import submit
    from greenmim.training.startup import choose_device
    from greenmim.training.train import train

    end_of_imports()
    values = options.clone()
    for name in OF_A_CALL:
        values.pop(name, None)
    of_job = {field.name: values.pop(field.name) for field in dataclasses.fields(SlurmJob)}
    try:
        recipe = kind(**vars(parser.instantiate(values)))
    except (UserError, ValueError) as error:  # the recipe's own checks and the model's
        raise _told_once(str(error)) from error
    except TypeError as error:  # a line of YAML that names a group of options and gives none
        raise _told_once(
            f"A group of options in the recipe is empty ({error}); give it values or remove it."
        ) from error
    if options.get("mask_per_image") and isinstance(recipe, Recipe):
        recipe.mask.per_image = True
    max_steps, profile = options.max_steps, options.profile
    if max_steps is not None and max_steps < 1:
        raise _told_once(f"--max-steps is {max_steps}; it has to be at least 1.")
    if options.launcher == "slurm" and World.from_environment().size > 1:
        raise _told_once(
            "--launcher slurm starts the processes itself; call it without torchrun or srun."
        )
    if options.launcher == "none" and not options.dry_run:
        # `record` reports what is raised to torchrun, and returns what `train` returns.
        return record(train)(recipe, options.resume, max_steps, profile).exit_code  # type: ignore[union-attr]

    world = World.from_environment()
    job = SlurmJob(**of_job) if options.launcher == "slurm" else None
    # Not checked here: a login node has no GPU, and a --cuda-graph dry run may be on a laptop.
    on_gpu = (job is not None or recipe.cuda_graph) and recipe.device != "cpu"
    device = torch.device("cuda") if on_gpu else choose_device(recipe.device, world)
    try:
        text, lines = dry_run(recipe, options.resume, device, job.processes if job else world.size)
    except UserError as error:
        raise _told_once(str(error)) from error
    if world.is_main:
        print(*([text] if options.dry_run else []), *lines, sep="\n")
    if job is not None and not options.dry_run:
        number, folder = submit(recipe, options.resume, job, max_steps, profile)
        print(f"submitted job {number}; its logs will be in {folder}")
    return 0


# ---- tools: imported only when called, as another's packages may be missing ----------------------


def _tool(usage: str, tool: Callable, tell: Callable) -> tuple[ArgumentParser, Callable]:
    """A tool's options are the parameters of its function, described by its docstring."""
    parser = _parser(usage=f"greenmim {usage}", description=(tool.__doc__ or "").split("\n")[0])
    by_hand: dict[str, dict[str, Any]] = {
        "images": {
            "nargs": "+",
            "required": True,
            "help": "Image files, folders, tars, shards or datasets.",
        },
        "source": {
            "choices": KINDS,
            "help": "Kind of the input; not needed for a run's checkpoint.",
        },
        "overwrite": {"action": "store_true", "help": "Replace an output that is there already."},
    }
    parser.add_function_arguments(tool, as_group=False, skip=set(by_hand))
    for name in by_hand.keys() & inspect.signature(tool).parameters.keys():
        parser.add_argument(f"--{name}", **by_hand[name])
    _hide_groups(parser, {"data"})

    def run(_: ArgumentParser, options: Namespace) -> int:
        end_of_imports()
        result = tool(**vars(parser.instantiate(options)))
        if result is not None:  # only the main process has a result
            print(tell(result, options))
        return 0

    return parser, run


def _reconstruct() -> tuple[ArgumentParser, Callable]:
    from greenmim.tools.reconstruct import reconstruct

    usage = "reconstruct --checkpoint FILE --images FILE_OR_FOLDER ... --output PICTURE"
    return _tool(usage, reconstruct, lambda path, _: f"wrote {path}")


def _knn() -> tuple[ArgumentParser, Callable]:
    from greenmim.tools.evaluate import knn

    return _evaluation("knn", knn, " --data.val-root FOLDER")


def _probe() -> tuple[ArgumentParser, Callable]:
    from greenmim.tools.evaluate import probe

    return _evaluation("probe", probe, " --data.val-root FOLDER")


def _eval() -> tuple[ArgumentParser, Callable]:
    from greenmim.tools.classify import classify_images

    return _evaluation("eval", classify_images, "")


def _evaluation(name: str, tool: Callable, more: str) -> tuple[ArgumentParser, Callable]:
    from greenmim.tools.measured import said

    usage = f"{name} --checkpoint FILE --data.root FOLDER{more} --output FILE.json [options]"
    return _tool(usage, tool, lambda found, options: said(found, options.output))


def _export() -> tuple[ArgumentParser, Callable]:
    from greenmim.tools.export import export, timm_line

    def tell(facts: dict[str, str], options: Namespace) -> str:
        note = f" ({facts['padding']})" if "padding" in facts else ""
        return f"wrote {options.output}; for timm{note}:\n{timm_line(facts, options.output)}"

    return _tool("export --checkpoint FILE --output FILE.safetensors [--model NAME]", export, tell)


def _convert() -> tuple[ArgumentParser, Callable]:
    from greenmim.tools.convert import convert_file

    def tell(count: int, options: Namespace) -> str:
        return f"wrote {options.output}: {count} tensors, {options.target} names"

    usage = "convert --input FILE --output FILE [--source NAME] [--target NAME]"
    return _tool(usage, convert_file, tell)


def _presets() -> tuple[ArgumentParser, Callable]:
    return _tool("presets", preset_table, lambda text, _: text)


def _doctor() -> tuple[ArgumentParser, Callable]:
    from greenmim.tools.doctor import report

    return _tool("doctor", report, lambda text, _: text)


COMMANDS = {
    "pretrain": ("pre-train an encoder on images", lambda: _run_command("pretrain")),
    "finetune": (
        "fine-tune a pre-trained encoder to classify images",
        lambda: _run_command("finetune"),
    ),
    "reconstruct": ("draw original, masked and reconstructed images", _reconstruct),
    "knn": ("evaluate an encoder by k nearest neighbours", _knn),
    "probe": ("evaluate an encoder by a linear probe", _probe),
    "eval": ("evaluate a fine-tuned classifier", _eval),
    "export": ("write the encoder or classifier as a file that timm loads", _export),
    "convert": ("convert checkpoints between official, greenmim and timm", _convert),
    "presets": ("list the presets for --config", _presets),
    "doctor": ("report what is installed and which backends work", _doctor),
}
