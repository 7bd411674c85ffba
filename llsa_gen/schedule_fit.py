"""What fits: which tile shapes a kernel can be launched with, and whether they can fit into shared memory.

Both are known before anything is compiled. What the compiler really takes is found out by `llsa_gen.aot`.
"""

from collections.abc import Mapping

from llsa_gen.plan import Plan
from llsa_gen.schedule_table import LIMITS, pad, stage_kind

__all__ = ["LIST_LENGTHS", "misfit", "read_in_gluon", "settled", "shared_memory"]

DOT = 16
"""Rows and columns of the smallest product that matrix units take."""

LIST_LENGTHS = (2, 4, 8)
"""Values of KEEP for which each of four threads keeps a list of its own, see `templates/best.py.j2`: longer lists would
take too many registers."""


def shared_memory(kind: str, tiles: Mapping[str, int], width: int, element: int) -> int:
    """Bytes of shared memory that a kernel of this kind takes, about: what it holds, and what is in flight.

    Of the tiles that a loop streams through, `num_stages - 1` are in flight; `width` is the padded head dim. Kernels
    that keep everything in registers take none. Weights of keys pass through it, but for those of grouped blocks.
    """
    if "BLOCK_N" not in tiles:
        return 0
    in_flight = max(1, tiles.get("num_stages", 2) - 1)
    batch = tiles.get("GROUP", tiles.get("SPLIT", 1))
    queries = batch * tiles["BLOCK_M"]
    keys = max(batch * tiles["BLOCK_N"], tiles.get("BLOCK_C", 0))
    if kind.startswith("select"):  # q; k streams
        rows = queries + keys * in_flight
    elif kind.startswith("grad_kv"):  # k and v; q and the gradient of o stream
        rows = 2 * (keys + queries * in_flight)
    else:  # q, and the gradient of o or the accumulator; k and v stream
        rows = 2 * (queries + keys * in_flight)
    weights = 0 if kind.startswith(("select", "grad_kv")) or "GROUP" in tiles else queries * tiles["BLOCK_N"]
    return (rows * width + weights) * element


def settled(kind: str, tiles: Mapping[str, int]) -> dict[str, int]:
    """`tiles` as they are launched: without HOPPER where they are not those of the kernel in Gluon, which are fixed."""
    if kind == "grad_kv_tokens":
        fixed: dict[str, tuple[int, ...]] = {"num_warps": (1,), "BLOCK_N": (16,)}
    elif kind.startswith("grad_kv"):
        fixed = {"num_warps": (4,), "BLOCK_N": (64,), "BLOCK_M": (32, 64)}
    else:
        fixed = {"num_warps": (4,), "GROUP": (4,)}
    fits = all(tiles.get(name) in sizes for name, sizes in fixed.items())
    return {name: value for name, value in tiles.items() if fits or name != "HOPPER"}


def read_in_gluon(kind: str) -> set[str]:
    """What the kernel in Gluon reads of an entry with HOPPER and is not fixed; all else is for Triton."""
    if kind == "grad_kv_tokens":
        return {"HOPPER", "PART"}
    return {"HOPPER", "BLOCK_M"} if kind.startswith("grad_kv") else {"HOPPER"}


def misfit(
    plan: Plan, stage: str, known: Mapping[str, int], tiles: Mapping[str, int], element: int, limit: int
) -> str | None:
    """Why `tiles` cannot be what this stage of the plan is launched with; None where nothing speaks against it.

    `known` is a legal entry, for the names that the kernel takes; `limit` is the target's shared memory in bytes.
    """
    strangers = [name for name in tiles if name not in {*known, *LIMITS} or (name == "HOPPER" and name not in known)]
    if strangers:
        return f"the kernel takes no {', '.join(strangers)}"
    kind = stage_kind(plan, stage)
    if kind in ("select_top", "select", "attend", "grad_q") or kind.startswith("grad_kv"):
        for name in ("BLOCK_M", "BLOCK_C", "BLOCK_N"):
            if tiles.get(name, DOT) < DOT:
                return f"{name} {tiles[name]}: products need {DOT} rows and columns"
    if kind in ("attend", "grad_q") and plan.grouped:
        rows = pad(plan.block(1))
        if tiles["BLOCK_M"] != rows:
            return f"BLOCK_M {tiles['BLOCK_M']}: a block of {plan.block(1)} grouped tokens is a tile of {rows} rows"
        sharing = plan.blocks_sharing
        if sharing is not None and tiles["GROUP"] > pad(sharing, 1):
            return f"GROUP {tiles['GROUP']}: only {sharing} query blocks share their coarse keys"
    if kind.startswith("select") and "KEEP" in tiles:
        if tiles["KEEP"] > tiles["BLOCK_N"]:
            return f"BLOCK_N {tiles['BLOCK_N']}: Top-{tiles['KEEP']} of a tile needs as many candidates"
        if tiles["KEEP"] in LIST_LENGTHS and 4 * tiles["KEEP"] > tiles["BLOCK_N"]:
            return f"BLOCK_N {tiles['BLOCK_N']}: four threads take {tiles['KEEP']} candidates each, at least"
    needed = shared_memory(kind, tiles, pad(plan.head_dim), element)
    if needed > limit:
        return f"its tiles take {needed:,} bytes of shared memory, and there are {limit:,}"
    return None
