"""The tensors of a plan: shape, dtype, who needs them, and what a reader of a kernel's signature is told of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import sympy

from llsa_gen.plan.levels import Levels
from llsa_gen.plan.sizes import GLOBAL, HEADS, KV_HEADS, G, M, N, parts, splits


class Role(StrEnum):
    """What a buffer is to the caller of the operator."""

    INPUT = "input"
    OUTPUT = "output"
    SAVED = "saved"  # made by the forward pass, read by the backward pass: one memory for all, heads outermost
    SCRATCH = "scratch"  # lives within one pass
    OPTIONAL = "optional"  # the caller may give it, or None


@dataclass(frozen=True)
class Buffer:
    """A tensor: its shape as expressions, its dtype and who needs it.

    The dtype `input` is that of q, k, v; `partial` is bfloat16 for bfloat16, otherwise float32: partial sums bear being
    rounded as the whole sum will be, but float16 has not the range.

    axes: the shape in the names of a signature. says: what it holds. strides: the letter in the names of its strides,
    where the caller decides how its batches, heads and rows lie. width: the number of columns, which its kernels are
    told, of an index list.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[sympy.Expr, ...]
    dtype: str
    role: Role
    says: str = ""
    strides: str = ""
    width: str = ""

    @property
    def elements(self) -> sympy.Expr:
        return sympy.Mul(*self.shape)


