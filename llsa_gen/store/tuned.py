"""Tuned: the rows that `llsa-gen tune` found on this machine, kept beside the stored modules and read by `compile`.

`<cache>/schedules/cuda_90.json` has the form of a shipped table. Its rows come after the shipped ones, so they decide.
What ships, and what `llsa_gen.emit.golden` writes, never reads them.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llsa_gen.errors import CacheRefused, ScheduleTableError
from llsa_gen.schedule.table import Target, parse, target
from llsa_gen.schedule.table import targets as shipped
from llsa_gen.store import trust
from llsa_gen.store.files import must_take, write_whole
from llsa_gen.store.store import Store, locked

__all__ = ["add", "files", "must_keep", "path", "remove", "targets"]

FOLDER = "schedules"
LOCK_SECONDS = 5.0
MOST_BYTES = 4 * 2**20  # of a file: some 20,000 rows

_told: set[str] = set()


def path(store: Store, name: str) -> Path:
    """The file of a target, whether it is there or not. Raises FileNotFoundError where there is no cache directory."""
    return store.root / FOLDER / f"{name.replace(':', '_')}.json"


def files(store: Store) -> list[Path]:
    """The files that are there, whatever they are."""
    try:
        return [file for file in (path(store, name) for name in shipped()) if os.path.lexists(file)]
    except OSError:
        return []


def targets(store: Store) -> dict[str, Target]:
    """The shipped targets with this machine's rows behind theirs.

    A file that cannot be read, that others may write, or that says what no table may say, is ignored, with one warning
    a process. Where the whole directory is refused, its warning is the store's.
    """
    tables = dict(shipped())
    for file in files(store) if store.trusted() else []:
        try:
            own = _parse(_load(file), file)
            tables[own.name] = replace(tables[own.name], rows=(*tables[own.name].rows, *own.rows))
        except (ScheduleTableError, CacheRefused) as error:
            _tell(f"tuned schedules are ignored: {error}")
    return tables


def must_keep(store: Store, name: str) -> None:
    """Whether `add` could write the file of a target, found out before a search; raises OSError if not."""
    must_take(path(store, name), folders=True)


def add(store: Store, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Put rows, as they stand in a table, into the file of a target, in one step; returns the file.

    They take the place of rows for the same stage and facts. A file that is broken is kept as `<file>.broken`.
    Raises ScheduleTableError for rows that no table may hold, CacheRefused where others may write the file or its
    directory, and OSError where the file cannot be written.
    """
    file = path(store, name)
    store.check()
    trust.make_directory(file.parent)
    trust.check_directory(file.parent)
    with locked(file.with_name(f"{file.name}.lock"), LOCK_SECONDS):  # without it, of two at once one may lose its rows
        same = [(row["stage"], row["when"]) for row in rows]
        kept = [row for row in _rows_in(file) if (row["stage"], row["when"]) not in same]
        table = {"target": name, "rows": [*kept, *rows]}
        _parse(table, file)
        write_whole(file, _text(table))
    return file


def remove(store: Store) -> int:
    """Remove the files; returns how many."""
    found = files(store)
    for file in found:
        file.unlink(missing_ok=True)
    return len(found)


def _load(file: Path) -> Any:
    """What the JSON in a file says. Raises CacheRefused, and ScheduleTableError for whatever else may be wrong."""
    try:
        trust.check_directory(file.parent)
        data = json.loads(trust.read(file, MOST_BYTES))
        json.dumps(data, ensure_ascii=False).encode()  # or a text in it could not be printed
        return data
    except CacheRefused:
        raise
    except Exception as error:  # a file may hold anything, so anything may go wrong: nested too deep, a FIFO
        problem = f"{type(error).__name__}: {error}" if isinstance(error, RecursionError | MemoryError) else error
        raise ScheduleTableError(f"{file}: expected a table in JSON, got {problem}") from None


def _parse(data: Any, file: Path) -> Target:
    name = file.stem.replace("_", ":")
    own = parse(data, str(file), target(name).shared_memory)
    if own.name != name:
        raise ScheduleTableError(f"{file}: target: expected {name!r}, got {own.name!r}")
    return own


def _rows_in(file: Path) -> list[dict[str, Any]]:
    """The rows of the file, none where it is not there or broken; a broken one is set aside."""
    if not os.path.lexists(file):
        return []
    try:
        data = _load(file)
        _parse(data, file)
        return [{"when": {}, **row} for row in data.get("rows", [])]
    except ScheduleTableError as error:
        os.replace(file, f"{file}.broken")
        _tell(f"tuned schedules were set aside as {file.name}.broken: {error}")
        return []


def _text(table: Mapping[str, Any]) -> str:
    """A table, one row a line."""
    lines = ",\n".join(f"    {json.dumps(row)}" for row in table["rows"])
    return f'{{\n  "target": {json.dumps(table["target"])},\n  "rows": [\n{lines}\n  ]\n}}\n'


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
