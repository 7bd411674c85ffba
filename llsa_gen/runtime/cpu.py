"""The same attention in torch: gathers of whole blocks, never a dense mask.

What is as long as the sequence is allocated once and written in place: small results that are kept, between large ones
that come and go, would leave holes in the heap. Everything else lives for one run: as many blocks of queries, of as
many heads, as fit into the space that is allowed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.launch_plan import ceil_div
    from llsa_gen.runtime.module import BLOCKS, ENRICHED, HEAD_DIM, LEVELS, LISTED, SPANS, WEIGHTED
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
    """x [H, N, D] and its pyramid, if any level of it is attended and there is anything to pool."""
    return [x, *token_means(x)] if ENRICHED and x.shape[1] else [x]


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


def elements_seen(kept: Tensors, m_tokens: int, n_tokens: int, g_tokens: int = 0) -> int:
    """Elements of the keys, values and logits of a block of queries of one head, the logits twice."""
    blocks = block_sizes(n_tokens)
    listed = sum(kept[level].shape[2] * blocks[level] for level in LISTED)
    seen = listed + g_tokens + (level_tokens(n_tokens)[LEVELS] if LEVELS in ENRICHED else 0)
    return 2 * (listed * HEAD_DIM.value + seen * block_sizes(m_tokens)[0])


def slices_of_heads(kept: Tensors, m_tokens: int, n_tokens: int, g_tokens: int = 0) -> list[slice]:
    """Slices of the heads: of so many that a block of queries of each, of any level, fits into CHUNK elements."""
    most = max(elements_seen(kept, m_tokens, n_tokens, g_tokens), level_tokens(n_tokens)[LEVELS])
    for lists, q_block, k_block in zip(kept[1:], block_sizes(m_tokens)[1:], block_sizes(n_tokens)[1:], strict=True):
        most = max(most, lists.shape[2] * k_block * (HEAD_DIM.value + q_block))
    return slices(kept[0].shape[0], CHUNK // most)


def log_weights(level: int, token: torch.Tensor, exists: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Logarithms of the weights c_l(j) of key tokens of a level, or 0; -inf for tokens that do not exist."""
    weights = (n_tokens - token * SPANS[level]).clamp(max=SPANS[level]).float().log() if WEIGHTED else 0.0
    return torch.where(exists, weights, float("-inf"))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What products of `x` are worked out in: float32 or, on a GPU, float64, for torch may take TF32 for float32 there.

    Whether it does is a switch of the user's, of all threads: nothing here turns it. A GPU comes here where there are
    no keys but global ones, which is rare.
    """
    return torch.float64 if x.is_cuda else torch.float32


class Pyramid:
    """Keys and values of some heads as queries see them: every level in blocks, and the kept tokens.

    Keys and values are in the dtype of products, float32 but on a GPU.

    k_levels and v_levels: [H, T_l(N), D] of the levels, finest first; kept: [H, T_l(M), width] of every coarse level,
    of m_tokens queries. shared: what all queries see, keys and values [H, S, D] and log weights [H, S], or None. It is
    the coarsest level, if that is attended, then the global tokens `of_all`. Without keys no level is listed.
    """

    def __init__(
        self, k_levels: Tensors, v_levels: Tensors, kept: Tensors, m_tokens: int, of_all: Tensors = ()
    ) -> None:
        self.kept, self.m_tokens, self.q_block = kept, m_tokens, block_sizes(m_tokens)[0]
        self.heads, self.n_tokens, _ = k_levels[0].shape
        self.blocks, self.listed = block_sizes(self.n_tokens), LISTED if self.n_tokens else ()
        self.wide = product_dtype(k_levels[0])
        self.k_blocks, self.v_blocks = (
            [blocks_of(levels[level], self.blocks[level]).to(self.wide).contiguous() for level in self.listed]
            for levels in (k_levels, v_levels)
        )
        self.n_top, self.g_tokens, parts = 0, of_all[0].shape[1] if of_all else 0, []
        if LEVELS in ENRICHED and self.n_tokens:
            self.n_top = k_levels[-1].shape[1]
            token = torch.arange(self.n_top, device=k_levels[-1].device)
            weights = log_weights(LEVELS, token, token >= 0, self.n_tokens)
            parts.append((k_levels[-1], v_levels[-1], weights.expand(self.heads, -1)))
        if of_all:
            keys, values, weights = of_all
            parts.append((keys.to(self.wide), values.to(self.wide), weights))
        together = [torch.cat(x, 1) for x in zip(*parts, strict=True)] if len(parts) > 1 else [*parts, None][0]
        self.shared: Tensors | None = together

    def runs(self) -> list[slice]:
        """Slices of query blocks such that the keys, values and logits of each fit into CHUNK elements."""
        elements = self.heads * elements_seen(self.kept, self.m_tokens, self.n_tokens, self.g_tokens)
        return slices(self.kept[0].shape[1], CHUNK // elements)

    def lists(self, run: slice) -> list[torch.Tensor]:
        """What the query blocks of a run keep one level above each listed level: a list of [H, R, width]."""
        block = torch.arange(run.start, run.stop, device=self.kept[0].device)
        return [self.kept[level].index_select(1, block * SPANS[1] // SPANS[level + 1]) for level in self.listed]

    def gather(self, lists: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values, lists of [H, R, C, D], and log weights, of [H, R, C], of the children of each list."""
        keys = [gather_blocks(blocks, kept) for blocks, kept in zip(self.k_blocks, lists, strict=True)]
        values = [gather_blocks(blocks, kept) for blocks, kept in zip(self.v_blocks, lists, strict=True)]
        weights = []
        for level, kept in zip(self.listed, lists, strict=True):
            child, exists = children_of(kept, self.blocks[level], level_tokens(self.n_tokens)[level])
            weights.append(log_weights(level, child, exists, self.n_tokens))
        return keys, values, weights


