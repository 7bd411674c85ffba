"""The command `llsa-gen check`: the fuzzer with a progress bar, a verdict, and a script that shows what is wrong."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer

from llsa_gen.cli.terminal import Json, between, exit_code, load_spec, print_json, signals_interrupt, warn
from llsa_gen.errors import CheckFailed, LlsaGenError

EXAMPLES = 100


def check(
    spec: Annotated[
        str | None,
        typer.Argument(metavar="SPEC", help="A spec file, or the name of one in ./spec; without one, random specs."),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(callback=between(1), help=f"Stop after so many cases; {EXAMPLES} unless --seconds is given."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Stop after so many seconds.")] = None,
    device: Annotated[str, typer.Option(help="Where the tensors are: cpu, cuda, cuda:1.")] = "cpu",
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Run the Triton kernels on the CPU, in Triton's interpreter. Slow.")
    ] = False,
    seed: Annotated[int | None, typer.Option(callback=between(0), help="Draw the same cases again.")] = None,
    as_json: Json = False,
) -> None:
    """Fuzz a spec against the dense float64 reference: o, dq, dk, dv, selection, and that two runs give the same bits.

    Drawn are lengths, dtypes, strides, values, global tokens and given lists. Where they disagree, the smallest case
    that was found is printed on stdout as a script that runs when pasted.
    """
    source = None if spec is None else load_spec(spec)
    if interpret:
        _interpret(device)
    from llsa_gen import fuzz
    from llsa_gen.cli.devices import must_exist

    must_exist(device)
    examples = EXAMPLES if examples is None and seconds is None else examples
    agreed = 0
    try:
        with signals_interrupt(), _progress(examples, seconds) as show:

            def step(done: int, elapsed: float) -> None:
                nonlocal agreed
                agreed = done
                show(done, elapsed)

            report = fuzz.check(source, examples=examples, seconds=seconds, device=device, progress=step, seed=seed)
    except KeyboardInterrupt as interrupt:
        warn(f"interrupted: {agreed} cases agreed with the reference until then")
        raise typer.Exit(exit_code(interrupt)) from None
    except CheckFailed as error:
        if not as_json:
            raise
        print_json({"ok": False, "message": error.message, "reproducer": error.reproducer})
        raise typer.Exit(1) from None
    if as_json:
        print_json({"ok": True} | asdict(report))
        return
    what = f"{report.specs} random specs" if source is None else source.name
    where = "Triton's interpreter" if report.interpreted else report.device
    typer.secho(f"{what} on {where}: {report.examples} cases agree with the reference", fg=typer.colors.GREEN)
    typer.echo(f"  {report.seconds:.0f} s, seed {report.seed}")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report.margins.items())
    typer.echo(f"  largest errors, of what is allowed: {shares}")


def _interpret(device: str) -> None:
    """Turn on Triton's interpreter, which only works before triton is imported."""
    if device != "cpu":
        raise typer.BadParameter("the interpreter runs on the CPU", param_hint="--device")
    if "triton" in sys.modules:  # never so in a process of its own
        raise LlsaGenError("--interpret: triton is imported already, and interprets its kernels or does not")
    os.environ["TRITON_INTERPRET"] = "1"


@contextmanager
def _progress(examples: int | None, seconds: float | None) -> Iterator[Callable[[int, float], None]]:
    """A bar on stderr, to whichever end comes first; yields what the fuzzer calls after every case."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("checking"), BarColumn(), TextColumn("{task.fields[done]} cases"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, done=0)

        def step(done: int, elapsed: float) -> None:
            shares = (done / examples if examples else 0.0, elapsed / seconds if seconds else 0.0)
            bar.update(task, completed=max(shares), done=done)

        yield step
