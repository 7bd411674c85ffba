"""Tables of tile shapes: one JSON file per GPU architecture, with rows that a person can read and a check that names
what is wrong.

    {"target": "cuda:90", "shared_memory": 232448, "rows": [
      {"stage": "attend", "when": {"element": 2, "pad_dim": 64, "rows": 16}, "set": {"BLOCK_N": 32},
       "measured": {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-20", "before_us": 512.0, "after_us": 498.5}}]}

A row says for which stage and under which facts (`when`: all of them must hold; a list means any of its values) which
tile shapes take the place of the rules' (`set`), and where it comes from: `why`, a sentence, or `measured`.
`docs/schedules.md` is the long form of this page.
"""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from llsa_gen.errors import ScheduleTableError, UnknownTargetError, short
from llsa_gen.plan import Plan

DIRECTORY = Path(__file__).parent / "tables"

FACTS: dict[str, tuple[Any, ...] | type] = {
    "element": (2, 4),  # bytes of an element of q, k, v
    "pad_dim": int,  # head dim, rounded up to a power of two, 16 at least
    "rows": int,  # the block that a tile is made of, padded likewise: b_1 of queries, b_(l+1) where keys have parents
    "keep": int,  # K of the level whose lists are made or read, rounded up to a power of two
    "grouped": (True, False),  # whether one program takes several query blocks
}
"""What a row can ask about, and the legal values; of a number any power of two."""


