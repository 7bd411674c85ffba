"""One attention from several over disjoint keys, by their ``lse``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys together, from those over parts of them: differentiable by autograd.

        lse = log sum_n exp(lse_n)        o = sum_n exp(lse_n - lse) o_n

    A part with an lse of -inf takes no part in that query, whatever its o holds, and receives no gradient there. A
    query that has no other has ``o = 0`` and ``lse = -inf``.

    Args:
        parts: one or more of (o, lse), o ``[B, H, M, D]`` and lse ``[B, H, M]``, floating, all of the same shapes.

    Returns:
        o, float64 ``[B, H, M, D]``, and lse, float64 ``[B, H, M]``.

    Raises:
        TypeError or ValueError: naming the part, what came and what was expected.
    """
    _check_parts(parts)
    o, lse = (torch.stack([part[i].double() for part in parts]) for i in range(2))
    present = lse != -math.inf
    # Where all are -inf, differences of them would be NaN: zeros stand in, and what comes of them is thrown away.
    anything = present.any(dim=0)
    lse = lse.masked_fill(~anything, 0)
    total = lse.logsumexp(dim=0)
    share = (lse - total).exp()  # 0 for a part of -inf
    merged = (share[..., None] * o.masked_fill(~present[..., None], 0)).sum(dim=0)
    return merged, total.masked_fill(~anything, -math.inf)


def _check_parts(parts: tuple[tuple[Tensor, Tensor], ...]) -> None:
    if not parts:
        raise ValueError("merge: expected one or more of (o, lse), got none")
    for number, part in enumerate(parts):
        if not isinstance(part, (list, tuple)) or len(part) != 2 or not all(isinstance(x, Tensor) for x in part):
            raise TypeError(f"merge, part {number}: expected a pair of tensors (o, lse), got {type(part).__name__}")
        o, lse = part
        if not (o.is_floating_point() and lse.is_floating_point()):
            raise TypeError(f"merge, part {number}: expected floating dtypes, got {o.dtype} and {lse.dtype}")
        first = parts[0][0]
        if o.ndim != 4 or o.shape != first.shape or lse.shape != o.shape[:3]:
            expected = "[B, H, M, D] and [B, H, M]"
            if first.ndim == 4:
                expected = f"{list(first.shape)} and {list(first.shape[:3])}"
            raise ValueError(f"merge, part {number}: expected {expected}, got {list(o.shape)} and {list(lse.shape)}")
        if not o.device == lse.device == first.device:
            raise ValueError(f"merge, part {number}: expected {first.device}, got {o.device} and {lse.device}")
