"""What single pixels of a picture see and keep, as numbers and as pictures: drawing.py puts them on a card."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llsa_gen.look.pixels import Layout
from llsa_gen.spec import Spec

__all__ = ["Query", "View", "mosaic", "seen_picture", "view"]

DIMMEST = 0.6
"""Brightness of what is seen at the coarsest level only; the pixels themselves have 1."""
UNSEEN = 0.1
"""Brightness of what is scored but not attended to: levels that are not enriched."""
GHOST = 0.25
"""How much of the picture shines through its coarse tokens, or nobody would know what they cover."""


class Query(NamedTuple):
    """A query pixel: what it shows, and where it is as fractions of the picture's height and width."""

    name: str
    down: float
    right: float

    def pixel(self, layout: Layout) -> tuple[int, int]:
        """Row and column."""
        return int(self.down * layout.height), int(self.right * layout.width)

    def token(self, layout: Layout) -> int:
        """The token of level 0."""
        return layout.token_at(*self.pixel(layout))


@dataclass(frozen=True)
class View:
    """What one query attends to in one head, and what it keeps."""

    seen: tuple[Tensor, ...]
    """L + 1 bool tensors [T_l], the pixels (level 0) first."""
    kept: tuple[Tensor, ...]
    """L int64 tensors, the kept tokens of level 1 first."""

    @property
    def keys(self) -> int:
        """How many keys it attends to."""
        return sum(int(seen.sum()) for seen in self.seen)

    def pixels_kept(self, layout: Layout, level: int) -> int:
        """How many pixels lie under the tokens of a level, from 1 on, that it keeps."""
        return int(torch.isin(layout.above(level), self.kept[level - 1]).sum())


def view(spec: Spec, kept: Sequence[Tensor], layout: Layout, head: int, token: int) -> View:
    """What the query `token` sees in `head`, from the kept indices that `attention.select` returns."""
    mine = [ids[0, head, token // spec.span(level)].long() for level, ids in enumerate(kept, start=1)]
    mine = [ids[ids >= 0] for ids in mine]
    seen = []
    for level in range(spec.num_levels + 1):
        tokens = torch.arange(-(-layout.n_tokens // spec.span(level)))
        candidates = torch.ones_like(tokens, dtype=torch.bool)
        if level < spec.num_levels:
            candidates = torch.isin(tokens // spec.block(level + 1), mine[level])
        seen.append(candidates & (level in (0, *spec.enriched_levels)))
    return View(tuple(seen), tuple(mine))


def mosaic(picture: Tensor, layout: Layout, level: int) -> Tensor:
    """The picture [3, height, width] with the patch of every token of a level in its mean colour."""
    tokens, above = layout.tokens(picture), layout.above(level)
    covered = above.bincount()[:, None]
    means = tokens.new_zeros(len(covered), tokens.shape[1]).index_add(0, above, tokens) / covered
    return layout.picture(means[above])


def seen_picture(spec: Spec, picture: Tensor, layout: Layout, view: View) -> Tensor:
    """The picture [3, height, width] as a query sees it: every pixel from the finest token that it attends to."""
    top = spec.num_levels
    result = UNSEEN * picture
    for level in range(top, -1, -1):
        bright = DIMMEST + (1 - DIMMEST) * (top - level) / top
        patches = bright * torch.lerp(mosaic(picture, layout, level), picture, GHOST)
        seen = layout.picture(view.seen[level][layout.above(level)][:, None])
        result = torch.where(seen, patches, result)
    return result
