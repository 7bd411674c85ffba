"""What a call gets wrong and no shape tells: tokens where heads belong, and a part of the tokens for all of them."""

import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.module import HEAD_DIM, OPERATOR

# ---- spliced into every module from here on

MANY_HEADS = 128
"""More heads than models have; more than that may be tokens."""

LAYOUT_WARNINGS: list[str] = []
"""What was said of layouts in this process: one warning is enough."""

DENSE_ATTENTION = torch._C._nn.scaled_dot_product_attention  # type: ignore[attr-defined]
"""What torch's context_parallel replaces in torch.nn.functional for as long as it lasts."""


def check_layout(layout: Any) -> None:
    """One clear error for a layout that is not [B, H, N, D]."""
    if layout != "BHND":
        raise ValueError(
            f"layout: expected 'BHND' or None, got {layout!r}; of [B, N, H, D] pass x.transpose(1, 2), a view"
        )


def look_at_layout(q: torch.Tensor, k: torch.Tensor) -> None:
    """One warning for keys that look like [B, N, H, D]: far more heads than tokens, whose rows lie together.

    What is [B, H, N, D] because it was transposed has the rows of a token together. Of other lengths than those of the
    keys, queries [B, M, H, D] are an error anyway.
    """
    _, heads, tokens, _ = shape = k.shape
    if LAYOUT_WARNINGS or heads <= 4 * tokens or q.shape != shape or k.stride(1) < k.stride(2):
        return
    d = HEAD_DIM.value
    text = (
        f"{OPERATOR}: k of shape {list(shape)} is read as [B, H, N, {d}], {heads} heads of {tokens} tokens. If it is "
        f"[B, N, H, {d}], {tokens} heads of {heads} tokens, pass x.transpose(1, 2) of q, k and v, which is a view; "
        "if it is right, layout='BHND' says so"
    )
    warnings.warn(text, UserWarning, stacklevel=3)
    LAYOUT_WARNINGS.append(text)


def refuse_context_parallel(q: torch.Tensor, k: torch.Tensor) -> None:
    """One clear error inside torch's context_parallel, where every process has a part of the tokens.

    It replaces torch's own attention alone. Others may replace that too, which is nobody's business here. Queries that
    are fewer than keys, or padded for a query_offset, are those of a caller who takes care of it.
    """
    inside = "context_parallel" in getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", "")
    if inside and q.shape[2] == k.shape[2]:
        raise NotImplementedError(
            f"{OPERATOR}: called inside torch's context_parallel, which shards the tokens and makes up for it in "
            f"scaled_dot_product_attention alone: queries would attend to the {k.shape[2]} keys of this process alone. "
            "Shard by batch or heads, outside that context, or gather k and v and say by query_offset where q begins"
        )
