"""Joint attention: text and image in one sequence, the text seen by everybody and seeing everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from llsa_gen.reference.dense import attention, check_mask, softmax_scale, weighted_softmax
from llsa_gen.reference.selection import SpecSource, check_count, check_tensors
from llsa_gen.spec import load

__all__ = ["joint_attention"]


@overload
def joint_attention(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    globals_first: int = 0,
    globals_last: int = 0,
    global_mask: Tensor | None = None,
    scale: float | None = None,
    indices: Sequence[Tensor] | None = None,
    return_lse: Literal[False] = False,
    round_to: torch.dtype | None = None,
) -> Tensor: ...


@overload
def joint_attention(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    globals_first: int = 0,
    globals_last: int = 0,
    global_mask: Tensor | None = None,
    scale: float | None = None,
    indices: Sequence[Tensor] | None = None,
    return_lse: Literal[True],
    round_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]: ...


def joint_attention(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    globals_first: int = 0,
    globals_last: int = 0,
    global_mask: Tensor | None = None,
    scale: float | None = None,
    indices: Sequence[Tensor] | None = None,
    return_lse: bool = False,
    round_to: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of N image tokens with T text tokens as globals, and dense attention of the text to all of both.

    Args:
        q, k, v: ``[B, H, T + N, D]``: `globals_first` text tokens, the image, `globals_last` text tokens. The blocks
            are those of the image alone, cut from its first token.
        globals_first, globals_last: how many, at least 0 each; ``T`` is their sum.
        global_mask: bool ``[B, T]``, true where a text token takes part; all do by default. First the first ones, then
            the last ones. The others are not read.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        indices: of the image, L integer tensors ``[B, H, ceil(N / P_l), *]``, level 1 first, -1 ignored; `select` by
            default.
        return_lse, round_to: as for `attention`.

    Returns:
        o, float64 ``[B, H, T + N, D]``, in the order of the input; with `return_lse` also lse, float64
        ``[B, H, T + N]``. A text token that takes no part has ``o = 0``, ``lse = -inf`` and zero gradients.

    Raises:
        TypeError or ValueError: naming the argument, what came and what was expected.
    """
    spec = load(spec)
    check_tensors(spec, q, k, v)
    if q.shape != k.shape:
        raise ValueError(f"k: expected the shape of q, {list(q.shape)}, got {list(k.shape)}")
    check_count("globals_first", globals_first)
    check_count("globals_last", globals_last)
    text = globals_first + globals_last
    if text > q.shape[2]:
        raise ValueError(f"globals_first + globals_last: expected at most {q.shape[2]} tokens, got {text}")
    global_mask = check_mask(global_mask, q, text)
    lengths = [globals_first, q.shape[2] - text, globals_last]

    # What a token that takes no part holds is replaced by zeros: it has weight 0, but 0 times infinity is no number.
    first, last = global_mask.split([globals_first, globals_last], dim=1)
    present = torch.cat([first, first.new_ones(q.shape[0], lengths[1]), last], dim=1)
    q, k, v = (x.masked_fill(~present[:, None, :, None], 0) for x in (q, k, v))

    (q_first, q_image, q_last), (k_first, k_image, k_last), (v_first, v_image, v_last) = (
        x.split(lengths, dim=2) for x in (q, k, v)
    )
    o_image, lse_image = attention(
        spec,
        q_image,
        k_image,
        v_image,
        scale=scale,
        indices=indices,
        k_global=torch.cat([k_first, k_last], dim=2),
        v_global=torch.cat([v_first, v_last], dim=2),
        global_mask=global_mask,
        return_lse=True,
        round_to=round_to,
    )
    # A text token sees every token that takes part, with weight 1; one that takes no part sees none.
    weights = (global_mask[:, None, :, None] & present[:, None, None, :]).expand(-1, q.shape[1], -1, -1).double()
    q_text = torch.cat([q_first, q_last], dim=2).double()
    o_text, lse_text = weighted_softmax(q_text, k.double(), v.double(), weights, softmax_scale(spec, scale))
    o, lse = (
        torch.cat([text[:, :, :globals_first], image, text[:, :, globals_first:]], dim=2)
        for text, image in ((o_text, o_image), (lse_text, lse_image))
    )
    return (o, lse) if return_lse else o
