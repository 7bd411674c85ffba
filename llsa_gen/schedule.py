"""Schedule: tile shapes, warps and pipeline stages of every kernel, for a target and the bytes of an element.

A target is `cuda:<compute capability * 10>` or `hip:<gfx name>`. Its table, `schedules/<target>.json`, holds the shared
memory that a program may use and rows that override the rules below: what a row says under `set` goes wherever stage,
element size and tile are as it says under `when`. Nothing here knows what a kernel computes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llsa_gen.errors import UnknownTargetError
from llsa_gen.plan import Plan

DIRECTORY = Path(__file__).parent / "schedules"

Entry = dict[str, int]
"""Tile shapes of one kernel as keyword arguments of its launch, `num_warps` and `num_stages` among them."""

Schedule = dict[str, Entry]
Schedules = dict[str, dict[int, Schedule]]
"""{target: {bytes of an element: {stage of the plan: entry}}}"""


def pad(size: int, least: int = 16) -> int:
    """`size` rounded up to a power of two, and to the smallest tile that matrix units take."""
    return max(least, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class Target:
    """A GPU architecture: its name, bytes of shared memory a program may use, and rows of its table."""

    name: str
    shared_memory: int
    rows: tuple[Mapping[str, Any], ...]


@cache
def targets() -> dict[str, Target]:
    """Every target that has a table."""
    tables = [json.loads(path.read_text()) for path in sorted(DIRECTORY.glob("*.json"))]
    return {
        table["target"]: Target(table["target"], table["shared_memory"], tuple(table.get("rows", ())))
        for table in tables
    }


def _by_age(name: str) -> tuple[str, int, str]:
    backend, _, arch = name.partition(":")
    return backend, int(arch) if arch.isdigit() else 0, arch


def target(name: str) -> Target:
    """The target of a name, or one clear error."""
    if name not in targets():
        raise UnknownTargetError(f"target: expected one of {', '.join(sorted(targets(), key=_by_age))}, got {name!r}")
    return targets()[name]


def schedules(plan: Plan) -> Schedules:
    """The schedules of a plan for every target and element size."""
    return {name: {size: schedule(plan, goal, size) for size in (2, 4)} for name, goal in targets().items()}


def schedule(plan: Plan, goal: Target, element: int) -> Schedule:
    """Tile shapes of every stage of `plan` on one target, for elements of `element` bytes."""
    result: Schedule = {"pool": _pool(plan)}
    for level in plan.levels:
        result[f"select_l{level}"] = _select(plan, goal, element, level)
    result["attend"] = _walk(plan, goal, element, "attend")
    result["count"] = {"BLOCK": 1024, "num_warps": 4}
    result["scan"] = {"BLOCK": 1024, "num_warps": 4}
    for level in plan.levels:
        keys = 32 if level == plan.top else pad(plan.block(level + 1), 2)
        result[f"invert_l{level}"] = {"BLOCK_M": max(8, min(128, 4096 // keys)), "KEYS": keys, "num_warps": 4}
    result["grad_q"] = _walk(plan, goal, element, "grad_q")
    if plan.attends_top:
        result[f"grad_kv_l{plan.top}"] = _grad_top(plan, goal, element)
        result["grad_sum"] = {"BLOCK": 8, "num_warps": 4}
    for level in reversed(plan.listed):
        result[f"grad_kv_l{level}"] = _grad_listed(plan, goal, element, level)
    facts = {"element": element, "pad_dim": pad(plan.head_dim)}
    for stage, entry in result.items():
        for row in goal.rows:
            if row["when"].items() <= {"stage": stage, **facts, **entry}.items():
                entry.update(row["set"])
    return result


def _pool(plan: Plan) -> Entry:
    width = pad(plan.head_dim)
    return {"CHILDREN": max(4, 1024 // width), "num_warps": 4 if width >= 64 else 2}


def _select(plan: Plan, goal: Target, element: int, level: int) -> Entry:
    if level not in plan.sorted_levels:
        return {"BLOCK_M": 16, "BLOCK_N": 64 if element == 2 else 32, "num_warps": 4, "num_stages": 2}
    keep = pad(plan.topk(level), 1)
    # sorting networks live in registers: one warp where a row's candidates are few, four where they are many
    return {
        "BLOCK_M": 16, "BLOCK_N": max(32, keep), "KEEP": keep, "num_warps": 1 if keep <= 16 else 4, "num_stages": 2,
    }  # fmt: skip


def _fit(entry: Entry, goal: Target, width: int, element: int, rows: int) -> Entry:
    """Halve BLOCK_N until two tiles of queries and what is in flight of two tiles of keys fit into shared memory."""
    while entry["BLOCK_N"] > 16:
        keys = entry.get("GROUP", 1) * entry["BLOCK_N"] * max(1, entry["num_stages"] - 1)
        if 2 * (rows + keys) * width * element <= goal.shared_memory:
            break
        entry["BLOCK_N"] //= 2
    return entry


def _walk(plan: Plan, goal: Target, element: int, stage: str) -> Entry:
    """`attend` and `grad_q`: for a tile of queries, over tiles of keys."""
    width = pad(plan.head_dim)
    rows = pad(plan.block(1))
    if plan.grouped:
        group = max(1, (64 if element == 2 and width <= 128 else 32) // rows)
        if plan.blocks_sharing is not None:
            group = min(group, pad(plan.blocks_sharing, 1))
        entry = {"GROUP": group, "BLOCK_M": rows, "BLOCK_N": 32}
        rows *= group
        entry |= {"num_warps": 2, "num_stages": 2} if width <= 64 else {"num_warps": 4, "num_stages": 3}
    elif rows < 64:
        entry = {"BLOCK_M": rows, "BLOCK_N": 32, "num_warps": rows // 16 if width <= 64 else rows // 8, "num_stages": 2}
    else:
        tall = stage == "attend" and width <= 64
        rows = min(rows, 128 if tall else 64)
        entry = {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    if element == 4:
        entry |= {"BLOCK_N": 32 if width <= 64 else 16, "num_warps": 8, "num_stages": 2}
        if not plan.grouped:  # a grouped block is one tile, whatever its size
            rows = entry["BLOCK_M"] = min(rows, 32)
    elif width == 256:
        entry |= {"num_warps": 8, "num_stages": 2}
    return _fit(entry, goal, width, element, rows)


def _grad_top(plan: Plan, goal: Target, element: int) -> Entry:
    """dk, dv of the coarsest level: for a tile of keys, over all queries."""
    width = pad(plan.head_dim)
    if element == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4 if width <= 128 else 8, "num_stages": 2}
    rows, keys = (128, 64) if width <= 64 else (64, 64) if width == 128 else (32, 32)
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": 2}


def _grad_listed(plan: Plan, goal: Target, element: int, level: int) -> Entry:
    """dk, dv of the other levels: for the children of a key token, over the queries that keep it."""
    width = pad(plan.head_dim)
    children = pad(plan.block(level + 1))
    # a list is cut where it is several times longer than the average, K entries
    entry = {"PART": 8 * plan.topk(level + 1)}
    if element == 4:
        return entry | {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4 if width <= 64 else 8, "num_stages": 2}
    if children == 16 and width <= 128:
        # one block of queries is 16 rows or so: gather a few; a token of a coarser level is a long run of them
        return entry | ({"BLOCK_M": 128, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2} if level else
                        {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 1, "num_stages": 2})  # fmt: skip
    keys = min(children, 128 if width <= 64 else 64 if width == 128 else 32)
    return entry | {"BLOCK_M": 32 if keys != 64 or width > 64 else 64, "BLOCK_N": keys, "num_warps": 4, "num_stages": 2}
