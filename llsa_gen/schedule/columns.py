"""The columns of a row as tiles of the kernels in Gluon hold them: all in one tile, or in two.

Tiles are powers of two. A head of 72 would fill 72 of 128 columns, which are copied, kept in shared memory and
multiplied. So its rows come in two tiles: the first 64 columns, and 16 for the rest.
"""

from dataclasses import dataclass

from llsa_gen.schedule.table import pad

__all__ = ["Columns", "columns_of", "kept_columns", "take_turns"]

FIRST = 64
"""Columns of the first of two tiles: 128 bytes a row in half precision, as many as one swizzle covers."""


@dataclass(frozen=True)
class Columns:
    """The columns that one tile of a row holds. As text it is how names of such tiles end: nothing, or `_rest`."""

    first: int
    width: int
    head_dim: int

    def __str__(self) -> str:
        return "_rest" if self.first else ""

    @property
    def alone(self) -> bool:
        """Whether the tile holds all columns."""
        return not self.first and self.width >= self.head_dim

    @property
    def padded(self) -> bool:
        """Whether some of them do not exist."""
        return self.first + self.width > self.head_dim

    @property
    def size(self) -> str:
        """The constant of a module that says how many they are."""
        return "PAD_DIM" if self.alone else f"WIDTH{self}".upper()


def columns_of(head_dim: int) -> tuple[Columns, ...]:
    """The tiles of a row: two where the rest of a head above 64 fills half of its own 64 columns at the most."""
    rest = pad(head_dim - FIRST) if head_dim > FIRST else FIRST
    if rest >= FIRST:
        return (Columns(0, pad(head_dim), head_dim),)
    return Columns(0, FIRST, head_dim), Columns(FIRST, rest, head_dim)


def kept_columns(head_dim: int) -> int:
    """How many columns of a row the tiles have together: what shared memory, copies and products are paid for."""
    return sum(some.width for some in columns_of(head_dim))


def take_turns(head_dim: int) -> bool:
    """Whether three programs of attention and more fit into a multiprocessor, and wait for products by turns."""
    return kept_columns(head_dim) <= FIRST + 16
