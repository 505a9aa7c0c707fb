"""Damage to files: what a bad disk does, and what somebody does who means harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HUGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
ODD = (None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "../../x")
ODD += ("\0", "x" * 3000, "\ud800", [], {}, [[]], [1] * 9, {"a": {"a": 1}}, "wds/x", b"bytes")
BOMB = 2**31  # bytes that a small file claims to hold

Mutation = Callable[[bytes, random.Random], bytes]


class Evil:
    """What a pickle that means harm does when it is read: call a function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def evil(marker: Path, rng: random.Random) -> Evil:
    """An object that leaves a file where its pickle is trusted."""
    code = f"open({str(marker)!r}, 'w')"
    return rng.choice(
        [
            Evil(os.system, f"touch {marker}"),
            Evil(eval, code),
            Evil(exec, code),
            Evil(open, str(marker), "w"),
            Evil(Path.touch, marker),
            Evil(torch.save, 0, str(marker)),
        ]
    )


# ---- of any file --------------------------------------------------------------------------------


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 64)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_bits_in_front(data: bytes, rng: random.Random) -> bytes:
    return flip_bits(data[:512], rng) + data[512:]


def flip_bits_at_end(data: bytes, rng: random.Random) -> bytes:
    return data[:-512] + flip_bits(data[-512:], rng)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def grow(data: bytes, rng: random.Random) -> bytes:
    more = rng.choice((b"\0", b"\xff", b"{", rng.randbytes(7))) * rng.choice((1, 100, 10_000))
    at = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    return data[:at] + more + data[at:]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 8, 512, 5000)) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = start + rng.choice((1, 8, 512, 5000))
    return data[:end] + data[start:]


def number_in_bytes(data: bytes, rng: random.Random) -> bytes:
    """A length, an offset or a size, wherever there may be one, becomes huge or nothing."""
    width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    front = rng.random() < 0.7
    at = rng.randrange(max(1, min(len(data), 256) if front else len(data)))
    number = rng.choice(HUGE) % 2 ** (8 * width)
    return data[:at] + number.to_bytes(width, order) + data[at + width :]


def number_in_text(data: bytes, rng: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(data[:100_000]) if 48 <= byte <= 57]
    if not digits:
        return flip_bits(data, rng)
    at = rng.choice(digits)
    return data[:at] + str(rng.choice((-1, *HUGE, 10**400, 1e308))).encode() + data[at + 1 :]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two words change places, as two lengths would."""
    width = rng.choice((2, 4, 8))
    if len(data) < 4 * width:
        return data[::-1]
    first, second = sorted(rng.sample(range(0, len(data) - width, width), 2))
    a, b = data[first : first + width], data[second : second + width]
    return data[:first] + b + data[first + width : second] + a + data[second + width :]


ANY: tuple[Mutation, ...] = (
    *(flip_bits, flip_bits_in_front, flip_bits_at_end, truncate, grow, cut_out, repeat),
    *(number_in_bytes, number_in_text, swap),
)


def changed_value(value: Any, rng: random.Random, odd: tuple = ODD) -> Any:
    """The same nested value with one of its parts gone, or something else."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kept = dict(value)
        if rng.random() < 0.15:
            del kept[key]
        else:
            kept[key] = changed_value(value[key], rng, odd)
        return kept
    if isinstance(value, (list, tuple)) and len(value) and rng.random() < 0.6:
        kept = list(value)
        at = rng.randrange(len(kept))
        kept[at] = changed_value(kept[at], rng, odd)
        return tuple(kept) if isinstance(value, tuple) else kept
    return rng.choice(odd)


def _as_json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()


def json_value(data: bytes, rng: random.Random) -> bytes:
    try:
        if rng.random() < 0.05:
            return b"[" * 100_000
        return _as_json(changed_value(json.loads(data), rng))
    except ValueError:
        return flip_bits(data, rng)


def json_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines() or [b"{}"]
    at = rng.randrange(len(lines))
    lines[at] = json_value(lines[at], rng)
    return b"\n".join(lines) + b"\n"