def softmax_blocks(
    queries: torch.Tensor, keys: Tensors, weights: Tensors, shared: Tensors | None, scale: float
) -> tuple[Tensors, torch.Tensor, torch.Tensor | None]:
    """Softmax weights over all keys, a list of [H, R, b_1, C], and lse [H, R, b_1], of query blocks [H, R, b_1, D].

    Also which queries have nothing to attend to, [H, R, b_1, 1], or None for none: there all weights are 0.
    """
    logits = [(queries @ k.mT).mul_(scale).add_(weight[:, :, None]) for k, weight in zip(keys, weights, strict=True)]
    if shared is not None:
        of_all = (queries.flatten(1, 2) @ shared[0].mT).mul_(scale).add_(shared[2][:, None])
        logits.append(of_all.unflatten(1, queries.shape[1:3]))
    sizes = [part.shape[-1] for part in logits]
    logits = torch.cat(logits, dim=-1)
    p, peak = logits.softmax(-1), logits.amax(-1)
    lse = peak - p.amax(-1).log()  # the largest weight is e^(peak - lse)
    nothing = (peak == float("-inf"))[..., None]
    if not (nothing.is_cuda or nothing.any()):  # a GPU would have to be waited for
        return p.split(sizes, dim=-1), lse, None
    return p.masked_fill_(nothing, 0.0).split(sizes, dim=-1), torch.where(nothing[..., 0], peak, lse), nothing


