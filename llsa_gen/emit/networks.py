"""Networks: which pairs to put in order, and when, so that whatever numbers come in, they come out ascending.

As (i, j) with i < j, in turn: afterwards number i is not larger than number j. The length of a list is a power of two.
"""

from collections.abc import Iterator

__all__ = ["merging", "sorting"]

Pairs = Iterator[tuple[int, int]]


def sorting(length: int) -> Pairs:
    """Batcher's odd-even merge sort (AFIPS 1968): for 2, 4 and 8 the fewest pairs there can be, 1, 5 and 19."""
    if length > 1:
        half = length // 2
        yield from sorting(half)
        yield from ((i + half, j + half) for i, j in sorting(half))
        yield from _odd_even(0, length, 1)


def _odd_even(first: int, length: int, step: int) -> Pairs:
    """Merge the ascending halves of what lies at `first`, `first` + `step`, ... of `length` places."""
    twice = 2 * step
    if twice < length:
        yield from _odd_even(first, length, twice)
        yield from _odd_even(first + step, length, twice)
        yield from ((i, i + step) for i in range(first + step, first + length - step, twice))
    else:
        yield first, first + step


def merging(length: int) -> Pairs:
    """Batcher's bitonic merge, of a list that rises and then falls, or falls and then rises."""
    step = length // 2
    while step:
        yield from ((i, i + step) for i in range(length) if not i & step)
        step //= 2
