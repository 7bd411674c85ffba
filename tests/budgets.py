"""The stored cost of every kernel, tests/budgets.json: how it is measured, and the command that measures it again.

    .venv/bin/python tests/budgets.py                  # everything: a quarter of an hour; tests/compiled.json too
    .venv/bin/python tests/budgets.py llsa_l2 cuda:90  # only the cells of these specs, targets or dtypes

A cell is a spec, a target and a dtype. Shipped specs share many kernels, so a cell holds only the kernels that no
cell before it has in identical form. Numbers are measured; the reasons in `why` are written by hand and stay: each is
a pattern over `target/dtype/spec/kernel`, and every kernel that spills must match one.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import compiled
import triton

from examples import EXTREMES, GLUON, GLUON_COMPILED
from llsa_gen import aot, compile
from llsa_gen.compiler import Attention

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "budgets.json"

# Those whose structure differs most come first: what the others share with them is not compiled again.
SPECS = (
    "llsa_l2", "uneven", "topk_b128", "llsa_d128", "llsa_b64", "llsa_l3", "llsa_l1", "topk_l2", "topk_l1",
    "vsa_like", "llsa_video",
)  # fmt: skip
TARGETS = ("cuda:90", "cuda:80", "cuda:86", "cuda:100", "cuda:120", "hip:gfx942")
DTYPES = ("bfloat16", "float32", "float16")

Row = dict[str, int]
"""What a kernel takes, by the names of `LIMITS`: the most of its variants."""

LIMITS = {"registers": 1.0, "spilled_bytes": 1.0, "shared_memory": 1.0, "instructions": 1.1}
"""How many times its stored value each figure may be before the test fails."""


@dataclass(frozen=True)
class Cell:
    """A spec compiled for a target and a dtype."""

    target: str
    dtype: str
    spec: str
    shared: bool = False  # with global tokens and given lists

    def __str__(self) -> str:
        return f"{self.target}/{self.dtype}/{self.spec}{'+shared' * self.shared}"


# bfloat16 is what people train in: everywhere, whole. float32 takes the same code through other tiles and other
# instructions: two specs that differ in blocks and head dim. float16 differs from bfloat16 in its instructions alone.
CELLS = [Cell(target, "bfloat16", spec) for target in TARGETS for spec in SPECS]
CELLS += [Cell("cuda:90", "float32", spec) for spec in SPECS[:2]] + [Cell("cuda:90", "float16", SPECS[0])]
CELLS += [Cell("cuda:90", "bfloat16", spec, shared=True) for spec in (*SPECS[:4], "vsa_like")]
CELLS += [Cell(target, "bfloat16", spec, shared=True) for target in ("cuda:80", "hip:gfx942") for spec in SPECS[:2]]
CELLS += [Cell("cuda:90", "float32", SPECS[1], shared=True)]


def measure(cell: Cell) -> list[aot.Report]:
    """What the kernels that are this cell's own take: remembered, or compiled where they have changed."""
    own = own_kernels(cell)
    return compiled.compile_kernels(*_arguments(cell), kernels=own, shared=cell.shared) if own else []


def measured(cell: Cell, kernels: set[str]) -> list[tuple[str, aot.Report]]:
    """The same of `kernels`, compiled now, by the keys of tests/compiled.json."""
    return compiled.measured(*_arguments(cell), kernels, cell.shared) if kernels else []


def _arguments(cell: Cell) -> tuple[Attention, str, str, int | None]:
    # variants for other lengths differ by their masks and not by target: they are compiled for one
    n_tokens = None if cell.target == "cuda:90" and not cell.shared else aot.USUAL_TOKENS
    return compile(ROOT / "spec" / f"{cell.spec}.yaml"), cell.target, cell.dtype, n_tokens


Other = tuple[dict[str, Any], str, int | None, bool]
"""What other tests compile for cuda:90: spec, dtype, tokens, and whether of its kernels only those in Gluon."""

OTHERS: list[Other] = []
for _name, _more, _dtype in GLUON_COMPILED:
    _spec, _lengths = GLUON[_name]
    _whole = _dtype == "bfloat16" and not _more and _name != "l3"  # as tests/kernels/test_hopper.py compiles them
    OTHERS.append((_spec.model_dump(mode="json"), _dtype, _lengths[0] + _more, not _whole))
OTHERS += [({"name": name, **chosen}, "float32", None, False) for name, chosen in EXTREMES.items()]


def _other(one: Other) -> list[tuple[str, aot.Report]]:
    chosen, dtype, n_tokens, gluon_alone = one
    attention, kernels = compile(chosen), None
    if gluon_alone:
        made = aot.distinct(attention, "cuda:90", dtype, n_tokens)
        kernels = {one.launch.kernel for one in made if one.launch.function.is_gluon()}
    return compiled.measured(attention, "cuda:90", dtype, n_tokens, kernels)


