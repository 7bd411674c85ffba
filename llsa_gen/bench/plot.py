"""The plot of bench rows: time over length, both logarithmic, forward beside forward and backward.

A line is one implementation; where a length was measured eagerly and as a CUDA graph, the graph counts. Two guides show
what growth with N and with N^2 looks like. The figure is a dark card, so that it stands on white and on dark pages.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator

from llsa_gen.bench.rows import Kind, Row, label, shape
from llsa_gen.bench.table import fastest_dense
from llsa_gen.errors import short
from llsa_gen.store.files import write_whole

__all__ = ["Line", "draw", "format_of", "lines"]

CARD, INK, MUTED, FAINT = "#12161d", "#e8ecf1", "#9aa5b3", "#4a5462"
COLORS: Mapping[Kind, tuple[str, ...]] = {
    "ours": ("#5dfdc1", "#ff4fa3", "#6cb6ff", "#c792ea"),
    "dense": ("#c3cad4", "#8893a2", "#5f6b7b"),
    "other": ("#ffb454", "#d9803f", "#f5e06e"),
}

OUTLINED: Mapping[str, Any] = {"path_effects": [withStroke(linewidth=4, foreground=CARD)]}
"""Text that can be read over a line."""

DPI = 100
WIDTH, HEIGHT = 1600, 760
PANELS = {"forward": "Forward", "forward_backward": "Forward + backward"}

NEAREST = 0.042
"""How far names at the ends of lines are kept apart at least, as a fraction of the height of a panel."""


@dataclass(frozen=True)
class Line:
    """One implementation in one panel: (tokens, milliseconds) by length, and at a length how many times faster than
    dense attention, where that was measured."""

    name: str
    kind: Kind
    points: tuple[tuple[int, float], ...]
    ratios: Mapping[int, float]


def lines(rows: Sequence[Row], what: str) -> list[Line]:
    """The lines of a panel, `forward` or `forward_backward`, dense attention first and ours last, on top.

    A line is named by what tells it from others: dtype and shape only where there are several of them.
    """
    shapes = {(row.batch, row.heads, row.head_dim, row.m_tokens) for row in rows}
    dtypes = {row.dtype for row in rows}
    chosen: defaultdict[tuple[Kind, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if getattr(row, what) is None:
            continue
        tensors = f" B={row.batch} H={row.heads} D={row.head_dim}" if len(shapes) > 1 else ""
        if tensors and row.m_tokens is not None:
            tensors += f" M={row.m_tokens}"
        name = f"{label(row)}{f' {row.dtype}' if len(dtypes) > 1 else ''}{tensors}"
        known = chosen[row.kind, name].get(row.n_tokens)
        if known is None or (known.mode, row.mode) == ("eager", "graph"):
            chosen[row.kind, name][row.n_tokens] = row
    order: tuple[Kind, ...] = ("dense", "other", "ours")
    found = []
    for kind, name in sorted(chosen, key=lambda key: order.index(key[0])):
        by_length = sorted(chosen[kind, name].items())
        dense = {n: fastest_dense(rows, row, what) for n, row in by_length}
        points = tuple((n, getattr(row, what).median_ms) for n, row in by_length)
        ratios = {n: fastest / ms for n, ms in points if (fastest := dense[n]) is not None}
        found.append(Line(name, kind, points, ratios))
    return found


def format_of(path: Path) -> str:
    """The format that the name of a file ends in. Raises ValueError for one that matplotlib does not write."""
    suffix, known = path.suffix.lower().removeprefix("."), FigureCanvasAgg.get_supported_filetypes()
    if suffix not in known:
        came = f".{short(suffix)}" if suffix else "a name without such an end"
        raise ValueError(f"expected a name that ends in one of {', '.join(f'.{name}' for name in known)}, got {came}")
    return suffix


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of some rows, in the format that the name of the file ends in.

    Raises ValueError where no row has a time, or for a format that matplotlib does not write.
    """
    suffix = format_of(path)
    panels = {what: lines(rows, what) for what in PANELS}
    points = [point for found in panels.values() for line in found for point in line.points]
    if not points:
        raise ValueError("rows: expected one with a time at least, got none")
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI))
    FigureCanvasAgg(figure)
    _card(figure, rows)
    palettes = {kind: chain(colors, repeat(MUTED)) for kind, colors in COLORS.items()}
    colors: defaultdict[tuple[Kind, str], str] = defaultdict()
    for line in chain(*panels.values()):
        if (line.kind, line.name) not in colors:
            colors[line.kind, line.name] = next(palettes[line.kind])
    lengths, times = zip(*points, strict=True)
    for index, (what, found) in enumerate(panels.items()):
        axes = figure.add_axes((0.05 + index * 0.48, 0.125, 0.385, 0.66))
        _axes(axes, PANELS[what], sorted(set(lengths)), (min(times) / 3, max(times) * 2))
        _guides(axes, found)
        for line in found:
            _line(axes, line, colors[line.kind, line.name])
        _names(axes, found, lambda line: colors[line.kind, line.name])
        _ratios(axes, found)
    content = io.BytesIO()
    figure.savefig(content, format=suffix, dpi=DPI, transparent=True)
    write_whole(path, content.getvalue())


