"""The command `llsa-gen tune`: the search with a progress bar, what it found, and the rows to contribute."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llsa_gen.cli.terminal import DType, Json, SpecArgument, console, load_spec, print_json, signals_interrupt, warn
from llsa_gen.errors import LlsaGenError

if TYPE_CHECKING:
    from llsa_gen.tune import Report
    from llsa_gen.tune.search import Progress, StageResult


def tune(
    spec: SpecArgument,
    n: Annotated[int, typer.Option("-n", "--tokens", min=1, max=2**30, help="Sequence length N, in tokens.")] = 65536,
    dtype: Annotated[DType, typer.Option("--dtype", help="Dtype of q, k and v.")] = DType.BFLOAT16,
    stages: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="STAGE", help="Only this stage, such as attend; may be repeated."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="About how long to search.")] = 600,
    as_json: Json = False,
) -> None:
    """Search tile shapes for a spec on this machine's GPU, and use what is faster from the next compile on.

    Every candidate is checked before it is timed, and the operator with a winner is compared with the reference. Ctrl-C
    ends the search and keeps what was found. `llsa-gen explain SPEC -n N --plan` says which entry each kernel has.
    """
    source = load_spec(spec)
    from llsa_gen.tune import tune

    with signals_interrupt(), _progress() as step:
        report = tune(source, n_tokens=n, dtype=dtype.value, stages=stages or (), seconds=seconds, progress=step)
    if as_json:
        print_json(_data(report))
    else:
        _print(report)
    if report.unsaved is not None:
        raise LlsaGenError(f"what was found is not stored: {report.unsaved}")


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on stderr, by the time spent."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("tuning"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=1.0, said="")

    def step(result: "StageResult", share: float) -> None:
        bar.start()  # not before there is something to show: an error is to stand alone
        times = [trial.microseconds for trial in result.trials if trial.microseconds is not None]
        best = min([result.before_us, *times])
        said = f"{result.stage}: {len(result.trials)} tried, {result.before_us:.1f} us -> {best:.1f}"
        bar.update(task, completed=share, said=said)

    try:
        yield step
    finally:
        if bar.live.is_started:
            bar.stop()


def _data(report: "Report") -> dict[str, Any]:
    stages = [vars(result) | {"trials": [vars(trial) for trial in result.trials]} for result in report.results]
    fields = {name: getattr(report, name) for name in ("spec", "target", "gpu", "n_tokens", "dtype")}
    path = None if report.path is None else str(report.path)
    return fields | {"stages": stages, "rows": list(report.rows), "path": path}


def _print(report: "Report") -> None:
    from rich import box
    from rich.table import Table

    typer.echo(f"{report.spec} at {report.n_tokens:,} tokens, {report.dtype}, on {report.gpu} ({report.target})")
    table = Table("stage", box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("us before", "us after", "timed", "left out"):
        table.add_column(name, justify="right")
    table.add_column("entry")
    for result in report.results:
        timed = sum(trial.microseconds is not None for trial in result.trials)
        changed = {name: value for name, value in result.after.items() if result.before.get(name) != value}
        said = ", ".join(f"{name} {value}" for name, value in changed.items()) or "as it was"
        after = f"{result.after_us:.1f}" if result.improved else "-"
        left_out = len(result.trials) - timed
        table.add_row(result.stage, f"{result.before_us:.1f}", after, str(timed), str(left_out), said)
    console().print(table)
    from llsa_gen.tune.search import ENDED

    for reason in (trial.reason for result in report.results for trial in result.trials):
        if reason is not None and reason.startswith(ENDED):
            warn(reason)
    if not report.rows:
        typer.echo("nothing beats the present entries by enough to be more than noise")
        return
    if report.path is not None:
        typer.echo(f"stored in {report.path}, for every compile from now on")
    typer.echo(f"to contribute, rows for llsa_gen/schedule/tables/{report.target.replace(':', '_')}.json:")
    for row in report.rows:
        typer.echo(f"    {json.dumps(row)}")
