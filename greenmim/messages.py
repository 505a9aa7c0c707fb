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

if typing.TYPE_CHECKING:  # kernels, their tests and the benchmarks do without it
    from jsonargparse import ArgumentParser

# Of the help of a run: what a first one needs, and what most people change, where it is there.
NEEDED = ("config", "data.root", "work_dir", "resume", "dry_run")
OFTEN = (
    "init", "epochs", "max_steps", "data.val_root", "data.probe_root", "data.batch_size",
    "data.workers", "optim.lr", "optim.accumulate", "mask.ratio", "mask_per_image",
    "model.image_size", "data.classes", "optim.layer_decay", "ema_decay",
    "device", "precision", "compile", "cuda_graph",
)  # fmt: skip
ONE, SEVERAL = {int: "a whole number", float: "a number"}, {int: "whole numbers", float: "numbers"}
PLAIN = {bool: "true or false", str: "text", type(None): "null", **ONE}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the cells of each column below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def drawable(name: str, most: int) -> str:
    """A file's or folder's name in a picture, cut to so many letters; it may hold what is no text.

    Matplotlib must not look for mathematics in it: `parse_math=False`.
    """
    text = name.encode(errors="replace").decode()
    return text if len(text) <= most else f"{text[: most - 3]}..."


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
    if "unrecognized arguments:" in text:
        return _unknown(text.partition("unrecognized arguments:")[2].strip(), typed, parser)
    if found := re.search(r"does not accept option '([\w.]+)'", text):  # in a file
        near = _near(dashes(found[1]), options_of(parser)).replace("--", "").replace("-", "_")
        return f"--config has {found[1]}, which is no option{near}"
    if found := re.search(r"invalid choice: '(.*?)' \(choose from (.+?)\)", text):
        choices = re.findall(r"[\w-]+", found[2])
        if "argument command" in text:
            near = _near(found[1], choices)
            return f"{found[1]} is no command{near or f'; there are {listed(choices)}'}"
        name = re.findall(r"argument (--\S+):", text)[0]
        return f"{dashes(name)} {found[1]}: give {listed(choices, 'or')}"
    if found := re.search(r"argument (?:-\w/)?(--\S+): ignored explicit argument '(.*)'", text):
        return f"{dashes(found[1])} takes no value; leave ={found[2]} out"
    if found := re.search(r"argument (--\S+): expected (?:one|at least one) argument", text):
        option = dashes(found[1])
        after = _value_of(option, typed) or ""
        if after.startswith("-") and after != "--":  # which looks like an option itself
            return f"{option} needs a value; one that begins with a dash is {option}={after}"
        return f"{option} needs a value{_wanted(found[1], parser, ': ')}"
    if found := re.match(r'Parser key "([\w.]+)":', text):
        # A value of several, such as --data '{"decode": "fast"}', has the key within.
        key = re.findall(r'Parser key "([\w.]+)":', text)[-1]
        value = re.search(r"(?:Got value|Given value): ?(.*)$", text)
        wanted = _wanted(key, parser, ": give ")
        if value and wanted:
            given = _value_of(dashes(key), typed)
            # Or in a value of several.
            is_typed = given is not None or _value_of(dashes(key.partition(".")[0]), typed)
            if not is_typed and (file := _value_of("--config", typed)):
                return f"{file} has {key}: {value[1]}{wanted}"
            return f"{dashes(key)} {given or value[1] or repr('')}{wanted}"
        text = text.replace(found[0], f"{dashes(found[1])}:")
    if found := re.search(r"are required: (.+)", text):
        # A tool's have the tool's name before them.
        names = [dashes(name.rpartition(".")[2]) for name in re.findall(r"[\w.]+", found[1])]
        return f"{listed(names)} {'is' if len(names) == 1 else 'are'} missing"
    return text


def _option_of(word: str) -> str:
    """`--work_dir=x` as --work-dir."""
    return dashes(word.partition("=")[0])


def _value_of(option: str, typed: Sequence[str]) -> str | None:
    """What was typed for an option, after `=` or as the next word."""
    for number, word in enumerate(typed):
        if word.startswith("--") and _option_of(word) == option:
            _, equals, value = word.partition("=")
            return value if equals else next(iter(typed[number + 1 :]), None)
    return None


