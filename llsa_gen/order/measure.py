"""How compact blocks are: the box around each, beside the number of its tokens and the roundest box that there is."""

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Compactness", "boxes", "measure", "of_boxes"]

Array = np.ndarray[Any, Any]


class Compactness(NamedTuple):
    """The blocks of one level, in the mean and at worst. 1 is perfect."""

    fill: float
    """Cells of the box around a block, over tokens of the block. A strip of a row has 1, so this alone says little."""
    worst_fill: float
    reach: float
    """Mean side of that box over the side of a square (cube, ...) of as many cells. 1x16 has 2.125, 2x8 1.25, 4x4 1."""
    worst_reach: float


def boxes(cells: Array, span: int) -> tuple[Array, Array]:
    """The sides of the boxes around runs of `span` cells, and how many cells each run has.

    cells: integers [d, C, n], C sequences of n cells. Returns int64 [d, C, ceil(n / span)] and [ceil(n / span)].
    """
    d, count, n = cells.shape
    whole = n // span
    runs = cells[:, :, : whole * span].reshape(d, count, whole, span)
    sides = runs.max(3).astype(np.int64) - runs.min(3) + 1 if whole else np.empty((d, count, 0), np.int64)
    sizes = np.full(whole, span)
    if n % span:
        rest = cells[:, :, whole * span :]
        last = rest.max(2).astype(np.int64) - rest.min(2) + 1
        sides, sizes = np.concatenate([sides, last[:, :, None]], 2), np.append(sizes, n % span)
    return sides, sizes


def of_boxes(sides: Array, sizes: Array) -> tuple[Array, Array]:
    """Fill and reach of boxes with sides [d, ...] around so many cells."""
    d = len(sides)
    return sides.prod(0) / sizes, sides.sum(0) / (d * sizes ** (1 / d))


def measure(permutation: Array, shape: tuple[int, ...], spans: tuple[int, ...]) -> tuple[Compactness, ...]:
    """How compact the blocks of every span are in an order of a grid's cells.

    permutation: integers [N], N at least 1, the cell at each place, counted in raster order. An axis of one cell does
    not count: a row is a line, in which every run is compact.
    """
    cells = np.stack(np.unravel_index(permutation, [size for size in shape if size > 1] or [1]))[:, None]
    found = [of_boxes(*boxes(cells, span)) for span in spans]
    return tuple(
        Compactness(float(fill.mean()), float(fill.max()), float(reach.mean()), float(reach.max()))
        for fill, reach in found
    )
