"""The demo's picture: the photograph as single query pixels see it, sharp where they keep blocks and coarse elsewhere.

Every token of every level that a query attends to is drawn as what it is, the mean over its tile; where levels overlap
the finest is on top. The figure is a dark card with round corners, so that it stands on white and on dark pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from llsa_gen.demo_photo import Layout
from llsa_gen.spec import Spec

CARD, INK, MUTED = "#12161d", "#e8ecf1", "#98a3b1"
QUERY = "#ff4fa3"
KEPT = ("#5dfdc1", "#ffffff")
"""Outlines of kept tokens, level 1 first; the levels above the second are drawn like the second."""

DIMMEST = 0.42
"""Brightness of what is seen at the coarsest level only; at the finest it is 1."""
UNSEEN = 0.12
"""Brightness of what was scored but is not attended to: levels that are not enriched."""

WIDTH, MARGIN, GAP = 1600, 20, 8  # pixels: 4 panels, each 3 times the 128 pixels of the photograph
DPI = 100
HEAD, FOOT = 92, 100


@dataclass(frozen=True)
class Query:
    """A query pixel: its name, and where it is in the picture as fractions of height and width."""

    name: str
    down: float
    right: float

    def pixel(self, layout: Layout) -> tuple[int, int]:
        """Row and column."""
        return int(self.down * layout.height), int(self.right * layout.width)


@dataclass(frozen=True)
class View:
    """What one query attends to, in one head: its tokens, level 0 (pixels) to level L, and those of them it keeps."""

    seen: tuple[Tensor, ...]
    """L + 1 bool tensors [T_l]."""
    kept: tuple[Tensor, ...]
    """L int64 tensors: the kept tokens, level 1 first."""


def view(spec: Spec, kept: Sequence[Tensor], layout: Layout, head: int, token: int) -> View:
    """What the query `token` sees in `head`, from the kept indices that `attention.select` returns."""
    mine = [ids[0, head, token // spec.span(level)].long() for level, ids in enumerate(kept, start=1)]
    mine = [ids[ids >= 0] for ids in mine]
    seen = []
    for level in range(spec.num_levels + 1):
        tokens = torch.arange(-(-layout.n_tokens // spec.span(level)))
        inside = torch.ones_like(tokens, dtype=torch.bool)
        if level < spec.num_levels:
            inside = torch.isin(tokens // spec.block(level + 1), mine[level])
        seen.append(inside & (level in (0, *spec.enriched_levels)))
    return View(tuple(seen), tuple(mine))


def seen_picture(spec: Spec, picture: Tensor, layout: Layout, view: View) -> Tensor:
    """The picture [3, height, width] as a query sees it: every pixel from the finest token that it attends to."""
    pixels = layout.tokens(picture)
    top = spec.num_levels
    result = torch.empty_like(pixels)
    for level in range(top, -1, -1):
        span = spec.span(level)
        means = pixels.view(-1, span, 3).mean(1)
        bright = DIMMEST + (1 - DIMMEST) * (top - level) / top
        seen = view.seen[level].repeat_interleave(span)
        if level == top:
            result = UNSEEN * means.repeat_interleave(span, dim=0)
        result[seen] = bright * means.repeat_interleave(span, dim=0)[seen]
    return layout.picture(result)


def draw(
    path: Path,
    spec: Spec,
    layout: Layout,
    kept: Sequence[Tensor],
    head: int,
    queries: Sequence[Query],
    before: tuple[str, Tensor],
    after: tuple[str, Tensor],
) -> None:
    """Write the PNG: a panel for each query, and one that is half `before` and half `after` attention.

    kept: what `attention.select` returned; head: the one to draw; before, after: a caption, and [3, height, width].
    """
    card = _Card(layout, panels=len(queries) + 1)
    _, noisy = before
    views = [view(spec, kept, layout, head, layout.token_at(*query.pixel(layout))) for query in queries]
    for panel, (query, seen) in enumerate(zip(queries, views, strict=True)):
        card.picture(panel, seen_picture(spec, noisy, layout, seen))
        card.caption(panel, query.name)
        for level in range(spec.num_levels, 0, -1):
            card.outline(panel, level, seen.kept[level - 1])
        card.mark(*card.at(panel, *query.pixel(layout)))
    card.halves(len(queries), before, after)
    _legend(card, spec, noisy, queries[0], views[0])
    card.title(f"What one pixel sees with {spec.name}", f"{_total(views[0]):,} keys of {layout.n_tokens:,}")
    card.figure.savefig(path, dpi=DPI, transparent=True)


def _total(view: View) -> int:
    return sum(int(seen.sum()) for seen in view.seen)


def _legend(card: "_Card", spec: Spec, picture: Tensor, query: Query, view: View) -> None:
    """What the panels show, each level with the query's own tile of the coarsest level as that level sees it."""
    layout, top = card.layout, spec.num_levels
    card.entry(0, top + 2, "the query pixel", f"sees {_total(view):,} keys instead of {layout.n_tokens:,}")
    token = layout.token_at(*query.pixel(layout)) // spec.span(top)
    row, column = layout.corner(top, token)
    tile = layout.tiles[top]
    for item, level in enumerate(range(top, -1, -1), start=1):
        means = layout.tokens(picture).view(-1, spec.span(level), 3).mean(1).repeat_interleave(spec.span(level), dim=0)
        swatch = layout.picture(means)[:, row : row + tile.height, column : column + tile.width]
        size = f"{layout.tiles[level].width}\N{MULTIPLICATION SIGN}{layout.tiles[level].height} pixels"
        count = int(view.seen[level].sum())
        if level == 0:
            head, text = f"{count:,} pixels", "themselves, in the blocks that level 1 keeps"
        else:
            where = "everywhere" if level == top else f"in what level {level + 1} keeps"
            head = f"level {level}: {count:,} tokens" if count else f"level {level}: only scored"
            text = f"of {size}, {where}; {len(view.kept[level - 1])} kept"
        card.entry(item, top + 2, head, text, swatch, level)