def attend_blocks(
    queries: torch.Tensor, keys: Tensors, values: Tensors, weights: Tensors, shared: Tensors | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [H, R, b_1, D] and lse [H, R, b_1] of query blocks [H, R, b_1, D]: one softmax over all their keys."""
    p, lse, _ = softmax_blocks(queries, keys, weights, shared, scale)
    o: Any = sum(part @ v for part, v in zip(p, values, strict=False))
    if shared is not None:
        o = o + (p[-1].flatten(1, 2) @ shared[1]).unflatten(1, queries.shape[1:3])
    return o, lse


def grad_attend_blocks(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, queries: torch.Tensor, keys: Tensors, values: Tensors,
    weights: Tensors, shared: Tensors | None, scale: float,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """dq, then dk and dv as lists like keys and values, and at their end those of `shared`.

    From the gradients of o [H, R, b_1, D] and lse [H, R, b_1, 1], which may be None.
    """
    p, _, nothing = softmax_blocks(queries, keys, weights, shared, scale)
    if nothing is not None:
        grad_o = grad_o.masked_fill(nothing, 0.0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(nothing, 0.0)
    dp = [grad_o @ v.mT for v in values]
    if shared is not None:
        dp.append((grad_o.flatten(1, 2) @ shared[1].mT).unflatten(1, queries.shape[1:3]))
    delta: Any = sum((part * grad).sum(-1, keepdim=True) for part, grad in zip(p, dp, strict=True))
    delta = delta - (0.0 if grad_lse is None else grad_lse)
    ds = [grad.sub_(delta).mul_(part).mul_(scale) for part, grad in zip(p, dp, strict=True)]
    dq: Any = sum(part @ k for part, k in zip(ds, keys, strict=False))
    dk = [part.mT @ queries for part in ds[: len(keys)]]
    dv = [part.mT @ grad_o for part in p[: len(keys)]]
    if shared is not None:
        dq = dq + (ds[-1].flatten(1, 2) @ shared[0]).unflatten(1, queries.shape[1:3])
        dk.append(ds[-1].flatten(1, 2).mT @ queries.flatten(1, 2))
        dv.append(p[-1].flatten(1, 2).mT @ grad_o.flatten(1, 2))
    return dq, dk, dv


def attend_heads(
    o: torch.Tensor, lse: torch.Tensor, kept: Tensors, q: torch.Tensor, k_levels: Tensors, v_levels: Tensors,
    scale: float, of_all: Tensors = (),
) -> None:  # fmt: skip
    """Fill in o [H, M, D] and lse [H, M] of some heads, along the kept tokens of every level, finest first."""
    pyramid = Pyramid(k_levels, v_levels, kept, q.shape[1], of_all)
    for run in pyramid.runs():
        queries = blocks_of(q, pyramid.q_block, run).to(pyramid.wide).contiguous()
        part_o, part_lse = attend_blocks(queries, *pyramid.gather(pyramid.lists(run)), pyramid.shared, scale)
        put_blocks(o, run, part_o)
        put_blocks(lse, run, part_lse)


def grad_levels(
    dq: torch.Tensor, kept: Tensors, grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor,
    k_levels: Tensors, v_levels: Tensors, scale: float, of_all: Tensors = (),
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """Fill in dq of some heads; the gradients of keys and of values of every attended level, in the dtype of products.

    Last those of the globals, if there are any.
    """
    pyramid = Pyramid(k_levels, v_levels, kept, q.shape[1], of_all)
    grad_k = [torch.zeros_like(blocks) for blocks in pyramid.k_blocks]
    grad_v = [torch.zeros_like(blocks) for blocks in pyramid.v_blocks]
    of_shared = [] if pyramid.shared is None else [torch.zeros_like(x) for x in pyramid.shared[:2]]
    for run in pyramid.runs():
        lists = pyramid.lists(run)
        queries, grads = (blocks_of(x, pyramid.q_block, run).to(pyramid.wide).contiguous() for x in (q, grad_o))
        of_lse = None if grad_lse is None else blocks_of(grad_lse, pyramid.q_block, run)
        gathered = pyramid.gather(lists)
        part_q, parts_k, parts_v = grad_attend_blocks(grads, of_lse, queries, *gathered, pyramid.shared, scale)
        put_blocks(dq, run, part_q)
        for total_k, total_v, above, part_k, part_v in zip(grad_k, grad_v, lists, parts_k, parts_v, strict=False):
            scatter_add_blocks(total_k, above, part_k)
            scatter_add_blocks(total_v, above, part_v)
        for total, parts in zip(of_shared, (parts_k, parts_v), strict=False):
            total += parts[-1]

    found = [blocks.flatten(1, 2) for blocks in grad_k], [blocks.flatten(1, 2) for blocks in grad_v]
    for levels, total in zip(found, of_shared, strict=False):
        top, of_globals = total[:, : pyramid.n_top], total[:, pyramid.n_top :]
        levels += [x for x, there in ((top, pyramid.n_top), (of_globals, of_all)) if there]
    return found


def put_sums(to: torch.Tensor, sums: Tensors) -> None:
    """Write to `to` [H, N, D] the sums of each token, and its share of the sums of the means that it is part of."""
    if not sums:  # there are no keys
        return
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
