"""The command `llsa-gen bench`: measure with a progress bar, or read what was measured; a table, JSON and a plot."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llsa_gen.cli.terminal import DType, between, console, exit_code, load_spec, signals_interrupt, warn
from llsa_gen.errors import LlsaGenError
from llsa_gen.store.files import must_take, write_whole

if TYPE_CHECKING:
    from llsa_gen.bench import Request
    from llsa_gen.bench.rows import Row

LENGTHS = {"cuda": (4096, 16384, 65536), "cpu": (1024, 4096)}
DTYPES = {"cuda": (DType.BFLOAT16,), "cpu": (DType.FLOAT32,)}


class ModeName(StrEnum):
    """How the operator is called."""

    EAGER = "eager"
    GRAPH = "graph"


MODES = {"cuda": (ModeName.EAGER, ModeName.GRAPH), "cpu": (ModeName.EAGER,)}

STDOUT = Path("-")


def bench(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPEC", help="Spec files, or names of some in ./spec, side by side; with --from none."),
    ] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option("-n", "--tokens", help="Sequence length N, in tokens; may be repeated."),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option("-m", "--queries", callback=between(1), help="Queries M, where they are not as many as keys."),
    ] = None,
    dtypes: Annotated[
        list[DType] | None,
        typer.Option("--dtype", help="Dtype of q, k and v; may be repeated. bfloat16 on a GPU, float32 on a CPU."),
    ] = None,
    batch: Annotated[int, typer.Option(callback=between(1), help="Batch entries, B.")] = 2,
    heads: Annotated[int, typer.Option(callback=between(1), help="Heads of each, H.")] = 4,
    modes: Annotated[
        list[ModeName] | None,
        typer.Option("--mode", help="Called from Python or replayed as a CUDA graph; may be repeated. Both on a GPU."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Also time this f(q, k, v), [B, H, M or N, D]; may be repeated."),
    ] = None,
    along: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Also time what this makes for the blocks that a spec keeps."),
    ] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this of torch's dense backends, such as sdpa-cudnn; may be repeated."),
    ] = None,
    dense_up_to: Annotated[
        int, typer.Option(callback=between(0), metavar="N", help="Leave dense attention out of longer sequences.")
    ] = 262_144,
    in_turns: Annotated[
        bool, typer.Option("--in-turns", help="Time the implementations in turns, not one after the other.")
    ] = False,
    repeats: Annotated[
        int | None, typer.Option(callback=between(1), help="Timed calls of each, in place of half a second of them.")
    ] = None,
    breakdown: Annotated[
        bool, typer.Option("--breakdown/--no-breakdown", help="Time each of our kernels, on a GPU.")
    ] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; a GPU if there is one.")] = None,
    sources: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FILE", help="Measure nothing: read these rows; may be repeated."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all rows to FILE; - prints them instead.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw time over length: FILE.png, .svg.")] = None,
) -> None:
    """Time specs beside torch's dense attention in one process, each result checked before it is timed.

    Forward and forward+backward, called from Python and as CUDA graphs; time on the host, peak memory, and each kernel
    beside the roofline. docs/bench.md says how each is measured.
    """
    if (not specs) == (not sources):
        raise typer.BadParameter("expected a spec to measure, or --from and rows to read", param_hint="SPEC")
    draw = None if plot is None else _drawing(plot)
    _must_take(json_file, plot, sources or ())
    if sources:
        from llsa_gen.bench.rows import read

        _tell(read(sources), json_file, plot, draw)
        return
    request = _request(
        specs or (), lengths, dtypes, modes, device, batch=batch, heads=heads, queries=queries, breakdown=breakdown,
        against=_each(against), along=_each(along), dense=_each(dense), dense_up_to=dense_up_to, in_turns=in_turns,
        repeats=repeats,
    )  # fmt: skip
    rows: list[Row] = []
    end: BaseException | None = None
    try:
        with signals_interrupt():
            _measure(request, rows, json_file)
    except BaseException as error:  # whatever it is, after what it left has been told
        end = error
    try:
        if rows:
            _tell(rows, json_file, plot, draw)
    except (OSError, LlsaGenError) as error:
        if end is None:
            raise
        warn(error)
    if end is not None:
        raise end
    _must_be_whole(rows)


def _each(given: Sequence[str] | None) -> tuple[str, ...]:
    """What was said, once."""
    return tuple(dict.fromkeys(given or ()))


def _request(
    specs: Sequence[str],
    lengths: Sequence[int] | None,
    dtypes: Sequence[DType] | None,
    modes: Sequence[ModeName] | None,
    device: str | None,
    **fields: Any,
) -> "Request":
    """What to measure of some specs; what is not said depends on the device."""
    sources = tuple(dict.fromkeys(map(load_spec, specs)))
    import torch

    from llsa_gen import bench
    from llsa_gen.cli.devices import must_exist

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    must_exist(device)
    kind = torch.device(device).type
    return bench.Request(
        specs=sources,
        lengths=tuple(dict.fromkeys(lengths or LENGTHS[kind])),
        dtypes=tuple(dtype.value for dtype in dict.fromkeys(dtypes or DTYPES[kind])),
        device=device,
        modes=tuple(mode.value for mode in dict.fromkeys(modes or MODES[kind])),
        **fields,
    )


def _measure(request: "Request", rows: "list[Row]", json_file: Path | None) -> None:
    """Put each row into `rows`, and all so far into the file, as soon as it is measured: a process may be killed."""
    from llsa_gen import bench
    from llsa_gen.bench.rows import dumps

    at = "getting ready"
    with _progress(request.cells) as show:

        def step(text: str) -> None:
            nonlocal at
            at = text
            show(text)

        try:
            for row in bench.bench(request, step):
                rows.append(row)
                if json_file is not None and _is_kept(json_file):
                    with suppress(OSError):  # which the last attempt tells
                        write_whole(json_file, dumps(rows))
        except KeyboardInterrupt as interrupt:
            warn(f"interrupted at: {at}; {len(rows)} of {request.cells} rows were measured")
            raise typer.Exit(exit_code(interrupt)) from None


def _tell(
    rows: "Sequence[Row]",
    json_file: Path | None,
    plot: Path | None,
    draw: "Callable[[Sequence[Row], Path], None] | None",
) -> None:
    """Write and print rows, each way whatever becomes of the others; the first that failed is raised at the end."""
    from llsa_gen.bench.rows import dumps

    def write() -> None:
        if json_file is not None and json_file != STDOUT:
            write_whole(json_file, dumps(rows))

    def show() -> None:
        if json_file == STDOUT:
            typer.echo(dumps(rows), nl=False)
            return
        from llsa_gen.bench.table import tables

        console().print(tables(rows))

    def paint() -> None:
        if draw is not None and plot is not None:
            try:
                draw(rows, plot)
            except ValueError as error:  # no time in any row
                raise LlsaGenError(f"--plot {plot}: {error}") from None

    failures: list[Exception] = []
    for way in (write, show, paint):
        try:
            way()
        except (OSError, LlsaGenError) as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _must_be_whole(rows: "Sequence[Row]") -> None:
    """An error where ours could not be measured, memory being too small: what is missing of others is in the table."""
    from llsa_gen.bench.table import reasons

    missing = list(reasons(row for row in rows if row.kind == "ours"))
    if missing:
        raise LlsaGenError("\n".join(missing))


def _must_take(json_file: Path | None, plot: Path | None, sources: Sequence[Path]) -> None:
    """One clear error before minutes are spent on rows that nobody could keep."""
    if json_file is not None and plot is not None and json_file.resolve() == plot.resolve():
        raise LlsaGenError(f"--plot {plot}: expected another file than that of --json, got the same")
    if plot is not None and plot.resolve() in [source.resolve() for source in sources]:
        raise LlsaGenError(f"--plot {plot}: expected another file than those of --from, got one of them")
    for path in (json_file, plot):
        if path is None or path == STDOUT:
            continue
        if not path.resolve().parent.is_dir():
            raise LlsaGenError(f"{path}: expected a file in a folder that exists, got no folder {path.parent}")
        must_take(path)


def _is_kept(path: Path) -> bool:
    """Whether a path is a file, or is to be one, that can be written again and again: no device and no pipe."""
    return path != STDOUT and (path.is_file() or not path.exists())


def _drawing(plot: Path) -> "Callable[[Sequence[Row], Path], None]":
    try:
        from llsa_gen.bench.plot import draw, format_of
    except ModuleNotFoundError as missing:
        raise LlsaGenError(f"--plot needs {missing.name}: pip install 'llsa-gen[demo]'") from None
    try:
        format_of(plot)
    except ValueError as error:
        raise LlsaGenError(f"--plot {plot}: {error}") from None
    return draw


@contextmanager
def _progress(cells: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; yields what the bench calls with what it measures next, and at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("getting ready", total=cells)
        begun = 0

        def step(text: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=text)
            begun += 1

        yield step
