"""The command line: `greenmim pretrain | reconstruct | export | convert | doctor`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from greenmim.guards import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_PEER, PeerError
from greenmim.messages import silence
from greenmim.presets import preset_names, resolve_config
from greenmim.recipe import Recipe, SlurmJob, UserError

EXIT_CODES = (
    "exit codes: 0 done; 2 bad input, told in one line; 3 stopped because losses were not finite;"
    " 4 another process of the run died or hung; 75 stopped by SIGTERM, SIGHUP, SIGUSR1 or"
    " SIGUSR2 after saving, repeat the command with --resume; 130 the same after Ctrl-C; 1 an error"
    " of greenmim itself, with its traceback"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (see `EXIT_CODES`).

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold bytes that no encoding has.
        with contextlib.suppress(AttributeError):  # no file of the system's
            stream.reconfigure(errors="backslashreplace")
    arguments = [_underscores(a) for a in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments or os.environ.get("GREENMIM_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        arguments = _config_first(arguments)
        parser, commands = build_parser()
        options = parser.parse_args(arguments)
        if options.command is None:
            parser.print_help(sys.stderr)
            return EXIT_BAD_INPUT
        subparser, function = commands[options.command]
        return function(subparser, options[options.command])
    except SystemExit as leaving:  # --help and --print-config
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        print("greenmim: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # of `| head`, which has seen enough; a run looks after itself
        if arguments[:1] == ["pretrain"] and not {"-h", "--help", "--dry_run"} & set(arguments):
            raise
        silence(sys.stdout)
        return 0
    except argparse.ArgumentError as error:
        if debug:
            raise
        return _complain_once(_in_our_words(error))
    except UserError as error:
        if debug:
            raise
        return EXIT_BAD_INPUT if error.quiet else _complain(str(error))
    except PeerError as error:
        if debug:
            raise
        return _complain(str(error), EXIT_PEER)


def _complain(message: str, code: int = EXIT_BAD_INPUT) -> int:
    try:
        print(f"greenmim: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it: the code still tells
        silence(sys.stderr)
    return code


def _complain_once(message: str) -> int:
    """What all processes of a run find, told by the main one."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return _complain(message) if rank == "0" else EXIT_BAD_INPUT


def _in_our_words(error: argparse.ArgumentError) -> str:
    """jsonargparse's message with options named as they are typed and types as people call them."""
    text = " ".join(str(error).split())
    text = re.sub(r'Parser key "([\w.]+)":', lambda m: f"--{m[1].replace('_', '-')}:", text)
    text = re.sub(r"Expected an? (?:<class '(\w+)'>|typing\.)", r"expected \1", text)
    text = re.sub(
        r"are required: (.+)",
        lambda m: "are required: " + re.sub(r"\b\w+\.(\w+)", r"--\1", m[1]),
        text,
    )
    return f"{text} (--help lists the options)"


def _underscores(argument: str) -> str:
    """`--work-dir=x` as `--work_dir=x`: both spellings of an option's name are understood."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _config_first(arguments: list[str]) -> list[str]:
    """The command, its --config, and the rest: a file would override the options before it."""
    if arguments[:1] != ["pretrain"]:
        return arguments
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    found, rest = finder.parse_known_args(arguments[1:])
    configs = [part for config in found.config for part in ("--config", config)]
    return ["pretrain", *configs, *rest]


class _Formatter(DefaultHelpFormatter):
    """Option names with dashes, as they are usually typed; line breaks of a text are kept."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(
                line, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
            )
            for line in text.splitlines()
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = super()._format_action_invocation(action)
        for option in action.option_strings:
            text = text.replace(option, option.replace("_", "-"))
        return text


def _parser(**options: str) -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, formatter_class=_Formatter, **options)


