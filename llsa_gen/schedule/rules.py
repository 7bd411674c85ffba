"""Schedule: tile shapes, warps and pipeline stages of every kernel, for a target and the bytes of an element.

A target is `cuda:<compute capability * 10>` or `hip:<gfx name>`. The last row of its table that matches decides
(`llsa_gen.schedule.table`); where no row does, or what it says does not fit, the rules below. They know no more of a
GPU than the size of its shared memory, whether four warps multiply 64 rows at once (`WGMMA`) and whether float64 sorts
faster (`DOUBLES`), so a spec or a head dim that nobody has measured still gets tiles that suit it. A GPU that has no
table gets that of the nearest older one, at run time: `target_of` in the generated module. Nothing here knows what a
kernel computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llsa_gen.plan import Plan
from llsa_gen.runtime.backend import in_triton
from llsa_gen.schedule.columns import kept_columns, take_turns
from llsa_gen.schedule.fit import LIST_LENGTHS, fitted, handed_to_gluon, misfit, settled
from llsa_gen.schedule.memory import WGMMA
from llsa_gen.schedule.table import TRITON, Target, facts_of, pad, stage_kind, targets

__all__ = [
    "PARTIAL_LEVELS", "Choice", "Entry", "Schedule", "Schedules", "choices", "list_length", "schedule", "schedules",
]  # fmt: skip

Entry = dict[str, Any]
"""Tile shapes of one kernel as keyword arguments of its launch, `num_warps`, `num_stages` and `maxnreg` among them.

