"""What to try: the tile shapes around an entry, nearest first, and why some of them are not worth compiling.

Nothing here knows of a GPU more than what fits; whether a candidate is right and how fast it is, others say.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product

from llsa_gen.plan import Plan
from llsa_gen.runtime.backend import in_triton
from llsa_gen.schedule import Entry, Target
from llsa_gen.schedule.fit import misfit, read_in_gluon, settled
from llsa_gen.schedule.table import STAGES, facts_of, stage_kind

__all__ = ["Candidate", "candidates", "settable"]

RANGES = {
    "GROUP": (1, 32), "BLOCK_M": (8, 256), "BLOCK_C": (16, 256), "BLOCK_N": (16, 256), "BLOCK": (1, 8192),
    "KEYS": (8, 256), "CHILDREN": (1, 256), "ROWS": (1, 128), "PART": (1, 4096), "SPLIT": (1, 16),
    "num_warps": (1, 16), "num_stages": (1, 5),
}  # fmt: skip
"""Smallest and largest value of each that is tried."""


@dataclass(frozen=True)
class Candidate:
    """Tile shapes to try; `reason` says why they are left out, where that is known before compiling them."""

    entry: Entry
    reason: str | None = None


REGISTERS = (96, 128, 168, 255)
"""What of `maxnreg` is tried: 20, 16, 12 and 8 warps at a time on a multiprocessor of 65,536 registers."""


def settable(kind: str) -> tuple[str, ...]:
    """What may be varied of a kind of kernel, tiles first."""
    return (*STAGES[kind].tiles, "num_warps", *(("num_stages", "maxnreg") if STAGES[kind].loop else ()))


def candidates(plan: Plan, stage: str, entry: Entry, element: int, goal: Target) -> Iterator[Candidate]:
    """The entries one step from `entry`, then those two steps from it: a step halves or doubles one number."""
    kind = stage_kind(plan, stage)
    for changes in (changes for steps in (1, 2) for changes in _steps(kind, entry, steps)):
        made = settled(plan, kind, entry, changes)
        if made.get("backend") == changes.get("backend"):  # or else only rare calls would read what differs
            reason = _wasteful(plan, stage, made, entry) or misfit(plan, stage, entry, made, element, goal)
            yield Candidate(made, reason)


def _steps(kind: str, entry: Entry, steps: int) -> Iterator[Entry]:
    """What is so many steps away: for the kernel of the entry's backend, then for the one in Triton."""
    if "backend" in entry:
        yield from _changes(entry, read_in_gluon(kind), steps, {"backend": entry["backend"]})
    yield from _changes(in_triton(entry), settable(kind), steps, {})


def _changes(entry: Entry, names: tuple[str, ...], steps: int, told: Entry) -> Iterator[Entry]:
    for changed in combinations([name for name in names if name in entry], steps):
        for values in product(*(_moves(name, entry[name]) for name in changed)):
            yield told | dict(zip(changed, values, strict=True))


def _moves(name: str, value: int) -> list[int]:
    if name == "maxnreg":
        return [new for new in REGISTERS if new != value]
    low, high = RANGES[name]
    around = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    return [new for new in around if low <= new <= high]


def _wasteful(plan: Plan, stage: str, made: Mapping[str, int], entry: Mapping[str, int]) -> str | None:
    """Why a tile is larger than anything that could fill it."""
    name = STAGES[stage_kind(plan, stage)].filled
    if name is None or made[name] <= max(rows := facts_of(plan, stage, 2)["rows"], entry[name]):
        return None
    return f"{name} {made[name]}: a block fills {rows} rows at the most"
