"""A picture among other tokens: attention in the order of its grid, what stands before and after it as globals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llsa_gen import order
from llsa_gen.joint import joint_attention
from llsa_gen.spec import Spec

__all__ = ["attend", "repeat_heads"]


def attend(
    attention: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: Spec,
    grid: Sequence[int] | None = None,
    first: int = 0,
    last: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Attend: q, k, v [B, H, first + N + last, D] to o, in the order of the input, differentiable.

    Args:
        attention: what `compile` gives for `spec`.
        q, k, v: of one shape: `first` global tokens, the N tokens of the grid in raster order, `last` global tokens.
        grid: shape of the grid, such as (height, width); None where the N tokens are a sequence, and stay as they are.
        first, last: how many tokens are global: they see and are seen by all.
        scale: the factor of the logits, 1/sqrt(D) unless given.
    """
    if grid is None or len(grid) < 2:
        return joint_attention(attention, q, k, v, globals_first=first, globals_last=last, scale=scale)
    with torch.inference_mode(False):  # or a backward pass could not keep them
        permutation, inverse = _places(grid, spec, first, last, q.device)
    q, k, v = (x.index_select(2, permutation) for x in (q, k, v))
    o = joint_attention(attention, q, k, v, globals_first=first, globals_last=last, scale=scale)
    return o.index_select(2, inverse)


def _places(grid: Sequence[int], spec: Spec, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The order of the grid and its inverse among global tokens, which stay in place."""
    made = order.grid(grid, spec, device=device)
    if not first and not last:
        return made.permutation, made.inverse
    before = torch.arange(first, device=device)
    after = torch.arange(last, device=device) + (first + math.prod(grid))
    return torch.cat([before, made.permutation + first, after]), torch.cat([before, made.inverse + first, after])


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H_kv, N, D] with the head of each group repeated for its query heads: [B, H, N, D] copies."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
