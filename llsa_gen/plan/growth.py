"""Growth: how the cost of a spec grows with the length, as limits that sympy takes of the counted expressions.

With the number of levels fixed, the coarsest level grows quadratically: all `T_L` tokens are scored by all `T_L` query
tokens and, where the level is enriched, seen by all N queries. With one more level whenever N grows by a block, `T_L`
stays where it is, and the order is that of everything else. In a limit, ceilings do not matter: `ceiling(x)` is `x`.
"""

from dataclasses import dataclass
from typing import cast

import sympy

from llsa_gen.plan.cost import FORWARD_PRODUCTS, GRAD_KV_PRODUCTS, GRAD_Q_PRODUCTS, Cost, evaluate
from llsa_gen.plan.plan import Plan
from llsa_gen.plan.sizes import HEADS, KV_HEADS, POOLED_M, G, M, N
from llsa_gen.spec import MAX_LEVELS, Spec

__all__ = ["Growth", "growth", "order", "order_with_levels", "smooth", "top_share", "with_another_level"]

PRODUCTS = FORWARD_PRODUCTS + GRAD_Q_PRODUCTS + GRAD_KV_PRODUCTS  # of a query, a key and a channel, in both passes
LEVELS = sympy.Symbol("L", integer=True, positive=True)


@dataclass(frozen=True)
class Growth:
    """How the FLOPs of both passes grow for a fixed number of levels, and what would become of it with enough levels.

    `pairs` is the limit of query-key pairs of the coarsest level / N^2, `beyond` the length from which the quadratic
    part is more than half of all FLOPs, `with_levels` the order when a level is added whenever N grows by a block.
    """

    level: int
    exponent: int
    pairs: sympy.Expr
    beyond: int
    attended: bool
    with_levels: str

    def __str__(self) -> str:
        share = f"{_power(self.exponent)}/{1 / self.pairs}"
        source = "level" if self.attended else "the Top-K of level"
        return f"{share} from {source} {self.level} (linear below)"


def smooth(expr: sympy.Expr) -> sympy.Expr:
    """An expression as N grows, M with it: `ceiling(x)` and `floor(x)` become `x`, a minimum what stays small."""
    expr = cast(sympy.Expr, expr.subs([(M, N), (POOLED_M, N), (KV_HEADS, HEADS), (G, 0)]))
    rules = {
        sympy.ceiling: lambda x: x,
        sympy.floor: lambda x: x,
        sympy.Min: lambda *args: min(args, key=_at_infinity),
        sympy.Max: lambda *args: max(args, key=_at_infinity),
    }
    for function, rule in rules.items():
        expr = cast(sympy.Expr, expr.replace(function, rule))
    return sympy.expand(expr)


def _at_infinity(expr: sympy.Expr) -> sympy.Expr:
    return sympy.limit(expr, N, sympy.oo)


def order(expr: sympy.Expr) -> tuple[int, sympy.Expr]:
    """(p, c) so that an expression of the plan is c N^p for large N, for one head and as many queries as keys."""
    expr = smooth(expr).subs(HEADS, 1)
    exponent = sympy.limit(sympy.log(expr) / sympy.log(N), N, sympy.oo)
    return int(exponent), sympy.limit(expr / N**exponent, N, sympy.oo)


def growth(cost: Cost) -> Growth:
    """The growth of the FLOPs of both passes."""
    plan = cost.plan
    exponent, _ = order(cost.totals.flops)
    queries = M if plan.attends_top else plan.query_tokens(plan.top)
    _, pairs = order(queries * cost.candidates(plan.top))
    polynomial = sympy.Poly(smooth(cost.totals.flops).subs(HEADS, 1), N)
    quadratic, rest = polynomial.coeff_monomial(N**2), polynomial.coeff_monomial(N)
    beyond = int(sympy.ceiling(rest / quadratic))
    return Growth(plan.top, exponent, pairs, beyond, plan.attends_top, order_with_levels(plan))


def order_with_levels(plan: Plan) -> str:
    """The order when levels like the coarsest one are added as N grows: "N log N" or "N".

    With blocks of b and K kept on each of L levels, N = T b^L for a top level of T tokens, however long the input is.
    Level l is then pooled from N / b^(l-1) tokens, scores K b candidates for each of its N / b^l query tokens (all T
    for each of T at the top) and, where it is enriched, shows them to each of N queries.
    """
    block, d = sympy.Integer(plan.block(plan.top)), plan.head_dim
    candidates = plan.topk(plan.top) * block
    top, level = sympy.Symbol("T", positive=True), sympy.Symbol("l", integer=True, positive=True)
    pooled = sympy.summation(len(plan.pooled) * d * block ** (1 - level), (level, 1, LEVELS))
    scored = sympy.summation(2 * d * candidates * block**-level, (level, 1, LEVELS - 1)) + 2 * d * top * block**-LEVELS
    seen = candidates + ((LEVELS - 1) * candidates + top if plan.attends_top else 0)
    a_token = sympy.expand(pooled + scored + 2 * d * PRODUCTS * seen)
    if sympy.limit(a_token, LEVELS, sympy.oo).is_finite:
        return "N"
    if sympy.limit(a_token / LEVELS, LEVELS, sympy.oo).is_finite:  # L grows as log N / log b
        return "N log N"
    raise AssertionError(f"{plan.spec.name}: {a_token} a token grows faster than L")


def top_share(cost: Cost, n_tokens: int) -> float:
    """The share of the FLOPs at a length, exactly, that the coarsest level causes: 0 to 1."""
    return evaluate(cost.level_flops(cost.plan.top), n_tokens) / evaluate(cost.totals.flops, n_tokens)


def with_another_level(spec: Spec) -> Spec | None:
    """The spec with its coarsest level once more on top, enriched if that one is; None where no level fits any more."""
    if spec.num_levels == MAX_LEVELS:
        return None
    enrich = spec.enrich
    if isinstance(enrich, tuple) and spec.num_levels in enrich:
        enrich = (*enrich, spec.num_levels + 1)
    return spec.model_copy(update={"levels": (*spec.levels, spec.levels[-1]), "enrich": enrich})


def _power(exponent: int) -> str:
    return "N" if exponent == 1 else f"N^{exponent}"
