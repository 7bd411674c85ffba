"""Cost: the plan counted. FLOPs, bytes moved and memory as expressions in the lengths and the numbers of heads.

What is counted, for llsa_gen and for dense attention alike:

- FLOPs: matrix products, two for each multiply-add, and pooling, one for each element added. Not the exponentials,
  scales, sorts and integers in between, nor adding up partial sums. Counted is what is computed, recomputation too: the
  forward pass takes 2 products a query, key and channel (q.k and p v), the backward pass 3 for dq (q.k again, do.v,
  ds k) and 4 for dk and dv (q.k and do.v again, p do, ds q), where dense flash attention, which makes all three at
  once, takes 5.
- Bytes moved: each kernel reads every buffer that it needs once and writes every buffer that it makes once: what has to
  cross the memory bus when the cache holds whatever is gathered several times.
- Memory: `saved` is what the forward pass leaves to the backward pass beside q, k, v and o, which any attention needs;
  `scratch` is what a pass allocates for itself, which the host code holds until the pass ends.

A query sees fewer keys when it keeps the last token of a level and that one has fewer children than the others.
Counted are the most keys that a query can see; `Cost.exact` says whether all queries see that many.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import sympy

from llsa_gen.plan.buffers import Buffer, Role
from llsa_gen.plan.plan import Kernel, Plan
from llsa_gen.plan.sizes import (
    FILLING,
    GLOBAL,
    HEADS,
    KV_HEADS,
    POOLED_M,
    G,
    M,
    N,
    ceil_div,
    least,
    of_level,
    parts,
    replaced,
    splits,
    tile,
)

__all__ = ["BYTES", "Cost", "Pass", "Share", "Totals", "dense", "evaluate"]

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "uint8": 1}
"""Bytes of an element."""

FORWARD_PRODUCTS, GRAD_Q_PRODUCTS, GRAD_KV_PRODUCTS, DENSE_BACKWARD_PRODUCTS = 2, 3, 4, 5


class Share(NamedTuple):
    """FLOPs that one stage spends on the keys of one level (0: the tokens, or the global ones), over all heads."""

    stage: str
    level: int | Literal["global"]
    flops: sympy.Expr


@dataclass(frozen=True)
class Pass:
    """One pass over all heads: FLOPs, bytes that its kernels move, bytes that it allocates for its own use."""

    flops: sympy.Expr
    moved: sympy.Expr
    scratch: sympy.Expr


@dataclass(frozen=True)
class Totals:
    """A forward and a backward pass, and the bytes that the one leaves to the other beside q, k, v and o."""

    forward: Pass
    backward: Pass
    saved: sympy.Expr

    @property
    def flops(self) -> sympy.Expr:
        """Of both passes."""
        return self.forward.flops + self.backward.flops


class Cost:
    """What a plan costs for q, k and v of a dtype.

    `schedule` gives the tile shapes, {stage: {name: value}}, as `llsa_gen.schedule.schedule` does: how large some
    scratch buffers are, and so what is moved, depends on them; FLOPs do not.
    """

    def __init__(self, plan: Plan, schedule: Mapping[str, Mapping[str, int]], dtype: str = "bfloat16") -> None:
        self.plan = plan
        self.schedule = schedule
        self.dtype = dtype

    # ---- keys ---------------------------------------------------------------------------------------------------

    def candidates(self, level: int) -> sympy.Expr:
        """The most keys of a level (0: tokens) that a query token can choose from or attend to: |C_l|, and the fine
        tokens for level 0."""
        plan = self.plan
        if level == plan.top:
            return plan.key_tokens(level)
        # what a long sequence keeps: T_l is never more than the b_(l+1) T_(l+1) that a short one could show
        kept = plan.width(level + 1).subs(N, sympy.oo)
        return least(plan.key_tokens(level), kept * plan.block(level + 1))

    @property
    def keys(self) -> sympy.Expr:
        """The most keys that a query attends to, over all levels."""
        return sympy.Add(*map(self.candidates, self.plan.attended))

    def exact(self, n_tokens: int) -> bool:
        """Whether, for a length, all queries see `keys` keys: whatever they keep, no short last token is in the way."""
        plan = self.plan
        return all(
            evaluate(plan.width(level), n_tokens) == evaluate(plan.key_tokens(level), n_tokens)
            or evaluate(plan.key_tokens(level - 1), n_tokens) % plan.block(level) == 0
            for level in plan.levels
        )

    # ---- FLOPs --------------------------------------------------------------------------------------------------

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """All FLOPs, by stage and level."""
        return tuple(self._shares())

    def _shares(self) -> Iterable[Share]:
        plan = self.plan
        row = 2 * HEADS * plan.head_dim  # one product of two rows
        for level in plan.levels:
            stage = "pool" if level <= 2 else "pool_sums"
            of_keys = (len(plan.pooled) - 1) * KV_HEADS * plan.key_tokens(level - 1)
            yield Share(stage, level, plan.head_dim * (HEADS * plan.query_tokens(level - 1) + of_keys))
            yield Share(f"select_l{level}", level, row * plan.query_tokens(level) * self.candidates(level))
        for level in plan.attended:
            pairs = row * M * self.candidates(level)
            yield Share("attend", level, FORWARD_PRODUCTS * pairs)
            yield Share("grad_q", level, GRAD_Q_PRODUCTS * pairs)
            yield Share(f"grad_kv_l{level}", level, GRAD_KV_PRODUCTS * pairs)
        for stage, products in (
            ("attend", FORWARD_PRODUCTS), ("grad_q", GRAD_Q_PRODUCTS), ("grad_kv_global", GRAD_KV_PRODUCTS),
        ):  # fmt: skip
            yield Share(stage, GLOBAL, products * row * M * G)
        for level in plan.listed:
            above = plan.enriched_above(level)
            if above:  # pooling backwards: dk and dv of the level above are added to those below it
                yield Share(f"grad_kv_l{level}", above, 2 * KV_HEADS * plan.head_dim * plan.key_tokens(level))

    def level_flops(self, level: int) -> sympy.Expr:
        """FLOPs of both passes that the keys of one level cause (0: the tokens)."""
        return sympy.Add(*(share.flops for share in self.shares if share.level == level))

    def stage_flops(self, stage: str) -> sympy.Expr:
        """FLOPs of all kernels of one stage of the plan."""
        return sympy.Add(*(share.flops for share in self.shares if share.stage == stage))

    def flops(self, kernels: Iterable[Kernel]) -> sympy.Expr:
        """FLOPs of all stages that some kernels belong to."""
        return sympy.Add(*map(self.stage_flops, dict.fromkeys(kernel.stage for kernel in kernels)))

    def kernel_flops(self, kernel: Kernel) -> sympy.Expr:
        """FLOPs of one launch. Parts of popular lists are counted where their lists are: in the kernel that follows."""
        if self._only_overflow(kernel):
            return sympy.Integer(0)
        shares = [share for share in self.shares if share.stage == kernel.stage]
        if kernel.kind == "pool_sums":  # one launch for every two levels
            shares = [share for share in shares if f"k_l{share.level}" in kernel.writes]
        return sympy.Add(*(share.flops for share in shares))

    # ---- bytes --------------------------------------------------------------------------------------------------

    def _is_overflow(self, name: str) -> bool:
        """Whether a buffer holds what parts of popular lists add up to, of which there are usually none."""
        return any(self.plan.buffers[name].elements.has(parts(level)) for level in self.plan.by_list)

    def _only_overflow(self, kernel: Kernel) -> bool:
        """Whether a kernel computes nothing but such parts."""
        return any(map(self._is_overflow, kernel.writes))

    def dtype_of(self, buffer: Buffer) -> str:
        """The dtype of a buffer."""
        partial = "bfloat16" if self.dtype == "bfloat16" else "float32"
        return {"input": self.dtype, "partial": partial}.get(buffer.dtype, buffer.dtype)

    def buffer_bytes(self, buffer: Buffer) -> sympy.Expr:
        """Bytes of a buffer."""
        return self._bytes[buffer.name]

    @cached_property
    def _bytes(self) -> dict[str, sympy.Expr]:
        """Of each buffer, by its name."""
        bytes_of = {name: one.elements * BYTES[self.dtype_of(one)] for name, one in self.plan.buffers.items()}
        return {name: replaced(size, self._decided) for name, size in bytes_of.items()}

    @cached_property
    def _decided(self) -> dict[sympy.Expr, sympy.Expr]:
        """What the host code decides: into how many splits queries come, and the room for overflow parts."""
        decided: dict[sympy.Expr, sympy.Expr] = {
            splits(level): self._splits(level) for level in (GLOBAL, *self.plan.split)
        }
        for level in self.plan.by_list:
            most = self.plan.overflow_parts(level).subs(tile("PART"), self.schedule[f"grad_kv_l{level}"]["PART"])
            decided[parts(level)] = most
        return decided

    def _splits(self, level: int | Literal["global"]) -> sympy.Expr:
        """How many splits the queries of a level come in: what `split_queries` of the host code says."""
        plan, tiles = self.plan, self.schedule[f"grad_kv_{of_level(level)}"]
        if level == GLOBAL:
            keys, queries, keepers = sympy.Max(G, 1), M, 1
        else:
            keys, keepers = plan.keys_of_keeper(level), plan.keepers(level)
            queries = M if level == plan.top else least(M, plan.span(level + 1))
        programs = HEADS * keepers * ceil_div(keys, tiles["BLOCK_N"])
        few_sums = sympy.floor(queries / (plan.queries_per_partial * keys))
        wanted = sympy.Max(1, least(sympy.ceiling(FILLING / programs), few_sums))
        rows = tiles["BLOCK_M"] * sympy.ceiling(sympy.ceiling(queries / wanted) / tiles["BLOCK_M"])
        return sympy.ceiling(queries / rows)

    def kernel_bytes(self, kernel: Kernel) -> sympy.Expr:
        """Bytes that one launch moves. Parts of popular lists are left out: usually there are none."""
        if self._only_overflow(kernel):
            return sympy.Integer(0)
        also = (name for name in kernel.optional if self.plan.buffers[name].dtype == "input")  # global tokens
        names = (*kernel.reads, *also, *kernel.writes)
        counted = (self.plan.buffers[name] for name in names if not self._is_overflow(name))
        moved = sympy.Add(*map(self.buffer_bytes, counted))
        return moved * least(G, 1) if kernel.of_globals else moved  # launched only where there are any

    def _bytes_of(self, role: Role, names: Iterable[str]) -> sympy.Expr:
        chosen = (self.plan.buffers[name] for name in dict.fromkeys(names))
        return sympy.Add(*(self.buffer_bytes(buffer) for buffer in chosen if buffer.role is role))

    # ---- totals -------------------------------------------------------------------------------------------------

    def _pass(self, kernels: tuple[Kernel, ...]) -> Pass:
        written = (name for kernel in kernels for name in kernel.writes)
        return Pass(
            self.flops(kernels),
            sympy.Add(*map(self.kernel_bytes, kernels)),
            self._bytes_of(Role.SCRATCH, written),
        )

    @cached_property
    def totals(self) -> Totals:
        """Both passes over all heads."""
        saved = self._bytes_of(Role.SAVED, self.plan.saved)
        return Totals(self._pass(self.plan.forward), self._pass(self.plan.backward), saved)


def dense(head_dim: int, element: int = 2) -> Totals:
    """Dense flash attention: 4 N^2 D FLOPs forward, 10 N^2 D backward, and lse saved.

    Kernels as published (arXiv 2307.08691): one forward; delta, then one for dq, dk and dv.
    """
    pairs = 2 * HEADS * N**2 * head_dim
    tensor, row = HEADS * N * head_dim * element, HEADS * N * BYTES["float32"]
    # forward: q, k, v, o, lse; delta: o, do, delta; backward: q, k, v, do, lse, delta, dq, dk, dv
    return Totals(
        Pass(FORWARD_PRODUCTS * pairs, 4 * tensor + row, sympy.Integer(0)),
        Pass(DENSE_BACKWARD_PRODUCTS * pairs, (2 * tensor + row) + (7 * tensor + 2 * row), row),
        row,
    )


def evaluate(expr: sympy.Expr, n_tokens: int, heads: int = 1, m_tokens: int | None = None, g_tokens: int = 0) -> int:
    """The value of an expression of this module, an exact integer: N keys, B*H heads, M queries (N unless given), G."""
    queries = n_tokens if m_tokens is None else m_tokens
    sizes = {N: n_tokens, M: queries, POOLED_M: queries, HEADS: heads, KV_HEADS: heads, G: g_tokens}
    value = replaced(expr, {symbol: sympy.Integer(size) for symbol, size in sizes.items()})
    if not value.is_Integer:
        raise ValueError(f"expected an expression in lengths and numbers of heads, got {expr}, which is {value}")
    return int(value)