# ---- safetensors --------------------------------------------------------------------------------


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """Shapes, types, places or facts that are not those of the file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(list(header))
    if "__metadata__" in header and rng.random() < 0.6:
        facts = header["__metadata__"]
        fact = rng.choice(list(facts))
        try:
            odd = _as_json(changed_value(json.loads(facts[fact]), rng)).decode()
        except ValueError:
            odd = str(rng.choice(ODD))
        facts[fact] = rng.choice((odd, odd, str(rng.choice(ODD)), "[" * 100_000))
        if rng.random() < 0.1:
            del facts[fact]
    elif rng.random() < 0.3:
        header[f"{name}x"] = header.pop(name)
    elif rng.random() < 0.3:
        header = changed_value(header, rng)
    elif name != "__metadata__":
        entry = header[name]
        at = rng.choice(("dtype", "shape", "data_offsets"))
        if at == "dtype":
            entry[at] = rng.choice(("F64", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "none"))
        else:
            numbers = entry[at] = list(entry[at])
            if at == "shape" and rng.random() < 0.5:  # the same number of elements
                entry[at] = [1, *numbers] if rng.random() < 0.5 else [0, *numbers]
                rng.random() < 0.5 and numbers and entry[at].reverse()
            elif numbers:
                numbers[rng.randrange(len(numbers))] = rng.choice(HUGE)
    text = _as_json(header)
    claimed = len(text) if rng.random() < 0.9 else rng.choice(HUGE)
    return struct.pack("<Q", claimed) + text + data[8 + length :]


# ---- what torch.save writes ---------------------------------------------------------------------


def _content(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)  # of a seed of our own


def _saved(content: Any, rng: random.Random) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    return file.getvalue()


def torch_value(data: bytes, rng: random.Random) -> bytes:
    """A whole file, with something else in one place."""
    one = torch.zeros(1)
    odd = (*ODD, one, one.long(), one.bool(), one.expand(7), torch.zeros(0), torch.zeros(()))
    odd += (torch.full((8,), torch.nan), torch.zeros(3, dtype=torch.complex64), torch.zeros(2, 2).T)
    odd += (torch.zeros(2**33, device="meta"), one.to_sparse(), torch.nn.Parameter(one))
    return _saved(changed_value(_content(data), rng, odd), rng)


def torch_claims_much(data: bytes, rng: random.Random) -> bytes:
    """A tensor of one element says that it has billions: by strides of 0, or beyond its storage."""
    content = _content(data)
    weights = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not weights:
        return flip_bits(data, rng)
    name = rng.choice([n for n, value in weights.items() if isinstance(value, torch.Tensor)])
    tensor = weights[name]
    shape = [max(side, rng.choice((1, 2**12, 2**20))) for side in tensor.shape] or [2**40]
    weights[name] = torch.zeros(1, dtype=tensor.dtype).expand(shape)
    return _saved(content, rng)


def _replaced(data: bytes, ending: str, change: Callable[[bytes], bytes], method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", method) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith(ending)
                         else content)  # fmt: skip
    return file.getvalue()


def zip_bomb(data: bytes, rng: random.Random) -> bytes:
    """A few megabytes that swell to gigabytes where they are read."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return flip_bits(data, rng)
    # Deflated anew for every file it would take seconds: 64 MiB suffice beside the bound of a test.
    ending = rng.choice(("/data.pkl", "/data/0", "/version"))
    size = rng.choice((2**20, 2**26))
    return _replaced(data, ending, lambda old: old + bytes(size), zipfile.ZIP_DEFLATED)


def zip_entry(data: bytes, rng: random.Random) -> bytes:
    """The pickle of a file is another's, or damaged, and the sums of the zip are right."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return flip_bits(data, rng)
    change = rng.choice((flip_bits, number_in_bytes, swap, cut_out, truncate, number_in_text))
    return _replaced(data, "/data.pkl", lambda old: change(old, rng), zipfile.ZIP_STORED)


def zip_directory(data: bytes, rng: random.Random) -> bytes:
    """Sizes and places in the directory at a zip's end."""
    at = data.rfind(b"PK\x01\x02") if rng.random() < 0.5 else data.find(b"PK\x01\x02")
    at = at if at >= 0 and rng.random() < 0.7 else max(data.rfind(b"PK\x05\x06"), 0)
    return data[:at] + number_in_bytes(data[at:], rng)


def code_in_pickle(data: bytes, rng: random.Random, marker: Path) -> bytes:
    """Code where a pickle is expected: the whole file, the zip's pickle, or one of its values."""
    harm = evil(marker, rng)
    kind = rng.randrange(4)
    if kind == 0:
        return pickle.dumps(harm, protocol=rng.choice((0, 2, 4)))
    if kind == 1 and zipfile.is_zipfile(io.BytesIO(data)):
        text = pickle.dumps({"model": harm}, protocol=2)
        return _replaced(data, "/data.pkl", lambda old: text, zipfile.ZIP_STORED)
    try:
        content = _content(data)
    except Exception:  # no checkpoint: `.metadata`, say
        try:
            content = pickle.loads(data)
        except Exception:
            return pickle.dumps(harm)
        if kind == 3 and hasattr(content, "__dict__"):
            setattr(content, rng.choice(list(content.__dict__)), harm)
            return pickle.dumps(content)
        return pickle.dumps([content, harm])
    return _saved(changed_value(content, rng, (harm,)), rng)


# ---- tars ---------------------------------------------------------------------------------------


