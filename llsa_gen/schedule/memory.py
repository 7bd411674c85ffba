"""How much shared memory a kernel takes, as far as tiles tell before anything is compiled: an upper bound.

What Triton allocates is a sum of few things: tiles that stay for a whole loop, tiles that stream through it, so many of
each as are in flight, and what has to change threads on its way from one product to the next. Which of them there are
depends on the matrix units. That the bound holds is found out by compiling (`tests/schedule/test_schedule_memory.py`);
where it is not tight, it is because a smaller one does not hold for every version of Triton, target and head dim.

Kernels in Gluon are not counted: their tiles are fixed, 64 rows of 128 to 256 bytes (`llsa_gen.schedule.columns`), and
far from any limit.
"""

from collections.abc import Mapping

from llsa_gen.plan import Plan
from llsa_gen.schedule.table import STAGES, Target, pad

__all__ = ["WGMMA", "shared_memory"]

WGMMA = ("cuda:90",)
"""Targets whose matrix units take 64 rows from four warps at once, and both operands from shared memory.

For them there are kernels in Gluon beside some of those in Triton. An entry hands its launches to such a kernel by
`backend`.
"""

TCGEN05 = ("cuda:100",)
"""The same, but their sums are in a memory of their own, through which weights go to the next product."""

BARRIERS = 2048
"""Bytes that such units take beside tiles."""

COPIED = 4
"""Bytes that are copied to shared memory at once, at least, without passing through registers."""

ACCUMULATOR = 4
"""Bytes of a number in a sum, a score or a list."""

RANK = 8
"""Bytes of a rank key of the selection."""


def shared_memory(plan: Plan, kind: str, tiles: Mapping[str, int], element: int, goal: Target) -> int:
    """Bytes of shared memory that a program of this kind of kernel takes on `goal`, at the most.

    `element` is the bytes of an element of q, k and v.
    """
    width, loop = pad(plan.head_dim), STAGES[kind].loop
    if loop == "select":
        return _select(kind, tiles, width, element, goal)
    if loop == "grad_kv":
        return _grad_kv(tiles, width, element, goal, turned=plan.row_unit * element < COPIED)
    if loop == "walk":
        return _walk(kind, tiles, width, element, goal)
    return ACCUMULATOR * _numbers(plan, kind, tiles, width)


def _numbers(plan: Plan, kind: str, tiles: Mapping[str, int], width: int) -> int:
    """What kernels without products hand from thread to thread: one tile of numbers."""
    if "CHILDREN" in tiles:  # pooling: sums of tokens or, of a single one, of its rows
        return max(tiles["CHILDREN"], tiles["ROWS"] if tiles["CHILDREN"] == 1 else 1) * width
    if "KEYS" in tiles:  # inverted lists
        return tiles["BLOCK_M"] * tiles["KEYS"]
    if kind == "keep":
        return tiles["BLOCK_M"] * pad(max(map(plan.most_kept, plan.levels)))
    if kind == "grad_gather":
        return tiles["ROWS"] * max(tiles["KEEP"], tiles["BLOCK"] * width)
    return tiles["BLOCK"] * (width if kind == "grad_sum" else 1)


def _on_rocm(goal: Target) -> bool:
    return goal.name.startswith("hip:")


def _in_flight(tiles: Mapping[str, int]) -> int:
    """How many tiles of one thing that a loop streams are there at once."""
    return max(1, tiles.get("num_stages", 2) - 1)


def _matrix_unit(goal: Target, tiles: Mapping[str, int], rows: int, element: int) -> str:
    """`mma`, or the larger unit of a target that multiplies `rows` rows; float32 has neither."""
    if element == 2 and rows >= 64 and tiles["num_warps"] % 4 == 0:
        return "wgmma" if goal.name in WGMMA else "tcgen05" if goal.name in TCGEN05 else "mma"
    return "mma"


def _select(kind: str, tiles: Mapping[str, int], width: int, element: int, goal: Target) -> int:
    """q stays and k streams; of rows that are dealt to several warps, q is in registers."""
    split = tiles.get("SPLIT", 1)
    queries, keys = tiles["BLOCK_M"], split * tiles["BLOCK_N"] * _in_flight(tiles)
    row = width * element
    if split > 1:
        return keys * row
    tile = queries * tiles["BLOCK_N"]
    # scores of float32 go to the threads that sort them; without KEEP, all are counted by running sums
    scores = RANK * tile if "KEEP" not in tiles else ACCUMULATOR * tile if element == 4 else 0
    # with keys come the parents of the next ones; Triton 3.9 has them there twice
    lists = 2 * ACCUMULATOR * keys if kind == "select" and tiles["num_stages"] > 1 else 0
    if _on_rocm(goal):
        scores = 0 if "KEEP" in tiles else scores
        return max(queries, keys) * row + scores + lists
    return (queries + keys) * row + scores + lists


def _grad_kv(tiles: Mapping[str, int], width: int, element: int, goal: Target, turned: bool) -> int:
    """k and v stay; q and the gradient of o stream, and with them two or three numbers of every query.

    `turned`: rows come by way of registers and change threads.
    """
    queries, keys, flying = tiles["BLOCK_M"], tiles["BLOCK_N"], _in_flight(tiles)
    row, weights = width * element, tiles["BLOCK_M"] * tiles["BLOCK_N"] * element
    if _on_rocm(goal):  # k and v are in registers, as are weights whose keys are few
        if element == 2 and keys < min(queries, 64):
            weights = 0
        streamed = queries * flying * (1 if tiles.get("num_stages") == 1 else 2)
        return max(streamed * row + weights, keys * width * ACCUMULATOR)
    numbers = ACCUMULATOR * queries * flying * (3 if element == 4 else 2)
    unit = _matrix_unit(goal, tiles, keys, element)
    if unit != "mma":  # a product still reads its tile while the next ones are on their way
        flying += 1 if unit == "wgmma" else 2
        weights = BARRIERS if unit == "tcgen05" else 0
    if turned:
        weights = max(weights, queries * row)
    return 2 * (keys + queries * flying) * row + weights + numbers


def _walk(kind: str, tiles: Mapping[str, int], width: int, element: int, goal: Target) -> int:
    """q, and for `grad_q` the gradient of o, stay; k and v stream: coarse keys, then fine ones."""
    row = width * element
    group, stages = tiles.get("GROUP", 1), tiles["num_stages"]
    queries = group * tiles["BLOCK_M"]
    staying = queries * (2 if kind == "grad_q" else 1)
    flying = 2 * _in_flight(tiles)
    if _on_rocm(goal) and stages == 1:
        flying = 1  # k makes way for v
    unit = _matrix_unit(goal, tiles, queries, element)

    def rows(keys: int) -> int:  # products of all queries with the same keys
        if unit == "mma":
            return (staying + flying * keys) * row + queries * keys * element
        more = kind == "grad_q" and unit == "tcgen05"  # k is read twice
        return (staying + (2 * stages + more) * keys) * row

    if "GROUP" not in tiles:
        needed = max(map(rows, (tiles["BLOCK_N"], tiles.get("BLOCK_C", 0))))
    else:  # every block has fine keys of its own, whose weights are in registers
        keys = group * tiles["BLOCK_N"]
        if _on_rocm(goal):  # and so are queries, but of float32 weights are not
            fine = flying * keys * row + (queries * tiles["BLOCK_N"] * element if element == 4 else 0)
        else:
            turned = element == 4 and stages > 1  # k as it is, and turned
            fine = (staying + (flying + turned) * keys) * row
        needed = max(rows(tiles["BLOCK_C"]), fine)
    return needed + (BARRIERS if unit == "tcgen05" else 0)