class _Card:
    """The dark card that everything is drawn on, in pixels from its upper left corner."""

    def __init__(self, layout: Layout, panels: int) -> None:
        self.layout = layout
        self.side = (WIDTH - 2 * MARGIN - (panels - 1) * GAP) / panels
        self.zoom = self.side / layout.width
        self.bottom = HEAD + layout.height * self.zoom
        self.height = round(self.bottom + FOOT)
        self.figure = Figure(figsize=(WIDTH / DPI, self.height / DPI))
        FigureCanvasAgg(self.figure)
        self.page = self.figure.add_axes((0, 0, 1, 1))
        self.page.set_axis_off()
        self.page.set(xlim=(0, WIDTH), ylim=(self.height, 0), autoscale_on=False)
        corner = 14
        self.page.add_patch(
            FancyBboxPatch(
                (corner, corner),
                WIDTH - 2 * corner,
                self.height - 2 * corner,
                f"round,pad={corner}",
                facecolor=CARD,
                linewidth=0,
            )
        )

    def text(self, x: float, y: float, text: str, size: float, color: str = INK, **style: Any) -> None:
        """Text of `size` pixels whose baseline is at y."""
        self.page.text(x, y, text, fontsize=size * 72 / DPI, color=color, **style)

    def title(self, left: str, right: str) -> None:
        self.text(MARGIN, 42, left, 24, weight="bold")
        self.text(WIDTH - MARGIN, 42, right, 20, MUTED, ha="right")

    def left(self, panel: int) -> float:
        return MARGIN + panel * (self.side + GAP)

    def caption(self, panel: int, text: str, **style: Any) -> None:
        self.text(self.left(panel), HEAD - 11, text, 16, **style)

    def at(self, panel: int, row: int, column: int) -> tuple[float, float]:
        """Where the middle of a pixel of the photograph is."""
        return self.left(panel) + (column + 0.5) * self.zoom, HEAD + (row + 0.5) * self.zoom

    def image(self, picture: Tensor, x: float, y: float, width: float, height: float) -> None:
        pixels = picture.clamp(0, 1).permute(1, 2, 0).numpy()
        self.page.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto", interpolation="nearest")
        self.page.set(xlim=(0, WIDTH), ylim=(self.height, 0))

    def picture(self, panel: int, picture: Tensor) -> None:
        self.image(picture, self.left(panel), HEAD, self.side, self.bottom - HEAD)

    def halves(self, panel: int, before: tuple[str, Tensor], after: tuple[str, Tensor]) -> None:
        """One panel: the left half of one picture beside the right half of the other."""
        middle = self.layout.width // 2
        self.picture(panel, torch.cat([before[1][:, :, :middle], after[1][:, :, middle:]], dim=2))
        x, _ = self.at(panel, 0, middle)
        x -= self.zoom / 2
        self.page.plot([x, x], [HEAD, self.bottom], color=CARD, linewidth=2)
        self.caption(panel, before[0])
        self.text(x + 8, HEAD - 11, after[0], 16)

    def outline(self, panel: int, level: int, tokens: Tensor) -> None:
        tile = self.layout.tiles[level]
        for token in tokens.tolist():
            row, column = self.layout.corner(level, token)
            x, y = self.left(panel) + column * self.zoom, HEAD + row * self.zoom
            self.frame(x, y, tile.width * self.zoom, tile.height * self.zoom, level)

    def frame(self, x: float, y: float, width: float, height: float, level: int) -> None:
        color = KEPT[min(level, len(KEPT)) - 1]
        self.page.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.1))

    def mark(self, x: float, y: float) -> None:
        self.page.plot(x, y, "o", markersize=8, markerfacecolor=QUERY, markeredgecolor="white", markeredgewidth=1.4)

    def entry(
        self, item: int, items: int, head: str, text: str, swatch: Tensor | None = None, level: int = 0
    ) -> None:
        """One entry of the legend: a tile or, without one, the query's mark, and two lines."""
        x, y, side = MARGIN + item * (WIDTH - 2 * MARGIN + GAP) / items, self.bottom + 24, 52
        if swatch is None:
            self.mark(x + side / 2, y + side / 2)
        else:
            self.image(swatch, x, y, side, side)
            if level:
                self.frame(x, y, side, side, level)
        self.text(x + side + 12, y + 21, head, 16, weight="bold")
        self.text(x + side + 12, y + 44, text, 14, MUTED)
