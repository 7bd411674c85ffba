"""A spec and its schedules as the Python literals that stand in a module."""

import json
from collections.abc import Mapping
from typing import Any

from llsa_gen.schedule import Schedule, Schedules
from llsa_gen.spec import Spec


def spec_literal(spec: Spec) -> str:
    """A spec as the Python dict that stands in its module."""
    return literal(json.loads(spec.canonical()))


def literal(spec: Mapping[str, object]) -> str:
    """A spec as a Python dict, one field a line, its texts escaped."""

    def escaped(value: object) -> str:
        # not json's own escapes: beyond the first 2^16 characters they are not Python's
        return json.dumps(value, ensure_ascii=False).encode("ascii", "backslashreplace").decode("ascii")

    values = {name: repr(value) if isinstance(value, bool) else escaped(value) for name, value in spec.items()}
    return "{\n" + "".join(f'    "{name}": {value},\n' for name, value in values.items()) + "}"


def schedules_literal(schedules: Schedules) -> str:
    """The schedules as the statement `SCHEDULES = {...}`, one line a kernel, equal tables written once.

    A table that differs from one before it in a quarter of its kernels at the most is that one and the difference.
    """
    tables: list[tuple[str, Schedule, bool]] = []  # the name of each, its entries, and whether all of them are written
    lines: list[str] = []
    rows: list[str] = []

    def name_of(kernels: Schedule) -> str:
        for name, known, _ in tables:
            if known == kernels:
                return name
        name = f"TILES_{len(tables) + 1}"
        near = [(other, _changed(known, kernels)) for other, known, whole in tables if whole and [*known] == [*kernels]]
        base, changed = min(near, key=lambda one: len(one[1]), default=("", kernels))
        brief = 4 * len(changed) <= len(kernels)
        told = changed if brief else kernels
        body = "".join(f"    {kernel!r}: {entry_literal(entry)},\n" for kernel, entry in told.items())
        lines.append(f"{name} = {base + ' | ' if brief else ''}{{\n{body}}}\n")
        tables.append((name, kernels, not brief))
        return name

    for target, by_size in schedules.items():
        told = ", ".join(f"{size}: {name_of(kernels)}" for size, kernels in by_size.items())
        rows.append(f"    {target!r}: {{{told}}},\n")
    comment = "# by target and bytes of an element"
    return ("".join(lines) + f"SCHEDULES = {{  {comment}\n{''.join(rows)}}}").replace("'", '"')


def _changed(known: Schedule, kernels: Schedule) -> Schedule:
    """The entries that a table of the same kernels has otherwise."""
    return {kernel: entry for kernel, entry in kernels.items() if entry != known[kernel]}


def entry_literal(entry: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name!r}: {value!r}" for name, value in entry.items()) + "}"