def _card(figure: Figure, rows: Sequence[Row]) -> None:
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    page.set_axis_off()
    corner = 14
    size = (WIDTH - 2 * corner, HEIGHT - 2 * corner)
    page.add_patch(FancyBboxPatch((corner, corner), *size, f"round,pad={corner}", facecolor=CARD, linewidth=0))
    page.text(28, 52, "Time of attention over sequence length", color=INK, fontsize=18, weight="bold")
    first = rows[0]
    shapes = {shape(row) for row in rows}
    modes = {row.mode for row in rows}
    how = "CUDA graph replay where measured" if modes == {"eager", "graph"} else "CUDA graph replay"
    what = [*(shapes if len(shapes) == 1 else ()), *([how] if "graph" in modes else ())]
    machines = {(row.machine.device, row.machine.torch) for row in rows}
    where = f"{first.machine.device}, torch {first.machine.torch}" if len(machines) == 1 else "several machines"
    page.text(28, 84, ", ".join([where, *what]), color=MUTED, fontsize=12)


def _axes(axes: Axes, title: str, lengths: Sequence[int], span: tuple[float, float]) -> None:
    axes.set_facecolor(CARD)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.set_ylim(*span)
    axes.set_xticks(lengths if len(lengths) <= 7 else lengths[:: len(lengths) // 7 + 1])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.tick_params(colors=MUTED, labelsize=11, length=0)
    axes.grid(True, color=FAINT, linewidth=0.6, alpha=0.45)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"{title}, ms", color=INK, fontsize=14, loc="left", pad=12)
    axes.set_xlabel("tokens N", color=MUTED, fontsize=11, labelpad=8)


def _guides(axes: Axes, found: Sequence[Line]) -> None:
    """Growth with N and with N^2 from the lower left corner, as far as the panel goes."""
    if not found:
        return
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    start = low * 1.1
    for power, text in ((1, "N"), (2, "N\N{SUPERSCRIPT TWO}")):
        end = min(right / 1.06, left * (high / start) ** (1 / power))
        top = start * (end / left) ** power
        axes.plot([left, end], [start, top], color=FAINT, linestyle=(0, (4, 4)), linewidth=1.4, zorder=1)
        at = left * (end / left) ** 0.94  # beyond the names of lines that end before it
        axes.text(at, start * (at / left) ** power / 1.12, f"~{text}", color=MUTED, fontsize=11, va="top", zorder=1)


def _line(axes: Axes, line: Line, color: str) -> None:
    lengths, times = zip(*line.points, strict=True)
    ours = line.kind == "ours"
    axes.plot(
        lengths,
        times,
        color=color,
        linewidth=3.0 if ours else 1.8,
        marker="o",
        markersize=7 if ours else 4.5,
        zorder=4 if ours else 3,
        solid_capstyle="round",
    )


def _names(axes: Axes, found: Sequence[Line], color: Callable[[Line], str]) -> None:
    """The name of each line to the right of its end; where several end at one length, none over another."""
    to_panel = axes.transData + axes.transAxes.inverted()
    ending: defaultdict[int, list[tuple[float, Line]]] = defaultdict(list)
    for line in found:
        n, ms = line.points[-1]
        ending[n].append((float(to_panel.transform((n, ms))[1]), line))
    for n, ends in ending.items():
        ends.sort(key=lambda end: end[0])
        right = float(to_panel.transform((n, 1.0))[0]) + 0.02
        for (_, line), at in zip(ends, spread([height for height, _ in ends]), strict=True):
            style = {"color": color(line), "fontsize": 12, "weight": "bold" if line.kind == "ours" else "normal"}
            axes.text(right, at, line.name, transform=axes.transAxes, va="center", zorder=6, **OUTLINED, **style)


def spread(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved apart, those in the middle least, until neighbours are `NEAREST` from each other."""
    places = list(heights)
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + NEAREST)
    shift = sum(place - height for place, height in zip(places, heights, strict=True)) / max(len(places), 1)
    return [place - shift for place in places]


def _ratios(axes: Axes, found: Sequence[Line]) -> None:
    """How many times faster than dense attention, below the points of the fastest of ours."""
    for n, ms, ratio in best(found):
        axes.annotate(
            f"{ratio:.2g}\N{MULTIPLICATION SIGN}" if ratio < 10 else f"{ratio:.0f}\N{MULTIPLICATION SIGN}",
            (n, ms), (0, -18), textcoords="offset points", ha="center", color=INK, fontsize=11, zorder=5, **OUTLINED,
        )  # fmt: skip


def best(found: Sequence[Line]) -> Iterator[tuple[int, float, float]]:
    """Tokens, milliseconds and ratio to dense attention of the fastest of ours, by length."""
    ours = [line for line in found if line.kind == "ours"]
    for n in sorted({n for line in ours for n in line.ratios}):
        ms, ratio = min((dict(line.points)[n], line.ratios[n]) for line in ours if n in line.ratios)
        yield n, ms, ratio
