"""Where a line of a generated module comes from: its function, and the template line that it was rendered from.

Rendered text carries no marks. But a template line is the generated line with holes, so the line is found again by
what stands around the holes: first in the template that defines the function, then in the macros of the others.
"""

import ast
import re
from dataclasses import dataclass
from functools import cache

from llsa_gen import runtime
from llsa_gen.emit.module import TEMPLATES, template_names

HOLES = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}")


@dataclass(frozen=True)
class Origin:
    """A place in a generated module, and the place in the templates that it was rendered from."""

    function: str | None  # the function around it; None at the top level
    template: str  # `triton/select.py.j2:83`, or `runtime/cpu.py:83`; without a number where only the file is known

    def __str__(self) -> str:
        return self.template


@dataclass(frozen=True)
class _Line:
    """A line of a template as a pattern that matches every line rendered from it."""

    template: str
    number: int
    pattern: re.Pattern[str]
    literal: int  # characters outside the holes: how much a match says


def origin(text: str, line: int) -> Origin:
    """Where line `line` (from 1) of the generated module `text` comes from."""
    lines = text.splitlines()
    spliced = _spliced(text, line)
    wanted = lines[line - 1].strip() if 1 <= line <= len(lines) else ""
    function, first = next(
        ((name, first) for name, first, last in _functions(text) if first <= line <= last), (None, 0)
    )
    if spliced is not None:
        return Origin(function, spliced)
    home = _best(lines[first - 1].strip()) if function else None
    found = _best(wanted, home)
    if found is not None:
        template = f"{found.template}:{found.number}"
    else:
        template = home.template if home else "module.py.j2"
    return Origin(function, template)


def _spliced(text: str, line: int) -> str | None:
    """The place in a file of the runtime, `runtime/cpu.py:83`, if the line is of one."""
    for name in runtime.FILES:
        part, whole = runtime.text(name).rstrip("\n"), (runtime.FOLDER / name).read_text(encoding="utf-8")
        begin = text.find(part)
        at = line - text.count("\n", 0, begin) - 1
        if begin >= 0 and 0 <= at <= part.count("\n"):
            return f"runtime/{name}:{whole.count(chr(10), 0, whole.index(part)) + at + 1}"
    return None


@cache
def _functions(text: str) -> tuple[tuple[str, int, int], ...]:
    """Name, first and last line of the functions of a module."""
    nodes = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    return tuple((node.name, node.lineno, node.end_lineno or node.lineno) for node in nodes)


def _best(wanted: str, home: _Line | None = None) -> _Line | None:
    """The template line that says most about `wanted`; of equal ones, the first after `home`, then in its template."""

    def rank(line: _Line) -> tuple[int, bool, bool, int]:
        at_home = home is not None and line.template == home.template
        after = at_home and home is not None and line.number >= home.number
        return line.literal, at_home, after, -line.number

    return max((line for line in _lines() if line.pattern.fullmatch(wanted)), key=rank, default=None)


@cache
def _lines() -> tuple[_Line, ...]:
    """Every line of every template that renders to something recognisable."""
    result: list[_Line] = []
    for name in template_names():
        for number, line in enumerate((TEMPLATES / name).read_text().splitlines(), 1):
            parts = HOLES.split(line.strip())
            literal = sum(len(part.replace(" ", "")) for part in parts)
            if literal >= 4:
                pattern = re.compile(".*?".join(map(re.escape, parts)))
                result.append(_Line(name, number, pattern, literal))
    return tuple(result)
