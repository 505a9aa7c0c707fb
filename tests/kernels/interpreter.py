"""Repairs of Triton's interpreter (3.6 to 3.8), for tests only: bfloat16 arithmetic, and its time.

The interpreter keeps bfloat16 as 16-bit integers and forgets it in products, arithmetic and some
casts, so that results are wrong by orders of magnitude without an error. Here bfloat16 values are
widened to float32 before an operation and rounded to nearest even after it.

It also puts its own functions into triton.language at every call of a function that a kernel calls,
where they are since the launch, looks for overflow of integers in its own slow arithmetic, makes
its table of types and the shape of each tensor anew, and finds for each pair of operands again
which type and shape the result has: most of the time of a test.
"""

from __future__ import annotations

import functools
import math
import operator
import types

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

    @functools.cache
    def languages(function):
        modules = [v for v in function.__globals__.values() if isinstance(v, types.ModuleType)]
        return [lang for lang in (tl, tl.core) if lang in modules]

    def patch_lang(function):
        if any(tl.core.is_builtin(lang.program_id) for lang in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    plain_call = tl.core.builtin(repair).__code__

    def patch_attr(owner, name, member, builder, scope):
        semantic = interpreter.interpreter_semantic
        if getattr(member, "__code__", None) is plain_call:
            member = member.__wrapped__  # what looks whether it is in a kernel: it is

        def call(*arguments, **named):
            named["_semantic"] = semantic
            return member(*arguments, **named)

        scope.set_attr(owner, name, call)

    def check_overflow(self, left, right, operation):
        kind = left.type.scalar
        if kind.int_bitwidth >= 64:
            return
        a, b = left.handle.data, right.handle.data
        exact = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[operation.__name__]
        if a.size == b.size == 1:
            least = most = exact(a.item(), b.item())
        else:
            results = exact(a.astype(np.int64), b.astype(np.int64))
            least, most = results.min(), results.max()
        fits = kind.get_int_min_value() <= least and most <= kind.get_int_max_value()
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

    broadcast, operands = (
        TritonSemantic.broadcast_impl_value,
        TritonSemantic.binary_op_type_checking_impl,
    )
    constants, together = {}, {}

    def broadcast_impl_value(self, left, right):
        if left.shape is right.shape:  # constant_shape makes each shape once
            return left, right
        key = id(left.shape), id(right.shape)
        if key not in together:
            one, other = broadcast(self, left, right)
            together[key] = (
                tuple(one.type.shape),
                one.shape is left.shape,
                other.shape is right.shape,
                (left.shape, right.shape),  # kept, so that their ids stay theirs
            )
        sides, left_stays, right_stays, _ = together[key]
        return (
            left if left_stays else spread(left, sides),
            right if right_stays else spread(right, sides),
        )

    def spread(tensor, sides):
        handle = tensor.handle
        if tensor.type.is_block():
            data = np.broadcast_to(handle.data, sides)
        else:
            data = np.empty(sides, get_np_dtype(handle.dtype))
            data[...] = handle.data
        return tl.tensor(Handle(data, handle.dtype.scalar), tl.block_type(tensor.dtype, sides))

    def known_operands(self, left, right, left_pointer, right_pointer, division):
        """What `operands` gives where that is plain, else None."""
        if type(left) is tl.tensor and type(right) is tl.tensor:
            a, b = left.dtype, right.dtype
            if a is b:
                plain = a.is_int() or (a.is_floating() and not division)
            else:
                plain = (left_pointer and a.is_ptr() and b.is_int()) or (
                    right_pointer and b.is_ptr() and a.is_int()
                )
            return broadcast_impl_value(self, left, right) if plain else None
        if type(left) is tl.tensor and type(right) is int and left.dtype.is_int():
            key = right, left.dtype.name, division
            if key not in constants:
                scalar = left if not left.type.is_block() else self.scalar_constant(1, left.dtype)
                same, constant = operands(self, scalar, right, div_or_mod=division)
                constants[key] = constant if same is scalar else None
            if (constant := constants[key]) is not None:
                return broadcast_impl_value(self, left, constant)
        return None

    def check_operands(
        self, left, right, left_pointer=False, right_pointer=False, arithmetic=True, division=False
    ):
        if arithmetic:
            found = known_operands(self, left, right, left_pointer, right_pointer, division)
            if found is not None:
                return found
        return operands(self, left, right, left_pointer, right_pointer, arithmetic, division)

    TritonSemantic.broadcast_impl_value = broadcast_impl_value
    TritonSemantic.binary_op_type_checking_impl = check_operands
    interpreter._get_np_dtype = get_np_dtype
    tl.tensor.__init__, tl.block_type.__init__ = make_tensor, make_block_type
    interpreter._patch_lang, interpreter._patch_attr = patch_lang, patch_attr
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
    Builder.create_dot, Builder.binary_op, Builder.unary_op = create_dot, binary_op, unary_op
    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder._bf16_repaired = True
