"""The order of a grid's cells: the coarsest blocks are cut first, and each of them again, down to the finest.

Blocks of a level are runs of equally many places, so in a grid that they do not divide they cannot all be boxes. Every
region, be it a box or not, is walked through by `tubes` in several ways, and the best of them stays. Regions of the
same form are done once. Where raster order is better all the same, in some of the smallest grids, it is what comes out.
"""

import math
from typing import Any

import numpy as np

from llsa_gen.order.measure import boxes, of_boxes
from llsa_gen.order.tubes import ideal, tubes, walk

__all__ = ["compact"]

Array = np.ndarray[Any, Any]

TRIED_CELLS = 1 << 22
"""About how many cells are walked through to find a good way for the regions of one size: bounds the time."""
FEWEST, MOST = 3, 24
"""Ways that are tried."""
WORST = 1 / 32
"""How much the worst block of a region counts beside the mean of all."""


def compact(shape: tuple[int, ...], spans: tuple[int, ...]) -> Array:
    """The cells of a grid, counted in raster order, in an order that makes runs of every span compact: int64 [N].

    spans: ascending, each a multiple of the one before. Within the finest runs cells are in raster order.
    """
    raster = np.arange(math.prod(shape))
    axes = tuple(size for size in shape if size != 1)
    spans = tuple(span for span in spans if span < len(raster))
    if len(axes) < 2 or not spans:
        return raster  # a line is compact, and one block is one block
    cells = np.stack(np.unravel_index(raster, axes)).astype(np.int32)
    order = raster
    for level in range(len(spans), 0, -1):
        regions = _regions(order, spans[level] if level < len(spans) else len(order))
        order = np.concatenate([_cut(part, cells, spans[:level]).ravel() for part in regions])
    order = np.concatenate([np.sort(part, axis=1).ravel() for part in _regions(order, spans[0])])
    return order if _loose(cells[:, order], spans) < _loose(cells, spans) else raster


def _regions(order: Array, size: int) -> list[Array]:
    """An order as rows of so many places, and one shorter row if something is left."""
    whole = len(order) // size * size
    parts = order[:whole].reshape(-1, size), order[whole:].reshape(1, -1)
    return [part for part in parts if part.size]


def _loose(cells: Array, spans: tuple[int, ...]) -> float:
    """Fill and reach together, the mean over the levels."""
    rated = (of_boxes(*boxes(cells[:, None], span)) for span in spans)
    return float(np.mean([fill.mean() + reach.mean() for fill, reach in rated]))


def _cut(regions: Array, cells: Array, spans: tuple[int, ...]) -> Array:
    """Each row of regions [R, n], cells of a grid, in an order that makes runs of spans[-1] compact."""
    if regions.shape[1] <= spans[-1]:
        return regions
    regions = np.sort(regions, axis=1)
    local = cells[:, regions]
    local -= local.min(2, keepdims=True)
    extents = local.max(2).T + 1  # [R, d]
    kinds, index = _alike(local, extents)
    orders = np.empty((len(kinds), regions.shape[1]), np.int64)
    sizes, group = np.unique(extents[kinds], axis=0, return_inverse=True)
    for number, extent in enumerate(sizes):
        own = np.flatnonzero(group.ravel() == number)
        orders[own] = _best(local[:, kinds[own]], tuple(map(int, extent)), spans)
    return np.take_along_axis(regions, orders[index], 1)


def _alike(local: Array, extents: Array) -> tuple[Array, Array]:
    """A region of each form, and the number of each region's form. Forms are told apart by a hash of their cells."""
    if local.shape[1] == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    random = np.random.default_rng(0)
    hashes = np.zeros(local.shape[1], np.uint64)
    for row in (*local, *extents.T[:, :, None]):
        factors = random.integers(1 << 63, size=row.shape[1], dtype=np.uint64)
        hashes += row.astype(np.uint64) @ factors
    _, kinds, index = np.unique(hashes, return_index=True, return_inverse=True)
    return kinds, index.ravel()


def _best(local: Array, extent: tuple[int, ...], spans: tuple[int, ...]) -> Array:
    """For each of some regions [d, C, n] with boxes of one size, the best of several walks: int64 [C, n]."""
    span = spans[-1]
    found = np.empty(local.shape[1:], np.int64)
    least = np.full(len(found), np.inf)
    whole, left = divmod(local.shape[2], span)
    ideals = [ideal(extent, span)] * whole + ([ideal(extent, left)] if left else [])
    enough = float(np.mean(ideals)) + max(ideals) * WORST + 1e-9
    most = min(MOST, max(FEWEST, TRIED_CELLS // local[0].size))
    for way in tubes(extent, spans)[:most]:
        order = walk(local, way)
        fill, reach = of_boxes(*boxes(np.take_along_axis(local, order[None], 2), span))
        boxed = fill + reach
        cost = boxed.mean(1) + boxed.max(1) * WORST
        better = cost < least - 1e-9
        found[better], least[better] = order[better], cost[better]
        if (least <= enough).all():
            break
    return found
