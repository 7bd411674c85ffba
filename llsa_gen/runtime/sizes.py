"""How many tokens levels have, and what follows from it for launches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llsa_gen.runtime.launch_plan import ceil_div
    from llsa_gen.runtime.module import BLOCKS, FILLING, LISTED, LISTS_FILL, SPANS, SPLIT_KEYS, WIDTHS

# ---- spliced into every module from here on


def level_tokens(length: int) -> tuple[int, ...]:
    """T_l of a length, the tokens of every level l = 0..L."""
    return length, *[ceil_div(length, span) for span in SPANS[1:]]


def split_queries(walks: int, n_queries: int, n_keys: int, tile: dict[str, int]) -> tuple[int, int]:
    """How queries are shared out where all of them attend to the same few keys: (rows a split, splits).

    `walks` is how many times that happens in a call, over all heads. Enough splits to fill a GPU, but no more than keep
    the partial sums small beside q: splits * n_keys <= n_queries / SPLIT_KEYS, or one split.
    """
    n_keys = max(n_keys, 1)
    programs = walks * ceil_div(n_keys, tile["BLOCK_N"])
    wanted = min(ceil_div(FILLING, programs), n_queries // (SPLIT_KEYS * n_keys))
    rows = ceil_div(ceil_div(n_queries, max(wanted, 1)), tile["BLOCK_M"]) * tile["BLOCK_M"]
    return rows, ceil_div(n_queries, rows)


def is_full(queries: Sequence[int], keys: Sequence[int], tile: dict[str, int]) -> bool:
    """Whether nothing needs a mask: all tokens are whole, so that no list has gaps, and lists fill their tiles."""
    if not LISTS_FILL or queries[0] % SPANS[-1] or keys[0] % SPANS[-1]:
        return False
    return all(
        min(WIDTHS[level], keys[level + 1]) * BLOCKS[level] % tile["BLOCK_C" if level else "BLOCK_N"] == 0
        for level in LISTED
    )
