"""The command `llsa-gen bench`: measure with a progress bar, or read what was measured; a table, JSON and a plot."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llsa_gen.errors import LlsaGenError
from llsa_gen.files import write_whole
from llsa_gen.terminal import DType, between, console, load_spec

if TYPE_CHECKING:
    from llsa_gen.bench_rows import Row

LENGTHS = {"cuda": (4096, 16384, 65536), "cpu": (1024, 4096)}
DTYPES = {"cuda": (DType.BFLOAT16,), "cpu": (DType.FLOAT32,)}


class ModeName(StrEnum):
    """How the operator is called."""

    EAGER = "eager"
    GRAPH = "graph"


MODES = {"cuda": (ModeName.EAGER, ModeName.GRAPH), "cpu": (ModeName.EAGER,)}

STDOUT = Path("-")


def bench(
    spec: Annotated[
        str | None,
        typer.Argument(metavar="SPEC", help="A spec file, or the name of one in ./spec; with --from none."),
    ] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option("-n", "--tokens", help="Sequence length N, in tokens; may be repeated."),
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
        typer.Option(metavar="MODULE:FUNCTION", help="Also time this f(q, k, v), [B, H, N, D] each; may be repeated."),
    ] = None,
    dense_up_to: Annotated[
        int, typer.Option(callback=between(0), metavar="N", help="Leave dense attention out of longer sequences.")
    ] = 262_144,
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
    """Time a spec beside torch's dense attention in one process, each result checked before it is timed.

    Forward and forward+backward, called from Python and as CUDA graphs; time on the host, peak memory, and each kernel
    beside the roofline. docs/bench.md says how each is measured.
    """
    if (spec is None) == (not sources):
        raise typer.BadParameter("expected a spec to measure, or --from and rows to read", param_hint="SPEC")
    for path in (json_file, plot):
        _must_be_writable(path)
    draw = None if plot is None else _drawing()
    if sources:
        from llsa_gen.bench_rows import read

        rows = read(sources)
    else:
        assert spec is not None
        rows = _measured(spec, lengths, dtypes, batch, heads, modes, against or [], dense_up_to, breakdown, device)
    if json_file is not None:
        from llsa_gen.bench_rows import dumps

        if json_file == STDOUT:
            typer.echo(dumps(rows), nl=False)
        else:
            write_whole(json_file, dumps(rows))
    if json_file != STDOUT:
        from llsa_gen.bench_table import tables

        console().print(tables(rows))
    if draw is not None and plot is not None:
        try:
            draw(rows, plot)
        except ValueError as error:  # no time in any row, or a format that matplotlib does not write
            raise LlsaGenError(f"--plot {plot}: {error}") from None


def _measured(
    spec: str,
    lengths: Sequence[int] | None,
    dtypes: Sequence[DType] | None,
    batch: int,
    heads: int,
    modes: Sequence[ModeName] | None,
    against: Sequence[str],
    dense_up_to: int,
    breakdown: bool,
    device: str | None,
) -> "tuple[Row, ...]":
    """Rows of a spec; what is not said depends on the device."""
    source = load_spec(spec)
    import torch

    from llsa_gen import bench
    from llsa_gen.devices import must_exist

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    must_exist(device)
    kind = torch.device(device).type
    request = bench.Request(
        spec=source,
        lengths=tuple(dict.fromkeys(lengths or LENGTHS[kind])),
        dtypes=tuple(dtype.value for dtype in dict.fromkeys(dtypes or DTYPES[kind])),
        device=device,
        batch=batch,
        heads=heads,
        modes=tuple(mode.value for mode in dict.fromkeys(modes or MODES[kind])),
        against=tuple(dict.fromkeys(against)),
        dense_up_to=dense_up_to,
        breakdown=breakdown,
    )
    with _progress(request.cells) as step:
        return bench.bench(request, step)


def _must_be_writable(path: Path | None) -> None:
    """One clear error before minutes are spent on rows that nobody could keep."""
    if path is not None and path != STDOUT and not path.resolve().parent.is_dir():
        raise LlsaGenError(f"{path}: expected a file in a folder that exists, got no folder {path.parent}")


def _drawing() -> "Callable[[Sequence[Row], Path], None]":
    try:
        from llsa_gen.bench_plot import draw
    except ModuleNotFoundError as missing:
        raise LlsaGenError(f"--plot needs {missing.name}: pip install 'llsa-gen[demo]'") from None
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
