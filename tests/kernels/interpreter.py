"""Repairs of Triton's interpreter (3.6 to 3.8), for tests only: bfloat16 arithmetic, and its time.

The interpreter keeps bfloat16 as 16-bit integers and forgets it in products, arithmetic and some
casts, so that results are wrong by orders of magnitude without an error. Here bfloat16 values are
widened to float32 before an operation and rounded to nearest even after it.

It also puts its own functions into triton.language at every call of a function that a kernel calls,
where they are since the launch, looks for overflow of integers in its own slow arithmetic, and
makes its table of types and the shape of each tensor anew: three quarters of the time of a test.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Handle) -> Handle:
    return Handle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def repair() -> None:
    """Patch the interpreter of this process, once."""
    if getattr(Builder, "_bf16_repaired", False):
        return
    dot, binary, unary = Builder.create_dot, Builder.binary_op, Builder.unary_op
    cast, convert = Builder.cast_impl, Builder.create_fp_to_fp

    def create_dot(self, a, b, d, precision, max_imprecise):
        return dot(self, _widened(a), _widened(b), d, precision, max_imprecise)

    def binary_op(self, left, right, operation):
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary(self, left, right, operation)
        result = operation(widen(left.data), widen(right.data))
        if result.dtype == bool:
            return Handle(result, tl.int1)
        return Handle(narrow(result), tl.bfloat16)

    def unary_op(self, value, operation):
        if not _is_bf16(value):
            return unary(self, value, operation)
        return Handle(narrow(operation(widen(value.data))), tl.bfloat16)

    def cast_impl(self, source, target):
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            dtype = interpreter._get_np_dtype(target)
            return Handle(widen(source.data).astype(dtype), target.scalar)
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if _is_bf16(source) or target.scalar == tl.bfloat16:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    patch = interpreter._patch_lang

    def patch_lang(function):
        names = function.__globals__.values()
        if any(lang in names and tl.core.is_builtin(lang.program_id) for lang in (tl, tl.core)):
            return patch(function)
        return interpreter._LangPatchScope()

    def check_overflow(self, left, right, operation):
        kind = left.type.scalar
        if kind.int_bitwidth >= 64:
            return
        a, b = (operand.handle.data.astype(np.int64) for operand in (left, right))
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__](a, b)
        fits = kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()
        assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"

    @functools.cache
    def constant_shape(shape):
        return tl.tuple([tl.constexpr(side) for side in shape]), tl.constexpr(math.prod(shape))

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constant_shape(tuple(type.shape) if type.is_block() else ())

    block_type, shapes = tl.block_type.__init__, {}

    def make_block_type(self, element_ty, shape):
        sides = tuple([side.value if isinstance(side, tl.constexpr) else side for side in shape])
        if sides not in shapes:
            block_type(self, element_ty, shape)  # which checks it
            shapes[sides] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = shapes[sides]
        self.name = f"<{text}, {element_ty}>"

    numpy_dtype, by_name = interpreter._get_np_dtype, {}

    def get_np_dtype(type):
        if (found := by_name.get(type.scalar.name)) is None:
            found = by_name[type.scalar.name] = numpy_dtype(type.scalar)
        return found

    interpreter._get_np_dtype = get_np_dtype
    tl.tensor.__init__, tl.block_type.__init__ = make_tensor, make_block_type
    interpreter._patch_lang = patch_lang
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
    Builder.create_dot, Builder.binary_op, Builder.unary_op = create_dot, binary_op, unary_op
    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder._bf16_repaired = True