@dataclass(frozen=True)
class Buffers(Levels):
    """The levels of a spec with every tensor that its attention needs."""

    @property
    def pooled(self) -> tuple[str, ...]:
        """Which of q, k, v have a pyramid: values need none where no coarse level is attended."""
        return ("q", "k", "v") if self.enriched else ("q", "k")

    @cached_property
    def buffers(self) -> dict[str, Buffer]:
        """Every tensor by name."""
        return {buffer.name: buffer for buffer in self._buffers()}

    @cached_property
    def _sizes(self) -> dict[str, sympy.Expr]:
        """The sizes of axes, by the names that signatures give them."""
        sizes: dict[str, sympy.Expr] = {
            "B*H": HEADS,
            "B*H_kv": KV_HEADS,
            "M": M,
            "N": N,
            "B": sympy.Symbol("batch", integer=True, positive=True),
            "G": G,
            "splits_global": splits(GLOBAL),
            "D": sympy.Integer(self.head_dim),
        }
        for level in self.levels:
            queries, keys, width = self.query_tokens(level), self.key_tokens(level), self.width(level)
            sizes |= {f"b_{level}": sympy.Integer(self.block(level)), f"width_l{level}": width}
            sizes |= {f"T_{level}(M)": queries, f"T_{level}(M) * width_l{level}": queries * width}
            sizes |= {f"T_{level}(N)": keys, f"T_{level}(N) + 1": keys + 1}
            sizes |= {f"width_l{level} * b_{level}": width * self.block(level), f"given_width_l{level}": width}
        sizes |= {f"parts_l{level}": parts(level) for level in self.by_list}
        return sizes | {f"splits_l{level}": splits(level) for level in self.split}

    def _buffers(self) -> Iterable[Buffer]:
        def buffer(name: str, axes: str, dtype: str, role: Role, says: str = "", **more: str) -> Buffer:
            names = tuple(axes.split(", "))
            return Buffer(name, names, tuple(self._sizes[x] for x in names), dtype, role, says, **more)

        queries, keys = "B*H, M", "B*H_kv, N"
        yield buffer("q", f"{queries}, D", "input", Role.INPUT, strides="q")
        for name in ("k", "v"):
            yield buffer(name, f"{keys}, D", "input", Role.INPUT, strides=name)
        for name in ("k", "v"):
            yield buffer(f"{name}_global", "B*H_kv, G, D", "input", Role.OPTIONAL, "None where there are no globals")
        yield buffer("global_mask", "B, G", "uint8", Role.OPTIONAL, "None where all take part")
        for level in self.levels:
            axes, width = f"B*H, T_{level}(M), given_width_l{level}", f"given_width_l{level}"
            yield buffer(f"given_l{level}", axes, "int32", Role.OPTIONAL, "kept key tokens, -1 anywhere", width=width)
        yield buffer("o", f"{queries}, D", "input", Role.OUTPUT)
        yield buffer("lse", queries, "float32", Role.OUTPUT, "natural logarithm of the sum of weights")
        for name in ("peak", "total"):  # the backward pass needs the sum without the rounding of lse
            yield buffer(name, queries, "float32", Role.SAVED, "the same sum as 2^peak * total")
        for level in self.levels:
            for name in self.pooled:
                role = Role.SAVED if name != "q" and level in self.enriched else Role.SCRATCH
                yield buffer(f"{name}_l{level}", f"{self._tokens_of(name, level)}, D", "input", role, "means")
        for step in self.pool_steps[:-1]:
            for name in self.pooled:
                axes = f"{self._tokens_of(name, step[-1])}, D"
                yield buffer(f"{name}_sums_l{step[-1]}", axes, "float32", Role.SCRATCH, "sums of tokens")
        for level in self.levels:
            says = "how many query tokens keep each key token"
            yield buffer(f"counts_l{level}", f"B*H, T_{level}(N)", "int32", Role.SAVED, says)
        for level in self.levels:
            width, says = f"width_l{level}", "kept key tokens, best first, then -1"
            yield buffer(f"kept_l{level}", f"B*H, T_{level}(M), {width}", "int32", Role.SAVED, says, width=width)
        yield buffer("grad_o", f"{queries}, D", "input", Role.INPUT, strides="g")
        yield buffer("grad_lse", queries, "float32", Role.OPTIONAL, "None where lse has no gradient")
        yield buffer("grad_q", f"{queries}, D", "input", Role.OUTPUT)
        for name in ("grad_k", "grad_v"):
            yield buffer(name, f"{keys}, D", "input", Role.OUTPUT)
        for name in ("grad_k_global", "grad_v_global"):
            yield buffer(name, "B*H_kv, G, D", "input", Role.OUTPUT)
        for name in ("partial_grad_k_global", "partial_grad_v_global"):
            yield buffer(name, "B*H, splits_global, G, D", "partial", Role.SCRATCH)
        yield buffer("delta", queries, "float32", Role.SCRATCH)
        for level in self.levels:
            says = "where the list of each key token begins"
            yield buffer(f"offsets_l{level}", f"B*H, T_{level}(N) + 1", "int32", Role.SCRATCH, says)
            width, says = f"width_l{level}", "query tokens by the key token that they keep"
            axes = f"B*H, T_{level}(M) * {width}"
            yield buffer(f"keepers_l{level}", axes, "int32", Role.SCRATCH, says, width=width)
            if level in self.parted:
                says = f"where its parts of part_l{level} entries beyond the first begin"
                yield buffer(f"overflow_l{level}", f"B*H, T_{level}(N) + 1", "int32", Role.SCRATCH, says)
        for level in self.by_list:
            axes = f"B*H, parts_l{level}, b_{level + 1}, D"
            for name in ("k", "v"):
                yield buffer(f"overflow_grad_{name}_l{level}", axes, "float32", Role.SCRATCH)
        for level in self.split:
            top, up = level == self.top, level + 1
            axes = f"splits_l{level}, T_{level}(N)" if top else f"T_{up}(M), splits_l{level}, width_l{up} * b_{up}"
            for name in ("k", "v"):
                partial = f"partial_grad_{name}_l{level}"
                yield buffer(partial, f"B*H, {axes}, D", "partial", Role.SCRATCH, "per token covered")
        for level in self.enriched:
            for name in ("k", "v"):
                axes = f"{self._tokens_of(name, level)}, D"
                yield buffer(f"grad_{name}_l{level}", axes, "float32", Role.SCRATCH, "per token covered")

    @staticmethod
    def _tokens_of(name: str, level: int) -> str:
        """The axes of all tokens of a level of q, k or v."""
        return f"B*H, T_{level}(M)" if name == "q" else f"B*H_kv, T_{level}(N)"
