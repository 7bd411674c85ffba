"""The levels of a spec: how many tokens each has, what a query sees of it, which levels lead to which.

In the names of the semantics: M queries, N keys, L levels, spans P_l, T_l(M) and T_l(N) tokens a level, K_l kept.
"""

from dataclasses import dataclass

import sympy

from llsa_gen.plan.sizes import MAX_TOKENS, M, N, ceil_div, least
from llsa_gen.spec import Spec

MAX_SORTED = 64
"""Largest K that is found by sorting: compile time and registers of the network grow faster than K."""


@dataclass(frozen=True)
class Levels:
    """What templates and the cost model ask about the levels of a spec; sizes are expressions in M and N."""

    spec: Spec

    @property
    def head_dim(self) -> int:
        return self.spec.head_dim

    @property
    def top(self) -> int:
        """L, the coarsest level."""
        return self.spec.num_levels

    @property
    def levels(self) -> range:
        """1..L, finest first."""
        return range(1, self.top + 1)

    @property
    def enriched(self) -> tuple[int, ...]:
        """The coarse levels that queries attend to, ascending."""
        return self.spec.enriched_levels

    @property
    def listed(self) -> tuple[int, ...]:
        """The attended levels whose keys are the children of a kept token: the tokens (0), then enriched l < L."""
        return (0, *(level for level in self.enriched if level < self.top))

    @property
    def attends_top(self) -> bool:
        """Whether every query attends to all T_L tokens of the coarsest level."""
        return self.top in self.enriched

    @property
    def attended(self) -> tuple[int, ...]:
        """The levels whose keys queries attend to, the tokens (0) first."""
        return (0, *self.enriched)

    @property
    def shared_level(self) -> int | None:
        """Queries under one token of this level see the same coarse keys; None: all queries do (or there are none)."""
        middle = [level for level in self.listed if level > 0]
        return middle[0] + 1 if middle else None

    def block(self, level: int) -> int:
        """b_l."""
        return self.spec.block(level)

    def topk(self, level: int) -> int:
        """K_l."""
        return self.spec.topk(level)

    def span(self, level: int) -> int:
        """P_l, capped at `MAX_TOKENS`: the levels above have one token whatever their span, so nothing changes."""
        return min(self.spec.span(level), MAX_TOKENS)

    def query_tokens(self, level: int) -> sympy.Expr:
        """T_l(M) = ceil(M / P_l)."""
        return ceil_div(M, self.span(level)) if level else M

    def key_tokens(self, level: int) -> sympy.Expr:
        """T_l(N) = ceil(N / P_l)."""
        return ceil_div(N, self.span(level)) if level else N

    def width(self, level: int) -> sympy.Expr:
        """Columns of the index list of a level: the most tokens that a query token of that level can keep.

        min(K_l, T_l(N), b_(l+1) width_(l+1)), where T_l is never more than b_(l+1) T_(l+1): so the smallest of a few
        numbers, and T_l(N).
        """
        return least(self.most_kept(level), self.key_tokens(level))

    def most_kept(self, level: int) -> int:
        """`width` of a level in the longest sequences."""
        return min(self.topk(above) * self.parent_ratio(level, above) for above in range(level, self.top + 1))

    def enriched_above(self, level: int) -> int | None:
        """The next enriched level above `level`: the one whose gradient flows down into it through the pooling."""
        return next((coarse for coarse in self.enriched if coarse > level), None)

    def parent_ratio(self, level: int, above: int) -> int:
        """How many tokens of `level` one token of level `above` pools."""
        ratio = 1
        for between in range(level + 1, above + 1):
            ratio *= self.block(between)
        return min(ratio, MAX_TOKENS)

    @property
    def pool_steps(self) -> tuple[tuple[int, ...], ...]:
        """Levels pooled together by one kernel, two at a time: (1, 2), (3, 4), ..."""
        return tuple(tuple(range(low, min(low + 2, self.top + 1))) for low in range(1, self.top + 1, 2))

    def adds_in_turn(self, level: int) -> bool:
        """Whether the rows that a token of a level pools are added to two sums in turn, and not each to one of its own.

        That leaves registers for more programs. Wide blocks, and heads of 128 and more without padding, are slower so.
        """
        padded = self.head_dim & (self.head_dim - 1) != 0
        return self.block(level) < 64 and (self.head_dim <= 64 or padded)

    @property
    def blocks_sharing(self) -> int | None:
        """Query blocks under one token of the shared level; None where all share."""
        return None if self.shared_level is None else self.parent_ratio(1, self.shared_level)

    @property
    def wide(self) -> bool:
        """Whether blocks are whole tiles of the 64 rows that matrix units of an H100 multiply at once."""
        return self.block(1) % 64 == 0

    @property
    def lists_fill(self) -> bool:
        """Whether every index list is full, without gaps, when all tokens are whole: K is at most the children kept."""
        return all(self.topk(level) <= self.topk(level + 1) * self.block(level + 1) for level in range(1, self.top))

    @property
    def sorted_levels(self) -> tuple[int, ...]:
        """Levels whose Top-K is found by sorting: K is small enough for a network in registers."""
        return tuple(level for level in self.levels if self.topk(level) <= MAX_SORTED)

    @property
    def max_tokens(self) -> int:
        """Most queries or keys of a head: tokens and the entries of an index list, T_l K_l, are counted in 32 bits."""
        return min(MAX_TOKENS, *(self.span(level) * (2**31 // self.topk(level) - 1) for level in self.levels))

    @property
    def blocks(self) -> tuple[int, ...]:
        """b_1, b_2, ..., b_L."""
        return tuple(self.block(level) for level in self.levels)

    @property
    def spans(self) -> tuple[int, ...]:
        """P_0, P_1, ..., P_L."""
        return (1, *(self.span(level) for level in self.levels))

    @property
    def topks(self) -> tuple[int, ...]:
        """K_1, K_2, ..., K_L."""
        return tuple(self.topk(level) for level in self.levels)

    @property
    def attended_text(self) -> str:
        """The levels that a query attends to, in words."""
        levels = self.attended[::-1]
        return f"the keys of level{'s' * (len(levels) > 1)} {' and '.join(', '.join(map(str, levels)).rsplit(', ', 1))}"

    @property
    def parted(self) -> tuple[int, ...]:
        """Levels whose inverted lists are read in parts, for the keys one level below."""
        return tuple(level + 1 for level in self.by_list)

    @property
    def queries_per_partial(self) -> int:
        """Where queries are split, partial sums have one row for so many of them at most, or there is one split."""
        return 8

    @property
    def by_list(self) -> tuple[int, ...]:
        """The listed levels whose dk, dv are made key by key, over the queries of its inverted list, ascending."""
        return tuple(level for level in self.listed if level not in self.by_keeper)

    @property
    def by_keeper(self) -> tuple[int, ...]:
        """The listed levels whose dk, dv are made keeper by keeper, ascending: one walk serves all that it keeps.

        Tiles of many keys, then, where a key token has but b_(l+1) children; what each keeper adds to a key is stored
        apart and summed in a second pass. Worth its memory where a keeper covers twice as many queries as it keeps
        keys, so that partial sums of a level take no more than q (float16: twice that), and enough of them for a tile.
        """
        return tuple(
            level
            for level in self.listed
            if level and max(2 * self.most_kept(level + 1) * self.block(level + 1), 64) <= self.span(level + 1)
        )

    @property
    def split(self) -> tuple[int, ...]:
        """Levels whose dk, dv are partial sums over splits of the queries, added up in a second pass: ascending."""
        return (*self.by_keeper, self.top) if self.attends_top else self.by_keeper
