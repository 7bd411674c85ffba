"""Which tokens of a sequence are the picture's, and which of them a mask leaves out. Decided from lengths alone.

A sequence of attention is a picture, or a picture with text before or after it. Its tokens do not say which; lengths
do: the cells of a grid, and the parts of the sequences that the model put together by `torch.cat`. Where lengths leave
it open there is no answer, only a reason.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from llsa_gen.integrations.grids import Shape

__all__ = ["Masks", "Place", "Text", "find", "look"]

Text = str | tuple[int, int] | None
"""Where the text is: "first", "last", (how many first, how many last), or None where nobody has said so."""


@dataclass(frozen=True)
class Place:
    """A picture's tokens in a sequence: `first` of others, those of the grid, `last` of others."""

    grid: Shape
    first: int
    last: int

    @property
    def cells(self) -> int:
        """How many tokens the picture has."""
        return math.prod(self.grid)

    @property
    def side(self) -> Text:
        """Where the text is, as a fact about the layer that stays when lengths change; None if there is none."""
        if self.first and self.last:
            return None
        return "first" if self.first else "last" if self.last else None

    def __str__(self) -> str:
        """In the order of the sequence, such as "77 text + 64×64"."""
        before, after = ([f"{count:,} text"] if count else [] for count in (self.first, self.last))
        return " + ".join([*before, "×".join(map(str, self.grid)), *after])


NO_GRID = "the grid of patches is not known: pass grid="
MANY_GRIDS = "several grids have as many cells: pass grid="
NO_TEXT = "which of its tokens are text is not known: pass text=(how many before, how many after)"
FEWER = "fewer tokens than the grid has cells"
AS_MANY = "as many text tokens as patches, so that which these are is not known"


def find(
    tokens: int, grids: Sequence[Shape], parts: Iterable[Sequence[int]], text: Text, *, copies: int = 1
) -> Place | str:
    """Where the picture is among `tokens` tokens, or why that is not known.

    Args:
        tokens: how long the sequence is.
        grids: candidates.
        parts: lengths of what was put together to sequences, in order: [77, 4096] for 77 of text before 4,096 patches.
            Those whose sum is another length are passed over.
        text: where text is known to be.
        copies: how many times as many batch entries there are as the model got: as many as the first axis of a grid
            has cells where a model attends within each frame.
    """
    if not grids:
        return NO_GRID
    whole = [grid for grid in grids if math.prod(grid) == tokens]
    if not whole and copies > 1:
        whole = [grid[1:] for grid in grids if len(grid) > 1 and grid[0] == copies and math.prod(grid[1:]) == tokens]
    if whole:
        return Place(whole[0], 0, 0) if len(set(whole)) == 1 else MANY_GRIDS
    grids = [grid for grid in grids if math.prod(grid) < tokens]
    if not grids:
        return FEWER
    found = {place for grid in grids for place in _in_parts(tokens, grid, parts)}
    if not found:
        found = {place for grid in grids for place in _beside(tokens, grid, text)}
    elif len(found) > 1 and text is not None:
        found &= {place for grid in grids for place in _beside(tokens, grid, text)}
    if len(found) == 1:
        return found.pop()
    if len({(place.cells, place.first) for place in found}) == 1:
        return MANY_GRIDS
    return NO_TEXT


def _in_parts(tokens: int, grid: Shape, parts: Iterable[Sequence[int]]) -> Iterable[Place]:
    for lengths in parts:
        if sum(lengths) == tokens:
            for index, length in enumerate(lengths):
                if length == math.prod(grid):
                    yield Place(grid, sum(lengths[:index]), sum(lengths[index + 1 :]))


def _beside(tokens: int, grid: Shape, text: Text) -> Iterable[Place]:
    others = tokens - math.prod(grid)
    if text == "first":
        yield Place(grid, others, 0)
    elif text == "last":
        yield Place(grid, 0, others)
    elif isinstance(text, tuple) and sum(text) == others:
        yield Place(grid, *text)