def own_kernels(cell: Cell) -> set[str]:
    """Kernels of a cell that no cell of the same target and dtype before it has in identical form."""
    before: set[str] = set()
    for other in CELLS:
        if other == cell:
            break
        if (other.target, other.dtype) == (cell.target, cell.dtype):
            before.update(_launched(other))
    return {kernel for identity, kernel in _launched(cell).items() if identity not in before}


@cache
def _launched(cell: Cell) -> dict[str, str]:
    """What a cell launches: everything that Triton would compile, as text, and the name of the kernel."""
    attention = compile(ROOT / "spec" / f"{cell.spec}.yaml")
    made = aot.distinct(attention, cell.target, cell.dtype, aot.USUAL_TOKENS, shared=cell.shared)
    return {compiled.identity(one): one.launch.kernel for one in made}


def rows(reports: list[aot.Report]) -> dict[str, Row]:
    """The row of every kernel."""
    found: dict[str, Row] = {}
    for report in reports:
        row = found.setdefault(report.kernel, dict.fromkeys(LIMITS, 0))
        for name in row:
            row[name] = max(row[name], getattr(report, name))
    return found


def overruns(budget: dict[str, Row], found: dict[str, Row]) -> list[str]:
    """What the kernels of a cell take beyond their budget, or that they have none, a line each."""
    problems = []
    for kernel, row in found.items():
        if kernel not in budget:
            problems.append(f"{kernel} has no budget")
            continue
        for name, factor in LIMITS.items():
            if row[name] > factor * budget[kernel][name]:
                problems.append(f"{kernel}: {row[name]} {name}, the budget is {budget[kernel][name]}")
    return problems


def stored() -> dict[str, Any]:
    """The file: `triton`, the version measured with; `why`, {pattern: reason}; `budgets`, {cell: {kernel: row}}."""
    return json.loads(FILE.read_text()) if FILE.exists() else {"triton": triton.__version__, "why": {}, "budgets": {}}


def reasons(why: dict[str, str], cell: str, kernel: str) -> list[str]:
    """The patterns that give a reason for the spills of a kernel."""
    return [pattern for pattern in why if fnmatchcase(f"{cell}/{kernel}", pattern)]


def store(content: dict[str, Any]) -> None:
    """Write the file, one kernel a line."""
    lines = [f'"triton": {json.dumps(content["triton"])}', f'"why": {json.dumps(content["why"], indent=2)}']
    cells = []
    for cell, kernels in content["budgets"].items():
        body = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
        cells.append(f"  {json.dumps(cell)}: {{\n{body}\n  }}")
    lines.append('"budgets": {\n' + ",\n".join(cells) + "\n}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the shipped specs and store what their kernels take.")
    parser.add_argument("only", nargs="*", choices=[[], *SPECS, *TARGETS, *DTYPES], help="specs, targets or dtypes")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    options = parser.parse_args()
    only = set(options.only)
    chosen = [cell for cell in CELLS if all(not only & set(kind) or name in only for kind, name in _kinds(cell))]
    for cell in CELLS:  # now, and not in the workers: so all measure the same templates, even if somebody edits them
        _launched(cell)
    content = stored()
    budgets: dict[str, dict[str, Row]] = content["budgets"]
    remembered: list[tuple[str, aot.Report]] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for cell, found in zip(chosen, pool.map(measured, chosen, map(own_kernels, chosen)), strict=True):
            remembered += found
            reports = [report for _, report in found]
            budgets[str(cell)] = rows(reports)
            seconds = sum(report.seconds for report in reports)
            print(f"{cell}: {len(reports)} kernels in {seconds:.0f} s", flush=True)
            for report in sorted(reports, key=lambda report: -report.spilled_bytes):
                if not report.fits:
                    print(f"  {report.kernel}: {report.shared_memory} bytes of shared memory, over the limit")
                if report.spilled_bytes:
                    known = reasons(content["why"], str(cell), report.kernel)
                    print(
                        f"  {report.kernel}: spills {report.spilled_bytes} bytes"
                        + ("" if known else ", no reason given")
                    )
        if not only:
            remembered += [entry for found in pool.map(_other, OTHERS) for entry in found]
    compiled.remember(remembered, all_there_are=not only)
    content["triton"] = triton.__version__
    content["budgets"] = {str(cell): budgets[str(cell)] for cell in CELLS if str(cell) in budgets}
    store(content)
    return 0


def _kinds(cell: Cell) -> list[tuple[tuple[str, ...], str]]:
    return [(SPECS, cell.spec), (TARGETS, cell.target), (DTYPES, cell.dtype)]


if __name__ == "__main__":
    sys.exit(main())
