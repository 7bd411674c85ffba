"""What fits: which tile shapes a kernel can be launched with, and how they are cut until they fit into shared memory.

Both are known before anything is compiled, see `schedule_memory`. What the compiler really takes is found out by
`llsa_gen.aot`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llsa_gen.plan import Plan
from llsa_gen.runtime.backend import in_triton
from llsa_gen.schedule.memory import shared_memory
from llsa_gen.schedule.table import GLUON, LIMITS, STAGES, TRITON, Target, pad, stage_kind

__all__ = ["LIST_LENGTHS", "fitted", "handed_to_gluon", "misfit", "read_in_gluon", "settled"]

DOT = 16
"""Rows and columns of the smallest product that matrix units take."""

LIST_LENGTHS = (2, 4, 8)
"""Values of KEEP for which each of four threads keeps a list of its own, see `templates/triton/best.py.j2`: longer
lists would take too many registers."""


def handed_to_gluon(entry: Mapping[str, Any], registers: int) -> dict[str, Any]:
    """An entry for Triton, handed to the kernel in Gluon, a thread of which has so many registers at the most."""
    own = {name: value for name, value in entry.items() if name != "maxnreg"}
    triton = {"triton_maxnreg": entry["maxnreg"]} if "maxnreg" in entry else {}
    return own | {"backend": GLUON, "maxnreg": registers} | triton


def settled(plan: Plan, kind: str, entry: dict[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`entry` with `changes`, as it is launched: in Triton if tiles are not those of the kernel in Gluon.

    `maxnreg` among `changes` is for the kernel of the backend that they name, or else the one in Triton.
    """
    changes = dict(changes or {})
    backend = changes.pop("backend", None)
    own = changes.pop("maxnreg", None) if backend == GLUON else None
    made = in_triton(entry) | changes
    if entry.get("backend") != GLUON or backend == TRITON or not _has_tiles_of_gluon(plan, kind, made):
        return made
    return handed_to_gluon(made, own or entry["maxnreg"])


def _has_tiles_of_gluon(plan: Plan, kind: str, tiles: Mapping[str, int]) -> bool:
    needed = (plan.wide and STAGES[kind].gluon_wide) or STAGES[kind].gluon
    return all(not legal or tiles.get(name) in legal for name, legal in needed.items())


def read_in_gluon(kind: str) -> tuple[str, ...]:
    """What the kernel in Gluon reads of an entry and is not fixed; all else is for Triton."""
    return (*(name for name, legal in STAGES[kind].gluon.items() if len(legal) != 1), "maxnreg")


def misfit(
    plan: Plan, stage: str, known: Mapping[str, int], tiles: Mapping[str, int], element: int, goal: Target
) -> str | None:
    """Why `tiles` cannot be what this stage of the plan is launched with on `goal`; None where nothing is against it.

    `known` is a legal entry, for the names that the kernel takes.
    """
    strangers = [name for name in tiles if name not in {*known, *LIMITS, "triton_maxnreg"}]
    if strangers:
        return f"the kernel takes no {', '.join(strangers)}"
    wrong = _illegal(plan, stage_kind(plan, stage), tiles)
    if wrong is not None:
        return wrong
    return _too_large(plan, stage_kind(plan, stage), tiles, element, goal)


def _too_large(plan: Plan, kind: str, tiles: Mapping[str, int], element: int, goal: Target) -> str | None:
    needed = shared_memory(plan, kind, tiles, element, goal)
    if needed <= goal.shared_memory:
        return None
    return f"its tiles take {needed:,} bytes of shared memory, and there are {goal.shared_memory:,}"


def _illegal(plan: Plan, kind: str, tiles: Mapping[str, int]) -> str | None:
    """Why a kernel of this kind cannot be launched with `tiles`, whatever memory there is."""
    loop = STAGES[kind].loop
    if loop is not None:
        for name in ("BLOCK_M", "BLOCK_C", "BLOCK_N"):
            if tiles.get(name, DOT) < DOT:
                return f"{name} {tiles[name]}: products need {DOT} rows and columns"
    if loop == "walk" and plan.grouped:
        rows = pad(plan.block(1))
        if tiles["BLOCK_M"] != rows:
            return f"BLOCK_M {tiles['BLOCK_M']}: a block of {plan.block(1)} grouped tokens is a tile of {rows} rows"
        sharing = plan.blocks_sharing
        if sharing is not None and tiles["GROUP"] > pad(sharing, 1):
            return f"GROUP {tiles['GROUP']}: only {sharing} query blocks share their coarse keys"
    if loop == "select" and "KEEP" in tiles:
        if tiles["KEEP"] > tiles["BLOCK_N"]:
            return f"BLOCK_N {tiles['BLOCK_N']}: Top-{tiles['KEEP']} of a tile needs as many candidates"
        if tiles["KEEP"] in LIST_LENGTHS and 4 * tiles["KEEP"] > tiles["BLOCK_N"]:
            return f"BLOCK_N {tiles['BLOCK_N']}: four threads take {tiles['KEEP']} candidates each, at least"
    return None


CUT = (("BLOCK_C", "BLOCK_N"), ("GROUP", "SPLIT"), ("BLOCK_M",), ("CHILDREN", "ROWS", "BLOCK"), ("num_stages",))
"""What is halved until a kernel fits, in this order; of several at once the largest first.

Tiles of keys before those of queries, whose length is how often keys are read. The gradients of keys are the other way
round, and what they read for each of their keys is a tile of queries.
"""


def fitted(
    plan: Plan, stage: str, entry: Mapping[str, Any], element: int, goal: Target
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`entry`, cut until it fits into the shared memory of `goal`, and, if it had to be, a sentence that says so.

    What can be cut no further is returned though it does not fit.
    """
    kind = stage_kind(plan, stage)
    made = dict(entry)
    while _too_large(plan, kind, made, element, goal):
        smaller = next(_smaller(plan, kind, made), None)
        if smaller is None:
            break
        made = smaller
    if made == entry:
        return made, ()
    cut = ", ".join(f"{name} {size} to {made[name]}" for name, size in entry.items() if made[name] != size)
    return made, (f"rule: {_too_large(plan, kind, entry, element, goal)}: {cut}",)


def _smaller(plan: Plan, kind: str, tiles: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries that are one cut smaller and can be launched, the one to take first."""
    order = (CUT[2], CUT[0], *CUT[3:]) if STAGES[kind].loop == "grad_kv" else CUT
    for names in order:
        for name in sorted((name for name in names if tiles.get(name, 1) > 1), key=lambda name: -tiles[name]):
            made = {**tiles, name: tiles[name] - 1 if name == "num_stages" else tiles[name] // 2}
            if name == "SPLIT":  # a warp each
                made["num_warps"] //= 2
            if _illegal(plan, kind, made) is None:
                yield made
