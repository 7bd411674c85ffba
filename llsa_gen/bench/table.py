"""Tables of bench rows for the terminal: times beside the fastest dense attention, and kernels beside the roofline."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llsa_gen.bench.rows import Row, Timing, label, shape, tflops
from llsa_gen.plan.units import human_bytes, human_flops

__all__ = ["fastest_dense", "reasons", "tables"]

PASSES: tuple[Literal["forward", "forward_backward"], ...] = ("forward", "forward_backward")


def tables(rows: Sequence[Row]) -> RenderableType:
    """All rows: a table for every machine, shape, dtype and mode, then the kernels of ours, then what is missing."""
    groups: defaultdict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[_where(row), shape(row), row.mode].append(row)
    parts: list[RenderableType] = []
    before = None
    for (where, tensors, mode), group in groups.items():
        if where != before:
            parts.append(Text(f"{where}\n", style="dim"))
        before = where
        title = f"{tensors}, {'CUDA graph replay' if mode == 'graph' else 'called from Python'}"
        parts += [_times(title, group), Text()]
    # the same for every mode: shown once
    profiled = {(row.date, row.digest, row.n_tokens, row.m_tokens, row.dtype): row for row in rows if row.breakdown}
    for row in profiled.values():
        parts += [_kernels(row), Text()]
    parts += [Text(reason, style="yellow") for reason in reasons(rows)]
    return Group(*parts)


def fastest_dense(rows: Iterable[Row], like: Row, what: str) -> float | None:
    """Milliseconds of the fastest dense attention in the same run, at the lengths, shape, dtype and mode of a row."""

    def key(row: Row) -> tuple[object, ...]:
        return row.date, row.machine, row.n_tokens, shape(row), row.mode

    timings = (getattr(row, what) for row in rows if row.kind == "dense" and key(row) == key(like))
    return min((timing.median_ms for timing in timings if timing is not None), default=None)


def _where(row: Row) -> str:
    machine = row.machine
    driver = f", driver {machine.driver}" if machine.driver else ""
    commit = f" ({machine.commit[:10]}{' and changes' * bool(machine.dirty)})" if machine.commit else ""
    versions = f"llsa_gen {machine.llsa_gen}{commit}, torch {machine.torch}, triton {machine.triton}"
    return f"{machine.device}{driver}\n{versions}, Python {machine.python}, {row.date}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for name in columns:
        named = name in ("implementation", "kernel")
        table.add_column(name, justify="left" if named else "right", no_wrap=named)  # numbers make room for names
    return table


def _times(title: str, rows: Sequence[Row]) -> Table:
    columns = ["tokens", "implementation", "forward ms", "20-80%", "x", "fwd+bwd ms", "20-80%", "x"]
    table = _table(title, [*columns, "TFLOP/s", "runs", "host us", "peak memory"])
    lengths = sorted({row.n_tokens for row in rows})
    for n in lengths:
        table.add_section()
        for row in (row for row in rows if row.n_tokens == n):
            cells = [cell for what in PASSES for cell in _timing(row, rows, what)]
            timings = [getattr(row, what) for what in PASSES]
            speeds = [tflops(row, what) for what in PASSES]
            speed = "-" if speeds == [None, None] else "/".join(map(_speed, speeds))
            runs = "/".join("-" if timing is None else str(timing.repeats) for timing in timings)
            host = "-" if row.host_us is None else f"{row.host_us:,.0f}"
            memory = "-" if row.memory is None else f"{human_bytes(row.memory.peak_bytes)} ({row.memory.ratio:.2f}x)"
            style = "bold" if row.kind == "ours" else None
            table.add_row(f"{n:,}", label(row), *cells, speed, runs, host, memory, style=style)
    return table


def _timing(row: Row, rows: Sequence[Row], what: str) -> tuple[str, str, str]:
    """Median, percentiles, and how many times faster than dense attention."""
    timing: Timing | None = getattr(row, what)
    if timing is None:
        return "-", "", ""
    dense = fastest_dense(rows, row, what)
    ratio = "" if dense is None else f"{dense / timing.median_ms:.3g}"
    return _ms(timing.median_ms), f"{_ms(timing.p20_ms)}-{_ms(timing.p80_ms)}", ratio


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _ms(value: float) -> str:
    return f"{value:,.3f}" if value < 100 else f"{value:,.1f}"


def _kernels(row: Row) -> Table:
    length = f"{row.n_tokens:,} tokens" if row.m_tokens is None else f"{row.n_tokens:,} keys, {row.m_tokens:,} queries"
    title = f"{label(row)}, {length}, {row.dtype}: kernels of forward+backward"
    table = _table(title, ["kernel", "launches", "us", "share", "FLOPs", "TFLOP/s", "bytes", "of the roofline"])
    kernels, limits = row.breakdown or (), row.ceilings
    for one in kernels:
        table.add_row(
            one.kernel,
            f"{one.launches:g}",
            f"{one.us:,.1f}",
            f"{one.share:.1%}",
            "-" if one.flops is None else human_flops(one.flops),
            f"{one.flops / one.us / 1e6:,.3g}" if one.flops and one.us else "-",
            "-" if one.moved_bytes is None else human_bytes(one.moved_bytes),
            "-" if one.roofline is None else f"{one.roofline:.0%}",
        )
    table.add_section()
    table.add_row(
        "all", f"{sum(one.launches for one in kernels):g}", f"{sum(one.us for one in kernels):,.1f}", "100.0%"
    )
    if limits is not None:
        copied, product = limits.bytes_per_s / 1e12, limits.flops_per_s / 1e12
        table.caption = f"measured in this run: {copied:.2f} TB/s copied, {product:,.0f} TFLOP/s multiplied"
        table.caption_justify = "left"
    return table


def reasons(rows: Iterable[Row]) -> Iterator[str]:
    """Why cells are empty, each reason once; not those that hold for a device as such."""
    seen: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        for what, reason in row.missing.items():
            if what in PASSES:
                lengths = seen.setdefault((label(row), reason), [])
                lengths += [row.n_tokens] * (row.n_tokens not in lengths)
    for (name, reason), lengths in seen.items():
        yield f"{name} at {', '.join(f'{n:,}' for n in lengths)} tokens: {reason}"
