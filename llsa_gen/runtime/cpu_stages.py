"""The two passes in torch, for the CPU, and the stages: the selection, attention with means that are given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.cpu import (
        CHUNK,
        attend_heads,
        block_sizes,
        blocks_of,
        children_of,
        enriched_by,
        gather_blocks,
        grad_levels,
        put_blocks,
        put_sums,
        slices,
        slices_of_heads,
        token_means,
    )
    from llsa_gen.runtime.launch_plan import empty_like, empty_outputs, empty_selection, views_of
    from llsa_gen.runtime.module import EMPTY, ENRICHED, HEAD_DIM, LEVELS, SPANS, saved_shapes

# ---- spliced into every module from here on


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


def select_levels(
    kept: Sequence[torch.Tensor], q_means: Sequence[torch.Tensor], k_means: Sequence[torch.Tensor], m_tokens: int,
    n_tokens: int,
) -> None:  # fmt: skip
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


def select_torch(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, in torch."""
    selection = empty_selection(q, k)
    q, k, *kept = (x.flatten(0, 1) for x in (q, k, *selection))
    lengths = q.shape[1], k.shape[1]
    for heads in slices_of_heads(kept, *lengths):
        select_levels([lists[heads] for lists in kept], token_means(q[heads]), token_means(k[heads]), *lengths)
    return selection


def global_rows(shared: Sequence[Any] | None) -> Sequence[torch.Tensor]:
    """Global keys and values [B*H, G, D] and log weights [B*H, G], -inf where masked; of None, nothing."""
    if shared is None:
        return ()
    keys, values, mask = shared
    weights = keys.new_zeros((keys.shape[0], keys.shape[2]), dtype=torch.float32)
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    return keys.flatten(0, 1), values.flatten(0, 1), weights.repeat_interleave(keys.shape[1], 0)


def attend_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, shared: Sequence[Any] | None = None,
    given: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o, lse and what the backward pass needs, in torch: of the layout `saved`, what is kept, unless that is given."""
    o, lse, saved = empty_outputs(q, k)
    saved.zero_()
    kept = saved_lists(saved, q, k) if given is None else [level.flatten(0, 1) for level in given]
    of_all = global_rows(shared)
    heads_o, heads_lse, q, k, v = (x.flatten(0, 1) for x in (o, lse, q, k, v))
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1], of_all[0].shape[1] if of_all else 0):
        lists, own = [level[heads] for level in kept], [x[heads] for x in of_all]
        if given is None:
            k_levels = [k[heads], *token_means(k[heads])]
            select_levels(lists, token_means(q[heads]), k_levels[1:], q.shape[1], k.shape[1])
        else:
            k_levels = enriched_by(k[heads])
        attend_heads(heads_o[heads], heads_lse[heads], lists, q[heads], k_levels, enriched_by(v[heads]), scale, own)
    return o, lse, saved


def saved_lists(saved: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, in what the forward pass over q and k left to the backward pass."""
    lists = views_of(saved, "saved", saved_shapes(q.shape[2], k.shape[2]), q.dtype)[-LEVELS:]
    return [kept.flatten(0, 1) for kept in lists]


