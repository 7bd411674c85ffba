"""The table of what kernels take from version to version of Triton: as JSON, and as Markdown that flags what grew."""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from packaging.version import Version

GROWTH = 15
"""By how many percent of its value in the version before a figure may grow before it is flagged."""

GROWING = {"instructions": "instructions", "registers": "registers", "spilled_bytes": "spilled bytes"}

HEAD = """\
# Kernels from version to version of Triton

What every kernel of the shipped specs takes, compiled for GPUs that are not there. `make versions` measures it again,
runs the interpreter's tests in every version, and writes this file and triton_versions.json. A figure that is the same
in all versions stands once; otherwise there is one a version, oldest first. Of a kernel with variants it is the most.

- *registers* and *spilled* bytes are a thread's, *shared* bytes a program's.
- *MMA*: what multiplies, and how many such instructions: HGMMA for four warps together, HMMA for one.
- *copies*: asynchronous ones of 16 bytes or more into shared memory, in the machine code.
"""

Kernels = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Rows by kernel, by cell."""


def flags(versions: Mapping[str, Any]) -> list[str]:
    """What grew by more than `GROWTH` percent from one version to the next, or multiplies or loads worse."""
    found = []
    for before, after in pairwise(sorted(versions, key=Version)):
        old, new = versions[before]["kernels"], versions[after]["kernels"]
        for cell in old:
            for kernel in sorted(old[cell].keys() & new.get(cell, {}).keys()):
                worse = list(_worse(old[cell][kernel], new[cell][kernel]))
                found += [f"{before} to {after}: {cell}/{kernel}: {one}" for one in worse]
    return found


def _worse(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if "error" in old or "error" in new:
        if "error" not in old:
            yield f"does not compile any more: {new['error']}"
        return
    for name, text in GROWING.items():
        if 100 * new[name] > (100 + GROWTH) * old[name]:
            yield f"{text} {old[name]:,} to {new[name]:,}"
    if _mma(old) != _mma(new):
        yield f"multiplies with {_mma(new)} in place of {_mma(old)}"
    if new["copies"] < old["copies"]:
        yield f"asynchronous copies {old['copies']:,} to {new['copies']:,}"


def _mma(row: Mapping[str, Any]) -> str:
    return " and ".join(name.upper() for name in ("hgmma", "hmma") if row[name]) or "none"


def errors(kernels: Kernels) -> list[str]:
    """The kernels that do not compile, a line each."""
    return [
        f"{cell}/{kernel}: {row['error']}"
        for cell, rows in kernels.items()
        for kernel, row in rows.items()
        if "error" in row
    ]


def markdown(versions: Mapping[str, Any]) -> str:
    """The table as people read it."""
    names = sorted(versions, key=Version)
    lines = [HEAD, "| triton | interpreter's tests | kernels that do not compile |", "| --- | --- | --- |"]
    for name in names:
        lines.append(f"| {name} | {versions[name]['interpreter']} | {len(errors(versions[name]['kernels']))} |")
    lines += ["", f"## What grew by more than {GROWTH}%, or lost something", ""]
    lines += [f"- {flag}" for flag in flags(versions)] or ["Nothing."]
    cells = {cell: None for name in names for cell in versions[name]["kernels"]}
    for cell in cells:
        by_version = [versions[name]["kernels"].get(cell, {}) for name in names]
        kernels = sorted({kernel for rows in by_version for kernel in rows})
        if kernels:
            lines += ["", f"## {cell}", "", "| kernel | registers | spilled | shared | instructions | MMA | copies |"]
            lines.append("| --- | --- | --- | --- | --- | --- | --- |")
            lines += [_line(kernel, [rows.get(kernel) for rows in by_version]) for kernel in kernels]
    return "\n".join(lines) + "\n"


def _line(kernel: str, rows: list[Mapping[str, Any] | None]) -> str:
    def told(name: str) -> str:
        return _once(["-" if row is None else "error" if "error" in row else f"{row[name]:,}" for row in rows])

    def multiplies(row: Mapping[str, Any] | None) -> str:
        if row is None or "error" in row:
            return "-"
        return " ".join(f"{name.upper()} {row[name]:,}" for name in ("hgmma", "hmma") if row[name]) or "-"

    figures = [told(name) for name in ("registers", "spilled_bytes", "shared_memory", "instructions")]
    columns = [kernel.removesuffix("_kernel"), *figures, _once(list(map(multiplies, rows))), told("copies")]
    return f"| {' | '.join(columns)} |"


def _once(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write the JSON, one kernel a line, and the Markdown beside it."""
    made = []
    names = sorted(content["versions"], key=Version)
    for name in names:
        one = content["versions"][name]
        cells = []
        for cell, kernels in one["kernels"].items():
            body = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in kernels.items())
            cells.append(f"   {json.dumps(cell)}: {{\n{body}\n   }}" if body else f"   {json.dumps(cell)}: {{}}")
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(one[key])}" for key in ("interpreter", "passed"))
        made.append(f' {json.dumps(name)}: {{{head}, "kernels": {{\n' + ",\n".join(cells) + "\n }}")
    kernels = json.dumps(content["kernels"])
    file.write_text(f'{{"kernels": {kernels}, "versions": {{\n' + ",\n".join(made) + "\n}}\n")
    file.with_suffix(".md").write_text(markdown(content["versions"]))