@dataclass(frozen=True)
class Stage:
    """A kind of kernel as tables name it: the facts that it has beside element and pad_dim, and its tiles."""

    facts: tuple[str, ...]
    tiles: tuple[str, ...]
    """What a row may set, beside `LIMITS` and `backend`. Sizes that the spec dictates are not among them."""
    loop: Literal["select", "walk", "grad_kv"] | None = None
    """The loop of loads and products that it is, if any; only of such a loop `num_stages` matters."""
    filled: str | None = None
    """The tile that `rows` fill, where a larger one would be a waste."""
    gluon: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """What the kernel in Gluon needs of an entry, if there is one: the legal values, none where any is legal."""
    gluon_wide: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The same of wide blocks, if it differs."""


GROUPED = {"num_warps": (4,), "GROUP": (4,)}
WIDE = {"num_warps": (4,), "BLOCK_M": (64,)}
SHARED_KEYS = {"num_warps": (4,), "BLOCK_N": (64,), "BLOCK_M": (32, 64)}
LISTED = {"num_warps": (1,), "BLOCK_N": (16,), "PART": ()}
LISTED_WIDE = {"num_warps": (4,), "BLOCK_N": (64,), "PART": ()}

WALK = Stage(("rows", "grouped"), ("GROUP", "BLOCK_M", "BLOCK_C", "BLOCK_N"), "walk", "BLOCK_M", GROUPED, WIDE)
BY_KEYS, BY_LISTS = ("BLOCK_M", "BLOCK_N"), ("PART", "BLOCK_M", "BLOCK_N")

STAGES = {
    "pool": Stage((), ("CHILDREN", "ROWS")),  # levels 1 and 2, from the tokens
    "pool_sums": Stage((), ("CHILDREN", "ROWS")),  # those above, from sums
    "select_top": Stage(("keep",), ("SPLIT", "BLOCK_M", "BLOCK_N"), "select"),  # the coarsest level
    "select": Stage(("rows", "keep"), ("BLOCK_M", "BLOCK_N"), "select", "BLOCK_M"),  # the levels below it
    "keep": Stage((), ("BLOCK_M",)),  # in place of the selection, where lists are given
    "attend": WALK,
    "scan": Stage((), ("BLOCK",)),
    "invert_top": Stage((), ("BLOCK_M", "KEYS")),
    "invert": Stage(("rows",), ("BLOCK_M",)),
    "grad_q": WALK,
    "grad_kv_top": Stage((), BY_KEYS, "grad_kv", gluon=SHARED_KEYS),  # the coarsest level, by all queries
    "grad_kv_coarse": Stage(("rows", "keep"), BY_LISTS, "grad_kv", "BLOCK_N"),  # coarse levels below it, by lists
    "grad_kv_keeper": Stage(("rows", "keep"), BY_KEYS, "grad_kv", gluon=SHARED_KEYS),  # the same, keeper by keeper
    "grad_kv_tokens": Stage(("rows", "keep"), BY_LISTS, "grad_kv", "BLOCK_N", LISTED, LISTED_WIDE),  # level 0, by lists
    "grad_kv_global": Stage((), BY_KEYS, "grad_kv", gluon=SHARED_KEYS),  # global tokens, by all queries
    "grad_sum": Stage((), ("BLOCK",)),
    "grad_gather": Stage(("rows", "keep"), ("ROWS", "BLOCK"), filled="BLOCK"),
}

LIMITS = {"num_warps": 32, "num_stages": 8, "maxnreg": 255}
"""The largest value of what is no tile; of a tile, 2^20."""

BACKENDS = TRITON, GLUON = "triton", "gluon_sm90"
"""What a kernel is written in: the folders of its templates."""

CUDA_ONLY = ("maxnreg", "backend")
"""The most registers of a thread; the backend whose kernel is launched, if there is more than one."""

ANY_NUMBER = ("num_stages", "maxnreg", "PART")
"""What needs to be no power of two."""

MEASURED: dict[str, type | tuple[type, ...]] = {
    "gpu": str, "date": str, "before_us": (int, float), "after_us": (int, float),
}  # fmt: skip
"""What `measured` must say; it may say more: the spec, N, versions."""

MOST_MICROSECONDS = 1e12
"""Eleven days."""

SHOWN = reprlib.Repr()
"""How a message shows what came, which may be long, or nested deeper than `repr` goes."""
SHOWN.maxlist, SHOWN.maxstring, SHOWN.maxother = 12, 80, 80


@dataclass(frozen=True)
class Row:
    """A row of a table, and where it stands: `cuda_90.json: rows[0]`."""

    stage: str
    when: Mapping[str, Any]
    set: Mapping[str, Any]
    reason: str
    place: str

    def matches(self, stage: str, facts: Mapping[str, Any]) -> bool:
        """Whether it speaks of this stage under these facts."""
        return stage == self.stage and all(
            facts.get(name) in (wanted if isinstance(wanted, list) else [wanted]) for name, wanted in self.when.items()
        )


@dataclass(frozen=True)
class Target:
    """A GPU architecture: its name, bytes of shared memory a program may use, and the rows of its table."""

    name: str
    shared_memory: int
    rows: tuple[Row, ...]


@cache
def targets() -> dict[str, Target]:
    """Every target that has a table, as shipped."""
    read = [parse(json.loads(path.read_text()), path.name) for path in sorted(DIRECTORY.glob("*.json"))]
    return {target.name: target for target in read}


def _by_age(name: str) -> tuple[str, int, str]:
    backend, _, arch = name.partition(":")
    return backend, int(arch) if arch.isdigit() else 0, arch


def target(name: str) -> Target:
    """The target of a name, or one clear error."""
    if name not in targets():
        raise UnknownTargetError(
            f"target: expected one of {', '.join(sorted(targets(), key=_by_age))}, got {short(repr(name))}"
        )
    return targets()[name]


# ---- facts ------------------------------------------------------------------------------------------------------


def pad(size: int, least: int = 16) -> int:
    """`size` rounded up to a power of two, and to the smallest tile that matrix units take."""
    return max(least, 1 << (size - 1).bit_length())


def stage_kind(plan: Plan, stage: str) -> str:
    """How tables call a stage of the plan: `select_l2` is `select_top` where level 2 is the coarsest."""
    kind, level = plan.stages[stage]
    if level is None:
        return kind
    if level == plan.top:
        return f"{kind}_top"
    if kind != "grad_kv":
        return kind
    return "grad_kv_tokens" if level == 0 else "grad_kv_keeper" if level in plan.by_keeper else "grad_kv_coarse"


def facts_of(plan: Plan, stage: str, element: int) -> dict[str, int]:
    """What is true of a stage of the plan, for elements of `element` bytes."""
    kind, level = STAGES[stage_kind(plan, stage)], plan.stages[stage][1] or 0
    known = {"element": element, "pad_dim": pad(plan.head_dim)}
    for fact in kind.facts:
        if fact == "rows":
            known[fact] = pad(plan.block(1 if kind.loop == "walk" else level + 1))
        elif fact == "keep":  # a selection makes the lists of its own level, the others read those of their keepers
            known[fact] = pad(plan.topk(level if kind.loop == "select" else level + 1), 1)
        elif fact == "grouped":
            known[fact] = plan.grouped
    return known


# ---- reading ----------------------------------------------------------------------------------------------------


def parse(data: Any, file: str, shared_memory: int | None = None) -> Target:
    """A table from what its JSON says. `shared_memory` stands in where the table need not say it.

    Raises ScheduleTableError: the file, the row, what came and what was expected.
    """
    where = _Place(file)
    where.need(isinstance(data, dict), "", "an object with target, shared_memory and rows", data)
    where.only(data, "", ("target", "shared_memory", "rows"))
    where.need(isinstance(data.get("target"), str), "target", "a name such as 'cuda:90'", data.get("target"))
    size = data.get("shared_memory", shared_memory)
    where.need(_number(size), "shared_memory", "a number of bytes", size)
    rows = data.get("rows", [])
    where.need(isinstance(rows, list), "rows", "a list", rows)
    cuda = data["target"].startswith("cuda:")
    options = tuple(name for name in (*LIMITS, "backend") if cuda or name not in CUDA_ONLY)
    return Target(data["target"], size, tuple(_row(row, f"{file}: rows[{at}]", options) for at, row in enumerate(rows)))


def _row(row: Any, place: str, options: tuple[str, ...]) -> Row:
    where = _Place(place)
    where.need(isinstance(row, dict), "", "an object with stage, when, set and why or measured", row)
    where.only(row, "", ("stage", "when", "set", "why", "measured"))
    where.one_of(row.get("stage"), "stage", STAGES)
    stage = STAGES[row["stage"]]
    when, tiles = row.get("when", {}), row.get("set")
    where.need(isinstance(when, dict), "when", "an object of facts", when)
    where.only(when, "when", ("element", "pad_dim", *stage.facts))
    for name, wanted in when.items():
        for value in wanted if isinstance(wanted, list) else [wanted]:
            legal = FACTS[name]
            if isinstance(legal, tuple):
                where.one_of(value, f"when.{name}", legal)
            else:
                where.power_of_two(value, f"when.{name}", 2**20)
    where.need(isinstance(tiles, dict) and bool(tiles), "set", "an object of tile shapes", tiles)
    where.only(tiles, "set", (*stage.tiles, *options))
    for name, value in tiles.items():
        if name == "backend":
            where.one_of(value, "set.backend", BACKENDS)
        elif name in ANY_NUMBER:
            most = LIMITS.get(name, 2**20)
            where.need(_number(value) and value <= most, f"set.{name}", f"a number from 1 to {most}", value)
        else:
            where.power_of_two(value, f"set.{name}", LIMITS.get(name, 2**20))
    return Row(row["stage"], when, tiles, _reason(row, where), place)


def _reason(row: Mapping[str, Any], where: "_Place") -> str:
    """Where a row comes from, as one sentence."""
    why, measured = row.get("why"), row.get("measured")
    where.need((why is None) != (measured is None), "", "either why or measured: where it comes from", list(row))
    if measured is None:
        where.need(isinstance(why, str) and bool(why.strip()), "why", "a sentence", why)
        return str(why)
    where.need(isinstance(measured, dict), "measured", f"an object with {', '.join(MEASURED)}", measured)
    for name, kind in MEASURED.items():
        value = measured.get(name)
        right = isinstance(value, kind) and not isinstance(value, bool)
        right = right and (kind is str or 0 <= value < MOST_MICROSECONDS)  # NaN is neither
        where.need(right, f"measured.{name}", "a text" if kind is str else "microseconds", value)
    return (
        f"{measured['before_us']:g} us before, {measured['after_us']:g} after ({measured['gpu']}, {measured['date']})"
    )


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class _Place:
    """What is being checked, for the message."""

    name: str

    def need(self, right: bool, field: str, expected: str, got: Any) -> None:
        if not right:
            place = f"{self.name}: {field}" if field else self.name
            raise ScheduleTableError(f"{place}: expected {expected}, got {SHOWN.repr(got)}")

    def one_of(self, value: Any, field: str, legal: Any) -> None:
        # by type too: to Python, 1 is True
        right = any(type(value) is type(each) and value == each for each in legal)
        self.need(right, field, f"one of {', '.join(map(str, legal))}", value)

    def only(self, data: Mapping[str, Any], field: str, legal: tuple[str, ...]) -> None:
        for name in data:
            self.one_of(name, field or "keys", legal)

    def power_of_two(self, value: Any, field: str, most: int) -> None:
        right = _number(value) and value & (value - 1) == 0 and value <= most
        self.need(right, field, f"a power of two up to {most}", value)