def _unknown(said: str, typed: Sequence[str], parser: ArgumentParser) -> str:
    """`said` are all that were not known, as the parser has them."""
    for word in typed:
        if word.startswith("--") and said and _option_of(word) == _option_of(said.split()[0]):
            name = word.partition("=")[0]
            return f"{name} is no option{_near(name, options_of(parser))}"
    return f"{said or repr(said)} belongs to no option"


def options_of(parser: ArgumentParser) -> list[str]:
    """Options as they are typed, but for those that help does not show."""
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]
    return [dashes(o) for a in shown for o in a.option_strings if o.startswith("--")]


def _last(name: str) -> str:
    return name.removeprefix("--").rpartition(".")[2]


def _near(name: str, names: Iterable[str]) -> str:
    """A question after the nearest of some names: the same but for dots and dashes, those with the
    same last part, or one that is spelt alike."""
    names = list(names)
    joined = [one for one in names if re.sub(r"\W", "", one) == re.sub(r"\W", "", name)]
    same = joined or [one for one in names if _last(one) == _last(name)]
    if not same:
        parts = {_last(one): one for one in names}
        close = difflib.get_close_matches(_last(name), parts, n=1, cutoff=0.8)
        same = [parts[one] for one in close]
    return f"; did you mean {listed(same, 'or')}?" if same else ""


def nearest(name: str, names: Iterable[str]) -> str:
    """The same for names that are long, as a sentence of its own; empty where none is near."""
    names = list(names)
    found = [one for one in names if one.startswith(name)] or [one for one in names if name in one]
    found = found or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f" Did you mean {listed(found, 'or')}?" if found else ""


def listed(names: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _wanted(key: str, parser: ArgumentParser, before: str) -> str:
    key = key.removeprefix("--")
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if action.dest == key and hint is not None:
            default, parts = action.default, typing.get_args(hint)
            pair = next((part for part in parts if typing.get_origin(part) is tuple), None)
            if pair and not isinstance(default, tuple):  # one or several: --model.image-size
                default = (default,) * len(typing.get_args(pair))
            example = f" such as '{list(default)}'" if isinstance(default, tuple) else ""
            return before + kind_of(hint) + example
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
    if origin is tuple and parts:
        several = SEVERAL.get(parts[0], "values")
        if Ellipsis in parts:
            return several
        return f"{len(parts)} {several}"
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


def asked_for_help(typed: Sequence[str]) -> tuple[bool, str | None]:
    """Whether there is a `--help`, and the topic after it: `--help data` or `--help=data`."""
    for number, word in enumerate(typed):
        name, equals, topic = word.partition("=")
        if word == "--":
            break
        if name in ("-h", "--help"):
            after = next(iter(typed[number + 1 :]), "-")
            return True, topic if equals else None if after.startswith("-") else after
    return False, None


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
            ("often changed", [by_name[name] for name in OFTEN if name in by_name]),
        ]
    else:
        chosen = list(found.values()) if topic == "all" else [found[topic]]
    more = [f"  --help {name:<12}{title}" for name, (title, _) in found.items()]
    epilog = [
        "more:",
        *more,
        f"  --help {'all':<12}Everything",
        "",
        textwrap.fill(parser.epilog or "", 80),
    ]
    return _page(parser, chosen, "\n".join(epilog))


def tool_help(parser: ArgumentParser) -> str:
    """Of a command with few options: all of them, those that are needed first."""
    options = [a for a in parser._actions if a.dest != "help" and a.help != argparse.SUPPRESS]
    needed = [a for a in options if a.required or a.dest in ("data.root", "data.val_root")]
    others = [a for a in options if a not in needed]
    chosen = [("needed", needed), ("options", others)]
    return _page(parser, [group for group in chosen if group[1]], "")


def _page(parser: ArgumentParser, groups: list[tuple[str, list]], epilog: str) -> str:
    shown = argparse.ArgumentParser(
        usage=parser.usage,
        description=parser.description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for title, actions in groups:
        group = shown.add_argument_group(title)
        for action in actions:
            _show(group, action)
    return shown.format_help()


def _show(group: argparse._ArgumentGroup, action: argparse.Action) -> None:
    """The option in plain argparse, with its default, and its values in place of a type."""
    options = [dashes(option) for option in action.option_strings]
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
    elif values := action.choices or (
        typing.get_origin(hint) is typing.Literal and typing.get_args(hint)
    ):
        metavar = "{" + ",".join(values) + "}"
    group.add_argument(*options, nargs=action.nargs, metavar=metavar, help=text)


def _written(value: object) -> str:
    """As it is typed."""
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
