"""Attention over several sets of keys: `merge` makes one of what was attended apart."""

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys together, from those over disjoint parts of them: exact, and differentiable.

        lse = log sum_n exp(lse_n)        o = sum_n exp(lse_n - lse) o_n

    A part with an lse of -inf (no keys) takes no part in that query, whatever its o holds, and gets no gradient there.
    A query that has no other has o = 0 and lse = -inf. Sums are float32, or float64 if a part is.

    Args:
        parts: one or more of (o, lse), as `attention(..., return_lse=True)` gives them: o [B, H, M, D] and lse
            [B, H, M], all of the same shapes and on one device. Either gradient may be missing.

    Returns:
        o [B, H, M, D] in the dtype of the first o, and lse [B, H, M], float32 or float64.

    Raises:
        TypeError, ValueError: naming the part, what came and what was expected.
    """
    _check(parts)
    wide = torch.float64 if any(x.dtype == torch.float64 for part in parts for x in part) else torch.float32
    present = torch.stack([lse != float("-inf") for _, lse in parts])
    anything = present.any(0)
    # where all are -inf, differences of them would be no numbers: 0 stands for them, and is thrown away at the end
    lse = torch.stack([lse.to(wide) for _, lse in parts]).masked_fill(~anything, 0.0)
    total = lse.logsumexp(0)
    weight = lse.softmax(0).masked_fill(~present, 0.0)  # not exp(lse - total), for total is rounded
    merged: Tensor | None = None
    for number, (o, _) in enumerate(parts):
        part = weight[number][..., None] * o.to(wide).masked_fill(~present[number][..., None], 0.0)
        merged = part if merged is None else merged + part
    assert merged is not None  # `_check` wants a part
    return merged.to(parts[0][0].dtype), total.masked_fill(~anything, float("-inf"))


def _check(parts: tuple[tuple[Tensor, Tensor], ...]) -> None:
    if not parts:
        raise ValueError("merge: expected one or more of (o, lse), got none")
    for number, part in enumerate(parts):
        where = f"merge, part {number}"
        if not isinstance(part, tuple | list) or len(part) != 2 or not all(isinstance(x, Tensor) for x in part):
            raise TypeError(f"{where}: expected a pair of tensors (o, lse), got {type(part).__name__}")
        (o, lse), first = part, parts[0][0]
        if not (o.is_floating_point() and lse.is_floating_point()):
            raise TypeError(f"{where}: expected floating dtypes, got {o.dtype} and {lse.dtype}")
        if o.ndim != 4 or o.shape != first.shape or lse.shape != o.shape[:3]:
            shapes = [[*first.shape], [*first.shape[:3]]] if first.ndim == 4 else ["[B, H, M, D]", "[B, H, M]"]
            raise ValueError(
                f"{where}: expected o {shapes[0]} and lse {shapes[1]}, got {[*o.shape]} and {[*lse.shape]}"
            )
        if not o.device == lse.device == first.device:
            raise ValueError(f"{where}: expected tensors on {first.device}, got {o.device} and {lse.device}")
