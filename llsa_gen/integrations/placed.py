"""The compiled operator in the place of dense attention: a picture, with text before and after it, in its order.

Rows of the picture are sparse, with all text as global tokens. Rows of text are the model's own dense attention, with
its own mask, so that they are what they were, padding included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llsa_gen import order
from llsa_gen.integrations.sequences import Masks, Place

__all__ = ["Run", "attend"]


@dataclass(frozen=True)
class Run:
    """One call of the operator: its arguments, and what it gave. Tokens are in the order of the grid."""

    attention: Any
    place: Place
    q: Tensor
    """Of the picture, as k, v and o: [B, H, N, D]."""
    k: Tensor
    v: Tensor
    k_global: Tensor | None
    """Of the text, as v_global: [B, H, T, D]."""
    v_global: Tensor | None
    global_mask: Tensor | None
    scale: float | None
    o: Tensor


def attend(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, place: Place, masks: Masks, mask: Tensor | None,
    scale: float | None, native: Callable[..., Tensor], probe: Callable[[Run], None] | None = None,
) -> Tensor:  # fmt: skip
    """o [B, H, S, D] of q [B, H, S, D] and k, v of as many heads or a divisor of them, in the order of the input.

    q may be that of the picture alone, and then o is: it sees text, and no text asks.

    Args:
        attention: what `llsa_gen.compile` gives.
        place: where the picture is among the S tokens.
        masks, mask: what `sequences.look` found in the mask, and the mask.
        native: torch's scaled_dot_product_attention, for the rows of text.
        probe: shown the call, if given.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if masks.picture is not None:
        torch.ops.aten._assert_async.msg(
            masks.picture.all(), "attn_mask: it leaves out picture tokens: do not compile the model"
        )
    after = place.first + place.cells
    alone = q.shape[2] != k.shape[2]
    parts = (x if alone and x is q else x[:, :, place.first : after] for x in (q, k, v))
    placed = None if len(place.grid) == 1 else order.grid(place.grid, attention.spec, device=q.device)
    if placed is not None:  # a line is in order
        parts = (x.index_select(2, placed.permutation) for x in parts)
    q_picture, k_picture, v_picture = parts
    more: dict[str, Any] = {}
    if place.first or place.last:
        more = {"k_global": _text(k, place), "v_global": _text(v, place), "global_mask": masks.text}
    o_picture = attention(q_picture, k_picture, v_picture, scale=scale, **more)
    if probe is not None:
        k_global, v_global, global_mask = (more.get(name) for name in ("k_global", "v_global", "global_mask"))
        probe(Run(attention, place, q_picture, k_picture, v_picture, k_global, v_global, global_mask, scale, o_picture))
    if placed is not None:
        o_picture = o_picture.index_select(2, placed.inverse)
    if alone or not more:
        return o_picture
    if mask is not None and mask.ndim > 1 and mask.shape[-2] != 1:
        mask = _text(mask, place)
    o_text = native(_text(q, place), k, v, attn_mask=mask, scale=scale)
    return torch.cat([o_text[:, :, : place.first], o_picture, o_text[:, :, place.first :]], 2)


def _text(x: Tensor, place: Place) -> Tensor:
    """The tokens of x [..., S, D] that are not the picture's."""
    first, last = x[..., : place.first, :], x[..., place.first + place.cells :, :]
    if not place.last:
        return first
    return last if not place.first else torch.cat([first, last], -2)
