"""The same attention in torch: gathers of whole blocks, never a dense mask.

What is as long as the sequence is allocated once and written in place: small results that are kept, between large ones
that come and go, would leave holes in the heap. Everything else lives for one run: as many blocks of queries, of as
many heads, as fit into the space that is allowed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.launch_plan import ceil_div, empty_like, empty_outputs, empty_selection, views_of
    from llsa_gen.runtime.module import (
        BLOCKS,
        EMPTY,
        ENRICHED,
        HEAD_DIM,
        LEVELS,
        LISTED,
        SPANS,
        WEIGHTED,
        saved_shapes,
    )
    from llsa_gen.runtime.sizes import level_tokens

# ---- spliced into every module from here on

CHUNK = 2**24  # elements of the largest intermediate
Tensors = Sequence[torch.Tensor]


def slices(length: int, step: int) -> list[slice]:
    """Slices of `step`, at least 1, that cover range(length) in order; the last one may be shorter."""
    step = max(1, step)
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def block_sizes(length: int) -> Sequence[int]:
    """b_1, b_2, ...; of a sequence shorter than a block its length, 1, 1, ...: nothing is filled up."""
    return BLOCKS if length >= BLOCKS[0] else (length, *(1 for _ in BLOCKS[1:]))


def blocks_of(x: torch.Tensor, block: int, run: slice | None = None) -> torch.Tensor:
    """Rows in blocks, those of a run or all, the last one filled up with zeros: [H, T, D] to [H, R, block, D]."""
    if run is not None:
        x = x[:, run.start * block : run.stop * block]
    missing = -x.shape[1] % block
    return (torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(1, (-1, block))


def put_blocks(to: torch.Tensor, run: slice, blocks: torch.Tensor) -> None:
    """Write the blocks [H, R, b, ...] of a run to where `blocks_of` takes them from, in `to` [H, T, ...]."""
    first, rows = run.start * blocks.shape[2], blocks.flatten(1, 2)
    to = to[:, first : first + rows.shape[1]]
    to.copy_(rows[:, : to.shape[1]])


def block_sums(x: torch.Tensor, block: int) -> torch.Tensor:
    """Sums over the blocks of x in float32: [H, T, D] to [H, ceil(T / block), D]."""
    heads, rows, dim = x.shape
    sums = x.new_empty((heads, ceil_div(rows, block), dim), dtype=torch.float32)
    for run in slices(sums.shape[1], CHUNK // (heads * block * dim)):
        sums[:, run] = blocks_of(x, block, run).float().sum(2)
    return sums


def covered_tokens(level: int, n_tokens: int, device: torch.device) -> torch.Tensor:
    """c_l(j) of every token of a level, [T_l] float32."""
    first = torch.arange(0, n_tokens, SPANS[level], device=device)
    return (n_tokens - first).clamp(max=SPANS[level]).float()


def token_means(x: torch.Tensor) -> list[torch.Tensor]:
    """The pyramid of x [H, N, D]: L tensors [H, T_l, D], finest first, rounded to x's dtype once and float32 again."""
    means, sums, n_tokens = [], x, x.shape[1]
    for level, block in enumerate(block_sizes(n_tokens), start=1):
        sums = block_sums(sums, block)
        covered = covered_tokens(level, n_tokens, x.device)
        means.append((sums / covered[:, None]).to(x.dtype).float())
    return means


def enriched_by(x: torch.Tensor) -> list[torch.Tensor]:
    """x [H, N, D] and its pyramid, if any level of it is attended."""
    return [x, *token_means(x)] if ENRICHED else [x]


