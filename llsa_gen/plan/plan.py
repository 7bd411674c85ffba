"""Lower a spec to a plan: the size of every buffer and grid as an expression in the lengths, and the kernels in order.

The plan says *what* is computed, in the names of the semantics (M queries, N keys, L levels, spans P_l, T_l tokens a
level, K_l kept); it knows neither text nor GPUs. Sizes are sympy expressions in `m_tokens` (M), `n_tokens` (N), `heads`
(B*H, the query heads of every batch entry), `kv_heads` (B*H_kv, as many for now), `g_tokens` (G, the global tokens) and
the tile shapes of a schedule.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import sympy

from llsa_gen.plan.buffers import Buffers, Role
from llsa_gen.plan.sizes import GLOBAL, HEADS, KV_HEADS, POOLED_M, G, M, ceil_div, least, parts, splits, tile
from llsa_gen.spec import Spec

Names = tuple[str, ...]
"""Buffers."""


class Scalar(NamedTuple):
    """A number that a kernel is told: its name in a signature, what it is, and its name in host code if another."""

    name: str
    says: str
    host: str = ""


SCALE = Scalar("scale", "s")
POOLED = Scalar("m_tokens", "M, or 0 where queries are not pooled", host="pooled_tokens")
H, B_H = Scalar("heads_per_batch", "H"), Scalar("heads", "B*H")
M_TOKENS, N_TOKENS, G_TOKENS = Scalar("m_tokens", "M"), Scalar("n_tokens", "N"), Scalar("g_tokens", "G")
SAVED_STEP = Scalar("saved_step", "256 bytes each, from head to head of what is saved")


@dataclass(frozen=True)
class Kernel:
    """One launch: how many programs, which buffers it reads and writes, and which numbers it is told, in this order.

    Kernels of one kind do the same, at a level each, if at any; a kind with its level is a stage of the schedule.
    """

    name: str
    kind: str
    computes: str
    programs: sympy.Expr
    reads: Names
    writes: Names
    scalars: tuple[Scalar, ...] = (M_TOKENS, N_TOKENS)
    optional: Names = ()  # buffers that are read where there are any, and None otherwise
    handed: Names = ()  # of what it reads, gradients of the level above that flow through the pooling
    level: int | None = None
    twin: bool = False  # whether a kernel in Gluon can take its place
    of_globals: bool = False  # whether it is launched only where there are global tokens

    @property
    def stage(self) -> str:
        """The schedule entry that gives its tile shapes."""
        return self.kind if self.level is None else f"{self.kind}_l{self.level}"

    @property
    def takes(self) -> Names:
        """Its buffers, in the order of its parameters."""
        return (*self.reads, *self.optional, *self.writes)

    @property
    def name_in_gluon(self) -> str:
        """The name of its `twin`."""
        return f"{self.name.removesuffix('_kernel')}_hopper_kernel"


@dataclass(frozen=True)
class Plan(Buffers):
    """The levels and buffers of a spec with the kernels that compute its attention."""

    @property
    def row_unit(self) -> int:
        """Rows of q, k and v begin at multiples of so many elements, of which 8 of two bytes load at once."""
        return math.gcd(self.head_dim, 8)

    def keepers(self, level: int) -> sympy.Expr:
        """Of a level that is `split`: query tokens a head whose queries all attend to the same keys of it."""
        return sympy.Integer(1) if level == self.top else self.query_tokens(level + 1)

    def keys_of_keeper(self, level: int) -> sympy.Expr:
        """Of a level that is `split`: the most keys that the queries of a keeper attend to."""
        return self.key_tokens(level) if level == self.top else self.width(level + 1) * self.block(level + 1)

    def overflow_parts(self, level: int) -> sympy.Expr:
        """Most overflow parts of the lists of a level's keys: what is beyond the first PART entries, PART entries each.

        A level has a list a key token, as long as there are query tokens at most, with K entries a query token in all.
        """
        queries = self.query_tokens(level + 1)
        of_a_list = sympy.floor((queries - 1) / tile("PART"))
        entries = queries * self.width(level + 1)
        return least(sympy.floor(entries / tile("PART")), self.key_tokens(level + 1) * of_a_list)

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of the buffers that the forward pass leaves to the backward pass, in the order of a head's memory."""
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
        return tuple(map(self._told, (*self._pool(), *self._select(), self._attend())))

    @property
    def selection(self) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
        """The kernels of the selection, pooling included, and those that score."""
        return self.forward[:-1], tuple(kernel for kernel in self.forward if kernel.kind == "select")

    @cached_property
    def backward(self) -> tuple[Kernel, ...]:
        """The kernels of the backward pass in launch order."""
        grad_kv = (step for level in reversed(self.attended) for step in self._grad_kv(level))
        return tuple(map(self._told, (*self._invert(), self._grad_q(), *self._grad_globals(), *grad_kv)))

    @cached_property
    def keep(self) -> Kernel:
        """What takes the place of the selection where the caller gives the lists: it counts who keeps what."""
        rows = sympy.Add(*(ceil_div(self.query_tokens(level), tile("BLOCK_M")) for level in self.levels))
        kept = tuple(f"{name}_l{level}" for name in ("kept", "counts") for level in self.levels)
        lists = tuple(f"given_l{level}" for level in self.levels)
        return self._told(
            Kernel("keep_kernel", "keep", "given lists, without gaps, and their counts", HEADS * rows, lists, kept)
        )

    def _told(self, kernel: Kernel) -> Kernel:
        """The kernel, told how far apart heads lie of what is saved, if it takes any of that."""
        if all(self.buffers[name].role is not Role.SAVED for name in kernel.takes):
            return kernel
        return replace(kernel, scalars=(*kernel.scalars, SAVED_STEP))

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every launch in order, but `recompute`; the selection is either `keep` or the kernels before it."""
        return (*self.forward[:-1], self.keep, self.forward[-1], *self.backward)

    @property
    def usual(self) -> tuple[Kernel, ...]:
        """The launches of a call without global tokens and given lists."""
        return tuple(kernel for kernel in (*self.forward, *self.backward) if not kernel.of_globals)

    @cached_property
    def stages(self) -> dict[str, tuple[str, int | None]]:
        """Kind and level of every stage."""
        return {kernel.stage: (kernel.kind, kernel.level) for kernel in self.kernels}

    @cached_property
    def kernel(self) -> dict[str, Kernel]:
        """Every launch by the name of its kernel."""
        return {kernel.name: kernel for kernel in (*self.kernels, self.recompute)}

    def _pool(self) -> Iterable[Kernel]:
        for step in self.pool_steps:
            first, last = step[0], step[-1]
            from_tokens = first == 1
            writes = [f"{name}_l{level}" for level in step for name in self.pooled]
            writes += [f"counts_l{level}" for level in step]  # zero, before the selection adds to them
            writes += [f"{name}_sums_l{last}" for name in self.pooled] * (last < self.top)

            def programs(tokens: sympy.Expr, of_token: bool = len(step) == 2) -> sympy.Expr:
                return ceil_div(tokens, 1 if of_token else tile("CHILDREN"))

            of_keys = (len(self.pooled) - 1) * KV_HEADS * programs(self.key_tokens(last))
            yield Kernel(
                f"pool_l{first}_kernel", "pool" if from_tokens else "pool_sums",
                f"means of level {' and '.join(map(str, step))}",
                HEADS * programs(self.query_tokens(last)).subs(M, POOLED_M) + of_keys,
                self.pooled if from_tokens else tuple(f"{name}_sums_l{first - 1}" for name in self.pooled),
                tuple(writes), (*((H,) if from_tokens else ()), B_H, POOLED, N_TOKENS),
            )  # fmt: skip

    def _select(self) -> Iterable[Kernel]:
        for level in reversed(self.levels):
            reads = (f"q_l{level}", f"k_l{level}")
            if level == self.top:
                rows = ceil_div(self.query_tokens(level), tile("BLOCK_M"))
            else:
                reads += (f"kept_l{level + 1}",)
                children = least(self.block(level + 1), self.query_tokens(level))
                rows = self.query_tokens(level + 1) * ceil_div(children, tile("BLOCK_M"))
            yield Kernel(
                f"select_l{level}_kernel", "select", f"Top-{self.topk(level)} of level {level}", HEADS * rows,
                reads, (f"kept_l{level}", f"counts_l{level}"), level=level,
            )  # fmt: skip

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
        blocks = self.query_tokens(1)
        if not self.grouped:
            return blocks * ceil_div(sympy.Integer(self.block(1)), tile("BLOCK_M"))
        if self.shared_level is None:
            return ceil_div(blocks, tile("GROUP"))
        sharing = least(self.blocks_sharing, blocks)
        return self.query_tokens(self.shared_level) * ceil_div(sharing, tile("GROUP"))

    @property
    def programs_in_gluon(self) -> sympy.Expr:
        """The same of its twin in Gluon, 64 queries each: four narrow blocks, or a part of a wide one."""
        blocks = self.query_tokens(1)
        return blocks * (self.block(1) // 64) if self.wide else ceil_div(blocks, 4)

    def _attend(self) -> Kernel:
        return Kernel(
            "attend_kernel", "attend", "o and lse: one softmax over all levels", HEADS * self.query_programs,
            ("q", "k", "v", *self._coarse(), *self._lists()), ("o", "lse", "peak", "total"),
            (SCALE, H, M_TOKENS, N_TOKENS, G_TOKENS), ("k_global", "v_global", "global_mask"), twin=True,
        )  # fmt: skip

    @property
    def handed(self) -> Names:
        """Gradients of coarse levels that flow down into the level below, in the order of the kernels."""
        return tuple(name for kernel in self.backward for name in kernel.handed)

    @property
    def recompute(self) -> Kernel:
        """What follows `attend` in Gluon, which keeps a fixed maximum: attend again where a sum does not fit.

        A program looks after 16 programs of the kernel before it.
        """
        programs = HEADS * ceil_div(self.programs_in_gluon, 16)
        return replace(
            self.forward[-1],
            name="attend_hopper_recompute_kernel",
            computes="o and lse, recomputed",
            programs=programs,
            twin=False,
        )

    def _invert(self) -> Iterable[Kernel]:
        counts = tuple(f"counts_l{level}" for level in self.levels)
        sums = [
            name
            for level in self.levels
            for name in (f"offsets_l{level}", *([f"overflow_l{level}"] if level in self.parted else []))
        ]
        scalars = (*(Scalar(f"part_l{level}", "entries a part") for level in self.parted), B_H, N_TOKENS)
        yield Kernel(
            "scan_kernel", "scan", "running sums of the counts", HEADS * len(sums), counts, tuple(sums), scalars
        )
        for level in reversed(self.levels):
            reads: Names = (f"kept_l{level}", f"offsets_l{level}")
            if level == self.top:
                programs = ceil_div(self.key_tokens(level), tile("KEYS"))
            else:
                reads += (f"offsets_l{level + 1}", f"keepers_l{level + 1}")
                programs = self.key_tokens(level + 1)
            yield Kernel(
                f"invert_l{level}_kernel", "invert", f"which query tokens keep which key of level {level}",
                HEADS * programs, reads, (f"keepers_l{level}",), level=level,
            )  # fmt: skip

    def _grad_q(self) -> Kernel:
        reads = ("q", "k", "v", *self._coarse(), *self._lists(), "o", "grad_o", "peak", "total")
        return Kernel(
            "grad_q_kernel", "grad_q", "dq, and delta = sum(o do)", HEADS * self.query_programs,
            reads, ("grad_q", "delta"), (SCALE, H, M_TOKENS, N_TOKENS, G_TOKENS),
            ("grad_lse", "k_global", "v_global", "global_mask"), twin=True,
        )  # fmt: skip

    def _grad_globals(self) -> Iterable[Kernel]:
        reads = ("q", "grad_o", "peak", "total", "delta", "k_global", "v_global")
        partial = "partial_grad_k_global", "partial_grad_v_global"
        rows, many = Scalar("rows_global", "queries a split"), Scalar("splits_global", "how many splits")
        yield Kernel(
            "grad_kv_global_kernel", "grad_kv_global", "dk, dv of the global tokens, a split of the queries each",
            HEADS * splits(GLOBAL) * ceil_div(G, tile("BLOCK_N")), reads, partial,
            (rows, many, SCALE, H, M_TOKENS, G_TOKENS), ("global_mask",), twin=True, of_globals=True,
        )  # fmt: skip
        yield Kernel(
            "grad_kv_global_sum_kernel", "grad_sum", "dk, dv of the global tokens: the partial sums in order",
            KV_HEADS * ceil_div(G, tile("BLOCK")), partial, ("grad_k_global", "grad_v_global"), (many, G_TOKENS),
            of_globals=True,
        )  # fmt: skip

    def _grad_kv(self, level: int) -> Iterable[Kernel]:
        suffix = f"_l{level}" if level else ""
        reads = ("q", "grad_o", "peak", "total", "delta", f"k{suffix}", f"v{suffix}")
        above = self.enriched_above(level)
        flow = (f"grad_k_l{above}", f"grad_v_l{above}") if above else ()
        made = (f"grad_k{suffix}", f"grad_v{suffix}")
        make = self._split if level in self.split else self._by_list
        yield from make(level, reads, flow, made)

    def _split(self, level: int, reads: Names, flow: Names, made: Names) -> Iterable[Kernel]:
        partial = f"partial_grad_k_l{level}", f"partial_grad_v_l{level}"
        programs = self.keepers(level) * splits(level) * ceil_div(self.keys_of_keeper(level), tile("BLOCK_N"))
        lists: Names = ()
        if level == self.top:
            kind, at, sums = "grad_sum", None, ceil_div(self.key_tokens(level), tile("BLOCK"))
        else:
            reads += (f"kept_l{level + 1}",)
            children = ceil_div(sympy.Integer(self.block(level + 1)), tile("BLOCK"))
            kind, at, sums = "grad_gather", level, self.key_tokens(level + 1) * children
            lists = (f"kept_l{level + 1}", f"keepers_l{level + 1}", f"offsets_l{level + 1}")
        lengths = (M_TOKENS, N_TOKENS) if lists else (N_TOKENS,)
        rows, many = Scalar(f"rows_l{level}", "queries a split"), Scalar(f"splits_l{level}", "how many splits")
        yield Kernel(
            f"grad_kv_l{level}_kernel", "grad_kv", f"dk, dv of level {level}, a split of the queries each",
            HEADS * programs, reads, partial, (rows, many, SCALE, H, M_TOKENS, N_TOKENS), level=level, twin=True,
        )  # fmt: skip
        yield Kernel(
            f"grad_kv_l{level}_sum_kernel", kind, f"dk, dv of level {level}: the partial sums in order",
            KV_HEADS * sums, (*partial, *lists, *flow), made, (many, *lengths), handed=flow, level=at,
        )  # fmt: skip

    def _by_list(self, level: int, reads: Names, flow: Names, made: Names) -> Iterable[Kernel]:
        tiles = ceil_div(sympy.Integer(self.block(level + 1)), tile("BLOCK_N"))
        reads += (f"keepers_l{level + 1}", f"offsets_l{level + 1}", f"overflow_l{level + 1}")
        overflow = f"overflow_grad_k_l{level}", f"overflow_grad_v_l{level}"
        scalars = (Scalar(f"parts_l{level}", "room for overflow parts a head"), SCALE, H, M_TOKENS, N_TOKENS)
        yield Kernel(
            f"grad_kv_l{level}_overflow_kernel", "grad_kv",
            f"dk, dv of level {level}: what the first part of a popular list leaves over",
            HEADS * parts(level) * tiles, reads, overflow, scalars, level=level,
        )  # fmt: skip
        yield Kernel(
            f"grad_kv_l{level}_kernel", "grad_kv", f"dk, dv of level {level}",
            KV_HEADS * self.key_tokens(level + 1) * tiles, (*reads, *overflow, *flow), made, scalars,
            handed=flow, level=level, twin=True,
        )  # fmt: skip

    # ---- printing -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, object]:
        """The plan as plain data: expressions as text in the lengths, the numbers of heads and tile shapes."""

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
                    "query_tokens": str(self.query_tokens(level)),
                    "key_tokens": str(self.key_tokens(level)),
                    "width": str(self.width(level)),
                }
                for level in self.levels
            },
            "buffers": {
                buffer.name: {"shape": [str(size) for size in buffer.shape], "dtype": buffer.dtype, "role": buffer.role}
                for buffer in self.buffers.values()
            },
            "forward": [kernel(step) for step in self.forward],
            "keep": kernel(self.keep),
            "backward": [kernel(step) for step in self.backward],
        }


def lower(spec: Spec) -> Plan:
    """Plan the computation of a spec."""
    return Plan(spec)
