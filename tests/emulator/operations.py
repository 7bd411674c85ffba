"""Arithmetic: for each instruction that makes one number of others, their types and the function of NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emulator.errors import UnknownInstruction

Array = NDArray[Any]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8,
    **{f"{kind}{bits}": getattr(np, f"{name}{bits}") for kind, name in (("b", "uint"), ("u", "uint"), ("s", "int"))
       for bits in (16, 32, 64)},
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,  # which NumPy has not
}  # fmt: skip


class Operation(NamedTuple):
    """What an instruction makes of its sources."""

    result: Any
    sources: tuple[Any, ...]
    """Their types."""
    function: Callable[..., Array]


def widened(bits: Array) -> Array:
    """bfloat16, as bits, in float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(x: Array) -> Array:
    """float32, rounded to bfloat16, as bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def halves(low: Array, high: Array) -> Array:
    """Two numbers of 16 bits in one register; the first is in the lower half."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def _shifted(function: Callable[..., Array], x: Array, by: Array) -> Array:
    """Shifts of as many bits as there are, or more, leave nothing, or the sign."""
    bits = 8 * x.dtype.itemsize
    kept = np.minimum(by, np.uint32(bits - 1)).astype(x.dtype)
    return np.where(by >= bits, function(function(x, kept), x.dtype.type(1)), function(x, kept))


def _divided(x: Array, y: Array) -> Array:
    """Toward zero; what a thread makes of a zero, it does not use."""
    y = np.where(y == 0, 1, y).astype(y.dtype)
    if x.dtype.kind == "u":
        return x // y
    quotient = np.abs(x) // np.abs(y)
    return np.where((x < 0) != (y < 0), -quotient, quotient).astype(x.dtype)


def _fma(x: Array, y: Array, z: Array) -> Array:
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _funnel(low: Array, high: Array, by: Array) -> Array:
    both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
    return ((both << (by & np.uint32(31)).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def _field(x: Array, first: Array, bits: Array) -> Array:
    """`bits` bits of 32 from the one with the number `first` on, with the sign that the last one is, if x has one."""
    left = np.uint32(32) - bits
    moved = x.view(np.uint32) << (left - first)
    return moved.view(x.dtype) >> left.astype(x.dtype)


_INTEGERS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mad.lo": lambda x, y, z: x * y + z,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "min": np.minimum,
    "max": np.maximum,
    "div": _divided,
    "rem": lambda x, y: x - _divided(x, y) * y,
    "mov": np.asarray,
    "abs": np.abs,
}
_FLOATS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _fma,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "mov": np.asarray,
}
_COMPARISONS: dict[str, Callable[..., Array]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "neu": np.not_equal,  # so is a NaN
}
_MODIFIERS = {"rn", "approx", "ftz", "full", "sat"}
"""Of float32: results may be off in the last bit, or tiny ones be 0."""

_CONVERSIONS: dict[str, tuple[str, tuple[str, ...], Callable[..., Array]]] = {
    "cvt.rn.bf16x2.f32": ("b32", ("f32", "f32"), lambda high, low: halves(narrowed(low), narrowed(high))),
    "cvt.rn.f16x2.f32": (
        "b32",
        ("f32", "f32"),
        lambda high, low: halves(*(x.astype(np.float16).view(np.uint16) for x in (low, high))),
    ),
    "cvt.rn.bf16.f32": ("b16", ("f32",), narrowed),
    "cvt.rn.f16.f32": ("f16", ("f32",), lambda x: x.astype(np.float16)),
    "cvt.f32.bf16": ("f32", ("b16",), widened),
}


def operation(parts: tuple[str, ...]) -> Operation:
    """What the instruction with this name does. Raises UnknownInstruction."""
    name, kind, first = ".".join(parts), parts[-1], parts[0]
    own = TYPES.get(kind)
    word = np.uint32
    if name in _CONVERSIONS:
        result, sources, function = _CONVERSIONS[name]
        return Operation(TYPES[result], tuple(TYPES[source] for source in sources), function)
    if first == "cvt" and own and parts[-2] in TYPES and "bf16" not in parts and {*parts[1:-2]} <= {"rn"}:
        to: Any = TYPES[parts[-2]]
        return Operation(to, (own,), lambda x: x.astype(to))
    if own is None:
        raise UnknownInstruction(name)
    if first == "setp" and len(parts) == 3:
        return Operation(np.bool_, (own, own), _COMPARISONS[parts[1]])
    if first == "selp":
        return Operation(own, (own, own, np.bool_), lambda x, y, which: np.where(which, x, y))
    if first in ("shl", "shr"):
        shift = np.left_shift if first == "shl" else np.right_shift
        return Operation(own, (own, word), lambda x, by: _shifted(shift, x, by))
    if name == "shf.l.wrap.b32":
        return Operation(own, (word, word, word), _funnel)
    if first == "bfe" and kind in ("u32", "s32"):
        return Operation(own, (own, word, word), _field)
    if parts[:2] == ("mul", "hi") and kind in ("s32", "u32"):
        wide = TYPES[f"{kind[0]}64"]
        return Operation(own, (own, own), lambda x, y: ((x.astype(wide) * y.astype(wide)) >> wide(32)).astype(own))
    if parts[1:2] == ("wide",) and kind[1:] in ("16", "32"):
        wide = TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
        if first == "mul":
            return Operation(wide, (own, own), lambda x, y: x.astype(wide) * y.astype(wide))
        return Operation(wide, (own, own, wide), lambda x, y, z: x.astype(wide) * y.astype(wide) + z)
    table = _FLOATS if kind == "f32" else _INTEGERS
    plain = ".".join(part for part in parts[:-1] if table is not _FLOATS or part not in _MODIFIERS)
    if plain not in table or (kind == "pred" and plain not in ("and", "or", "xor", "not", "mov")):
        raise UnknownInstruction(name)
    count = {"fma": 3, "mad.lo": 3}.get(plain, 1 if plain in ("not", "neg", "abs", "mov", "ex2", "lg2", "rcp") else 2)
    return Operation(own, (own,) * count, table[plain])
