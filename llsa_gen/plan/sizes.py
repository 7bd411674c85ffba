"""Sizes as sympy expressions: the lengths they depend on, and the one division that levels are made of."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, cast

import sympy

M = sympy.Symbol("m_tokens", integer=True, nonnegative=True)
"""Queries of a head."""

N = sympy.Symbol("n_tokens", integer=True, nonnegative=True)
"""Keys of a head."""

G = sympy.Symbol("g_tokens", integer=True, nonnegative=True)
"""Global tokens of a head, which every query attends to."""

HEADS = sympy.Symbol("heads", integer=True, positive=True)
"""B*H, the heads of all queries."""

KV_HEADS = sympy.Symbol("kv_heads", integer=True, positive=True)
"""B*H_kv, the heads of all keys."""

MAX_TOKENS = 2**30
"""Most queries or keys of a head. Token numbers have 32 bits; a level that spans more has exactly one token."""


POOLED_M = sympy.Symbol("pooled_tokens", integer=True, nonnegative=True)
"""Queries of a head that are pooled: all, or none where the caller gives the index lists."""

GLOBAL: Literal["global"] = "global"
"""Stands for a level where keys are the global tokens."""


def of_level(level: int | Literal["global"]) -> str:
    """How names of buffers, kernels and numbers end: `l2` of level 2, `global` of the global tokens."""
    return GLOBAL if level == GLOBAL else f"l{level}"


def splits(level: int | Literal["global"]) -> sympy.Symbol:
    """Into how many splits the queries come of one tile of a level's keys: the host code's choice."""
    return sympy.Symbol(f"splits_{of_level(level)}", integer=True, positive=True)


def parts(level: int) -> sympy.Symbol:
    """Room for the overflow parts of a level's popular lists: `Plan.overflow_parts`, computed by the host code."""
    return sympy.Symbol(f"parts_l{level}", integer=True, nonnegative=True)


FILLING = 1024
"""Programs that are enough to fill a GPU: where all queries attend to the same few keys, they are split no further."""

CACHED = 2**25
"""Bytes of q, k and v (of q and k, where nothing else is pooled) of which much may still be in the cache when attention
reads them again: about half of what recent caches hold. Beyond, they make way as soon as they are pooled."""


def tile(name: str) -> sympy.Symbol:
    """A tile shape that the schedule decides: `BLOCK_M`, `GROUP`, ..."""
    return sympy.Symbol(name, integer=True, positive=True)


@lru_cache(maxsize=4096)
def least(*sizes: sympy.Basic | int) -> sympy.Expr:
    """The least of some sizes, remembered: sympy looks for those that are never larger than another, each time."""
    return sympy.Min(*sizes)


def replaced(expr: sympy.Basic | int, values: Mapping[sympy.Expr, sympy.Basic]) -> sympy.Expr:
    """An expression with others for parts of it, all at once, where `subs` goes through it once for each.

    >>> replaced(least(8, ceil_div(N, 16)), {ceil_div(N, 16): M})
    Min(8, m_tokens)
    """
    expr = cast(sympy.Expr, sympy.sympify(expr))
    if expr in values or not expr.args:
        return cast(sympy.Expr, values.get(expr, expr))
    args = [replaced(arg, values) for arg in expr.args]
    return least(*args) if isinstance(expr, sympy.Min) else expr.func(*args)


def ceil_div(numerator: sympy.Expr, divisor: int | sympy.Expr) -> sympy.Expr:
    """ceil(numerator / divisor), where nested divisions by integers collapse: ceil(ceil(n/a)/b) = ceil(n/(a b)).

    >>> ceil_div(ceil_div(N, 16), 16)
    ceiling(n_tokens/256)
    """
    if isinstance(numerator, sympy.ceiling) and isinstance(divisor, int):
        coefficient, rest = numerator.args[0].as_coeff_Mul()
        if isinstance(coefficient, sympy.Rational) and coefficient.p == 1:
            return sympy.ceiling(rest / (coefficient.q * divisor))
    return sympy.ceiling(numerator / divisor)
