"""Networks: that they sort is decided by all lists of 0 and 1 (Knuth, The Art of Computer Programming 3, 5.3.4)."""

from collections.abc import Iterable
from itertools import product

import pytest

from llsa_gen.emit.networks import merging, sorting

LENGTHS = [1, 2, 4, 8, 16]


def passed(network: Iterable[tuple[int, int]], numbers: Iterable[int]) -> list[int]:
    found = list(numbers)
    for i, j in network:
        assert i < j
        found[i], found[j] = sorted((found[i], found[j]))
    return found


@pytest.mark.parametrize("length", LENGTHS)
def test_whatever_comes_in_comes_out_ascending(length: int) -> None:
    for bits in product((0, 1), repeat=length):
        assert passed(sorting(length), bits) == sorted(bits)


@pytest.mark.parametrize("length", LENGTHS)
def test_what_falls_and_then_rises_or_the_other_way_round_is_merged(length: int) -> None:
    for first in range(length + 1):
        for last in range(first, length + 1):
            for inside in (0, 1):
                bits = [inside if first <= place < last else 1 - inside for place in range(length)]
                assert passed(merging(length), bits) == sorted(bits)


def test_how_many_pairs_there_are() -> None:
    assert [len(list(sorting(length))) for length in LENGTHS] == [0, 1, 5, 19, 63]
    assert [len(list(merging(length))) for length in LENGTHS] == [0, 1, 4, 12, 32]