def build_parser() -> tuple[ArgumentParser, dict[str, tuple[ArgumentParser, Callable[..., int]]]]:
    """The whole parser, and each subcommand's parser and function."""
    parser = _parser(
        prog="greenmim",
        usage="greenmim COMMAND [options]",
        description="Masked image modelling that computes only the visible quarter of the image.",
        epilog="--debug (or GREENMIM_DEBUG=1) shows the traceback of an error.",
    )
    subcommands = parser.add_subcommands(dest="command", required=False, title="commands")
    commands = {}
    for name, make, function, text in (
        ("pretrain", _pretrain_parser, _pretrain, "pre-train a Swin on a folder of images"),
        ("reconstruct", _reconstruct_parser, _reconstruct, "draw original, masked, reconstruction"),
        ("export", _export_parser, _export, "write the encoder as a file that timm loads"),
        ("convert", _convert_parser, _convert, "convert checkpoints: official, greenmim, timm"),
        ("doctor", _doctor_parser, _doctor, "say what is installed and which backends work"),
    ):
        subparser = make()
        subcommands.add_subcommand(name, subparser, help=text)
        commands[name] = (subparser, function)
    return parser, commands


# ---- pretrain -----------------------------------------------------------------------------------


class _Preset(ActionConfigFile):
    """`--config` that takes the name of a preset as well as a file."""

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        ActionConfigFile.apply_config(parser, cfg, dest, resolve_config(value))


def _pretrain_parser() -> ArgumentParser:
    parser = _parser(
        usage="greenmim pretrain --config NAME_OR_FILE --data.root FOLDER --work-dir FOLDER"
        " [--resume [CHECKPOINT]] [--dry-run] [--launcher slurm] [--any.value X]",
        description="Pre-train on a folder of images. Presets for --config:\n  "
        + "\n  ".join(preset_names()),
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "--config",
        action=_Preset,
        metavar="NAME_OR_FILE",
        help="a preset or a YAML file; options override its values",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on with the run in --work-dir (or start it), or from this checkpoint",
    )
    parser.add_argument(
        "--mask_per_image", action="store_true", help="the same as --mask.per-image true"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would run and what it would cost"
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "slurm"),
        default="none",
        help="slurm submits the run as a job, with the options that follow; torchrun and srun need"
        " none",
    )
    parser.add_class_arguments(SlurmJob, None, as_group=False)
    parser.add_class_arguments(Recipe, None, as_group=False)
    groups = {f.name for f in dataclasses.fields(Recipe) if "Config" in str(f.type)}
    for action in parser._actions:
        if action.dest in groups:  # `--model FILE` and the like work, but only clutter the help
            action.help = argparse.SUPPRESS
    return parser


def _pretrain(parser: ArgumentParser, options: Namespace) -> int:
    from torch.distributed.elastic.multiprocessing.errors import record

    from greenmim.training.slurm import submit
    from greenmim.training.train import pretrain

    values = options.clone()
    for name in ("config", "resume", "mask_per_image", "dry_run", "launcher"):
        values.pop(name, None)
    job = {field.name: values.pop(field.name) for field in dataclasses.fields(SlurmJob)}
    try:
        recipe = Recipe(**vars(parser.instantiate(values)))
    except ValueError as error:  # the model's own checks
        raise UserError(str(error)) from error
    if options.mask_per_image:
        recipe.mask.per_image = True
    if options.launcher == "none" and not options.dry_run:
        # What it raises, torchrun shows as the cause.
        return record(pretrain)(recipe, options.resume).exit_code
    job = SlurmJob(**job) if options.launcher == "slurm" else None
    _say_what_would_run(recipe, options, job)
    if job is not None and not options.dry_run:
        number, folder = submit(recipe, options.resume, job)
        print(f"submitted job {number}; its logs will be in {folder}")
    return 0


