"""The oracle: log-linear sparse attention as one dense float64 softmax over ``[tokens | level 1 | ... | level L]``.

Everything else is judged by this file, so it says the math as plainly as it can and shares nothing with the compiler.
For every query it writes the whole row of weights, zero where the query does not attend, and takes one softmax:

    o_i = sum_j w_ij exp(s q_i.k_j) v_j / sum_j w_ij exp(s q_i.k_j)        lse_i = log sum_j w_ij exp(s q_i.k_j)

with j over the tokens and the pooled tokens of all levels. Time and memory are quadratic. What the queries keep is an
argument, so that attention is checked apart from selection; `llsa_gen.reference.selection` has the notation, the
pooling and the selection; `llsa_gen.reference` offers the public functions of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from llsa_gen.reference.selection import (
    SpecSource,
    candidate_rows,
    candidates,
    check_selection,
    check_tensors,
    children,
    covered_tokens,
    kept_mask,
    kept_width,
    num_tokens,
    pool,
    select,
)
from llsa_gen.spec import Spec, load

__all__ = [
    "attention",
    "attention_rows",
    "candidates",
    "check_selection",
    "covered_tokens",
    "dense_in_dtype",
    "kept_width",
    "num_tokens",
    "pool",
    "relative_error",
    "select",
    "tolerance",
    "weight_rows",
]

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest `relative_error` of o, dq, dk, dv that is accepted on standard normal inputs, by dtype."""


def _check_indices(spec: Spec, indices: Sequence[Tensor], q: Tensor, n: int) -> None:
    if not isinstance(indices, (list, tuple)):
        raise TypeError(f"indices: expected {spec.num_levels} tensors, one a level, got {type(indices).__name__}")
    if len(indices) != spec.num_levels:
        raise ValueError(f"indices: expected {spec.num_levels} tensors, one a level, got {len(indices)}")
    for level, ids in enumerate(indices, start=1):
        if not isinstance(ids, Tensor):
            raise TypeError(f"indices, level {level}: expected a tensor of integers, got {type(ids).__name__}")
        rows, tokens = num_tokens(spec, level, q.shape[2]), num_tokens(spec, level, n)
        if ids.ndim != 4 or ids.shape[:3] != (*q.shape[:2], rows) or ids.is_floating_point():
            expected = [*q.shape[:2], rows, "*"]
            raise ValueError(f"indices, level {level}: expected integers {expected}, got {ids.dtype} {list(ids.shape)}")
        if ((ids < -1) | (ids >= tokens)).any():
            raise ValueError(
                f"indices, level {level}: expected -1 or ids below {tokens}, got {ids.min()} to {ids.max()}"
            )


