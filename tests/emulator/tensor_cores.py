"""The products of the matrix units: where threads hold the elements of a tile, and where a descriptor finds them.

Threads of a warp are taken as [8, 4]; a register of a tile of 16 bits holds two elements of a row.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from emulator.errors import OutOfBounds, UnknownInstruction
from emulator.operations import Array, widened

_SWIZZLES = {1: (3, 128), 2: (2, 64), 3: (1, 32)}
"""By mode: how many bits of an address are swapped, and the bytes of a row."""


def floats(halves: Array, kind: str) -> Array:
    """Bits of bf16 or f16 as float32."""
    return widened(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


def left(registers: Array, kind: str) -> Array:
    """Left operands [warps, 16, 16], of registers [4, warps * 32]."""
    pairs = floats(np.ascontiguousarray(registers).view(np.uint16), kind)
    return pairs.reshape(2, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def right(registers: Array, kind: str) -> Array:
    """Right operands [warps, 16, 8], of registers [2, warps * 32]."""
    pairs = floats(np.ascontiguousarray(registers).view(np.uint16), kind)
    return pairs.reshape(2, -1, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)


def product(registers: Array) -> Array:
    """Products [warps, 16, N], of float32 registers [N / 2, warps * 32]."""
    columns = len(registers) // 4
    parts = registers.view(np.float32).reshape(columns, 2, 2, -1, 8, 4)
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, 8 * columns)


def registers_of(product: Array) -> Array:
    """The inverse of `product`."""
    warps, _, columns = product.shape
    parts = product.astype(np.float32).reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return parts.reshape(columns // 2, -1).view(np.uint32)


def loaded(rows: Array, transposed: bool) -> Array:
    """What `ldmatrix` makes of the 16 bytes that each thread points to: registers [4, warps * 32]."""
    tiles = rows.view(np.uint16).reshape(-1, 4, 8, 8)
    tiles = tiles.transpose(0, 1, 3, 2) if transposed else tiles
    return np.ascontiguousarray(tiles.transpose(1, 0, 2, 3)).view(np.uint32).reshape(4, -1)


def stored(registers: Array) -> Array:
    """The 16 bytes that `stmatrix` writes to where each thread points."""
    tiles = np.ascontiguousarray(registers).view(np.uint16).reshape(4, -1, 8, 8)
    return np.ascontiguousarray(tiles.transpose(1, 0, 2, 3)).reshape(-1, 8).view(np.uint8)


@dataclass(frozen=True)
class Descriptor:
    """A tile of 16 bits in shared memory: where the elements [rows, 16] lie in each of some programs."""

    at: Array
    """Numbers of the elements in all memory."""
    units: Array
    """What `races` knows them as."""


def descriptor(
    words: Array, programs: Array, rows: int, transposed: bool, size: int, stride: int, unit: int
) -> Descriptor:  # fmt: skip
    """What the descriptors `words` of these programs mean, whose `size` bytes lie `stride` apart.

    `transposed`: elements of a column lie side by side, and not those of a row.
    """
    return _descriptor(tuple(words.tolist()), tuple(programs.tolist()), rows, transposed, size, stride, unit)


@cache
def _descriptor(
    words: tuple[int, ...], programs: tuple[int, ...], rows: int, transposed: bool, size: int, stride: int, unit: int
) -> Descriptor:
    word = np.array(words, np.uint64)
    fields = [word >> np.uint64(at) & np.uint64(0x3FFF) for at in (0, 16, 32)]
    first, leading, other = (16 * field.astype(np.int64)[:, None, None] for field in fields)
    modes = {int(one) >> 62 for one in words}
    if not modes <= {*_SWIZZLES} or len(modes) > 1 or any(one >> 49 & 7 for one in words):
        raise UnknownInstruction(f"descriptors {[hex(one) for one in words]}")
    bits, pitch = _SWIZZLES[modes.pop()]
    row, k = np.arange(rows)[:, None], np.arange(16)
    if transposed:
        wide = pitch // 2
        at = first + row % wide * 2 + row // wide * leading + k % 8 * pitch + k // 8 * other
    else:
        at = first + row % 8 * pitch + row // 8 * other + 2 * k
    at ^= (at >> 7 & ((1 << bits) - 1)) << 4
    if at.max() + 2 > size:
        raise OutOfBounds(f"a descriptor reaches {int(at.max()) + 2:#x} of {size:#x} bytes of shared memory")
    at += np.array(programs)[:, None, None] * stride
    return Descriptor(at // 2, np.unique(at // unit))
