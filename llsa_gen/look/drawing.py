"""The card: a picture as single query pixels see it, and what attention makes of it.

Every token of every level that a query attends to is drawn as what it is, the mean over its patch; where levels overlap
the finest is on top. A frame is the box around a patch. The figure is a dark card with round corners, so that it stands
on white and on dark pages.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from llsa_gen.look.pixels import Box, Layout
from llsa_gen.look.views import Query, View, mosaic, seen_picture
from llsa_gen.spec import Spec

__all__ = ["FOOT", "HEAD", "MARGIN", "MAX_QUERIES", "TALLEST", "WIDTH", "draw"]

CARD, INK, MUTED = "#12161d", "#e8ecf1", "#9aa5b3"
QUERY = "#ff4fa3"
KEPT = ("#5dfdc1", "#ffffff")
"""Outlines of kept tokens of level 1, and of the levels above it."""

DPI = 100
WIDTH, MARGIN, GAP, HEAD, FOOT = 1600, 20, 8, 92, 104  # pixels; 4 panels of 384, 3 times the photograph's 128
SWATCH = 56
TALLEST = 1600
"""Pixels of the height of a panel: a picture that is much taller than wide gets a narrower one."""

MAX_QUERIES = 8
"""Beyond, panels are too small to see anything in them."""


def draw(
    file: Path | BinaryIO,
    spec: Spec,
    layout: Layout,
    picture: Tensor,
    queries: Sequence[Query],
    views: Sequence[View],
    before_after: tuple[tuple[str, Tensor], tuple[str, Tensor]] | None = None,
) -> None:
    """Write a PNG: a panel for what each query sees, and one that is half before and half after attention.

    Pictures are [3, height, width] in 0 to 1; those before and after attention come with a caption. Without them the
    last panel is the picture as it is, with all queries.
    """
    card = _Card(layout, panels=len(queries) + 1)
    card.text(MARGIN, 44, "What one pixel attends to", 24, weight="bold")
    card.text(WIDTH - MARGIN, 44, f"{spec.name}: {layout.n_tokens:,} pixels as tokens", 18, MUTED, ha="right")
    for panel, (query, seen) in enumerate(zip(queries, views, strict=True)):
        card.panel(panel, seen_picture(spec, picture, layout, seen))
        card.text(card.left(panel), HEAD - 12, query.name, 16)
        for level in range(spec.num_levels, 0, -1):
            for token in seen.kept[level - 1].tolist():
                card.outline(panel, level, token)
        card.mark(*card.point(panel, query.pixel(layout)))
    if before_after is None:
        _whole(card, len(queries), picture, queries)
    else:
        _halves(card, len(queries), *before_after)
    _legend(card, spec, picture, queries[0], views[0])
    card.figure.savefig(file, dpi=DPI, transparent=True, format="png")


def _whole(card: "_Card", panel: int, picture: Tensor, queries: Sequence[Query]) -> None:
    card.panel(panel, picture)
    card.text(card.left(panel), HEAD - 12, "the picture", 16)
    for query in queries:
        card.mark(*card.point(panel, query.pixel(card.layout)))


def _halves(card: "_Card", panel: int, before: tuple[str, Tensor], after: tuple[str, Tensor]) -> None:
    middle = card.layout.width // 2
    card.panel(panel, torch.cat([before[1][:, :, :middle], after[1][:, :, middle:]], dim=2))
    x = card.left(panel) + middle * card.zoom
    card.page.plot([x, x], [HEAD, card.bottom], color=CARD, linewidth=2, zorder=3)
    card.text(card.left(panel), HEAD - 12, before[0], 16)
    card.text(x + 6, HEAD - 12, after[0], 16)


def _legend(card: "_Card", spec: Spec, picture: Tensor, query: Query, view: View) -> None:
    """An entry for the query and for each level, coarsest first: the swatches go, step by step, down to the query."""
    layout, top = card.layout, spec.num_levels
    step = (WIDTH - 2 * MARGIN + GAP) / (top + 2)
    y = card.bottom + 24
    small = min(1.0, 5 / (top + 2))  # many levels leave little room for each

    def entry(item: int, head: str, text: str) -> None:
        card.text(MARGIN + item * step + SWATCH + 12, y + 24, head, 16 * small, weight="bold")
        card.text(MARGIN + item * step + SWATCH + 12, y + 47, text, 14 * small, MUTED)

    card.mark(MARGIN + SWATCH / 2, y + SWATCH / 2)
    entry(0, "the query pixel", f"one softmax over {view.keys:,} keys")
    for item, level in enumerate(range(top, -1, -1), start=1):
        _swatch(card, spec, picture, query, level, MARGIN + item * step, y)
        where = "the whole picture" if level == top else f"inside those {len(view.kept[level])}"
        count, own = int(view.seen[level].sum()), layout.box(level, query.token(layout) // spec.span(level))
        if level == 0:
            entry(item, f"{count:,} pixels", f"level 0: {where}")
        else:
            whole = own.width * own.height == spec.span(level)
            size = f"{own.width}\N{MULTIPLICATION SIGN}{own.height}" if whole else f"{spec.span(level):,}"
            what = f"{'token' if count == 1 else 'tokens'} of {size} pixels"
            where = where if count else "only scored"  # a level that is not enriched
            entry(item, f"{count:,} {what}", f"level {level}: {where}; {len(view.kept[level - 1])} kept")


def _swatch(card: "_Card", spec: Spec, picture: Tensor, query: Query, level: int, x: float, y: float) -> None:
    """The query's token of the level above, or the whole picture, as this level sees it; the query's own outlined."""
    layout, pixel = card.layout, query.token(card.layout)
    whole = Box(0, 0, layout.height, layout.width)
    if level < spec.num_levels:
        whole = layout.box(level + 1, pixel // spec.span(level + 1))
    zoom = SWATCH / max(whole.height, whole.width)
    rows, columns = slice(whole.row, whole.row + whole.height), slice(whole.column, whole.column + whole.width)
    width, height = whole.width * zoom, whole.height * zoom
    card.image(mosaic(picture, layout, level)[:, rows, columns], x, y, width, height)
    if level < spec.num_levels:
        card.frame(x, y, width, height, _color(level + 1))
    own = layout.box(level, pixel // spec.span(level))
    left, up = x + (own.column - whole.column) * zoom, y + (own.row - whole.row) * zoom
    card.frame(left, up, own.width * zoom, own.height * zoom, _color(level))


def _color(level: int) -> str:
    return QUERY if level == 0 else KEPT[min(level, len(KEPT)) - 1]


class _Card:
    """The dark card that everything is drawn on, in pixels from its upper left corner."""

    def __init__(self, layout: Layout, panels: int) -> None:
        self.layout = layout
        self.side = (WIDTH - 2 * MARGIN - (panels - 1) * GAP) / panels
        self.zoom = min(self.side / layout.width, TALLEST / layout.height)
        self.bottom = HEAD + layout.height * self.zoom
        self.height = round(self.bottom + FOOT)
        self.figure = Figure(figsize=(WIDTH / DPI, self.height / DPI))
        FigureCanvasAgg(self.figure)
        self.page = self.figure.add_axes((0, 0, 1, 1))
        self.page.set_axis_off()
        corner = 14
        inner = (WIDTH - 2 * corner, self.height - 2 * corner)
        self.page.add_patch(
            FancyBboxPatch((corner, corner), *inner, f"round,pad={corner}", facecolor=CARD, linewidth=0)
        )
        self._fit()

    def _fit(self) -> None:
        self.page.set(xlim=(0, WIDTH), ylim=(self.height, 0))

    def left(self, panel: int) -> float:
        """Where a panel begins."""
        return MARGIN + panel * (self.side + GAP)

    def point(self, panel: int, pixel: tuple[int, int]) -> tuple[float, float]:
        """Where the middle of the picture's pixel (row, column) is."""
        return self.left(panel) + (pixel[1] + 0.5) * self.zoom, HEAD + (pixel[0] + 0.5) * self.zoom

    def text(self, x: float, y: float, text: str, size: float, color: str = INK, **style: Any) -> None:
        """Text of `size` pixels on the baseline y."""
        self.page.text(x, y, text, fontsize=size * 72 / DPI, color=color, **style)

    def image(self, picture: Tensor, x: float, y: float, width: float, height: float) -> None:
        """A picture [3, *, *] at a place, of a size."""
        pixels = picture.clamp(0, 1).permute(1, 2, 0).numpy()
        box = (x, x + width, y + height, y)
        self.page.imshow(pixels, extent=box, aspect="auto", interpolation="nearest", zorder=2)
        self._fit()  # which imshow changes

    def panel(self, panel: int, picture: Tensor) -> None:
        """A picture as large as a panel."""
        self.image(picture, self.left(panel), HEAD, self.layout.width * self.zoom, self.bottom - HEAD)

    def outline(self, panel: int, level: int, token: int) -> None:
        """The frame of a token's patch."""
        box = self.layout.box(level, token)
        x, y = self.left(panel) + box.column * self.zoom, HEAD + box.row * self.zoom
        self.frame(x, y, box.width * self.zoom, box.height * self.zoom, _color(level))

    def frame(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """An empty rectangle."""
        self.page.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.2, zorder=3))

    def mark(self, x: float, y: float) -> None:
        """The dot that is a query."""
        style = {"markerfacecolor": QUERY, "markeredgecolor": "white", "markeredgewidth": 1.4}
        self.page.plot(x, y, "o", markersize=8, zorder=5, **style)
