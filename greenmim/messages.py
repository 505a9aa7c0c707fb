"""What the command line says: errors in people's words, and help with what is needed first.

jsonargparse and argparse tell an option by its key and a type as Python writes it, and list all
options at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence

from jsonargparse import ArgumentParser

# Of `pretrain --help`: what a first run needs, and what most people change.
NEEDED = ("config", "data.root", "work_dir", "resume", "dry_run")
OFTEN = (
    "epochs", "data.batch_size", "data.workers", "optim.lr", "optim.accumulate", "mask.ratio",
    "mask_per_image", "model.image_size", "device", "precision", "compile", "cuda_graph",
)  # fmt: skip
ONE, SEVERAL = {int: "a whole number", float: "a number"}, {int: "whole numbers", float: "numbers"}
PLAIN = {bool: "true or false", str: "text", type(None): "null", **ONE}
WORDS = ("", "one", "two", "three", "four")


def dashes(name: str) -> str:
    """An option as it is usually typed, by its key: data.batch_size as --data.batch-size."""
    return "--" + name.removeprefix("--").replace("_", "-")


# ---- errors -------------------------------------------------------------------------------------


def in_words(error: argparse.ArgumentError, parser: ArgumentParser, typed: Sequence[str]) -> str:
    """An error of a parser as one sentence: what was wrong, what to do.

    Args:
        parser: of the command.
        typed: its arguments as they were typed.
    """
    text = " ".join(str(error).split())
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        return _unknown(_as_typed(found[1], typed), parser)
    if found := re.search(r"invalid choice: '(.+?)' \(choose from (.+?)\)", text):
        choices = re.findall(r"[\w-]+", found[2])
        if "argument command" in text:
            near = _near(found[1], choices)
            return f"{found[1]} is no command{near or f'; there are {listed(choices)}'}"
        option = re.search(r"argument (--\S+):", text)
        return f"{dashes(option[1])} {found[1]}: give {listed(choices, 'or')}"
    if found := re.search(r"argument (--\S+): ignored explicit argument '(.*)'", text):
        return f"{dashes(found[1])} takes no value; leave ={found[2]} out"
    if found := re.search(r"argument (--\S+): expected one argument", text):
        return f"{dashes(found[1])} needs a value{_wanted(found[1], parser, ': ')}"
    if found := re.match(r'Parser key "([\w.]+)":', text):
        value = re.search(r"(?:Got value|Given value): (.+)$", text)
        wanted = _wanted(found[1], parser, ": give ")
        if value and wanted:
            return f"{dashes(found[1])} {value[1]}{wanted}"
        text = text.replace(found[0], f"{dashes(found[1])}:")
    if found := re.search(r"are required: (.+)", text):
        # A tool's have the tool's name before them.
        names = [dashes(name.rpartition(".")[2]) for name in re.findall(r"[\w.]+", found[1])]
        return f"{listed(names)} {'is' if len(names) == 1 else 'are'} missing"
    return text


def _as_typed(argument: str, typed: Sequence[str]) -> str:
    for one in typed:
        if one.partition("=")[0].replace("-", "_") == argument.partition("=")[0].replace("-", "_"):
            return one.partition("=")[0]
    return argument


def _unknown(argument: str, parser: ArgumentParser) -> str:
    if not argument.startswith("--"):
        return f"{argument} belongs to no option"
    return f"{argument} is no option{_near(argument, options_of(parser))}"


def options_of(parser: ArgumentParser) -> list[str]:
    """Options as they are typed."""
    return [dashes(o) for a in parser._actions for o in a.option_strings if o.startswith("--")]


def _near(name: str, names: Iterable[str]) -> str:
    """A question after the nearest of some names: by its last part, or by its spelling."""
    names = list(names)
    last = re.split(r"[.]|^--", name)[-1]
    alike = [one for one in names if re.split(r"[.]|^--", one)[-1] == last]
    joined = [one for one in names if re.sub(r"\W", "", one) == re.sub(r"\W", "", name)]
    found = joined or alike or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def nearest(name: str, names: Iterable[str]) -> str:
    """The same, as a sentence of its own; empty where none is near."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def listed(names: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _wanted(key: str, parser: ArgumentParser, before: str) -> str:
    key = key.removeprefix("--")
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if action.dest == key and hint is not None:
            return before + kind_of(hint)
    return ""


