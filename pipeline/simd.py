"""Vectors as values in compiled code: 8 or 16 float32 lanes that numba functions load, compute with and store.

numba vectorises plain loops where it can; short rows, transposes and branches per block it cannot. With these values
a kernel says itself what runs in parallel, on any instruction set LLVM knows (SSE, AVX, AVX-512, NEON): arithmetic,
comparisons, and the functions below. Indices count array elements; nothing is checked against the array's length.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import PrimitiveModel
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, register_model

_RELAXED = ("contract", "reassoc", "arcp", "nsz")
_INDEX = ir.IntType(32)
_FLOAT = ir.FloatType()


class Lanes(types.Type):
    """The type of a vector of ``count`` float32, or of as many truth values."""

    def __init__(self, count: int, truth: bool = False) -> None:
        super().__init__(name=f"{'Truth' if truth else 'Lanes'}({count})")
        self.count = count
        self.truth = truth


@register_model(Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(ir.IntType(1) if fe_type.truth else _FLOAT, fe_type.count))


_WIDTHS = {count: Lanes(count) for count in (8, 16)}
_TRUTHS = {count: Lanes(count, truth=True) for count in (8, 16)}


def _is_lanes(kind: Any) -> bool:
    return isinstance(kind, Lanes) and not kind.truth


def _common(*args: Any) -> Lanes | None:
    """The vector type of an expression of vectors of one width and numbers, else None."""
    wide = {kind for kind in args if _is_lanes(kind)}
    plain = all(_is_lanes(kind) or isinstance(kind, types.Float | types.Integer) for kind in args)
    return wide.pop() if len(wide) == 1 and plain else None


def _spread(context: Any, builder: Any, value: Any, kind: Any, to: Lanes) -> Any:
    """An LLVM vector: the value itself, or a number in every lane."""
    if _is_lanes(kind):
        return value
    value = context.cast(builder, value, kind, types.float32)
    shape = ir.VectorType(_FLOAT, to.count)
    one = builder.insert_element(ir.Constant(shape, ir.Undefined), value, ir.Constant(_INDEX, 0))
    return _shuffle(builder, one, one, [0] * to.count)


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INDEX, len(order)), order))


def _operator(function: Any, emit: Callable[[Any, Any, Any], Any], truth: bool = False) -> None:
    """Teach numba a binary operator on vectors and on a vector and a number."""

    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            kind = _common(*args) if len(args) == 2 and not kws else None
            return kind and signature(_TRUTHS[kind.count] if truth else kind, *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to = _common(*sig.args)
        assert to is not None
        return emit(builder, *(_spread(context, builder, a, kind, to) for a, kind in zip(args, sig.args, strict=True)))

    infer: Any = infer_global(function)
    infer(Template)
    for first, second in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(function, first, second)(lower)


_operator(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=_RELAXED))
_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=_RELAXED))
_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=_RELAXED))
_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b, flags=_RELAXED))
_operator(operator.eq, lambda builder, a, b: builder.fcmp_ordered("==", a, b), truth=True)
_operator(operator.gt, lambda builder, a, b: builder.fcmp_ordered(">", a, b), truth=True)
_operator(operator.ge, lambda builder, a, b: builder.fcmp_ordered(">=", a, b), truth=True)


def _picker(sign: str) -> Any:
    @intrinsic
    def pick(typingctx: Any, a: Any, b: Any) -> Any:
        to = _common(a, b)
        if to is None:
            return None

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, y = (_spread(context, builder, v, kind, to) for v, kind in zip(args, sig.args, strict=True))
            return builder.select(builder.fcmp_ordered(sign, x, y), x, y)

        return to(a, b), generate

    return pick


smaller = _picker("<")  # of two vectors, or of a vector and a number, lane by lane
larger = _picker(">")


@intrinsic
def where(typingctx: Any, truth: Any, a: Any, b: Any) -> Any:
    """``a`` in the lanes where ``truth`` holds, else ``b``."""
    to = _common(a, b)
    if to is None or not isinstance(truth, Lanes) or not truth.truth:
        return None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, y = (_spread(context, builder, v, kind, to) for v, kind in zip(args[1:], sig.args[1:], strict=True))
        return builder.select(args[0], x, y)

    return to(truth, a, b), generate


@intrinsic
def whole(typingctx: Any, a: Any) -> Any:
    """The largest integers that are not larger."""
    if not _is_lanes(a):
        return None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        shape = args[0].type
        kind = ir.FunctionType(shape, [shape])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.floor.v{a.count}f32"), args)

    return a(a), generate


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, to: Any) -> Any:
    data = context.make_array(kind)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _loader(count: int) -> Any:
    @intrinsic
    def load(typingctx: Any, array: Any, index: Any) -> Any:
        if not isinstance(array, types.Array) or array.dtype not in (types.float32, types.uint8):
            return None
        small = array.dtype == types.uint8

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            shape = ir.VectorType(ir.IntType(8) if small else _FLOAT, count)
            pointer = _pointer(context, builder, sig.args[0], args[0], args[1], shape)
            value = builder.load(pointer, align=1 if small else 4)
            if not small:
                return value
            return builder.sitofp(builder.zext(value, ir.VectorType(_INDEX, count)), ir.VectorType(_FLOAT, count))

        return _WIDTHS[count](array, types.intp), generate

    return load


load8 = _loader(8)  # (array, index): the next 8 elements of a flat float32 or uint8 array
load16 = _loader(16)


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write all lanes of ``value`` to a flat float32 array."""
    if not isinstance(array, types.Array) or array.dtype != types.float32 or not _is_lanes(value):
        return None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], args[2].type)
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def transpose8(typingctx: Any, rows: Any) -> Any:
    """Eight vectors of 8 lanes: lane j of vector i becomes lane i of vector j."""
    kind = types.UniTuple(_WIDTHS[8], 8)
    if rows != kind:
        return None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v = [builder.extract_value(args[0], i) for i in range(8)]
        low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
        v = [_shuffle(builder, v[i], v[i + 1], order) for i in (0, 2, 4, 6) for order in (low, high)]
        low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        v = [_shuffle(builder, v[i], v[i + 2], order) for i in (0, 1, 4, 5) for order in (low, high)]
        low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        v = [_shuffle(builder, v[i], v[i + 4], order) for order in (low, high) for i in range(4)]
        out = ir.Constant(ir.ArrayType(v[0].type, 8), ir.Undefined)
        for i, value in enumerate(v):
            out = builder.insert_value(out, value, i)
        return out

    return kind(kind), generate