def _say_what_would_run(recipe: Recipe, options: Namespace, job: SlurmJob | None) -> None:
    import torch

    from greenmim.training.dry_run import dry_run
    from greenmim.training.run import choose_device, user_errors
    from greenmim.training.world import World

    with user_errors():
        world = World.from_environment()
    if job and recipe.device != "cpu":  # a login node need not have the GPUs of the job
        device = torch.device("cuda")
    else:
        device = choose_device(recipe, world)
    processes = job.processes if job else world.size
    text, lines = dry_run(recipe, options.resume, device, processes)
    if world.is_main:
        print(*([text] if options.dry_run else []), *lines, sep="\n")


# ---- reconstruct --------------------------------------------------------------------------------


def _reconstruct_parser() -> ArgumentParser:
    parser = _parser(
        usage="greenmim reconstruct --checkpoint FILE --images FILE_OR_FOLDER ... --output PICTURE",
        description="Draw a grid of original, masked and reconstructed images.",
    )
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="a run's checkpoint, or one with --model")
    add("--images", type=str, nargs="+", required=True, help="image files or folders of them")
    add("--output", type=str, required=True, help="picture to write (.png, .jpg, .pdf, .svg)")
    add("--model", type=str | None, help="model's name, for a checkpoint that does not say")
    add("--seed", type=int, default=0, help="seed of the masks, one mask per image")
    add("--mask_ratio", type=float | None, help="share of hidden units; null takes the run's")
    add("--paste_visible", type=bool, default=True, help="show visible patches as they are")
    add("--limit", type=int, default=12, help="greatest number of images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return parser


def _reconstruct(_: ArgumentParser, options: Namespace) -> int:
    from greenmim.tools.reconstruct import reconstruct

    print(f"wrote {reconstruct(**vars(options))}")
    return 0


# ---- export, convert, doctor --------------------------------------------------------------------


def _export_parser() -> ArgumentParser:
    parser = _parser(
        usage="greenmim export --checkpoint FILE --output FILE.safetensors [--model NAME]",
        description="Write the encoder with timm's names; the file's metadata say how it was made.",
    )
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="a run's checkpoint, or one with --model")
    add("--output", type=str, required=True, help="file to write (.safetensors)")
    add("--model", type=str | None, help="model's name, for a checkpoint that does not say")
    add("--overwrite", action="store_true", help="replace the output if it is there already")
    return parser


def _export(_: ArgumentParser, options: Namespace) -> int:
    from greenmim.tools.export import export

    facts = export(**vars(options))
    arguments = json.loads(facts["timm"])
    name = arguments.pop("model_name")
    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    print(f"wrote {options.output}; for timm:")
    print(f"timm.create_model({name!r}{words}, num_classes=0, checkpoint_path={options.output!r})")
    return 0


def _convert_parser() -> ArgumentParser:
    parser = _parser(
        usage="greenmim convert --input FILE --output FILE [--source NAME] [--target NAME]",
        description="Convert a checkpoint file. The output's suffix chooses its format.",
    )
    formats = ("official", "timm", "greenmim")
    orders = ("swin", "row-major")
    add = parser.add_argument
    add("--input", type=str, required=True, help="checkpoint to read")
    add("--output", type=str, required=True, help="file to write")
    add("--source", choices=formats, help="what the input is; a run's checkpoint is recognised")
    add("--target", choices=formats, default="timm", help="what to write")
    add(
        "--merge_order",
        choices=orders,
        default="swin",
        help="row-major for official weights published before 2023",
    )
    add("--overwrite", action="store_true", help="replace the output if it is there already")
    return parser


def _convert(_: ArgumentParser, options: Namespace) -> int:
    from greenmim.tools.convert import convert_file

    count = convert_file(**vars(options))
    print(f"wrote {options.output}: {count} tensors, {options.target} names")
    return 0


def _doctor_parser() -> ArgumentParser:
    return _parser(
        usage="greenmim doctor",
        description="Say what is installed, which backends work here, and why others do not.",
    )


def _doctor(_: ArgumentParser, options: Namespace) -> int:
    from greenmim.tools.doctor import report

    print(report())
    return 0