All are numbers but `backend`, which is there if the launch is handed to a kernel that is not in Triton. `maxnreg` is
then the register cap of that kernel, and `triton_maxnreg` that of the one in Triton, to which some calls are left.
"""

Schedule = dict[str, Entry]
"""{stage of the plan: entry}"""

Schedules = dict[str, dict[int, Schedule]]
"""{target: {bytes of an element: schedule}}"""

PARTIAL_LEVELS = 3
"""The most levels with which attention in Gluon also takes partial tiles, with keys that do not exist or cover
fewer tokens than others: some lengths, lists with gaps. With more, registers run out: 6% slower than Triton with
four levels, 29% with six."""

DOUBLES = ("cuda:90",)
"""Targets known to sort faster by float64 than by int64: two integer instructions a comparison, and float64 units that
keep up. Consumer cards have next to none; other GPUs that have them were not measured."""


@dataclass(frozen=True)
class Choice:
    """The entry of one stage, the row or rule that it came from, and what was meant instead but does not fit."""

    entry: Entry
    origin: str
    pruned: tuple[str, ...] = ()


def schedules(plan: Plan, tables: Mapping[str, Target] | None = None) -> Schedules:
    """The schedules of a plan for every target and element size; `tables` are the shipped ones unless given."""
    goals = targets() if tables is None else tables
    return {name: {size: schedule(plan, goal, size) for size in (2, 4)} for name, goal in goals.items()}


def schedule(plan: Plan, goal: Target, element: int) -> Schedule:
    """Tile shapes of every stage of `plan` on one target, for elements of `element` bytes, whatever the length."""
    return {stage: choice.entry for stage, choice in choices(plan, goal, element).items()}


def choices(plan: Plan, goal: Target, element: int) -> dict[str, Choice]:
    """The same, with where each entry comes from."""
    found: dict[str, Choice] = {}
    for stage, rule in _rules(plan, goal, element).items():
        kind, facts = stage_kind(plan, stage), facts_of(plan, stage, element)
        entry, pruned = fitted(plan, stage, rule, element, goal)
        entry, origin = settled(plan, kind, entry), "rule"
        for row in reversed(goal.rows):
            if row.matches(kind, facts):
                chosen, wanted = settled(plan, kind, entry, row.set), row.set.get("backend", TRITON)
                reason = misfit(plan, stage, entry, chosen, element, goal)
                if reason is None and wanted not in (TRITON, chosen.get("backend")):
                    known = "its kernel has other tiles" if "backend" in entry else "it has no kernel for this stage"
                    reason = f"backend {wanted}: {known}"
                if reason is None:
                    entry, origin = chosen, f"{row.place}: {row.reason}"
                    break
                pruned = (*pruned, f"{row.place}: {reason}")
        found[stage] = Choice(entry, origin, pruned)
    return found


# ---- rules ------------------------------------------------------------------------------------------------------


def _rules(plan: Plan, goal: Target, element: int) -> dict[str, Entry]:
    """What the rules say of every stage, whether it fits into shared memory or not."""
    result = {"pool": _pool(plan, goal, element)}
    if plan.top > 2:
        result["pool_sums"] = _pool_sums(plan)
    for level in plan.levels:
        result[f"select_l{level}"] = _select(plan, goal, element, level)
    # more programs hide more of the way from a list to its counters: 8 lists of 8 take 6.6 us, 16 take 7.5
    result["keep"] = {"BLOCK_M": max(1, 64 // pad(max(map(plan.most_kept, plan.levels)), 1)), "num_warps": 1}
    result["attend"] = _walk(plan, goal, element, "attend")
    result["scan"] = {"BLOCK": 1024, "num_warps": 4}
    for level in plan.levels:
        result[f"invert_l{level}"] = _invert(plan, level)
    result["grad_q"] = _walk(plan, goal, element, "grad_q")
    split = _grad_split(plan, goal, element)
    result["grad_sum"] = _grad_sum(plan)
    if plan.attends_top:
        result[f"grad_kv_l{plan.top}"] = split
        result["grad_kv_global"] = dict(split)
    else:  # a kernel in Gluon for global tokens alone would be most of a module's Gluon
        result["grad_kv_global"] = in_triton(split)
    for level in reversed(plan.by_keeper):
        result[f"grad_kv_l{level}"] = _grad_keeper(plan, goal, element, level)
        result[f"grad_gather_l{level}"] = _grad_gather(plan, level)
    for level in reversed(plan.by_list):
        result[f"grad_kv_l{level}"] = _grad_listed(plan, goal, element, level)
    return result


def _pool(plan: Plan, goal: Target, element: int) -> Entry:
    width = pad(plan.head_dim)
    if plan.top == 1 and plan.block(1) >= 64:  # no level above to sum for: a program a token
        return {"CHILDREN": 1, "ROWS": max(16, 4096 // width), "num_warps": 4}
    entry: Entry = {"CHILDREN": max(4, 1024 // width), "ROWS": min(8, pad(plan.block(1), 1)), "num_warps": 2}
    if element == 2 and plan.adds_in_turn(1):  # ten programs, where Triton takes 96 to 104 registers by its version
        entry |= _capped(goal, 96)
    return entry


def _pool_sums(plan: Plan) -> Entry:
    # few tokens: a program one of them, or, where a program makes two levels, one of the higher
    children = 1 if plan.top == 3 else max(4, 1024 // pad(plan.head_dim))
    return {"CHILDREN": children, "ROWS": min(16, pad(plan.block(3), 1)), "num_warps": 1 if children == 1 else 4}


def _select(plan: Plan, goal: Target, element: int, level: int) -> Entry:
    if level not in plan.sorted_levels:
        return {"BLOCK_M": 16, "BLOCK_N": 64 if element == 2 else 32, "num_warps": 4, "num_stages": 2}
    keep = pad(plan.topk(level), 1)
    # sorting networks live in registers, those of one warp: between warps, every step goes through shared memory
    entry = {"BLOCK_M": 16, "BLOCK_N": max(32, keep), "KEEP": keep, "num_warps": 1, "num_stages": 2}
    entry["DOUBLES"] = int(element == 2 and goal.name in DOUBLES)  # float32 waits for its products anyway
    if level == plan.top:
        entry["SPLIT"] = 1
        if element == 2 and keep <= 16:  # few queries, each with many candidates
            entry |= {"SPLIT": 4, "num_warps": 4, "BLOCK_N": 64 if keep <= 8 else 32}
    return entry


def list_length(plan: Plan, level: int) -> int | None:
    """How many of a sorted level a thread keeps in a list, KEEP; None where a row's best are one list."""
    keep = pad(plan.topk(level), 1)
    return keep if keep in LIST_LENGTHS else None


