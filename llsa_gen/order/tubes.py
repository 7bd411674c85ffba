"""Tubes: one way to walk through a region of a grid so that runs of `span` cells are compact.

A region is cut, along all axes but one, into bands. They make tubes, which run along the axis that is left. The walk
goes through one tube after the other, slice by slice, and turns where a tube ends: the next one begins beside it, and
goes back. So no step leads across the region. Where bands are as wide as a box of `span` cells, a run is such a box;
only runs at a turn, or in a band of another width, are not. This file lists the ways to cut, best first.
"""

import math
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from llsa_gen.order.measure import of_boxes

__all__ = ["Tubes", "ideal", "tubes", "walk"]

Array = np.ndarray[Any, Any]

MOST_TILES = 12
"""How many shapes of a box are tried for a span."""


class Tubes(NamedTuple):
    """The axis that tubes run along, and the bands of every axis: (width, how many of it), one after the other."""

    along: int
    bands: tuple[tuple[tuple[int, int], ...], ...]
    """One band of everything for the axis that tubes run along."""


def walk(cells: Array, way: Tubes) -> Array:
    """The places of cells [d, C, n], counted from each region's corner, in the order of the walk: int64 [C, n]."""
    at = np.zeros(cells.shape[1:], np.int64)
    inner = np.zeros_like(at)
    for axis, bands in enumerate(way.bands):
        if axis == way.along:
            continue
        widths = np.repeat(*np.array(bands).T)
        band = np.repeat(np.arange(len(widths)), widths)[cells[axis]]
        at = at * len(widths) + _to_and_fro(band, at, len(widths))
        inner = inner * widths.max() + cells[axis] - (np.cumsum(widths) - widths)[band]
    ((length, _),) = way.bands[way.along]
    at = at * length + _to_and_fro(cells[way.along].astype(np.int64), at, length)
    slices = math.prod(max(width for width, _ in bands) for axis, bands in enumerate(way.bands) if axis != way.along)
    return np.argsort(at * slices + inner, axis=1)


def _to_and_fro(position: Array, turns: Array, size: int) -> Array:
    """A position from the other end at every second turn."""
    return np.where(turns & 1, size - 1 - position, position)


@lru_cache(maxsize=1024)
def tubes(extent: tuple[int, ...], spans: tuple[int, ...]) -> tuple[Tubes, ...]:
    """The ways to cut a box into tubes for runs of spans[-1], best first, as far as can be told without doing it."""
    rated: dict[Tubes, float] = {}
    for tile in _tiles(extent, spans[-1]):
        nests = 0.0 if _nests(tile, spans[:-1]) else 0.15
        for along in range(len(extent)):
            cuts = [_cuts(size, width) for size, width in zip(extent, tile, strict=True)]
            cuts[along] = [((extent[along], 1),)]
            for bands in product(*cuts):
                way = Tubes(along, bands)
                rated[way] = min(_expected(way, spans[-1]) + nests, rated.get(way, math.inf))
    return tuple(sorted(rated, key=lambda way: rated[way]))


@lru_cache(maxsize=1024)
def ideal(extent: tuple[int, ...], span: int) -> float:
    """Fill and reach together of the best box of `span` cells that fits into this one, as far as boxes are tried."""
    rated = (of_boxes(np.array(tile), np.array(span)) for tile in _tiles(extent, span))
    return min(float(max(fill, 1.0) + reach) for fill, reach in rated)


@lru_cache(maxsize=1024)
def _tiles(extent: tuple[int, ...], span: int) -> tuple[tuple[int, ...], ...]:
    """Boxes of about `span` cells inside another: exact ones, the roundest first, then those nearest to a cube."""
    exact, near = set(_factorings(extent, span)), set()
    side: dict[int, float] = {}
    left = float(span)
    for rank, axis in enumerate(sorted(range(len(extent)), key=lambda axis: extent[axis])):
        side[axis] = min(float(extent[axis]), left ** (1 / (len(extent) - rank)))
        left /= side[axis]
    for rounded in product(*({math.floor(side[axis]), math.ceil(side[axis])} for axis in range(len(extent)))):
        near.add(tuple(min(size, max(1, width)) for size, width in zip(extent, rounded, strict=True)))
    best = sorted(exact, key=lambda tile: (sum(tile), tile))[:MOST_TILES]
    rows = (1,) * len(extent)  # bad, but not for the smallest grids
    return tuple(best + sorted((near | {rows}) - set(best)))


def _factorings(extent: tuple[int, ...], span: int) -> list[tuple[int, ...]]:
    """All boxes of exactly `span` cells that fit."""
    if len(extent) == 1:
        return [(span,)] if span <= extent[0] else []
    small = [side for side in range(1, math.isqrt(span) + 1) if span % side == 0]
    return [
        (side, *others)
        for side in sorted({*small, *(span // side for side in small)})
        if side <= extent[0]
        for others in _factorings(extent[1:], span // side)
    ]


@lru_cache(maxsize=4096)
def _nests(box: tuple[int, ...], spans: tuple[int, ...]) -> bool:
    """Whether a box can be cut into equal boxes of spans[-1], and these again, down to spans[0]; none a mere strip."""
    return not spans or any(
        all(side % part == 0 for side, part in zip(box, tile, strict=True)) and _nests(tile, spans[:-1])
        for tile in _tiles(box, spans[-1])
        if math.prod(tile) == spans[-1]
    )


def _cuts(size: int, width: int) -> list[tuple[tuple[int, int], ...]]:
    """Ways to cut a side into bands of about a width: what is left over by itself, with the last, or spread."""
    full, left = divmod(size, width)
    if not left:
        return [((width, full),)]

    def spread(count: int) -> list[tuple[int, int]]:
        return [(size // count, count - size % count), (size // count + 1, size % count)]

    kinds = [[(width, full), (left, 1)], spread(full + 1)]
    if full:
        kinds += [spread(full), [(width, full - 1), (width + left, 1)]]
    return sorted({tuple(pair for pair in kind if pair[1]) for kind in kinds})


def _expected(way: Tubes, span: int) -> float:
    """About what the boxes of a walk come to, fill and reach together.

    A run of `span` cells through slices of A cells touches (span + A - gcd(span, A)) / A of them in the mean.
    """
    total = weight = 0.0
    ((length, _),) = way.bands[way.along]
    for bands in product(*(bands for axis, bands in enumerate(way.bands) if axis != way.along)):
        section = [width for width, _ in bands]
        area = math.prod(section)
        run = min(float(length), (span + area - math.gcd(span, area)) / area)
        turning = 0.0 if (area * length) % span == 0 else min(1.0, span / (area * length))
        sides = np.array([*section, run])
        fill, reach = of_boxes(sides, np.array(span))
        share = math.prod(width * count for width, count in bands)
        total += share * (max(1.0, float(fill)) + float(reach) + 0.6 * turning)
        weight += share
    return total / weight
