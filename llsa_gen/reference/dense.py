"""The oracle: log-linear sparse attention as one dense float64 softmax over all that a query may attend to.

The columns are ``[tokens | level 1 | ... | level L | globals]``, ``N + T_1 + ... + T_L + G`` of them.

Everything else is judged by this file, so it says the math as plainly as it can and shares nothing with the compiler.
For every query it writes the whole row of weights, zero where the query does not attend, and takes one softmax:

    o_i = sum_j w_ij exp(s q_i.k_j) v_j / sum_j w_ij exp(s q_i.k_j)        lse_i = log sum_j w_ij exp(s q_i.k_j)

with j over the columns. A query that attends to nothing has ``o = 0``, ``lse = -inf`` and no gradient. Time and memory
are quadratic. What the queries keep is an argument, so that attention is checked apart from selection;
`llsa_gen.reference.selection` has the notation, the pooling and the selection; `llsa_gen.reference` offers the public
functions of both.
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
    check_count,
    check_selection,
    check_tensor,
    check_tensors,
    children,
    covered_tokens,
    kept_mask,
    kept_width,
    num_tokens,
    pool,
    query_token,
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


def _check_indices(spec: Spec, indices: Sequence[Tensor], q: Tensor, n: int, query_offset: int) -> None:
    if not isinstance(indices, (list, tuple)):
        raise TypeError(f"indices: expected {spec.num_levels} tensors, one a level, got {type(indices).__name__}")
    if len(indices) != spec.num_levels:
        raise ValueError(f"indices: expected {spec.num_levels} tensors, one a level, got {len(indices)}")
    for level, ids in enumerate(indices, start=1):
        if not isinstance(ids, Tensor):
            raise TypeError(f"indices, level {level}: expected a tensor of integers, got {type(ids).__name__}")
        rows, tokens = num_tokens(spec, level, q.shape[2], query_offset), num_tokens(spec, level, n)
        if ids.ndim != 4 or ids.shape[:3] != (*q.shape[:2], rows) or ids.is_floating_point():
            expected = [*q.shape[:2], rows, "*"]
            raise ValueError(f"indices, level {level}: expected integers {expected}, got {ids.dtype} {list(ids.shape)}")
        if ((ids < -1) | (ids >= tokens)).any():
            raise ValueError(
                f"indices, level {level}: expected -1 or ids below {tokens}, got {ids.min()} to {ids.max()}"
            )


def _globals(
    spec: Spec, q: Tensor, k_global: Tensor | None, v_global: Tensor | None, global_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that everybody sees, checked: k and v ``[B, H, G, D]``, mask bool ``[B, G]``; ``G = 0`` without any.

    What a masked token holds is replaced by zeros. It has weight 0, but 0 times infinity is no number.
    """
    if k_global is None or v_global is None:
        if k_global is not v_global or global_mask is not None:
            given = {"k_global": k_global, "v_global": v_global, "global_mask": global_mask}
            names = [name for name, x in given.items() if x is not None]
            raise ValueError(f"k_global, v_global: expected both or neither, got {' and '.join(names)} alone")
        k_global = v_global = q[:, :, :0]
    for name, x in (("k_global", k_global), ("v_global", v_global)):
        check_tensor(name, "G", x, q, spec.head_dim)
    if k_global.shape != v_global.shape:
        raise ValueError(
            f"v_global: expected the shape of k_global, {list(k_global.shape)}, got {list(v_global.shape)}"
        )
    mask = check_mask(global_mask, q, k_global.shape[2])
    absent = ~mask[:, None, :, None]
    return k_global.masked_fill(absent, 0), v_global.masked_fill(absent, 0), mask


def check_mask(global_mask: Tensor | None, q: Tensor, tokens: int) -> Tensor:
    """The mask of ``tokens`` global tokens, all true for None; TypeError or ValueError unless it is bool ``[B, G]``."""
    if global_mask is None:
        return torch.ones(q.shape[0], tokens, dtype=torch.bool, device=q.device)
    if not isinstance(global_mask, Tensor) or global_mask.dtype != torch.bool:
        found = global_mask.dtype if isinstance(global_mask, Tensor) else type(global_mask).__name__
        raise TypeError(f"global_mask: expected a bool tensor [B, G], got {found}")
    if (tuple(global_mask.shape), global_mask.device) != ((q.shape[0], tokens), q.device):
        expected = f"{[q.shape[0], tokens]} on {q.device}"
        raise ValueError(f"global_mask: expected {expected}, got {list(global_mask.shape)} on {global_mask.device}")
    return global_mask


