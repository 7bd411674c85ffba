"""Schedule: tile shapes, warps and pipeline stages of every kernel, for a target and the bytes of an element.

A target is `cuda:<compute capability * 10>` or `hip:<gfx name>`. `schedules/<target>.json` holds what a target is
(shared memory) and the rows that override the rules below for it; a row applies where all its conditions hold. Tiles
that do not fit into shared memory are halved until they do. Nothing here knows what a kernel computes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
    rows: tuple[Mapping[str, object], ...]


@cache
def targets() -> dict[str, Target]:
    """Every target that has a table."""
    tables = [json.loads(path.read_text()) for path in sorted(DIRECTORY.glob("*.json"))]
    return {
        table["target"]: Target(table["target"], table["shared_memory"], tuple(table.get("rows", ()))) for table in tables
    }


def target(name: str) -> Target:
    """The target of a name, or one clear error."""
    if name not in targets():
        raise UnknownTargetError(f"target: expected one of {', '.join(targets())}, got {name!r}")
    return targets()[name]


def schedules(plan: Plan) -> Schedules:
    """The schedules of a plan for every target and element size."""
    return {name: {size: schedule(plan, goal, size) for size in (2, 4)} for name, goal in targets().items()}


def schedule(plan: Plan, goal: Target, element: int) -> Schedule:
    """Tile shapes of every stage of `plan` on one target, for elements of `element` bytes."""
    result: Schedule = {"pool": _pool(plan)}
    for level in plan.levels:
        result[f"select_l{level}"] = _select(plan, goal, element, level)
    result["attend"] = _walk(plan, goal, element, tensors=2)
    result["count"] = {"BLOCK": 1024, "num_warps": 4}
    result["scan"] = {"BLOCK": 1024, "num_warps": 4}
    for level in plan.levels:
        keys = 32 if level == plan.top else pad(plan.block(level + 1), 2)
        result[f"invert_l{level}"] = {"BLOCK_M": max(8, min(128, 4096 // keys)), "KEYS": keys, "num_warps": 4}
    result["grad_q"] = _walk(plan, goal, element, tensors=2)
    if plan.attends_top:
        result[f"grad_kv_l{plan.top}"] = _grad_top(plan, goal, element)
        result["grad_sum"] = {"BLOCK": 8, "num_warps": 4}
    for level in reversed(plan.listed):
        result[f"grad_kv_l{level}"] = _grad_listed(plan, goal, element, level)
    for stage, entry in result.items():
        for row in goal.rows:
            if _applies(row, plan, element, stage):
                entry.update(row["set"])  # type: ignore[call-overload]
    return result


def _applies(row: Mapping[str, object], plan: Plan, element: int, stage: str) -> bool:
    facts = {"stage": stage, "element": element, "pad_dim": pad(plan.head_dim), "block": plan.block(1), "grouped": plan.grouped}
    return all(facts[name] == value for name, value in row.items() if name != "set")


def _pool(plan: Plan) -> Entry:
    width = pad(plan.head_dim)
    return {"CHILDREN": max(4, 1024 // width), "num_warps": 4 if width >= 64 else 2}


def _select(plan: Plan, goal: Target, element: int, level: int) -> Entry:
    keep = pad(plan.topk(level), 1)
    columns = max(32, keep) if keep > 16 or element == 4 else 64
    rows = 16
    return {"BLOCK_M": rows, "BLOCK_N": columns, "KEEP": keep, "num_warps": 4, "num_stages": 2}


def _fit(entry: Entry, goal: Target, width: int, element: int, rows: int, tensors: int, least: int = 16) -> Entry:
    """Halve BLOCK_N, then the stages, until the tiles that are in flight fit into shared memory."""
    batch = entry.get("GROUP", 1)
    while True:
        moving = batch * entry["BLOCK_N"] * width * element * tensors * max(1, entry["num_stages"] - 1)
        if (moving + rows * width * element * tensors) <= goal.shared_memory or entry["BLOCK_N"] == least:
            return entry
        entry["BLOCK_N"] //= 2


def _walk(plan: Plan, goal: Target, element: int, tensors: int) -> Entry:
    """Kernels that walk, for a tile of queries, over tiles of keys."""
    width = pad(plan.head_dim)
    wide = element == 4 or width >= 128
    if plan.grouped:
        rows = pad(plan.block(1))
        group = max(1, (32 if wide else 64) // rows)
        if plan.blocks_sharing is not None:
            group = min(group, pad(plan.blocks_sharing, 1))
        entry = {"GROUP": group, "BLOCK_M": rows, "BLOCK_N": 32 if wide else 64, "num_warps": 4, "num_stages": 2}
        if element == 4:
            entry["BLOCK_N"] = 16 if width >= 128 else 32
        return _fit(entry, goal, width, element, group * rows, tensors)
    rows = min(pad(plan.block(1)), 32 if element == 4 else 64 if wide else 128)
    warps = 1 if rows == 16 and not wide else 2 if rows < 64 and not wide else 4 if rows <= 64 else 8
    entry = {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": warps, "num_stages": 2}
    if element == 4:
        entry["BLOCK_N"] = 16 if width >= 128 else 32
    return _fit(entry, goal, width, element, rows, tensors)


def _grad_top(plan: Plan, goal: Target, element: int) -> Entry:
    width = pad(plan.head_dim)
    keys, rows = (64, 64) if element == 2 and width <= 64 else (32, 32) if element == 2 else (16, 32)
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": 2}


def _grad_listed(plan: Plan, goal: Target, element: int, level: int) -> Entry:
    width = pad(plan.head_dim)
    wide = element == 4 or width >= 128
    keys = min(pad(plan.block(level + 1)), 16 if element == 4 else 32 if wide else 128)
    rows = 64 if keys >= 64 else 32
    warps = 1 if keys == 16 and not wide else 4 if keys <= 64 else 8
    # a list is cut where it is several times longer than the average, K entries
    return {"PART": 8 * plan.topk(level + 1), "BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": 2}
