"""The oracle's selection: pooled tokens, hierarchical Top-K by dense score matrices in float64, and its check by value.

Everything is a plain statement of the definition, quadratic in the number of tokens, and shares nothing with the
compiler. The symbols, here and in `llsa_gen.reference`, are those of arXiv 2512.16615: level 0 is the tokens, level 1
the finest coarse level, L the coarsest.

    P_l     tokens that a level-l token spans                 T_l     number of level-l key tokens, ceil(N / P_l)
    c_l(j)  tokens under key token j: P_l, or fewer the last  K_l     key tokens that a level-l query token keeps
    C_l(a)  candidates of query token a of level l            I^(l)(a)  those of them that it keeps

``M`` is the number of query tokens, ``N`` of key tokens; either may be 0, and neither says anything about the other.
Queries are cut into blocks as if query 0 were token `query_offset` of a sequence. Their first block may so be short:

    query i lies under level-l query token     floor((query_offset + i) / P_l) - floor(query_offset / P_l)
    there are                                  floor((query_offset + M - 1) / P_l) - floor(query_offset / P_l) + 1

of them, none if ``M = 0``, and without an offset ``ceil(M / P_l)``. ``T_l(M)`` below is this number. Each is the mean
over the queries that exist. Tensors stay on the device they came on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llsa_gen.spec import Spec, load

SpecSource = str | os.PathLike[str] | Mapping[str, Any] | Spec
"""What `llsa_gen.load` takes, and so every public function here and in `reference` that does an op's work."""

CHUNK_ELEMENTS = 1 << 21
"""Scores that `select` and `check_selection` hold at a time, on a GPU eight times as many: it bounds memory alone."""

UNIT_ROUNDOFF = 2.0**-24
"""The relative error of one operation rounded to float32."""

DOT_ROUNDOFF = 2.0**-22
"""The same for one addition in a dot product: matrix units keep float32 sums, but truncate some of them."""

TINY = torch.finfo(torch.float32).tiny
"""What a device that flushes subnormal float32 numbers to zero may lose in one operation."""


def check_tensors(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises TypeError or ValueError unless q is ``[B, H, M, D]``, k and v ``[B, H, N, D]``, of one floating dtype."""
    for name, tokens, x in (("q", "M", q), ("k", "N", k), ("v", "N", v)):
        check_tensor(name, tokens, x, q, spec.head_dim)
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k, {list(k.shape)}, got {list(v.shape)}")


def check_tensor(name: str, tokens: str, x: Tensor, q: Tensor, head_dim: int) -> None:
    """Raises TypeError or ValueError unless `x` is ``[B, H, tokens, D]``, floating, and all but its length is as of q.

    `tokens` is the symbol of its length, and `q` may be `x` itself.
    """
    expected = f"[B, H, {tokens}, {head_dim}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.ndim != 4 or x.shape[3] != head_dim:
        raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}")
    if (x.dtype, x.device, x.shape[:2]) != (q.dtype, q.device, q.shape[:2]):
        raise ValueError(
            f"{name}: expected the dtype, device and [B, H] of q ({q.dtype}, {q.device}, "
            f"{list(q.shape[:2])}), got {x.dtype}, {x.device}, {list(x.shape[:2])}"
        )


def check_count(name: str, value: int) -> None:
    """Raises TypeError or ValueError unless `value` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer >= 0, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value}")


def num_tokens(spec: Spec, level: int, n: int, offset: int = 0) -> int:
    """How many level-`level` tokens cover the ``n`` tokens from `offset` on; without an offset ``ceil(n / P_l)``."""
    span = spec.span(level)
    return (offset + n - 1) // span - offset // span + 1 if n else 0


def query_token(spec: Spec, level: int, rows: Tensor, offset: int) -> Tensor:
    """The level-`level` query token under which each of the queries `rows` lies: int64 ``[len(rows)]``."""
    return (offset % spec.span(level) + rows) // spec.span(level)


def parent_token(spec: Spec, level: int, tokens: Tensor, offset: int) -> Tensor:
    """The query token of level ``l + 1`` under which each of the level-`level` query tokens lies: int64.

    Both are counted from the first one that has queries. The block of either kind that it is depends on the offset.
    """
    first = offset // spec.span(level)
    return (first % spec.block(level + 1) + tokens) // spec.block(level + 1)