def _invert(plan: Plan, level: int) -> Entry:
    if level == plan.top:
        return {"BLOCK_M": 128, "KEYS": 32, "num_warps": 4}
    keys = pad(plan.block(level + 1), 2)
    if keys <= 16:
        return {"BLOCK_M": 128, "KEYS": keys, "num_warps": 4}
    # many keys: small steps along the list, a few elements a thread, where a larger tile would take all its registers
    return {"BLOCK_M": max(8, 1024 // keys), "KEYS": keys, "num_warps": min(16, keys // 4)}


def _walk(plan: Plan, goal: Target, element: int, stage: str) -> Entry:
    """`attend` and `grad_q`: for a tile of queries, over tiles of keys."""
    width = pad(plan.head_dim)
    rows = pad(plan.block(1))
    attend = stage == "attend"
    if plan.grouped:
        # products with both operands in shared memory leave registers for 64 rows of 256, if no gradients stand beside
        fills = element == 2 and (width <= 128 or (attend and goal.name in WGMMA))
        group = max(1, (64 if fills else 32) // rows)
        if plan.blocks_sharing is not None:
            group = min(group, pad(plan.blocks_sharing, 1))
        # fine keys come by the block; of coarse ones, registers hold more where no gradient stands beside the sums
        entry = {"GROUP": group, "BLOCK_M": rows, "BLOCK_C": 64 if attend else 32, "BLOCK_N": rows}
        entry |= {"num_warps": 2 if width <= 64 else 4, "num_stages": 2 if attend and width <= 64 else 3}
        # what is worked out ahead takes registers, or spares some: float32 halves what grad_q spills
        entry |= {"PIPELINED_QK": int(element == 4 and width <= 64)}
        if width <= 64 and (group, rows) == (4, 16) and goal.name in WGMMA:
            # a warp a block, and four programs at a time on a multiprocessor, five where heads are short
            entry |= {"num_warps": 4, "PIPELINED_QK": 1} | _capped(goal, 128 if width == 64 else 96)
            if attend and plan.topk(1) * plan.block(1) % 32 == 0:  # four warps with 16 rows of v meet in the same banks
                entry["BLOCK_N"] = 32
        if (group, rows) == (4, 16) and goal.name in WGMMA:
            families = plan.block(1) == 16 and (plan.blocks_sharing or 4) % 4 == 0
            full = plan.lists_fill and all(plan.topk(up) * plan.block(up) % 64 == 0 for up in plan.levels[1:])
            every_level = plan.enriched == tuple(plan.levels) and (full or plan.top <= PARTIAL_LEVELS)
            if families and every_level and _in_gluon(plan, goal, element):
                entry = handed_to_gluon(entry, _registers(plan, attend))
    elif rows < 64:
        entry = {"BLOCK_M": rows, "BLOCK_N": 32, "num_warps": rows // 16 if width <= 64 else rows // 8, "num_stages": 2}
        entry |= _capped(goal, 128) if width <= 64 and element == 2 else {}
    else:
        entry = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3 if width <= 64 else 2}
        every_level = plan.enriched in (tuple(plan.levels), ()) and plan.top <= PARTIAL_LEVELS
        if width == 128 and plan.wide and every_level and _in_gluon(plan, goal, element):
            entry = handed_to_gluon(entry, _registers(plan, attend))
        if attend and width <= 64 and element == 2:
            # without wgmma it would take 177, and one program less would fit; without coarse keys it needs fewer
            entry |= _capped(goal, 168 if plan.enriched else 128)
    if element == 4:
        entry |= {"BLOCK_C": 32 if width <= 64 else 16, "BLOCK_N": 32 if width <= 64 else 16}
        entry |= {"num_warps": 8, "num_stages": 2}
        if not plan.grouped:  # a grouped block is one tile, whatever its size
            entry["BLOCK_M"] = min(rows, 32)
    elif width == 256:
        entry |= {"num_warps": 8, "num_stages": 2}
        if plan.grouped and goal.name in WGMMA:  # a warp for 16 rows, and keys that its registers hold
            entry |= {"num_warps": entry["GROUP"] * rows // 16, "BLOCK_C": 32, "BLOCK_N": 16}
    if not plan.enriched:
        entry.pop("BLOCK_C", None)
    elif "BLOCK_C" not in entry:
        entry["BLOCK_C"] = entry["BLOCK_N"]
    return entry


def _grad_split(plan: Plan, goal: Target, element: int) -> Entry:
    """dk, dv of the coarsest level and of global tokens: for a tile of keys, over a long run of queries."""
    width = pad(plan.head_dim)
    if element == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4 if width <= 128 else 8, "num_stages": 2}
    if width == 256:
        if goal.name in WGMMA:
            return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    entry = {"BLOCK_M": 128 if width <= 64 else 64, "BLOCK_N": 64, "num_warps": 4}
    entry["num_stages"] = 3 if width <= 32 else 2
    if _in_gluon(plan, goal, element):
        return handed_to_gluon(entry | {"BLOCK_M": 64}, 255)  # with fewer registers it would wait for every product
    return entry


def _grad_keeper(plan: Plan, goal: Target, element: int, level: int) -> Entry:
    """dk, dv of what a keeper keeps: the same, over the queries under the keeper."""
    width = pad(plan.head_dim)
    split = _grad_split(plan, goal, element)
    entry, registers = in_triton(split), 255
    if goal.name in WGMMA and element == 2 and width <= 64 and plan.span(level + 1) <= 16 * width:
        # a run so short (1,024 queries at D = 64) is over before copies ahead pay; four or five programs on a
        # multiprocessor hide each other's loads
        entry |= {"BLOCK_M": 32, "num_stages": 1} | _capped(goal, 128 if width == 64 else 96)
        registers = 128
    keys = pad(plan.most_kept(level + 1) * plan.block(level + 1))
    entry["BLOCK_N"] = min(entry["BLOCK_N"], keys)
    return handed_to_gluon(entry, registers) if "backend" in split and keys >= 64 else entry


def _grad_sum(plan: Plan) -> Entry:
    width = pad(plan.head_dim)
    rows = 1 if width <= 64 else 2  # sums are few and long: many small programs
    return {"BLOCK": rows, "num_warps": max(1, rows * width // 64)}


def _grad_gather(plan: Plan, level: int) -> Entry:
    # a list may be long, so few keys a program
    width = pad(plan.head_dim)
    entry = {"ROWS": 8, "BLOCK": max(1, min(pad(plan.block(level + 1), 1), 128 // width))}
    return entry | {"KEEP": pad(plan.most_kept(level + 1), 1), "num_warps": max(1, width // 128)}


def _grad_listed(plan: Plan, goal: Target, element: int, level: int) -> Entry:
    """dk, dv of the other levels: for the children of a key token, over the queries that keep it."""
    width = pad(plan.head_dim)
    children = pad(plan.block(level + 1))
    # a list is cut where it is several times longer than the average, K entries, or of very many queries
    entry = {"PART": max(1, min(8 * plan.topk(level + 1), 8192 // plan.span(level + 1)))}
    if element == 4:
        return entry | {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4 if width <= 64 else 8, "num_stages": 2}
    if children == 16 and width <= 128:
        # one block of queries is 16 rows or so; a token of a coarser level is a long run of them
        entry |= {"BLOCK_M": 128 if level else 32 if width <= 64 else 16, "BLOCK_N": 16}
        entry |= {"num_warps": 4 if level else 1, "num_stages": 3 if width <= 64 else 2}
        entry |= _capped(goal, 168 if width == 64 else 128) if width <= 64 else {}
        if level == 0 and plan.block(1) == 16 and _in_gluon(plan, goal, element):
            # programs on a multiprocessor: twelve; of wider rows ten or eight
            kept = kept_columns(plan.head_dim)
            return handed_to_gluon(entry, 168 if kept <= 80 else 200 if kept <= 96 else 255)
        return entry
    keys = min(children, 128 if width <= 64 else 64 if width == 128 else 32)
    rows = 128 if level and keys <= 64 and width <= 64 else 32
    entry |= {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": 2}
    if not level and width == 128 and plan.wide and _in_gluon(plan, goal, element):
        return handed_to_gluon(entry, 255)
    if not level and keys == 32 and width <= 128:  # more warps would wait for each other
        entry["num_warps"] = 1 if width <= 32 else 2
    if rows == 32 and keys <= 64 and width <= 64:
        entry |= _capped(goal, 168)  # it would take 180, and one program less would fit
    return entry


def _in_gluon(plan: Plan, goal: Target, element: int) -> bool:
    """Whether kernels in Gluon take rows of this kind: 128 to 256 bytes in shared memory, copied 16 bytes at a time."""
    return goal.name in WGMMA and element == 2 and pad(plan.head_dim) in (64, 128) and plan.row_unit == 8


def _registers(plan: Plan, attend: bool) -> int:
    """The most of a thread of attention in Gluon: four programs on a multiprocessor, three, or of wide rows two."""
    if not take_turns(plan.head_dim):
        return 255
    return 128 if attend and kept_columns(plan.head_dim) == 64 else 168


def _capped(goal: Target, registers: int) -> Entry:
    """The most registers of a thread, where more warps at a time are worth a spill: 168 let in 12, 128 let in 16."""
    return {"maxnreg": registers} if goal.name.startswith("cuda:") else {}