def block_rows(blocks: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Where the blocks of a list are in `blocks` [H, T, block, D] seen as [H * T, block, D]; block 0 for -1."""
    first = torch.arange(blocks.shape[0], device=kept.device)[:, None, None] * blocks.shape[1]
    return (kept.clamp(min=0) + first).flatten()


def gather_blocks(blocks: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The blocks that a list names, side by side: [H, T, block, D] and [H, R, W] to [H, R, W * block, D]."""
    found = blocks.flatten(0, 1).index_select(0, block_rows(blocks, kept))
    return found.view(*kept.shape, *blocks.shape[2:]).flatten(2, 3)


def scatter_add_blocks(total: torch.Tensor, kept: torch.Tensor, parts: torch.Tensor) -> None:
    """Add what `gather_blocks` took from [H, T, block, D] back to where it came from, in place."""
    rows = parts.unflatten(2, (-1, total.shape[2])).flatten(0, 2)
    total.view(-1, *total.shape[2:]).index_add_(0, block_rows(total, kept), rows)


def children_of(kept: torch.Tensor, block: int, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Children of the tokens in a list, and which of them exist: [H, R, W] to twice [H, R, W * block]."""
    child = (kept.long()[..., None] * block + torch.arange(block, device=kept.device)).flatten(2)
    return child, (child >= 0) & (child < n_tokens)


def best_tokens(scores: torch.Tensor, token: torch.Tensor, exists: torch.Tensor, width: int) -> torch.Tensor:
    """The `width` best tokens of each row, best first, of equal scores the lower token; -1 where fewer exist.

    scores [H, R, M, C] float32, overwritten; token and exists [H, R, C]; returns [H, R, M, width] int32.
    """
    # one integer that orders like (score, lower token first): the float's bits made monotonic, then the token
    bits = scores.add_(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    rank = bits.long()
    rank <<= 32
    rank |= 0x7FFFFFFF - token[:, :, None]
    rank.masked_fill_(~exists[:, :, None], EMPTY.value)
    best = rank.topk(width, dim=-1).values
    return torch.where(best == EMPTY.value, -1, 0x7FFFFFFF - (best & 0x7FFFFFFF)).int()


def select_levels(kept: Tensors, q_means: Tensors, k_means: Tensors, m_tokens: int, n_tokens: int) -> None:
    """Fill in the kept tokens [H, T_l(M), width] of each level, finest first, from the means of each level.

    Those of the queries are [H, T_l(M), D], those of the keys [H, T_l(N), D].
    """
    heads, n_top, _ = k_means[-1].shape
    token = torch.arange(n_top, device=k_means[-1].device).expand(heads, 1, n_top)
    for rows in slices(q_means[-1].shape[1], CHUNK // (heads * n_top)):
        scores = q_means[-1][:, rows] @ k_means[-1].mT
        kept[-1][:, rows] = best_tokens(scores[:, None], token, token >= 0, kept[-1].shape[2])[:, 0]
    for level in range(LEVELS - 1, 0, -1):
        above, q_block, k_block = kept[level], block_sizes(m_tokens)[level], block_sizes(n_tokens)[level]
        k_blocks = blocks_of(k_means[level - 1], k_block)
        for run in slices(above.shape[1], CHUNK // (heads * above.shape[2] * k_block * (HEAD_DIM.value + q_block))):
            lists, queries = above[:, run], blocks_of(q_means[level - 1], q_block, run)
            child, exists = children_of(lists, k_block, k_means[level - 1].shape[1])
            scores = queries @ gather_blocks(k_blocks, lists).mT
            put_blocks(kept[level - 1], run, best_tokens(scores, child, exists, kept[level - 1].shape[2]))


def elements_seen(kept: Tensors, m_tokens: int, n_tokens: int) -> int:
    """Elements of the keys, values and logits of a block of queries of one head, the logits twice."""
    blocks = block_sizes(n_tokens)
    listed = sum(kept[level].shape[2] * blocks[level] for level in LISTED)
    seen = listed + level_tokens(n_tokens)[LEVELS] if LEVELS in ENRICHED else listed
    return 2 * (listed * HEAD_DIM.value + seen * block_sizes(m_tokens)[0])


def slices_of_heads(kept: Tensors, m_tokens: int, n_tokens: int) -> list[slice]:
    """Slices of the heads: of so many that a block of queries of each, of any level, fits into CHUNK elements."""
    most = max(elements_seen(kept, m_tokens, n_tokens), level_tokens(n_tokens)[LEVELS])
    for lists, q_block, k_block in zip(kept[1:], block_sizes(m_tokens)[1:], block_sizes(n_tokens)[1:], strict=True):
        most = max(most, lists.shape[2] * k_block * (HEAD_DIM.value + q_block))
    return slices(kept[0].shape[0], CHUNK // most)


def select_torch(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, in torch."""
    selection = empty_selection(q, k)
    q, k, *kept = (x.flatten(0, 1) for x in (q, k, *selection))
    lengths = q.shape[1], k.shape[1]
    for heads in slices_of_heads(kept, *lengths):
        select_levels([lists[heads] for lists in kept], token_means(q[heads]), token_means(k[heads]), *lengths)
    return selection


def log_weights(level: int, token: torch.Tensor, exists: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Logarithms of the weights c_l(j) of key tokens of a level, or 0; -inf for tokens that do not exist."""
    weights = (n_tokens - token * SPANS[level]).clamp(max=SPANS[level]).float().log() if WEIGHTED else 0.0
    return torch.where(exists, weights, float("-inf"))


class Pyramid:
    """Keys and values of some heads as queries see them: every level in float32 and in blocks, and the kept tokens.

    k_levels and v_levels: [H, T_l(N), D] of the levels, finest first; kept: [H, T_l(M), width] of every coarse level,
    of m_tokens queries. top: keys and values [H, T_L(N), D] and log weights [T_L(N)] of the coarsest level, if all
    queries see it, or else None.
    """

    def __init__(self, k_levels: Tensors, v_levels: Tensors, kept: Tensors, m_tokens: int) -> None:
        self.kept, self.m_tokens, self.q_block = kept, m_tokens, block_sizes(m_tokens)[0]
        self.heads, self.n_tokens, _ = k_levels[0].shape
        self.blocks = block_sizes(self.n_tokens)
        self.k_blocks, self.v_blocks = (
            [blocks_of(levels[level], self.blocks[level]).float().contiguous() for level in LISTED]
            for levels in (k_levels, v_levels)
        )
        self.top = None
        if LEVELS in ENRICHED:
            token = torch.arange(k_levels[-1].shape[1], device=k_levels[-1].device)
            self.top = k_levels[-1], v_levels[-1], log_weights(LEVELS, token, token >= 0, self.n_tokens)

    def runs(self) -> list[slice]:
        """Slices of query blocks such that the keys, values and logits of each fit into CHUNK elements."""
        elements = self.heads * elements_seen(self.kept, self.m_tokens, self.n_tokens)
        return slices(self.kept[0].shape[1], CHUNK // elements)

    def lists(self, run: slice) -> list[torch.Tensor]:
        """What the query blocks of a run keep one level above each listed level: a list of [H, R, width]."""
        block = torch.arange(run.start, run.stop, device=self.kept[0].device)
        return [self.kept[level].index_select(1, block * SPANS[1] // SPANS[level + 1]) for level in LISTED]

    def gather(self, lists: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values, lists of [H, R, C, D], and log weights, of [H, R, C], of the children of each list."""
        keys = [gather_blocks(blocks, kept) for blocks, kept in zip(self.k_blocks, lists, strict=True)]
        values = [gather_blocks(blocks, kept) for blocks, kept in zip(self.v_blocks, lists, strict=True)]
        weights = []
        for level, kept in zip(LISTED, lists, strict=True):
            child, exists = children_of(kept, self.blocks[level], level_tokens(self.n_tokens)[level])
            weights.append(log_weights(level, child, exists, self.n_tokens))
        return keys, values, weights


def softmax_blocks(
    queries: torch.Tensor, keys: Tensors, weights: Tensors, top: Tensors | None, scale: float
) -> tuple[Tensors, torch.Tensor]:
    """Softmax weights over all keys, a list of [H, R, b_1, C], and lse [H, R, b_1], of query blocks [H, R, b_1, D]."""
    logits = [(queries @ k.mT).mul_(scale).add_(weight[:, :, None]) for k, weight in zip(keys, weights, strict=True)]
    if top is not None:
        k_top, _, weights_top = top
        of_top = (queries.flatten(1, 2) @ k_top.mT).mul_(scale).add_(weights_top)
        logits.append(of_top.unflatten(1, queries.shape[1:3]))
    sizes = [part.shape[-1] for part in logits]
    logits = torch.cat(logits, dim=-1)
    p = logits.softmax(-1)
    lse = logits.amax(-1) - p.amax(-1).log()  # the largest weight is e^(peak - lse)
    return p.split(sizes, dim=-1), lse


def attend_blocks(
    queries: torch.Tensor, keys: Tensors, values: Tensors, weights: Tensors, top: Tensors | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [H, R, b_1, D] and lse [H, R, b_1] of query blocks [H, R, b_1, D]: one softmax over all their keys."""
    p, lse = softmax_blocks(queries, keys, weights, top, scale)
    o: Any = sum(part @ v for part, v in zip(p, values, strict=False))
    if top is not None:
        o = o + (p[-1].flatten(1, 2) @ top[1]).unflatten(1, queries.shape[1:3])
    return o, lse


def grad_attend_blocks(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | float, queries: torch.Tensor, keys: Tensors, values: Tensors,
    weights: Tensors, top: Tensors | None, scale: float,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """dq, then dk and dv as lists like keys and values, and at their end those of `top`.

    From the gradients of o [H, R, b_1, D] and lse [H, R, b_1, 1], or 0.
    """
    p, _ = softmax_blocks(queries, keys, weights, top, scale)
    dp = [grad_o @ v.mT for v in values]
    if top is not None:
        dp.append((grad_o.flatten(1, 2) @ top[1].mT).unflatten(1, queries.shape[1:3]))
    delta = sum((part * grad).sum(-1, keepdim=True) for part, grad in zip(p, dp, strict=True)) - grad_lse
    ds = [grad.sub_(delta).mul_(part).mul_(scale) for part, grad in zip(p, dp, strict=True)]
    dq: Any = sum(part @ k for part, k in zip(ds, keys, strict=False))
    dk = [part.mT @ queries for part in ds[: len(keys)]]
    dv = [part.mT @ grad_o for part in p[: len(keys)]]
    if top is not None:
        dq = dq + (ds[-1].flatten(1, 2) @ top[0]).unflatten(1, queries.shape[1:3])
        dk.append(ds[-1].flatten(1, 2).mT @ queries.flatten(1, 2))
        dv.append(p[-1].flatten(1, 2).mT @ grad_o.flatten(1, 2))
    return dq, dk, dv


def attend_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, lse and what the backward pass needs, in torch: of the layout `saved`, the kept tokens alone."""
    o, lse, saved = empty_outputs(q, k)
    kept = saved_lists(saved.zero_(), q, k)
    heads_o, heads_lse, q, k, v = (x.flatten(0, 1) for x in (o, lse, q, k, v))
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1]):
        lists, k_levels = [level[heads] for level in kept], [k[heads], *token_means(k[heads])]
        select_levels(lists, token_means(q[heads]), k_levels[1:], q.shape[1], k.shape[1])
        attend_heads(heads_o[heads], heads_lse[heads], lists, q[heads], k_levels, enriched_by(v[heads]), scale)
    return o, lse, saved


def attend_heads(
    o: torch.Tensor, lse: torch.Tensor, kept: Tensors, q: torch.Tensor, k_levels: Tensors, v_levels: Tensors,
    scale: float,
) -> None:  # fmt: skip
    """Fill in o [H, M, D] and lse [H, M] of some heads, along the kept tokens of every level, finest first."""
    pyramid = Pyramid(k_levels, v_levels, kept, q.shape[1])
    for run in pyramid.runs():
        queries = blocks_of(q, pyramid.q_block, run).float().contiguous()
        part_o, part_lse = attend_blocks(queries, *pyramid.gather(pyramid.lists(run)), pyramid.top, scale)
        put_blocks(o, run, part_o)
        put_blocks(lse, run, part_lse)


def saved_lists(saved: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, in what the forward pass over q and k left to the backward pass."""
    lists = views_of(saved, "saved", saved_shapes(q.shape[2], k.shape[2]), q.dtype)[-LEVELS:]
    return [kept.flatten(0, 1) for kept in lists]


def grad_torch(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    saved: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv in torch: the softmax of every run of query blocks once more, then the pooling backwards."""
    kept = saved_lists(saved, q, k)
    grads = tuple(map(empty_like, (q, k, v)))
    dq, dk, dv, grad_o, q, k, v = (x.flatten(0, 1) for x in (*grads, grad_o, q, k, v))
    if grad_lse is not None:
        grad_lse = grad_lse.flatten(0, 1)[..., None]
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1]):
        lists = [level[heads] for level in kept]
        of_lse = None if grad_lse is None else grad_lse[heads]
        grad_heads(dq[heads], dk[heads], dv[heads], lists, grad_o[heads], of_lse, q[heads], k[heads], v[heads], scale)
    return grads


def grad_heads(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, kept: Tensors, grad_o: torch.Tensor,
    grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Fill in dq [H, M, D], dk and dv [H, N, D] of some heads."""
    sums_k, sums_v = grad_levels(dq, kept, grad_o, grad_lse, q, enriched_by(k), enriched_by(v), scale)
    put_sums(dk, sums_k)
    put_sums(dv, sums_v)


def grad_levels(
    dq: torch.Tensor, kept: Tensors, grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor,
    k_levels: Tensors, v_levels: Tensors, scale: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """Fill in dq of some heads; the gradients of keys and of values of every attended level, float32."""
    pyramid = Pyramid(k_levels, v_levels, kept, q.shape[1])
    grad_k = [torch.zeros_like(blocks) for blocks in pyramid.k_blocks]
    grad_v = [torch.zeros_like(blocks) for blocks in pyramid.v_blocks]
    of_top = [] if pyramid.top is None else [torch.zeros_like(x) for x in pyramid.top[:2]]
    for run in pyramid.runs():
        lists = pyramid.lists(run)
        queries, grads = (blocks_of(x, pyramid.q_block, run).float().contiguous() for x in (q, grad_o))
        of_lse = 0.0 if grad_lse is None else blocks_of(grad_lse, pyramid.q_block, run)
        gathered = pyramid.gather(lists)
        part_q, parts_k, parts_v = grad_attend_blocks(grads, of_lse, queries, *gathered, pyramid.top, scale)
        put_blocks(dq, run, part_q)
        for total_k, total_v, above, part_k, part_v in zip(grad_k, grad_v, lists, parts_k, parts_v, strict=False):
            scatter_add_blocks(total_k, above, part_k)
            scatter_add_blocks(total_v, above, part_v)
        for total, parts in zip(of_top, (parts_k, parts_v), strict=False):
            total += parts[-1]

    return (
        [*(blocks.flatten(1, 2) for blocks in grad_k), *of_top[:1]],
        [*(blocks.flatten(1, 2) for blocks in grad_v), *of_top[1:]],
    )


def put_sums(to: torch.Tensor, sums: Tensors) -> None:
    """Write to `to` [H, N, D] the sums of each token, and its share of the sums of the means that it is part of."""
    if not ENRICHED:
        to.copy_(sums[0][:, : to.shape[1]])
        return
    heads, n_tokens, dim = to.shape
    for run in slices(n_tokens, CHUNK // (heads * dim)):
        token, rows = torch.arange(run.start, run.stop, device=to.device), sums[0][:, run]
        for level, coarse in zip(ENRICHED, sums[1:], strict=True):
            above = token // SPANS[level]
            share = 1.0 / covered_tokens(level, n_tokens, to.device)[above][:, None]
            rows += coarse.index_select(1, above).mul_(share)
        to[:, run] = rows