def grad_torch(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    saved: torch.Tensor, scale: float, shared: Sequence[Any] | None = None, given: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv in torch, then dk and dv of the globals, if there are any.

    The softmax of every run of query blocks once more, then the pooling backwards.
    """
    kept = saved_lists(saved, q, k) if given is None else [level.flatten(0, 1) for level in given]
    of_all = global_rows(shared)
    grads = tuple(map(empty_like, (q, k, v, *(shared or ())[:2])))
    dq, dk, dv, *of_globals, grad_o, q, k, v = (x.flatten(0, 1) for x in (*grads, grad_o, q, k, v))
    if grad_lse is not None:
        grad_lse = grad_lse.flatten(0, 1)[..., None]
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1], of_all[0].shape[1] if of_all else 0):
        lists, own, to = ([x[heads] for x in tensors] for tensors in (kept, of_all, (dk, dv, *of_globals)))
        of_lse = None if grad_lse is None else grad_lse[heads]
        k_levels, v_levels = enriched_by(k[heads]), enriched_by(v[heads])
        sums = grad_levels(dq[heads], lists, grad_o[heads], of_lse, q[heads], k_levels, v_levels, scale, own)
        for place, levels in enumerate(sums):
            if own:
                to[2 + place].copy_(levels.pop().masked_fill_((own[2] == float("-inf"))[..., None], 0.0))
            put_sums(to[place], levels)
    return grads


def with_means(x: torch.Tensor, means: Sequence[torch.Tensor], heads: slice) -> list[torch.Tensor]:
    """The rows of some heads, and their means."""
    return [x[heads], *(mean[heads] for mean in means)]


def select_means_torch(
    kept: Sequence[torch.Tensor], q_means: Sequence[torch.Tensor], k_means: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Fill in the kept tokens [B, H, T_l(M), width] from the means of each level, in torch."""
    lists, q_levels, k_levels = ([x.flatten(0, 1) for x in levels] for levels in (kept, q_means, k_means))
    lengths = q_levels[0].shape[1] * SPANS[1], k_levels[0].shape[1] * SPANS[1]
    for heads in slices_of_heads(lists, *lengths):
        q_own, k_own = ([x[heads].float() for x in levels] for levels in (q_levels, k_levels))
        select_levels([level[heads] for level in lists], q_own, k_own, *lengths)
    return list(kept)


def attend_along(
    o: torch.Tensor, lse: torch.Tensor, saved: dict[str, torch.Tensor], q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Fill in o and lse along the lists and with the means that are `saved`, by name."""
    kept, levels = saved_by_level(saved)
    heads_o, heads_lse, q, k, v = (x.flatten(0, 1) for x in (o, lse, q, k, v))
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1]):
        k_levels, v_levels = (with_means(x, means, heads) for x, means in zip((k, v), levels, strict=True))
        lists = [level[heads] for level in kept]
        attend_heads(heads_o[heads], heads_lse[heads], lists, q[heads], k_levels, v_levels, scale)


def saved_by_level(saved: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Of what is saved, by name: the lists of every level, and the means of keys and of values, float32. [B*H, ...]."""
    levels = range(1, LEVELS + 1)
    kept = [saved[f"kept_l{level}"].flatten(0, 1) for level in levels]
    none = kept[0].new_empty((kept[0].shape[0], 0, HEAD_DIM.value), dtype=torch.float32)
    means = [
        [saved[f"{x}_l{level}"].flatten(0, 1).float() if level in ENRICHED else none for level in levels] for x in "kv"
    ]
    return kept, means


def grad_along(
    means: Sequence[torch.Tensor], grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, saved: dict[str, torch.Tensor], scale: float,
) -> list[torch.Tensor]:  # fmt: skip
    """dq, dk, dv and the gradients of the means, which are filled in: where `attend_along` attended."""
    kept, levels = saved_by_level(saved)
    grads = [empty_like(x) for x in (q, k, v)]
    dq, dk, dv, grad_o, q, k, v = (x.flatten(0, 1) for x in (*grads, grad_o, q, k, v))
    of_k, of_v = means[:LEVELS], means[LEVELS:]
    if grad_lse is not None:
        grad_lse = grad_lse.flatten(0, 1)[..., None]
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1]):
        k_levels, v_levels = (with_means(x, found, heads) for x, found in zip((k, v), levels, strict=True))
        lists, of_lse = [level[heads] for level in kept], None if grad_lse is None else grad_lse[heads]
        sums = grad_levels(dq[heads], lists, grad_o[heads], of_lse, q[heads], k_levels, v_levels, scale)
        for to, own, (first, *coarse) in ((dk, of_k, sums[0]), (dv, of_v, sums[1])):
            to[heads] = first[:, : to.shape[1]]
            for level, total in zip(ENRICHED, coarse, strict=True):
                mean = own[level - 1].flatten(0, 1)
                mean[heads] = total[:, : mean.shape[1]].to(mean.dtype)
    return [*grads, *means]
