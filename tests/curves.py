"""Orders that token orders are measured against, and the table of docs/orders.md: python tests/curves.py prints it."""

import math
from functools import cache

import torch
from torch import Tensor

from llsa_gen import order

SHAPES = (
    (256, 256), (64, 64), (61, 64), (37, 53), (61, 61), (1, 4096), (16, 16, 16), (16, 30, 52), (7, 11, 13)
)  # fmt: skip
BLOCKS = ((16, 16), (16, 8, 8), (64,), (128,))


@cache
def raster(shape: tuple[int, ...]) -> order.Order:
    """Row by row."""
    return order.from_codes(torch.arange(math.prod(shape)))


def has_curves(shape: tuple[int, ...]) -> bool:
    """Whether the sides are equal and a power of two: the curves are for such grids."""
    return len({*shape}) == 1 and shape[0] & (shape[0] - 1) == 0


def places(shape: tuple[int, ...]) -> list[Tensor]:
    """Of every cell, its place along each axis: int64 [N] each."""
    return list(torch.unravel_index(torch.arange(math.prod(shape)), shape))


def bit_rows(shape: tuple[int, ...]) -> list[Tensor]:
    """Of the highest bits of a cell's places a number, of the next ones another, and so on: int64 [N] each."""
    at = places(shape)
    return [
        sum(((x >> bit) & 1) << axis for axis, x in enumerate(at))  # type: ignore[misc]
        for bit in reversed(range((shape[0] - 1).bit_length()))
    ]


@cache
def morton(shape: tuple[int, ...]) -> order.Order:
    """By interleaved bits."""
    code = torch.zeros(math.prod(shape), dtype=torch.int64)
    for digit in bit_rows(shape):
        code = code << len(shape) | digit
    return order.from_codes(code)


@cache
def hilbert(shape: tuple[int, ...]) -> order.Order:
    """Along Hilbert's curve, in any number of dimensions.

    Each cube of 2^d cubes is walked through by a reflected Gray code; `entry` is the corner at which it is entered,
    `along` the axis along which it is left. Both follow, cube in cube, from the number of the step.
    """
    d = len(shape)
    steps = torch.arange(1 << d)
    gray = steps ^ steps >> 1
    step_of = torch.empty_like(steps).scatter_(0, gray, steps)
    before = ((steps - 1).clamp(min=0)) // 2 * 2
    entries = before ^ before >> 1
    ones = [(int(s) ^ int(s) + 1).bit_length() - 1 for s in steps]  # at the end of the number
    alongs = torch.tensor([0 if s == 0 else ones[s - 1] % d if s % 2 == 0 else ones[s] % d for s in range(1 << d)])

    def turned(x: Tensor, by: Tensor) -> Tensor:
        by = by % d
        return (x << by | x >> (d - by)) & (1 << d) - 1

    entry = along = code = torch.zeros(math.prod(shape), dtype=torch.int64)
    for digit in bit_rows(shape):
        step = step_of[turned(digit ^ entry, d - (along + 1) % d)]
        code = code << d | step
        entry = entry ^ turned(entries[step], along + 1)
        along = (along + alongs[step] + 1) % d
    return order.from_codes(code)


def table() -> str:
    """Fill, its worst in brackets, and reach, level by level, the finest first."""
    rows = [
        "| grid | blocks | fill (worst) | raster | reach | raster | Morton | Hilbert |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in SHAPES:
        for blocks in BLOCKS:
            orders = [order.grid(shape, blocks, device="cpu"), raster(shape)]
            if has_curves(shape):
                orders += [morton(shape), hilbert(shape)]
            found = [order.compactness(one, shape, blocks) for one in orders]
            fills = [", ".join(f"{x.fill:.2f} ({x.worst_fill:.2f})" for x in one) for one in found[:2]]
            reaches = [", ".join(f"{x.reach:.2f}" for x in one) for one in found] + [""] * (4 - len(found))
            cells = ["×".join(map(str, shape)), "/".join(map(str, blocks)), *fills, *reaches]
            rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(rows).replace("|  |", "| |") + "\n"


if __name__ == "__main__":
    print(table(), end="")
