"""What every kernel of the shipped specs takes with the Triton that is installed: measured in one environment.

    .venv/bin/python tests/version_rows.py ROWS.json [cuda:90 cuda:80]

`tests/versions.py` runs it once a version. Compiles and figures are those of `tests/budgets.py`; beside them stands
what the instructions say of how a kernel multiplies and loads.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import budgets
import triton
from budgets import CELLS, Cell
from triton import knobs

from llsa_gen.errors import LlsaGenError

TARGETS = ("cuda:90", "cuda:80")

INSTRUCTIONS = {
    "hgmma": r"HGMMA\.",  # the matrix units of a whole group of four warps
    "hmma": r"[HI]MMA\.",  # those of one warp
    "copies": r"(?:LDGSTS\S*\.128|UTMALDG\S*|UBLKCP\S*)",  # asynchronous ones to shared memory, 16 bytes or more
}
"""What is counted in the machine code, by the start of the instruction."""

FIGURES = (*budgets.LIMITS, *INSTRUCTIONS)

Row = dict[str, Any]
"""What a kernel takes, by the names of `FIGURES`, the most of its variants; or `error`, why it does not compile."""


class Binaries:
    """The cubins that Triton makes, or finds in its cache, while this is its listener; in the order of the compiles."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def __call__(self, *, metadata_group: Mapping[str, str], **_: object) -> None:
        self.paths += [Path(path) for name, path in metadata_group.items() if name.endswith(".cubin")]


def rows(cell: Cell) -> dict[str, Row]:
    """The row of every kernel that is the cell's own."""
    return {kernel: _row(cell, kernel) for kernel in sorted(budgets.own_kernels(cell))}


def _row(cell: Cell, kernel: str) -> Row:
    binaries = Binaries()
    with knobs.compilation.scope():
        knobs.compilation.listener = binaries
        try:
            reports = [report for _, report in budgets.measured(cell, {kernel})]
        except LlsaGenError as error:
            return {"error": str(error).partition("\n")[0]}
    counts = [counted(disassembled(path)) for path in binaries.paths]
    return {
        **budgets.rows(reports)[kernel],
        **{name: max(count[name] for count in counts) for name in INSTRUCTIONS},
    }


def disassembled(cubin: Path) -> str:
    """The machine code as text, an instruction a line."""
    command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counted(text: str) -> dict[str, int]:
    """How many instructions of each kind of `INSTRUCTIONS` a disassembly has; a predicate may stand before one."""
    return {
        name: len(re.findall(rf"^\s+/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+ )?{start}", text, re.MULTILINE))
        for name, start in INSTRUCTIONS.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Write what every kernel takes with this version of Triton.")
    parser.add_argument("output", type=Path)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("-j", "--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [cell for cell in CELLS if cell.target in options.targets]
    found: dict[str, dict[str, Row]] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for cell, made in zip(chosen, pool.map(rows, chosen), strict=True):
            found[str(cell)] = made
            failed = sum("error" in row for row in made.values())
            print(f"triton {triton.__version__}, {cell}: {len(made)} kernels, {failed} failed", flush=True)
    content = {"triton": triton.__version__, "kernels": found}
    with tempfile.NamedTemporaryFile("w", dir=options.output.parent, delete=False) as staged:
        json.dump(content, staged)
    Path(staged.name).replace(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