def weight_rows(
    spec: Spec,
    indices: Sequence[Tensor],
    rows: Tensor,
    n: int,
    *,
    query_offset: int = 0,
    global_mask: Tensor | None = None,
) -> Tensor:
    """``w_ij`` of the queries `rows`: float64 ``[B, H, len(rows), N + T_1 + ... + T_L + G]``, zero where not attended.

    Args:
        indices: L integer tensors ``[B, H, T_l(M), *]``, level 1 first, -1 for none.
        rows: int64 ``[R]``, query tokens.
        n: number of key tokens, ``N``.
        query_offset: where in a sequence query 0 stands.
        global_mask: bool ``[B, G]``, true where a global token takes part; without one ``G = 0``.

    Raises:
        TypeError or ValueError: if `query_offset` is not an integer of at least 0.
    """
    check_count("query_offset", query_offset)
    # The tokens: those of the blocks that the query's level-1 token keeps, each with weight 1.
    kept = indices[0][:, :, query_token(spec, 1, rows, query_offset)]
    parts = [children(spec, 1, kept_mask(kept, num_tokens(spec, 1, n)), n).double()]
    # Every enriched level: what was a candidate there for the query's token of that level.
    for level in range(1, spec.num_levels + 1):
        coarser = indices[level] if level < spec.num_levels else None
        above = query_token(spec, level, rows, query_offset)
        attended = candidate_rows(spec, level, coarser, above, n, indices[0], query_offset).double()
        if level not in spec.enriched_levels:
            attended = torch.zeros_like(attended)
        weight = covered_tokens(spec, level, n, rows.device) if spec.reweight else 1
        parts.append(attended * weight)
    # What everybody sees, each with weight 1.
    if global_mask is not None:
        parts.append(global_mask[:, None, None].expand(-1, indices[0].shape[1], len(rows), -1).double())
    return torch.cat(parts, dim=-1)


def _columns(spec: Spec, x: Tensor, x_global: Tensor, round_to: torch.dtype) -> Tensor:
    """``[tokens | level 1 | ... | level L | globals]``: float64 ``[B, H, N + T_1 + ... + T_L + G, D]``."""
    coarse = [pool(x, spec.span(level), round_to=round_to) for level in range(1, spec.num_levels + 1)]
    return torch.cat([x.double(), *coarse, x_global.double()], dim=2)


