"""Rows that measurements are stored in: JSON, a list, each row readable alone, with machine, versions, commit and date.

As `llsa_gen.bench` stores its own. Files grow: what is measured later is added to what stands there.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llsa_gen.bench.machine import machine


def stamp(device: str) -> dict[str, Any]:
    """What every row of a run begins with."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(device).model_dump()}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def add(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows behind those of a file, which need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps([*read(path), *rows], indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, for people and for docs: the first column to the left, numbers to the right."""
    widths = [max(3, *(len(line[place]) for line in (head, *lines))) for place in range(len(head))]  # ---, --:

    def row(cells: Sequence[str]) -> str:
        placed = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(placed)} |"

    rule = ["-" * (width - 1) + (":" if place else "-") for place, width in enumerate(widths)]
    return "\n".join([row(head), row(rule), *map(row, lines)])