def covered_tokens(spec: Spec, level: int, n: int, device: torch.device | None = None) -> Tensor:
    """``c_l(j) = min(n, (j+1) P_l) - j P_l``: tokens under each level-`level` token; int64 ``[T_l]``."""
    span = spec.span(level)
    first = torch.arange(num_tokens(spec, level, n), device=device) * span
    return (first + span).clamp(max=n) - first


def kept_width(spec: Spec, level: int, n: int) -> int:
    """The most level-`level` key tokens that any query token keeps: the last size of ``indices[level - 1]``."""
    if level == spec.num_levels:
        available = num_tokens(spec, level, n)
    else:
        available = min(num_tokens(spec, level, n), kept_width(spec, level + 1, n) * spec.block(level + 1))
    return min(spec.topk(level), available)


class _RoundStraightThrough(torch.autograd.Function):
    """Rounds float64 values to those of a narrower dtype; the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return round_to_dtype(x, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of `dtype`, as float64; by way of float32, which is how a float32 sum gets rounded."""
    return x if dtype == torch.float64 else x.float().to(dtype).double()


def pool(x: Tensor, span: int, *, offset: int = 0, round_to: torch.dtype | None = None) -> Tensor:
    """The mean of every `span` consecutive tokens, of however many there are for the first and the last.

    Args:
        x: ``[B, H, N, D]``, any floating dtype.
        span: tokens per pooled token, ``P_l >= 1``; may be far larger than ``N``.
        offset: where in a sequence cut into blocks of `span` the first token stands.
        round_to: the dtype to whose values the means are rounded, once; that of `x` by default. float64 rounds nothing.

    Returns:
        float64 ``[B, H, ceil(N / span), D]``, one more where an offset cuts one more. The gradient of a token is that
        of its pooled token divided by the number of tokens pooled there: rounding counts as the identity.
    """
    begun = min(x.shape[2], -offset % span)  # tokens of a block that begins before the first one
    head, x = x[:, :, :begun], x[:, :, begun:]
    n = x.shape[2]
    span = max(1, min(span, n))  # one pooled token covers everything, however large the span
    blocks = -(-n // span)
    padded = pad(x.double(), (0, 0, 0, blocks * span - n))  # zeros add nothing to a sum
    sums = padded.unflatten(2, (blocks, span)).sum(dim=3)
    covered = (n - torch.arange(blocks, device=x.device) * span).clamp(max=span)
    if begun:
        sums = torch.cat([head.double().sum(dim=2, keepdim=True), sums], dim=2)
        covered = pad(covered, (1, 0), value=begun)
    return _RoundStraightThrough.apply(sums / covered[:, None], round_to or x.dtype)


def kept_mask(ids: Tensor, tokens: int) -> Tensor:
    """Bool ``[..., tokens]``, true at the ids in the last dimension of `ids`; -1 names nothing."""
    mask = torch.zeros(*ids.shape[:-1], tokens + 1, dtype=torch.bool, device=ids.device)
    mask.scatter_(-1, torch.where(ids < 0, tokens, ids).long(), True)  # the extra column takes the -1s
    return mask[..., :tokens]


def children(spec: Spec, level: int, mask: Tensor, n: int) -> Tensor:
    """From bool ``[..., T_l]`` over level-`level` key tokens to bool ``[..., T_(l-1)]`` over their children."""
    child = torch.arange(num_tokens(spec, level - 1, n), device=mask.device)
    return mask[..., child // spec.block(level)]


def candidate_rows(
    spec: Spec, level: int, coarser: Tensor | None, rows: Tensor, n: int, like: Tensor, query_offset: int
) -> Tensor:
    """``C_l(a)`` for the level-`level` query tokens `rows`: bool ``[B, H, len(rows), T_l]``.

    `coarser` holds the ids kept at level ``l + 1``; it is not read at level L, where all key tokens are candidates.
    B and H are those of `like`.
    """
    if level == spec.num_levels:
        shape = (*like.shape[:2], len(rows), num_tokens(spec, level, n))
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    assert coarser is not None
    kept_by_parent = coarser[:, :, parent_token(spec, level, rows, query_offset)]
    return children(spec, level + 1, kept_mask(kept_by_parent, num_tokens(spec, level + 1, n)), n)


def candidates(spec: Spec, indices: Sequence[Tensor], n: int, *, query_offset: int = 0) -> list[Tensor]:
    """``C_l(a)``: which key tokens each query token may keep, given what was kept one level up.

    Args:
        indices: L integer tensors ``[B, H, T_l(M), *]`` of kept key tokens, level 1 first, -1 for none.
        n: number of key tokens, ``N``.
        query_offset: where in a sequence query 0 stands.

    Returns:
        L bool tensors ``[B, H, T_l(M), T_l]``, level 1 first.

    Raises:
        TypeError or ValueError: if `query_offset` is not an integer of at least 0.
    """
    check_count("query_offset", query_offset)
    masks: list[Tensor] = []
    for level, ids in enumerate(indices, start=1):
        coarser = indices[level] if level < spec.num_levels else None
        rows = torch.arange(ids.shape[2], device=ids.device)
        masks.append(candidate_rows(spec, level, coarser, rows, n, ids, query_offset))
    return masks


def _row_chunks(rows: int, elements_per_row: int, device: torch.device) -> Iterator[Tensor]:
    step = max(1, CHUNK_ELEMENTS * (1 if device.type == "cpu" else 8) // max(1, elements_per_row))
    for start in range(0, rows, step):
        yield torch.arange(start, min(start + step, rows), device=device)


def _tie_exact_scores(q: Tensor, k: Tensor) -> Tensor:
    """``q . k`` for all pairs, one dimension after the other: equal keys get bit-equal scores wherever they stand.

    A matrix product of a BLAS may sum in another order at the edge of a tile, and so break ties by position.
    """
    scores = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype, device=q.device)
    for d in range(q.shape[3]):
        scores += q[..., d].unsqueeze(3) * k[..., d].unsqueeze(2)
    return scores


@torch.no_grad()
def select(spec: SpecSource, q: Tensor, k: Tensor, *, query_offset: int = 0) -> tuple[Tensor, ...]:
    """Hierarchical Top-K, from the coarsest level down: ``I^(l)(a)`` for every query token of every level.

    Args:
        q: ``[B, H, M, D]``, ``M >= 0``.
        k: ``[B, H, N, D]``, ``N >= 0``, of the dtype of `q`.
        query_offset: where in a sequence query 0 stands; decides how queries are cut into blocks, nothing else.

    Returns:
        L int32 tensors ``[B, H, T_l(M), width_l]``, level 1 first, with ``width_L = min(K_L, T_L)`` and
        ``width_l = min(K_l, T_l, width_(l+1) b_(l+1))``. A row is in descending order of score, of equal scores the
        lower index first, and ends in -1 where fewer candidates exist. Without keys every width is 0.

    Raises:
        TypeError or ValueError: if a tensor or `query_offset` is not as above.
    """
    spec = load(spec)
    check_tensors(spec, q, k, k)
    check_count("query_offset", query_offset)
    n = k.shape[2]
    kept: list[Tensor] = []
    for level in range(spec.num_levels, 0, -1):
        queries, keys = pool(q, spec.span(level), offset=query_offset), pool(k, spec.span(level))
        chunks = [torch.empty(*q.shape[:2], 0, kept_width(spec, level, n), dtype=torch.int32, device=q.device)]
        for rows in _row_chunks(queries.shape[2], math.prod(q.shape[:2]) * keys.shape[2], q.device):
            allowed = candidate_rows(spec, level, kept[0] if kept else None, rows, n, q, query_offset)
            scores = _tie_exact_scores(queries[:, :, rows], keys).masked_fill(~allowed, -math.inf)
            # Stable: of equal scores the lower index stays first.
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : kept_width(spec, level, n)]
            chunks.append(torch.where(allowed.gather(-1, best), best, -1).int())
        kept.insert(0, torch.cat(chunks, dim=2))
    return tuple(kept)


def _pooled_and_slack(spec: Spec, level: int, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, float]:
    """Pooled tokens, how far from them those of a correct implementation may be, and by how much it may shrink one.

    Float32 sums of ``x`` in any order, of the tokens at once or level by level, are off by at most the number of
    operations on the longest path times the unit roundoff times the mean of ``|x|``. One rounding to the dtype follows.
    It is monotone, so its result lies between the roundings of the two ends of that interval; most often those are
    the same number, and the slack is 0.

    Not so for the first token where the offset cuts its block. An implementation may count the ``ahead`` tokens before
    the first one as zeros, and round ``mean c / (c + ahead)``: it selects by that multiple, the same for all keys. As a
    mean, it may be another number than the rounded mean. But either rounding is off by at most the dtype's roundoff u
    times the number, or times the smallest normal number if that is more. So the pooled token is the mean that nothing
    rounds, with a slack of ``u |mean|`` an element. What small numbers lose is lost in the multiple, so
    ``(c + ahead) / c`` times as much in the mean: the number returned, 1 for no such block.
    """
    span = spec.span(level)
    mean = pool(x, span, offset=offset, round_to=torch.float64)
    # Level by level the path is b_1 + ... + b_l additions, and a division (or a product by a rounded inverse) a level.
    # A sum of all tokens at once is taken to be a tree or blocked: no longer a path than that.
    operations = sum(spec.block(i) + 2 for i in range(1, level + 1))
    size = pool(x.abs(), span, offset=offset, round_to=torch.float64)
    radius = operations * (UNIT_ROUNDOFF * size + TINY)
    pooled = round_to_dtype(mean, x.dtype)
    above = round_to_dtype(mean + radius, x.dtype) - pooled
    below = pooled - round_to_dtype(mean - radius, x.dtype)
    slack, ahead = torch.maximum(above, below), offset % span
    if ahead == 0 or x.shape[2] == 0:
        return pooled, slack, 1.0
    shrunk = 1 + ahead / min(x.shape[2], span - ahead)
    first, numbers = mean[:, :, 0], torch.finfo(x.dtype)
    largest = first.abs() + radius[:, :, 0] + operations * TINY * (shrunk - 1)
    rounding = numbers.eps / 2 * largest.clamp(min=shrunk * numbers.smallest_normal)
    pooled[:, :, 0], slack[:, :, 0] = first, largest - first.abs() + rounding
    return pooled, slack, shrunk


def _check_ids(spec: Spec, level: int, ids: Tensor, expected: tuple[int, ...], tokens: int) -> None:
    if ids.dtype != torch.int32 or tuple(ids.shape) != expected:
        raise AssertionError(
            f"selection, level {level}: expected int32 {list(expected)}, got {ids.dtype} {list(ids.shape)}"
        )
    _refuse(
        (ids < -1) | (ids >= tokens), level, lambda at: f"expected -1 or ids below {tokens}, got {_listed(ids, at)}"
    )
    ordered = ids.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    _refuse(twice, level, lambda at: f"expected no key token twice, got {_listed(ids, at)}")


def _listed(ids: Tensor, at: tuple[int, ...]) -> str:
    return str(ids[at[:3]].tolist())


def _refuse(bad: Tensor, level: int, message: Callable[[tuple[int, ...]], str], first_row: int = 0) -> None:
    """Raises for the first true element of `bad`, ``[B, H, rows, ...]``, with `message` of its place in `bad`."""
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        where = f"level {level}, batch {at[0]}, head {at[1]}, query token {first_row + at[2]}"
        raise AssertionError(f"selection, {where}: {message(at)}")


def _check_rows(spec: Spec, level: int, allowed: Tensor, kept: Tensor, scores: Tensor, slack: Tensor, row: int) -> None:
    """The checks of a chunk of query tokens, the first of which is `row`; all tensors ``[B, H, rows, T_l]``."""
    _refuse(kept & ~allowed, level, lambda at: f"kept key token {at[3]}, which is not a candidate", row)
    count, wanted = kept.sum(dim=-1), allowed.sum(dim=-1).clamp(max=spec.topk(level))
    _refuse(count != wanted, level, lambda at: f"expected {wanted[at]} kept key tokens, got {count[at]}", row)
    lowest_kept = (scores + slack).masked_fill(~kept, math.inf).min(dim=-1)
    highest_dropped = (scores - slack).masked_fill(kept | ~allowed, -math.inf).max(dim=-1)

    def inversion(at: tuple[int, ...]) -> str:
        low, high = (*at, int(lowest_kept.indices[at])), (*at, int(highest_dropped.indices[at]))
        return (
            f"kept key token {low[3]} with score {scores[low]:.9g} and dropped {high[3]} with {scores[high]:.9g}, "
            f"further apart than rounding explains ({slack[low]:.2g} and {slack[high]:.2g})"
        )

    _refuse(lowest_kept.values < highest_dropped.values, level, inversion, row)


@torch.no_grad()
def check_selection(
    spec: SpecSource, q: Tensor, k: Tensor, indices: Sequence[Tensor], *, query_offset: int = 0
) -> None:
    """Checks a selection by value, whatever its order and its choice among scores that rounding cannot tell apart.

    Per level and query token: as many key tokens kept as there are candidates, but at most ``K_l``; none twice, none
    out of range, each a candidate (a child of what `indices` itself keeps one level up), and no score kept below one
    dropped. Scores are compared in float64, each with the slack that a correct implementation in float32 has:

        (|q| + dq).(|k| + dk) (1 + D 2^-22) - |q|.|k|

    with ``dq`` and ``dk`` what one rounding to the dtype after float32 sums in another order can change in the pooled
    query and key (mostly nothing in half precision), and ``D 2^-22`` for a dot product summed in float32, in any order,
    truncating. TF32 products exceed it. Inputs are taken to be such that no score overflows float32. For a query token
    whose block the offset cuts, and for no other, q is the mean that nothing rounds and dq the dtype's roundoff of each
    of its elements: it may have been rounded as a multiple of the mean.

    Args:
        q: ``[B, H, M, D]``, ``M >= 0``.
        k: ``[B, H, N, D]``, ``N >= 0``, of the dtype of `q`.
        indices: L int32 tensors of the shapes that `select` returns, level 1 first, -1 where fewer are kept.
        query_offset: that of the selection.

    Raises:
        AssertionError: naming the level, batch, head and query token, what came and what was expected.
        TypeError or ValueError: if q, k or `query_offset` is not as above.
    """
    spec = load(spec)
    check_tensors(spec, q, k, k)
    check_count("query_offset", query_offset)
    if len(indices) != spec.num_levels:
        raise AssertionError(f"selection: expected {spec.num_levels} tensors, one a level, got {len(indices)}")
    m, n = q.shape[2], k.shape[2]
    for level in range(spec.num_levels, 0, -1):
        ids, tokens = indices[level - 1], num_tokens(spec, level, n)
        rows_of_level = num_tokens(spec, level, m, query_offset)
        _check_ids(spec, level, ids, (*q.shape[:2], rows_of_level, kept_width(spec, level, n)), tokens)
        if not tokens:
            continue  # no keys: rows of width 0, which are right
        coarser = indices[level] if level < spec.num_levels else None
        keys, dk, _ = _pooled_and_slack(spec, level, k)
        queries, dq, shrunk = _pooled_and_slack(spec, level, q, query_offset)
        lost = queries.new_full((rows_of_level, 1), spec.head_dim * TINY)  # to subnormal products, in all of a score
        lost[:1] *= shrunk
        largest_keys, largest_queries, key_sizes = (keys.abs() + dk).mT, queries.abs() + dq, keys.abs().mT
        for rows in _row_chunks(rows_of_level, math.prod(q.shape[:2]) * tokens, q.device):
            query = queries[:, :, rows]
            largest = largest_queries[:, :, rows] @ largest_keys * (1 + spec.head_dim * DOT_ROUNDOFF) + lost[rows]
            slack = largest - query.abs() @ key_sizes
            allowed = candidate_rows(spec, level, coarser, rows, n, q, query_offset)
            kept = kept_mask(ids[:, :, rows], tokens)
            _check_rows(spec, level, allowed, kept, query @ keys.mT, slack, int(rows[0]))