class Masks(NamedTuple):
    """What a mask says for the queries of a picture."""

    text: Tensor | None
    """bool [B, T], True where a text token takes part; None where all do."""
    picture: Tensor | None = None
    """bool [B, N] that has to be True everywhere, and that nobody could look at; None where somebody did."""


BIAS = "the mask is a bias"
PER_QUERY = "the mask differs from query to query"
PER_HEAD = "the mask differs from head to head"
OVER_PICTURE = "the mask leaves out tokens of the picture"
NOT_SEEN = "a mask of this form cannot be looked at while torch compiles"

_looked = WeakTensorKeyDictionary()
"""What was found, by mask: a model passes one mask to all its layers, and looking waits for the GPU."""


def look(mask: Tensor, batch: int, place: Place, tokens: int) -> Masks | str:
    """What an SDPA mask says for the picture's queries, or why those cannot be sparse.

    Bool masks are True where a key takes part. In float ones 0 takes part, and what is -10,000 or less does not; other
    numbers are a bias. Rows of text queries do not matter: these stay dense, with the mask as it is.

    Args:
        mask: [..., M or 1, S], for a sequence of S = `tokens` tokens, as torch's scaled_dot_product_attention takes it;
            M is S, or the picture's tokens.
        batch: how many batch entries the sequence has.
    """
    if torch.compiler.is_compiling():
        return _unseen(mask, batch, place, tokens)
    if mask.is_inference():  # then nothing tells whether somebody has written into it
        return _look(mask, batch, place, tokens)
    key = (mask._version, batch, place)
    known = _looked.get(mask)
    if known is None or known[0] != key:
        known = (key, _look(mask, batch, place, tokens))
        _looked[mask] = known
    return known[1]


def _rows(mask: Tensor, place: Place) -> Tensor:
    """The mask as [B or 1, H or 1, N or 1, S], of the picture's queries."""
    while mask.ndim < 4:
        mask = mask[None]
    if mask.shape[2] in (1, place.cells):  # one row for all, or the picture's queries alone
        return mask
    return mask[:, :, place.first : place.first + place.cells]


def _split(keys: Tensor, batch: int, place: Place, tokens: int) -> tuple[Tensor, Tensor]:
    """[B or 1, S or 1] as those of the picture and of text."""
    keys = keys.expand(batch, tokens)
    after = place.first + place.cells
    return keys[:, place.first : after], torch.cat([keys[:, : place.first], keys[:, after:]], 1)


def _look(mask: Tensor, batch: int, place: Place, tokens: int) -> Masks | str:
    rows = _rows(mask, place)
    first = rows[:, :1, :1]
    if rows.dtype == torch.bool:
        present, plain = first[:, 0, 0], rows.new_ones(())
    else:
        present = first[:, 0, 0] == 0
        plain = (present | (first[:, 0, 0] <= -1e4)).all()
    picture, text = _split(present, batch, place, tokens)
    equal = [(rows[:, :1] == first).all(), (rows == rows[:, :1]).all()]
    facts = torch.stack([plain, *equal, picture.all(), text.all()]).tolist()  # waits once
    for fact, reason in zip(facts, (BIAS, PER_QUERY, PER_HEAD, OVER_PICTURE), strict=False):
        if not fact:
            return reason
    return Masks(None if facts[-1] else text)


def _unseen(mask: Tensor, batch: int, place: Place, tokens: int) -> Masks | str:
    """While torch compiles nobody can look: text is masked without looking, and the picture is to be asserted."""
    rows = _rows(mask, place)
    if rows.dtype != torch.bool or rows.shape[1] != 1 or rows.shape[2] != 1:
        return NOT_SEEN
    picture, text = _split(rows[:, 0, 0], batch, place, tokens)
    return Masks(text if text.shape[1] else None, picture)