def kind_of(hint: object) -> str:
    """A type in words: int | None as "a whole number or null"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if origin is typing.Literal:
        return listed([str(part) for part in parts], "or")
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_of(part) for part in parts)
    if origin is tuple:
        several = SEVERAL.get(parts[0], "values")
        if Ellipsis in parts:
            return f"{several} such as '[2, 2, 6, 2]'"
        example = ", ".join(["1", "2", "3"][: len(parts)])
        return f"{WORDS[len(parts)]} {several} such as '[{example}]'"
    if origin is dict:
        return """JSON such as '{"mem": "200G"}'"""
    return getattr(hint, "__name__", str(hint))


# ---- help ---------------------------------------------------------------------------------------


def topics(parser: ArgumentParser, of_slurm: Sequence[str]) -> dict[str, tuple[str, list]]:
    """What `--help TOPIC` may name: title and options of each group."""
    found: dict[str, tuple[str, list]] = {"run": ("The run", []), "slurm": ("A job of Slurm", [])}
    titles = {a.dest: group.title for group in parser._action_groups for a in group._group_actions}
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.dest == "help":
            continue
        group, dot, _ = action.dest.partition(".")
        name = group if dot else "slurm" if action.dest in of_slurm else "run"
        found.setdefault(name, (titles.get(action.dest) or name, []))[1].append(action)
    return found


def help_text(parser: ArgumentParser, topic: str | None, of_slurm: Sequence[str]) -> str:
    """Of a command with many options: what is needed first, one topic, or "all".

    Raises:
        ValueError: no such topic; says which there are.
    """
    found = topics(parser, of_slurm)
    if topic not in (None, "all", *found):
        raise ValueError(f"--help {topic}: there are {listed(['all', *found])}")
    if topic is None:
        by_name = {action.dest: action for action in parser._actions}
        chosen = [
            ("needed first", [by_name[name] for name in NEEDED]),
            ("often changed", [by_name[name] for name in OFTEN]),
        ]
    else:
        chosen = list(found.values()) if topic == "all" else [found[topic]]
    more = [f"  --help {name:<12}{title}" for name, (title, _) in found.items()]
    epilog = [
        "more:",
        *more,
        f"  --help {'all':<12}Everything",
        "",
        textwrap.fill(parser.epilog, 80),
    ]
    shown = argparse.ArgumentParser(
        usage=parser.usage,
        description=parser.description,
        epilog="\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for title, actions in chosen:
        group = shown.add_argument_group(title)
        for action in actions:
            _show(group, action)
    return shown.format_help()


def _show(group: argparse._ArgumentGroup, action: argparse.Action) -> None:
    """The option in plain argparse, with its default, and its values in place of a type."""
    options = [option.replace("_", "-") for option in action.option_strings]
    text = " ".join((action.help or "").split()).replace("%", "%%")
    if action.nargs == 0:
        group.add_argument(*options, action="store_true", help=text)
        return
    if action.default not in (None, argparse.SUPPRESS, {}):
        text = text.removesuffix(".") + f" (default: {_written(action.default)})"
    hint = getattr(action, "_typehint", None)
    metavar = action.metavar or action.dest.rpartition(".")[2].upper()
    if hint is bool:
        metavar = "{true,false}"
    elif values := action.choices or (typing.get_origin(hint) is typing.Literal and hint.__args__):
        metavar = "{" + ",".join(values) + "}"
    group.add_argument(*options, nargs=action.nargs, metavar=metavar, help=text)


def _written(value: object) -> str:
    """As it is typed."""
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
