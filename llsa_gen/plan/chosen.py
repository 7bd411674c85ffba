"""A spec chosen for a length: how many levels, of which blocks, keeping how many, so that a query attends to few keys.

For blocks of B there are L = floor(log_B N - 1) levels, as in the paper, 1 at least and 6 at most: the coarsest one,
which is searched and attended to in full, then has B to B^2 tokens. All levels keep as many, K, and all are enriched.
"""

from llsa_gen.errors import LlsaGenError
from llsa_gen.plan.cost import Cost, dense, evaluate
from llsa_gen.plan.sizes import MAX_TOKENS
from llsa_gen.spec import MAX_LEVELS, Level, Spec

__all__ = ["choose", "keys_of", "levels_for", "pays_from"]

USUAL_TOPK = 8
"""What the shipped specs with blocks of 16 keep of a level."""

MOST_KEPT = 512


def levels_for(n_tokens: int, block: int) -> int:
    """L = floor(log_B N - 1), 1 to 6, in integers: the logarithm of a power may come out a rounding too small."""
    levels = 1
    while levels < MAX_LEVELS and block ** (levels + 2) <= n_tokens:
        levels += 1
    return levels


def keys_of(n_tokens: int, block: int, levels: int, topk: int) -> int:
    """The most keys that a query attends to where each of the levels keeps `topk`: what `Cost.keys` counts."""
    tokens = [-(-n_tokens // block**level) for level in range(levels + 1)]
    return tokens[levels] + sum(min(of_level, topk * block) for of_level in tokens[:levels])


def choose(name: str, n_tokens: int, head_dim: int, keys: int | None = None, block: int = 16) -> Spec:
    """The spec for N tokens of which a query attends to about `keys`; each level keeps 8 if that is not said.

    Raises LlsaGenError for lengths and numbers of keys that no such spec has, SpecError for what no spec may say.
    """
    if not 2 * block <= n_tokens <= MAX_TOKENS:
        blocks = f"from two blocks of {block} on"
        raise LlsaGenError(f"tokens: expected {2 * block} to {MAX_TOKENS}, {blocks}, got {n_tokens}")
    levels, topk = levels_for(n_tokens, block), USUAL_TOPK
    if keys is not None:
        seen = {topk: keys_of(n_tokens, block, levels, topk) for topk in range(1, MOST_KEPT + 1)}
        least, most = seen[1], min(n_tokens, seen[MOST_KEPT])
        if not least <= keys <= most:
            fewest = f"{least} being one block of each level and all of level {levels}"
            raise LlsaGenError(f"keys: expected {least} to {most} of {n_tokens} tokens, {fewest}, got {keys}")
        topk = min(seen, key=lambda topk: abs(seen[topk] - keys))  # the first of two that are as near
    return Spec(name=name, head_dim=head_dim, levels=(Level(block=block, topk=topk),) * levels)


def pays_from(cost: Cost) -> int | None:
    """About the length from which both passes take fewer FLOPs than dense attention; None if there is none.

    "About" because ceilings make the count of FLOPs go in steps.
    """
    whole, most = dense(cost.plan.head_dim).flops, cost.plan.max_tokens

    def pays(n_tokens: int) -> bool:
        return evaluate(cost.totals.flops, n_tokens) < evaluate(whole, n_tokens)

    high = 1
    while not pays(high):
        if high == most:
            return None
        high = min(2 * high, most)
    low = high // 2  # does not pay; nor does 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