def tar_member(data: bytes, rng: random.Random) -> bytes:
    """A header with a right sum and wrong values: names, sizes, kinds, links."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            member = rng.choice(archive.getmembers())
    except (tarfile.TarError, IndexError):
        return flip_bits(data, rng)
    at = member.offset
    header = bytearray(data[at : at + 512])
    kind = rng.randrange(4)
    if kind == 0:
        names = ("../../../etc/passwd", "/etc/passwd", "a/../../b.png", ".", "..", "/", "\xff.png")
        name = rng.choice((*names, "x.tar", "\n.png", "0.cls", ".png", "0.seg.png", "__x__.png"))
        header[:100] = name.encode("latin1")[:100].ljust(100, b"\0")
    elif kind == 1:
        size = rng.choice(
            (
                b"77777777777\0",
                b"-1\0",
                b"x",
                b"\x80" + b"\xff" * 11,
                b"\xff" * 12,
                b"\x80" + b"\0" * 7 + b"\x7f\xff\xff\xff",
                b"0" * 11 + b"\0",
            )
        )
        header[124:136] = size.ljust(12, b"\0")
    elif kind == 2:
        header[156:157] = rng.choice((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"K", b"L", b"S",
                                      b"x", b"g", b"X", b"z"))  # fmt: skip
        link = rng.choice(("../../etc/passwd", "/dev/zero", member.name))
        header[157:257] = link.encode()[:100].ljust(100, b"\0")
    else:
        field = rng.choice(((100, 108), (108, 116), (136, 148), (257, 265), (345, 500)))
        header[slice(*field)] = rng.randbytes(field[1] - field[0])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def tar_name(data: bytes, rng: random.Random) -> bytes:
    """A member before the others, with a name or a size in blocks of their own."""
    file = io.BytesIO()
    odd = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with tarfile.open(fileobj=file, mode="w", format=odd) as archive:
        info = tarfile.TarInfo("../" * 60 + "x" * rng.choice((1, 300, 30_000)) + ".png")
        if odd == tarfile.PAX_FORMAT:
            name = rng.choice(("size", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major",
                               "mtime", "uid", "path", "hdrcharset"))  # fmt: skip
            info.pax_headers = {name: str(rng.choice((*ODD[2:9], *HUGE))), "comment": "x" * 5000}
        archive.addfile(info)
    return file.getvalue()[: -tarfile.RECORDSIZE or None].rstrip(b"\0").ljust(1024, b"\0") + data


# ---- recipes ------------------------------------------------------------------------------------

_YAML = (
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:os.system ['touch {marker}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "{{class_path: os.system, init_args: {{command: 'touch {marker}'}}}}",
    "{{class_path: subprocess.Popen, init_args: {{args: [touch, '{marker}']}}}}",
    "&a [*a]",
    "{{<<: 1}}",
    "[" * 3000,
    "1" + "0" * 5000,
    "1e9999",
    "0x" + "f" * 5000,
    "1:" * 50 + "1",
    "2001-99-99",
    "!!binary x",
    "!!timestamp x",
    ".nan",
    "~",
    "'\0'",
    "\t",
    "{marker}",
    "${{oc.env:HOME}}",
    "@{marker}",
)


def yaml_value(data: bytes, rng: random.Random, marker: Path) -> bytes:
    lines = data.decode(errors="replace").splitlines()
    at = rng.randrange(len(lines))
    key, colon, value = lines[at].partition(": ")
    if not colon:
        return flip_bits(data, rng)
    odd = rng.choice(_YAML).format(marker=marker) if rng.random() < 0.6 else str(rng.choice(ODD))
    lines[at] = rng.choice((f"{key}: {odd}", f"{key}x: {value}", f"{key}: {value}\n{lines[at]}"))
    return "\n".join(lines).encode(errors="surrogatepass") + b"\n"


def yaml_bomb(data: bytes, rng: random.Random) -> bytes:
    """Lists of lists of lists that are one list each, nine to a level."""
    levels = [f"a0: &a0 [{', '.join('1' * 9)}]"]
    for level in range(1, 9):
        levels.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    name = rng.choice(("seed", "data", "model", "zzz"))
    text = "\n".join(f"  {line}" for line in levels)
    return data + f"\n{name}:\n{text}\n".encode()


def mutations(path: Path, marker: Path) -> tuple[Mutation, ...]:
    """What is done to a file of this name."""
    own: tuple[Mutation, ...] = ()
    if path.suffix in (".pth", ".distcp") or path.name == ".metadata":
        own = (lambda data, rng: code_in_pickle(data, rng, marker),)
    if path.suffix == ".pth":
        own += (torch_value, torch_value, torch_claims_much, zip_bomb, zip_entry, zip_directory)
    elif path.suffix == ".distcp":
        own += (zip_entry, zip_directory)
    elif path.suffix == ".safetensors":
        own = (safetensors_header,) * 4
    elif path.suffix == ".tar":
        own = (tar_member, tar_member, tar_member, tar_name)
    elif path.suffix == ".json":
        own = (json_value, json_value, json_value)
    elif path.suffix == ".jsonl":
        own = (json_line, json_line)
    elif path.suffix == ".yaml":
        own = (*(lambda data, rng: yaml_value(data, rng, marker),) * 4, yaml_bomb)
    # Half of them know what they break, where there are such.
    return (*ANY, *own * max(1, len(ANY) // len(own))) if own else ANY
