"""Reads the machine code of a compiled kernel.

It looks for two Triton bugs around Hopper's asynchronous wgmma: operands overwritten while they are
read, and a missing proxy fence. Neither is visible in the results of every run.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*) *([^;]*);")
_PRODUCT = re.compile(r"HMMA|HGMMA|UTCHMMA")
# Instructions that write two registers. A conversion names its result's type first, unless that has
# 32 bits.
_PAIR = re.compile(
    r"\.64|\.WIDE|MT?88\.2$|^CS2R|^D(?:ADD|MUL|FMA)|^F2I\.[SU]64|^I2F\.F64|^F2F\.F64\."
)
# Instructions that write no register.
_NO_RESULT = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "EXIT",
    "LDGSTS",
    "LDGDEP",
    "DEPBAR",
    "MEMBAR",
    "FENCE",
    "WARP",
)


class Instruction(NamedTuple):
    """An instruction without its predicate; its address in bytes."""

    address: int
    operation: str
    operands: str


def instructions(sass: str) -> list[Instruction]:
    """A kernel's code, from its disassembly."""
    return [Instruction(int(at, 16), *rest) for at, *rest in _INSTRUCTION.findall(sass)]


def overwritten_operands(code: list[Instruction]) -> list[str]:
    """Instructions that write a register while a product may still read it (triton PR 11781).

    A product that takes its left operand from four registers reads them until a wait for all
    products. The code is read from top to bottom: loops are not followed.
    """
    being_read: set[int] = set()
    found = []
    for address, operation, operands in code:
        if operation.startswith("HGMMA"):
            left = re.match(r"R\d+, *R(\d+)", operands)
            if left:
                being_read |= set(range(int(left[1]), int(left[1]) + 4))
        elif operation.startswith("WARPGROUP.DEPBAR"):
            if operands.strip().endswith("0x0"):  # at 0x1 the last product may still be in flight
                being_read.clear()
        elif not operation.startswith(_NO_RESULT):
            to = re.match(r"(?:U?P\w+, *)?R(\d+)\b", operands)
            if to and being_read & set(range(int(to[1]), int(to[1]) + _width(operation))):
                found.append(f"{address:04x}: {operation} {operands.strip()}")
    return found


def _width(operation: str) -> int:
    """How many registers an instruction writes."""
    if ".128" in operation or operation.endswith(("M88.4", "MT88.4")):
        return 4
    return 2 if _PAIR.search(operation) else 1


def proxy_fence(ptx: str) -> bool | None:
    """Whether a fence stands between every wait for an asynchronous copy and the next product.

    The product reads shared memory through another proxy than the copy writes through (triton PR
    9610; Triton 3.6 leaves the fence out). None without such a copy, or without a wgmma after it.
    The code is read from top to bottom: loops are not followed.
    """
    _, *after_waits = ptx.split("cp.async.wait_group")
    parts = [after.partition("wgmma.mma_async") for after in after_waits]
    fenced = ["fence.proxy.async" in before for before, product, _ in parts if product]
    return all(fenced) if fenced else None


def loop_length(code: list[Instruction]) -> int:
    """Instructions of the innermost loop around all tensor core products; 0 without one.

    In an attention kernel for short groups that is the loop over images.
    """
    products = _products(code)
    around = [
        _length(start, end)
        for start, end in _loops(code).items()
        if products and start <= products[0] and products[-1] < end
    ]
    return min(around, default=0)


def product_loops(code: list[Instruction]) -> list[int]:
    """Instructions of every loop around a tensor core product, the innermost first.

    In an attention kernel for long groups one loop goes over tiles and one over images. On sm_100
    other branches lead back as well.
    """
    products = _products(code)
    return sorted(
        _length(start, end)
        for start, end in _loops(code).items()
        if any(start <= product < end for product in products)
    )


def _products(code: list[Instruction]) -> list[int]:
    """Addresses of tensor core products."""
    return [address for address, operation, _ in code if _PRODUCT.match(operation)]


def _loops(code: list[Instruction]) -> dict[int, int]:
    """{address of a loop's first instruction: address of the last branch back to it}."""
    found = {}
    for address, operation, operands in code:
        to = re.search(r"0x([0-9a-f]+)", operands) if operation == "BRA" else None
        if to and int(to[1], 16) < address:
            found[int(to[1], 16)] = address
    return found


def _length(start: int, end: int) -> int:
    return (end - start) // 16 + 1
