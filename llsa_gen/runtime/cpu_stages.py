"""The stages of attention in torch, for the CPU: selection from means, attention along given lists."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.cpu import attend_heads, grad_levels, select_levels, slices_of_heads
    from llsa_gen.runtime.launch_plan import empty_like
    from llsa_gen.runtime.module import ENRICHED, HEAD_DIM, LEVELS, SPANS

# ---- spliced into every module from here on


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