def weight_rows(spec: Spec, indices: Sequence[Tensor], rows: Tensor, n: int) -> Tensor:
    """``w_ij`` of the queries `rows`: float64 ``[B, H, len(rows), N + T_1 + ... + T_L]``, zero where not attended.

    Args:
        indices: L integer tensors ``[B, H, ceil(M / P_l), *]``, level 1 first, -1 for none.
        rows: int64 ``[R]``, query tokens.
        n: number of key tokens, ``N``.
    """
    # The tokens: those of the blocks that the query's level-1 token keeps, each with weight 1.
    kept_blocks = kept_mask(indices[0][:, :, rows // spec.span(1)], num_tokens(spec, 1, n))
    parts = [children(spec, 1, kept_blocks, n).double()]
    # Every enriched level: what was a candidate there for the query's token of that level.
    for level in range(1, spec.num_levels + 1):
        coarser = indices[level] if level < spec.num_levels else None
        attended = candidate_rows(spec, level, coarser, rows // spec.span(level), n, indices[0]).double()
        if level not in spec.enriched_levels:
            attended = torch.zeros_like(attended)
        weight = covered_tokens(spec, level, n, rows.device) if spec.reweight else 1
        parts.append(attended * weight)
    return torch.cat(parts, dim=-1)


def _with_coarse(spec: Spec, x: Tensor, round_to: torch.dtype) -> Tensor:
    """``[tokens | level 1 | ... | level L]``: float64 ``[B, H, N + T_1 + ... + T_L, D]``."""
    coarse = [pool(x, spec.span(level), round_to=round_to) for level in range(1, spec.num_levels + 1)]
    return torch.cat([x.double(), *coarse], dim=2)


def _weighted_softmax(q: Tensor, keys: Tensor, values: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o and lse of the formula at the head of this file, computed by torch in the dtype of `q`."""
    if not (weights > 0).any(dim=-1).all():
        raise ValueError("indices: expected every query to attend to something, got a query that keeps nothing")
    logits = scale * (q @ keys.mT) + weights.log().to(q.dtype)  # log 0 = -inf: not attended
    return logits.softmax(dim=-1) @ values, logits.logsumexp(dim=-1)


def _scale(spec: Spec, scale: float | None) -> float:
    if scale is None:
        return 1.0 / math.sqrt(spec.head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return scale


@overload
def attention(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    indices: Sequence[Tensor] | None = None,
    return_lse: Literal[False] = False,
    round_to: torch.dtype | None = None,
) -> Tensor: ...


@overload
def attention(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    indices: Sequence[Tensor] | None = None,
    return_lse: Literal[True],
    round_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    indices: Sequence[Tensor] | None = None,
    return_lse: bool = False,
    round_to: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of `spec`, dense and in float64, differentiable by autograd with the selection held fixed.

    Args:
        q: ``[B, H, M, D]``.
        k, v: ``[B, H, N, D]``, of the dtype of `q`.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        indices: L integer tensors ``[B, H, ceil(M / P_l), *]``, level 1 first, -1 ignored; `select` by default.
        return_lse: also return the natural logarithm of the weighted sum of exponentials.
        round_to: the dtype to which pooled keys and values are rounded, that of the tensors by default. Autograd rounds
            the gradients of half-precision tensors; for gradients in float64 pass ``q.double()`` and so on, with the
            indices, and the original dtype here.

    Returns:
        o, float64 ``[B, H, M, D]``; with `return_lse` also lse, float64 ``[B, H, M]``. Memory: ``M (N + sum T_l)``.
    """
    spec = load(spec)
    check_tensors(spec, q, k, v)
    if indices is None:
        indices = select(spec, q, k)
    _check_indices(spec, indices, q, k.shape[2])
    round_to = round_to or k.dtype
    keys, values = _with_coarse(spec, k, round_to), _with_coarse(spec, v, round_to)
    weights = weight_rows(spec, indices, torch.arange(q.shape[2], device=q.device), k.shape[2])
    o, lse = _weighted_softmax(q.double(), keys, values, weights, _scale(spec, scale))
    return (o, lse) if return_lse else o


@torch.no_grad()
def attention_rows(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    indices: Sequence[Tensor],
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` for a sample of the queries, forward only: memory ``len(rows) (N + sum T_l)``, for large ``N``.

    Args:
        q, k, v, indices, scale: as for `attention`, all queries included.
        rows: integer ``[R]``, the queries to compute.

    Returns:
        o, float64 ``[B, H, R, D]``, and lse, float64 ``[B, H, R]``.
    """
    spec = load(spec)
    check_tensors(spec, q, k, v)
    _check_indices(spec, indices, q, k.shape[2])
    rows = rows.to(q.device, torch.int64)
    keys, values = _with_coarse(spec, k, k.dtype), _with_coarse(spec, v, v.dtype)
    weights = weight_rows(spec, indices, rows, k.shape[2])
    return _weighted_softmax(q[:, :, rows].double(), keys, values, weights, _scale(spec, scale))


def dense_in_dtype(
    spec: SpecSource, q: Tensor, k: Tensor, v: Tensor, indices: Sequence[Tensor], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same dense formula with products, logits, softmax and sums evaluated by torch in the dtype of the inputs.

    Its error against `attention` is the yardstick on arbitrary inputs: no implementation may have more than twice as
    much, in o as in the gradients that autograd derives from it.

    Returns:
        o ``[B, H, M, D]`` and lse ``[B, H, M]``, in the dtype of `q`.
    """
    spec = load(spec)
    check_tensors(spec, q, k, v)
    _check_indices(spec, indices, q, k.shape[2])
    keys, values = _with_coarse(spec, k, k.dtype).to(k.dtype), _with_coarse(spec, v, v.dtype).to(v.dtype)
    weights = weight_rows(spec, indices, torch.arange(q.shape[2], device=q.device), k.shape[2])
    return _weighted_softmax(q, keys, values, weights, _scale(spec, scale))


def tolerance(dtype: torch.dtype) -> float:
    """The largest accepted `relative_error` of o, dq, dk, dv on standard normal inputs of `dtype`."""
    if dtype not in TOLERANCES:
        raise ValueError(f"tolerance: expected one of {', '.join(map(str, TOLERANCES))}, got {dtype}")
    return TOLERANCES[dtype]


@torch.no_grad()
def relative_error(x: Tensor, ref: Tensor) -> float:
    """``|x - ref| / |ref|`` in the Frobenius norm, in float64: inf if anything is not finite, 0 where both are zero."""
    if x.shape != ref.shape:
        raise ValueError(f"relative_error: expected the shape of the reference, {list(ref.shape)}, got {list(x.shape)}")
    x, ref = x.double(), ref.double().to(x.device)
    if not (x.isfinite().all() and ref.isfinite().all()):
        return math.inf
    error, norm = float((x - ref).norm()), float(ref.norm())
    if error == 0.0:
        return 0.0
    return error / norm if norm > 0.0 else math.inf
