"""Tuned: the rows that `llsa-gen tune` found on this machine, kept beside the stored modules and read by `compile`.

`<cache>/schedules/cuda_90.json` has the form of a shipped table. Its rows come after the shipped ones, so they decide.
What ships, and what `llsa_gen.golden` writes, never reads them.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from llsa_gen.errors import ScheduleTableError
from llsa_gen.files import must_take, write_whole
from llsa_gen.schedule_table import Target, parse, target
from llsa_gen.schedule_table import targets as shipped
from llsa_gen.store import Store

__all__ = ["add", "files", "must_keep", "path", "remove", "targets"]

FOLDER = "schedules"
LOCK_SECONDS = 5.0

_told: set[str] = set()


def path(store: Store, name: str) -> Path:
    """The file of a target, whether it is there or not. Raises FileNotFoundError where there is no cache directory."""
    return store.root / FOLDER / f"{name.replace(':', '_')}.json"


def files(store: Store) -> list[Path]:
    """The files that are there."""
    try:
        found = [path(store, name) for name in shipped()]
        return [file for file in found if file.is_file()]
    except OSError:
        return []


def targets(store: Store) -> dict[str, Target]:
    """The shipped targets with this machine's rows behind theirs.

    A file that cannot be read, or that says what no table may say, is ignored, with one warning a process.
    """
    tables = dict(shipped())
    for file in files(store):
        try:
            own = _read(file)
            tables[own.name] = replace(tables[own.name], rows=(*tables[own.name].rows, *own.rows))
        except (OSError, ScheduleTableError) as error:
            _tell(f"tuned schedules are ignored: {error}")
    return tables


def must_keep(store: Store, name: str) -> None:
    """Whether `add` could write the file of a target, found out before a search; raises OSError if not."""
    must_take(path(store, name), folders=True)


def add(store: Store, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Put rows, as they stand in a table, into the file of a target, in one step; returns the file.

    They take the place of rows for the same stage and facts. A file that is broken is kept as `<file>.broken`.
    Raises ScheduleTableError for rows that no table may hold, and OSError where the file cannot be written.
    """
    from filelock import (
        FileLock,
        Timeout,
    )  # only here: compile reads without a lock, for a file is replaced in one step

    file = path(store, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{file}.lock", timeout=LOCK_SECONDS)
    with suppress(Timeout, NotImplementedError):  # without it, of two that tune at once one may lose its rows
        lock.acquire()
    try:
        same = [(row["stage"], row["when"]) for row in rows]
        kept = [row for row in _rows_in(file) if (row["stage"], row["when"]) not in same]
        text = _text(name, [*kept, *rows])
        _parse(text, file)
        write_whole(file, text)
    finally:
        lock.release()
    return file


def remove(store: Store) -> int:
    """Remove the files; returns how many."""
    found = files(store)
    for file in found:
        file.unlink(missing_ok=True)
    return len(found)


def _read(file: Path) -> Target:
    try:
        return _parse(file.read_text(encoding="utf-8"), file)
    except UnicodeDecodeError as error:
        raise ScheduleTableError(f"{file}: expected a table in JSON, got {error}") from None


def _parse(text: str, file: Path) -> Target:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ScheduleTableError(f"{file}: expected a table in JSON, got {error}") from None
    name = file.stem.replace("_", ":")
    own = parse(data, str(file), target(name).shared_memory)
    if own.name != name:
        raise ScheduleTableError(f"{file}: target: expected {name!r}, got {own.name!r}")
    return own


def _rows_in(file: Path) -> list[dict[str, Any]]:
    """The rows of the file, none where it is not there or broken; a broken one is set aside."""
    if not file.exists():
        return []
    try:
        _read(file)
        return [{"when": {}, **row} for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    except ScheduleTableError as error:
        os.replace(file, f"{file}.broken")
        _tell(f"tuned schedules were set aside as {file.name}.broken: {error}")
        return []


def _text(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, one row a line."""
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    return f'{{\n  "target": {json.dumps(name)},\n  "rows": [\n{lines}\n  ]\n}}\n'


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
