"""Terminal: what the commands share. How a spec is named, how tables and JSON are printed, how a command fails."""

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from llsa_gen.errors import CheckFailed, LlsaGenError, short

if TYPE_CHECKING:
    from rich.console import Console

    from llsa_gen.spec import Spec

__all__ = [
    "Commands",
    "DType",
    "Ended",
    "Json",
    "SpecArgument",
    "between",
    "console",
    "exit_code",
    "load_spec",
    "print_json",
    "signals_interrupt",
    "warn",
]


class DType(StrEnum):
    """Dtypes of q, k and v."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A spec file, or the name of one in ./spec.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def load_spec(text: str) -> "Spec":
    """The spec in the file `text`; where that is a bare name and no file, in ./text.yaml or ./spec/text.yaml."""
    from llsa_gen.spec import load

    path = Path(text)
    if path.suffix or os.sep in text or path.name in ("", "..") or _is_meant(path):
        return load(text)
    here, there = Path(f"{text}.yaml"), Path("spec") / f"{text}.yaml"
    return load(there if _is_meant(there) or (there.parent.is_dir() and not _is_meant(here)) else here)


def _is_meant(path: Path) -> bool:
    """Whether there is a file, or a link to nothing, of which whoever made it wants to hear."""
    try:
        return path.is_file() or (path.is_symlink() and not path.exists())
    except OSError:  # a name that is too long, for example, which `load` says
        return False


def between(low: int, high: int | None = None) -> Callable[[int | None], int | None]:
    """A callback for an option that is an integer in this range, or not given."""

    def check(value: int | None) -> int | None:
        if value is None or (value >= low and (high is None or value <= high)):
            return value
        most = "" if high is None else f" and <= {high}"
        raise typer.BadParameter(f"expected an integer >= {low}{most}, got {short(str(value))}")

    return check


# ---- printing ---------------------------------------------------------------------------------------------------


def console() -> "Console":
    """Where tables go: as wide as the terminal, and wide enough for any table where it is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def print_json(data: object) -> None:
    """For programs: the only thing on stdout."""
    typer.echo(json.dumps(data, indent=2))


def warn(message: object) -> None:
    """One line on stderr."""
    typer.secho(f"warning: {message}", fg=typer.colors.YELLOW, err=True)


# ---- ending -----------------------------------------------------------------------------------------------------


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end, where it is taken for Ctrl-C; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP interrupt like Ctrl-C, so that what was found until then is kept.

    One that somebody handles or ignores already, as under nohup, is left alone.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, _: object) -> None:
        raise Ended(number)

    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """What shells call a process that a signal has ended."""
    return 128 + (interrupt.number if isinstance(interrupt, Ended) else signal.SIGINT)


# ---- failing ----------------------------------------------------------------------------------------------------


# click's, which typer has of its own in later versions
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

MOST_REPEATED = 300
"""Characters of a message about wrong usage, which repeats what was typed."""


class Commands(TyperGroup):
    """Commands that fail with one clear message on stderr and exit code 1; any other exception is a bug."""

    def invoke(self, ctx: Any) -> Any:
        with _plain_warnings():
            try:
                return super().invoke(ctx)
            except UsageError as error:
                error.message = short(error.message, MOST_REPEATED)
                raise
            except CheckFailed as error:
                _complain(error)
                typer.echo(error.reproducer)
            except LlsaGenError as error:
                _complain(error)
            except OSError as error:
                if isinstance(error, BrokenPipeError):  # who reads the output has seen enough: typer leaves quietly
                    raise
                place = "" if error.filename is None else f"{error.filename}: "
                _complain(f"{place}{error.strerror or error}")
        raise typer.Exit(1)


def _complain(message: object) -> None:
    typer.secho(str(message), fg=typer.colors.RED, err=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line, without the place in our own code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: warn(message)
        yield
