"""A picture as attention: its pixels as tokens, and q, k, v that denoise it.

Attention is non-local means. A pixel's feature x is the colours around it and its position, each divided by a
bandwidth; with q = (x, 1) and k = (x, -|x|^2 / 2) the logit is q.k = -|x_i - x_j|^2 / 2 up to a term that the softmax
over j cancels: a Gaussian in colour and position. v carries the pixel's colour, so o is a picture, less noisy.

Every head dim from 8 to 256 will do. The colours are those of the widest square of odd side that fits: 3 channels a
pixel, 2 for the position and 1 for |x|^2. That is the pixel alone from 8 on, a square of 3 from 30, of 5 from 78, of 7
from 150, of 9 from 246. Channels that are left are zero. Then one random rotation turns every vector, which leaves all
products as they are, so that every channel carries something.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from llsa_gen import order
from llsa_gen.spec import Spec

__all__ = ["HEADS", "Bandwidth", "Box", "Layout", "Tokens", "layout", "tokens"]


class Box(NamedTuple):
    """A rectangle of pixels."""

    row: int
    column: int
    height: int
    width: int


class Bandwidth(NamedTuple):
    """How alike what a head attends to must be: standard deviations of colour (0 to 1) and position (1: long side)."""

    colour: float
    position: float


HEADS = (Bandwidth(0.15, 0.02), Bandwidth(0.15, 0.03), Bandwidth(0.12, 0.05), Bandwidth(0.12, 0.2))
"""From a head that looks around to one that looks everywhere."""


@dataclass(frozen=True)
class Layout:
    """The pixels of a picture as tokens, in an order that makes a block of tokens a patch of the picture."""

    height: int
    width: int
    spans: tuple[int, ...]
    """How many pixels a token of level 0, 1, ..., L covers; the last token of a level may cover fewer."""
    order: order.Order

    @property
    def n_tokens(self) -> int:
        """N, the number of pixels."""
        return self.height * self.width

    def tokens(self, picture: Tensor) -> Tensor:
        """[C, height, width] to [N, C]."""
        return self.order.apply(picture.flatten(1).mT)

    def picture(self, tokens: Tensor) -> Tensor:
        """[N, C] back to [C, height, width]."""
        return self.order.restore(tokens).mT.unflatten(1, (self.height, self.width))

    def above(self, level: int) -> Tensor:
        """int64 [N]: the token of a level under which each token lies."""
        return torch.arange(self.n_tokens) // self.spans[level]

    def box(self, level: int, token: int) -> Box:
        """The box around the pixels of a token, as its patch need not be one where blocks do not divide the picture."""
        covered = self.order.permutation[token * self.spans[level] : (token + 1) * self.spans[level]]
        (top, bottom), (left, right) = ([int(x.min()), int(x.max())] for x in self._places(covered))
        return Box(top, left, bottom - top + 1, right - left + 1)

    def token_at(self, row: int, column: int) -> int:
        """The token that is the pixel at a row and a column."""
        return int(self.order.inverse[row * self.width + column])

    def _places(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels // self.width, pixels % self.width


def layout(spec: Spec, height: int, width: int) -> Layout:
    """The tokens of a picture of `height` x `width` pixels. With blocks of 16 they cover 4 x 4 pixels, then 16 x 16."""
    spans = tuple(spec.span(level) for level in range(spec.num_levels + 1))
    return Layout(height, width, spans, order.grid((height, width), spec))


@dataclass(frozen=True)
class Tokens:
    """q, k, v [1, heads, N, D] float32 of a picture, and how to see a picture in what attention makes of v."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    turn: Tensor
    """[D, D]: the rotation that every vector went through."""

    def picture(self, o: Tensor) -> Tensor:
        """[1, heads, N, D] to [3, height, width]: the mean over the heads, turned back into colours."""
        return self.layout.picture((o.mean(1)[0].to(self.turn) @ self.turn.mT)[:, :3])


def tokens(spec: Spec, picture: Tensor, layout: Layout, heads: Sequence[Bandwidth] = HEADS, seed: int = 0) -> Tokens:
    """q, k, v of a picture [3, height, width], one head for each bandwidth; see the head of this file."""
    dim = spec.head_dim
    # the widest odd patch of colours that leaves room for a position and for |x|^2
    patch = max(side for side in range(1, dim, 2) if 3 * side**2 + 3 <= dim)
    half = patch // 2
    colours = unfold(pad(picture[None], (half,) * 4, mode="replicate"), patch)[0]
    colours = colours.unflatten(1, picture.shape[1:]) / patch  # |.|^2: the mean over the patch, summed over r, g, b
    rows, columns = torch.arange(layout.height), torch.arange(layout.width)
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij")) / max(layout.height, layout.width)

    turn, _ = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))
    v = _turned([layout.tokens(picture)], turn)
    q, k = [], []
    for head in heads:
        x = layout.tokens(torch.cat([colours / head.colour, positions / head.position]))
        x = x - x.mean(0)  # differences stay, products get small: float32 keeps more of them
        q.append(_turned([x, torch.ones(len(x), 1)], turn) * math.sqrt(dim))  # which attention divides by
        k.append(_turned([x, x.square().sum(1, keepdim=True) / -2], turn))
    return Tokens(torch.stack(q)[None], torch.stack(k)[None], torch.stack([v] * len(heads))[None], layout, turn)


def _turned(parts: Sequence[Tensor], turn: Tensor) -> Tensor:
    """The parts side by side, filled up with zeros and turned: [N, D]."""
    x = torch.cat(list(parts), dim=1)
    return pad(x, (0, len(turn) - x.shape[1])) @ turn