def weighted_softmax(q: Tensor, keys: Tensor, values: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o and lse of the formula at the head of this file, computed by torch in the dtype of `q`.

    Args:
        q: ``[B, H, R, D]``.
        keys, values: ``[B, H, J, D]``, of the dtype of `q`; ``J`` may be 0.
        weights: ``[B, H, R, J]``, at least 0. A row without a positive weight has ``o = 0`` and ``lse = -inf``.
        scale: factor of the logits.

    Returns:
        o ``[B, H, R, D]`` and lse ``[B, H, R]``.
    """
    logits = scale * (q @ keys.mT) + weights.log().to(q.dtype)  # log 0 = -inf: not attended
    # A row of -inf alone would have NaN for its softmax, and for every gradient. Any finite numbers do in its place:
    # what comes of them is thrown away, and no gradient gets back to them.
    nothing = ~(weights > 0).any(dim=-1)
    logits = logits.masked_fill(nothing[..., None], 0)
    p = logits.softmax(dim=-1).masked_fill(nothing[..., None], 0)
    return p @ values, logits.logsumexp(dim=-1).masked_fill(nothing, -math.inf)


def softmax_scale(spec: Spec, scale: float | None) -> float:
    """The factor of the logits: `scale`, or ``1/sqrt(D)`` for None; TypeError or ValueError if it is not finite."""
    if scale is None:
        return 1.0 / math.sqrt(spec.head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return scale


def _attend(
    source: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    indices: Sequence[Tensor] | None,
    scale: float | None,
    shared: tuple[Tensor | None, Tensor | None, Tensor | None],
    query_offset: int,
    dtype: torch.dtype,
    round_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse of the queries `rows`, of all for None, computed in `dtype`; `shared`: k_global, v_global, the mask."""
    spec = load(source)
    check_tensors(spec, q, k, v)
    check_count("query_offset", query_offset)
    k_global, v_global, global_mask = _globals(spec, q, *shared)
    n = k.shape[2]
    if indices is None:
        indices = select(spec, q, k, query_offset=query_offset)
    _check_indices(spec, indices, q, n, query_offset)
    round_to = round_to or k.dtype
    keys, values = _columns(spec, k, k_global, round_to), _columns(spec, v, v_global, round_to)
    if rows is None:
        rows = torch.arange(q.shape[2], device=q.device)
    else:
        rows = rows.to(q.device, torch.int64)
        q = q[:, :, rows]
    weights = weight_rows(spec, indices, rows, n, query_offset=query_offset, global_mask=global_mask)
    return weighted_softmax(q.to(dtype), keys.to(dtype), values.to(dtype), weights, softmax_scale(spec, scale))


@overload
def attention(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    indices: Sequence[Tensor] | None = None,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    global_mask: Tensor | None = None,
    query_offset: int = 0,
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
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    global_mask: Tensor | None = None,
    query_offset: int = 0,
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
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    global_mask: Tensor | None = None,
    query_offset: int = 0,
    return_lse: bool = False,
    round_to: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of `spec`, dense and in float64, differentiable by autograd with the selection held fixed.

    Args:
        q: ``[B, H, M, D]``, ``M >= 0``.
        k, v: ``[B, H, N, D]``, ``N >= 0``, of the dtype of `q`.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        indices: L integer tensors ``[B, H, T_l(M), *]``, level 1 first, -1 ignored; `select` by default.
        k_global, v_global: ``[B, H, G, D]``, ``G >= 0``, of the dtype of `q`: tokens that every query attends to.
        global_mask: bool ``[B, G]``, true where a global token takes part; all do by default. The others are not read.
        query_offset: where in a sequence query 0 stands, for the blocks of queries; at least 0.
        return_lse: also return the natural logarithm of the weighted sum of exponentials.
        round_to: the dtype to which pooled keys and values are rounded, that of the tensors by default. Autograd rounds
            the gradients of half-precision tensors; for gradients in float64 pass ``q.double()`` and so on, with the
            indices, and the original dtype here.

    Returns:
        o, float64 ``[B, H, M, D]``; with `return_lse` also lse, float64 ``[B, H, M]``. A query that attends to nothing
        has ``o = 0``, ``lse = -inf`` and zero gradients. Memory: ``M (N + sum T_l + G)``.

    Raises:
        TypeError or ValueError: naming the argument, what came and what was expected.
    """
    shared = (k_global, v_global, global_mask)
    o, lse = _attend(spec, q, k, v, None, indices, scale, shared, query_offset, torch.float64, round_to)
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
    *,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    global_mask: Tensor | None = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """`attention` of a sample of the queries, forward only: memory ``len(rows) (N + sum T_l + G)``, for large ``N``.

    Args:
        rows: integer ``[R]``, the queries to compute.
        q, k, v, indices, scale, k_global, v_global, global_mask, query_offset: as for `attention`, with all queries.

    Returns:
        o, float64 ``[B, H, R, D]``, and lse, float64 ``[B, H, R]``.

    Raises:
        TypeError or ValueError: as `attention`.
    """
    shared = (k_global, v_global, global_mask)
    return _attend(spec, q, k, v, rows, indices, scale, shared, query_offset, torch.float64)


def dense_in_dtype(
    spec: SpecSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Sequence[Tensor],
    scale: float | None = None,
    *,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    global_mask: Tensor | None = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The same dense formula with products, logits, softmax and sums evaluated by torch in the dtype of the inputs.

    Its error against `attention` is the yardstick on arbitrary inputs: no implementation may have more than twice as
    much, in o as in the gradients that autograd derives from it. The arguments are those of `attention`.

    Returns:
        o ``[B, H, M, D]`` and lse ``[B, H, M]``, in the dtype of `q`.

    Raises:
        TypeError or ValueError: as `attention`.
    """
    shared = (k_global, v_global, global_mask)
    return _attend(spec, q, k, v, None, indices, scale, shared, query_offset, q.dtype)


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
