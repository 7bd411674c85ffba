"""Lower a spec to a plan: the size of every buffer and grid as an expression in the lengths, and the kernels in order.

The plan says *what* is computed, in the names of the semantics (N tokens, L levels, spans P_l, T_l tokens a level,
K_l kept); it knows neither text nor GPUs. Sizes are sympy expressions in two lengths, `n_tokens` (N) and `heads`
(B*H, every head of every batch entry), and in the tile shapes that a schedule fills in later.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import sympy

from llsa_gen.plan.levels import Levels
from llsa_gen.plan.sizes import HEADS, LATE, N, ceil_div, parts, splits, tile
from llsa_gen.spec import Spec

Names = tuple[str, ...]
"""Buffers."""


class Role(StrEnum):
    """What a buffer is to the caller of the operator."""

    INPUT = "input"
    OUTPUT = "output"
    SAVED = "saved"  # made by the forward pass, read by the backward pass
    SCRATCH = "scratch"  # lives within one pass


@dataclass(frozen=True)
class Buffer:
    """A tensor: its shape as expressions, its dtype and who needs it.

    The dtype `input` is that of q, k, v; `share` is bfloat16 for bfloat16, otherwise float32: what is summed up later
    bears being rounded as the sum will be, but float16 has not the range.
    """

    name: str
    shape: tuple[sympy.Expr, ...]
    dtype: str
    role: Role

    @property
    def elements(self) -> sympy.Expr:
        return sympy.Mul(*self.shape)


@dataclass(frozen=True)
class Kernel:
    """One launch: how many programs, and which buffers it reads and writes."""

    name: str
    stage: str  # the schedule entry that gives its tile shapes
    computes: str
    programs: sympy.Expr
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Plan(Levels):
    """The levels of a spec with the buffers and kernels that compute its attention."""

    # ---- buffers ------------------------------------------------------------------------------------------------

    @cached_property
    def buffers(self) -> dict[str, Buffer]:
        """Every tensor by name."""
        return {buffer.name: buffer for buffer in self._buffers()}

    def _buffers(self) -> Iterable[Buffer]:
        d = sympy.Integer(self.head_dim)
        for name in ("q", "k", "v"):
            yield Buffer(name, (HEADS, N, d), "input", Role.INPUT)
        yield Buffer("o", (HEADS, N, d), "input", Role.OUTPUT)
        yield Buffer("lse", (HEADS, N), "float32", Role.OUTPUT)
        for name in ("peak", "total"):  # e^lse = 2^peak * total: the backward pass needs it without lse's rounding
            yield Buffer(name, (HEADS, N), "float32", Role.SAVED)
        for level in self.levels:
            shape = (HEADS, self.tokens(level), d)
            yield Buffer(f"q_l{level}", shape, "input", Role.SCRATCH)
            yield Buffer(f"k_l{level}", shape, "input", Role.SAVED if level in self.enriched else Role.SCRATCH)
            if self.enriched:
                yield Buffer(f"v_l{level}", shape, "input", Role.SAVED if level in self.enriched else Role.SCRATCH)
        for step in self.pool_steps[:-1]:
            shape = (sympy.Integer(self.pooled_tensors), HEADS, self.tokens(step[-1]), d)
            yield Buffer(f"sums_l{step[-1]}", shape, "float32", Role.SCRATCH)
        for level in self.levels:
            yield Buffer(f"counts_l{level}", (HEADS, self.tokens(level)), "int32", Role.SAVED)
        for level in self.levels:
            yield Buffer(f"kept_l{level}", (HEADS, self.tokens(level), self.width(level)), "int32", Role.SAVED)
        yield Buffer("grad_o", (HEADS, N, d), "input", Role.INPUT)
        for name in ("grad_q", "grad_k", "grad_v"):
            yield Buffer(name, (HEADS, N, d), "input", Role.OUTPUT)
        yield Buffer("delta", (HEADS, N), "float32", Role.SCRATCH)
        for level in self.levels:
            tokens = self.tokens(level)
            yield Buffer(f"offsets_l{level}", (HEADS, tokens + 1), "int32", Role.SCRATCH)
            yield Buffer(f"keepers_l{level}", (HEADS, tokens * self.width(level)), "int32", Role.SCRATCH)
            if level in self.parted:
                yield Buffer(f"extra_l{level}", (HEADS, tokens + 1), "int32", Role.SCRATCH)
        for level in self.by_list:
            shape = (HEADS, parts(level), sympy.Integer(self.block(level + 1)), d)
            yield Buffer(f"extra_grad_k_l{level}", shape, "float32", Role.SCRATCH)
            yield Buffer(f"extra_grad_v_l{level}", shape, "float32", Role.SCRATCH)
        for level in self.split:
            shape = (HEADS, self.keepers(level), splits(level), self.keys_of_keeper(level), d)
            yield Buffer(f"split_grad_k_l{level}", shape, "share", Role.SCRATCH)
            yield Buffer(f"split_grad_v_l{level}", shape, "share", Role.SCRATCH)
        for level in self.enriched:
            shape = (HEADS, self.tokens(level), d)
            yield Buffer(f"grad_k_l{level}", shape, "float32", Role.SCRATCH)
            yield Buffer(f"grad_v_l{level}", shape, "float32", Role.SCRATCH)

    @property
    def row_unit(self) -> int:
        """Rows of q, k and v begin at multiples of so many elements, of which 8 of two bytes load at once."""
        return math.gcd(self.head_dim, 8)

    @property
    def pooled_tensors(self) -> int:
        """How many of q, k, v have a pyramid: values need none where no coarse level is attended."""
        return 3 if self.enriched else 2

    @property
    def values_may_wait(self) -> bool:
        """Whether values can be pooled by the selection of level 1, a program each token of level 2.

        With more levels, the pyramid above would have to wait too; with wider blocks, several programs have one parent:
        16 is the smallest tile of queries.
        """
        return bool(self.enriched) and self.top == 2 and self.block(2) <= 16 and 1 in self.sorted_levels

    @property
    def waiting(self) -> tuple[str, ...]:
        """Values and their means: given to two kernels, the first pooling and the last selection, for one of them."""
        return ("v", "v_l1", "v_l2") if self.values_may_wait else ()

    def keepers(self, level: int) -> sympy.Expr:
        """Of a level that is `split`: query tokens a head whose queries all attend to the same keys of it."""
        return sympy.Integer(1) if level == self.top else self.tokens(level + 1)

    def keys_of_keeper(self, level: int) -> sympy.Expr:
        """Of a level that is `split`: the most keys that the queries of a keeper attend to."""
        return self.tokens(level) if level == self.top else self.width(level + 1) * self.block(level + 1)

    def extra_parts(self, level: int) -> sympy.Expr:
        """Most parts beyond the first into which the lists of a level's keys can be cut, PART entries each.

        A level has as many lists as tokens, each no longer than that, with K entries a token in all.
        """
        tokens = self.tokens(level + 1)
        of_a_list = sympy.floor((tokens - 1) / tile("PART"))
        return sympy.Min(sympy.floor(tokens * self.width(level + 1) / tile("PART")), tokens * of_a_list)

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of the buffers that the forward pass leaves to the backward pass, in the order of their memory."""
        return tuple(name for name, buffer in self.buffers.items() if buffer.role is Role.SAVED)

    @cached_property
    def layouts(self) -> dict[str, tuple[str, ...]]:
        """Names of the buffers that can share a piece of memory, since they are made together and are gone together.

        `selection` lives within the forward pass, `saved` until the backward pass is done, `gradients` within that.
        """
        return {
            "selection": self._scratch_of(self.forward),
            "saved": self.saved,
            "gradients": self._scratch_of(self.backward),
        }

    def _scratch_of(self, kernels: Iterable[Kernel]) -> tuple[str, ...]:
        written = {name for kernel in kernels for name in kernel.writes}
        return tuple(name for name in self.buffers if name in written and self.buffers[name].role is Role.SCRATCH)

    # ---- kernels ------------------------------------------------------------------------------------------------

    @cached_property
    def forward(self) -> tuple[Kernel, ...]:
        """The kernels of the forward pass in launch order; those before `attend` are the selection."""
        return (*self._pool(), *self._select(), self._attend())

    @cached_property
    def backward(self) -> tuple[Kernel, ...]:
        """The kernels of the backward pass in launch order."""
        grad_kv = (step for level in reversed(self.attended) for step in self._grad_kv(level))
        return (*self._invert(), self._grad_q(), *grad_kv)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every launch in order."""
        return (*self.forward, *self.backward)

    def _pool(self) -> Iterable[Kernel]:
        names = ("q", "k", "v")[: self.pooled_tensors]
        for step in self.pool_steps:
            first, last = step[0], step[-1]
            stage = "pool" if first == 1 else "pool_sums"
            reads = names if first == 1 else (f"sums_l{first - 1}",)
            writes = [f"{name}_l{level}" for name in names for level in step]
            writes += [f"sums_l{last}"] * (last < self.top)
            writes += [f"counts_l{level}" for level in step]  # zero, before the selection adds to them
            programs = ceil_div(self.tokens(last), 1 if len(step) == 2 else tile("CHILDREN"))
            tensors = self.pooled_tensors - (LATE if self.values_may_wait else 0)
            yield Kernel(
                f"pool_l{first}_kernel", stage, f"means of level {' and '.join(map(str, step))}",
                tensors * HEADS * programs, tuple(reads), tuple(writes),
            )  # fmt: skip

    def _select(self) -> Iterable[Kernel]:
        for level in reversed(self.levels):
            reads = (f"q_l{level}", f"k_l{level}")
            if level == self.top:
                rows = ceil_div(self.tokens(level), tile("BLOCK_M"))
            else:
                reads += (f"kept_l{level + 1}",)
                children = sympy.Min(self.block(level + 1), self.tokens(level))
                rows = self.tokens(level + 1) * ceil_div(children, tile("BLOCK_M"))
            computes, writes = f"Top-{self.topk(level)} of level {level}", (f"kept_l{level}", f"counts_l{level}")
            if level == 1 and self.values_may_wait:
                computes += ", and where late is 1 the means of values"
                reads, writes = (*reads, *self.waiting[:1]), (*writes, *self.waiting[1:])
            yield Kernel(f"select_l{level}_kernel", f"select_l{level}", computes, HEADS * rows, reads, writes)

    def _coarse(self) -> tuple[str, ...]:
        return tuple(f"{name}_l{level}" for level in self.enriched for name in ("k", "v"))

    def _lists(self) -> tuple[str, ...]:
        return tuple(f"kept_l{level + 1}" for level in self.listed)

    @property
    def grouped(self) -> bool:
        """Whether one program takes several narrow query blocks, so that the keys they share fill a tile of rows."""
        return bool(self.enriched) and self.block(1) <= 32

    @property
    def query_programs(self) -> sympy.Expr:
        """Programs of a kernel that walks over query blocks, per head."""
        blocks = self.tokens(1)
        if not self.grouped:
            return blocks * ceil_div(sympy.Integer(self.block(1)), tile("BLOCK_M"))
        if self.shared_level is None:
            return ceil_div(blocks, tile("GROUP"))
        sharing = sympy.Min(self.blocks_sharing, blocks)
        return self.tokens(self.shared_level) * ceil_div(sharing, tile("GROUP"))

    def _attend(self) -> Kernel:
        reads = ("q", "k", "v", *self._coarse(), *self._lists())
        programs = HEADS * self.query_programs
        return Kernel(
            "attend_kernel",
            "attend",
            "o and lse: one softmax over all levels",
            programs,
            reads,
            ("o", "lse", "peak", "total"),
        )

    def _invert(self) -> Iterable[Kernel]:
        counts = tuple(f"counts_l{level}" for level in self.levels)
        sums = (*(f"offsets_l{level}" for level in self.levels), *(f"extra_l{level}" for level in self.parted))
        yield Kernel("scan_kernel", "scan", "running sums of the counts", HEADS * len(sums), counts, sums)
        for level in reversed(self.levels):
            reads = (f"kept_l{level}", f"offsets_l{level}")
            if level == self.top:
                programs = ceil_div(self.tokens(level), tile("KEYS"))
            else:
                reads += (f"offsets_l{level + 1}", f"keepers_l{level + 1}")
                programs = self.tokens(level + 1)
            yield Kernel(
                f"invert_l{level}_kernel", f"invert_l{level}", f"which query tokens keep which key of level {level}",
                HEADS * programs, reads, (f"keepers_l{level}",),
            )  # fmt: skip

    def _grad_q(self) -> Kernel:
        reads = ("q", "k", "v", *self._coarse(), *self._lists(), "o", "peak", "total", "grad_o")
        programs = HEADS * self.query_programs
        return Kernel("grad_q_kernel", "grad_q", "dq, and delta = sum(o do)", programs, reads, ("grad_q", "delta"))

    def _grad_kv(self, level: int) -> Iterable[Kernel]:
        suffix = f"_l{level}" if level else ""
        reads = ("q", f"k{suffix}", f"v{suffix}", "peak", "total", "delta", "grad_o")
        above = self.enriched_above(level)
        flow = (f"grad_k_l{above}", f"grad_v_l{above}") if above else ()
        made = (f"grad_k{suffix}", f"grad_v{suffix}")
        make = self._split if level in self.split else self._by_list
        yield from make(level, reads, flow, made)

    def _split(self, level: int, reads: Names, flow: Names, made: Names) -> Iterable[Kernel]:
        shares = f"split_grad_k_l{level}", f"split_grad_v_l{level}"
        programs = self.keepers(level) * splits(level) * ceil_div(self.keys_of_keeper(level), tile("BLOCK_N"))
        lists: Names = ()
        if level == self.top:
            stage, sums = "grad_sum", ceil_div(self.tokens(level), tile("BLOCK"))
        else:
            reads += (f"kept_l{level + 1}",)
            children = ceil_div(sympy.Integer(self.block(level + 1)), tile("BLOCK"))
            stage, sums = f"grad_gather_l{level}", self.tokens(level + 1) * children
            lists = (f"kept_l{level + 1}", f"offsets_l{level + 1}", f"keepers_l{level + 1}")
        yield Kernel(
            f"grad_kv_l{level}_kernel", f"grad_kv_l{level}", f"dk, dv of level {level}, a share of the queries each",
            HEADS * programs, reads, shares,
        )  # fmt: skip
        yield Kernel(
            f"grad_kv_l{level}_sum_kernel", stage, f"dk, dv of level {level}: the shares summed in order",
            HEADS * sums, (*shares, *lists, *flow), made,
        )  # fmt: skip

    def _by_list(self, level: int, reads: Names, flow: Names, made: Names) -> Iterable[Kernel]:
        tiles = ceil_div(sympy.Integer(self.block(level + 1)), tile("BLOCK_N"))
        reads += (f"offsets_l{level + 1}", f"extra_l{level + 1}", f"keepers_l{level + 1}")
        extra = f"extra_grad_k_l{level}", f"extra_grad_v_l{level}"
        yield Kernel(
            f"grad_kv_l{level}_extra_kernel", f"grad_kv_l{level}",
            f"dk, dv of level {level}: what the first part of a popular list leaves over",
            HEADS * parts(level) * tiles, reads, extra,
        )  # fmt: skip
        yield Kernel(
            f"grad_kv_l{level}_kernel", f"grad_kv_l{level}", f"dk, dv of level {level}",
            HEADS * self.tokens(level + 1) * tiles, (*reads, *extra, *flow), made,
        )  # fmt: skip

    # ---- printing -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, object]:
        """The plan as plain data: expressions as text in `n_tokens`, `heads` and the tile shapes."""

        def kernel(step: Kernel) -> dict[str, object]:
            return {
                "name": step.name,
                "computes": step.computes,
                "programs": str(step.programs),
                "reads": list(step.reads),
                "writes": list(step.writes),
            }

        return {
            "spec": json.loads(self.spec.canonical()),
            "levels": {
                str(level): {
                    "span": self.span(level),
                    "tokens": str(self.tokens(level)),
                    "width": str(self.width(level)),
                }
                for level in self.levels
            },
            "buffers": {
                buffer.name: {"shape": [str(size) for size in buffer.shape], "dtype": buffer.dtype, "role": buffer.role}
                for buffer in self.buffers.values()
            },
            "forward": [kernel(step) for step in self.forward],
            "backward": [kernel(step) for step in self.backward],
        }


def lower(spec: Spec) -> Plan:
    """Plan the computation of a spec."""
    return Plan(spec)
