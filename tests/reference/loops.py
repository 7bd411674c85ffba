"""The definitions of docs/semantics.md once more, more naive than the oracle: loops over single tokens of one head.

Tokens are lists of vectors; ``kept[l - 1][a]`` is the list ``I^(l)(a)``, best first. Beside them, what the tests of the
oracle are made with.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llsa_gen.spec import Level, Spec

Kept = dict[int, list[list[int]]]


def make_spec(*levels: tuple[int, int], head_dim: int = 8, enrich: Any = "all", reweight: bool = True) -> Spec:
    """A spec from (block, topk) pairs, finest first."""
    pairs = tuple(Level(block=block, topk=topk) for block, topk in levels)
    return Spec(name="tiny", head_dim=head_dim, levels=pairs, enrich=enrich, reweight=reweight)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def float64_leaves(*tensors: Tensor) -> list[Tensor]:
    """Float64 copies from which autograd derives."""
    return [x.detach().double().requires_grad_() for x in tensors]


def as_lists(indices: Sequence[Tensor], head: int) -> Kept:
    """Of one head, per level and query token, the kept ids without the -1s."""
    return {
        level: [[j for j in row if j >= 0] for row in ids[0, head].tolist()]
        for level, ids in enumerate(indices, start=1)
    }


def blocks(count: int, span: int, offset: int = 0) -> list[list[int]]:
    """The tokens 0 to count - 1, cut as if they stood at `offset` of a sequence that is cut every `span` tokens."""
    members: dict[int, list[int]] = {}
    for token in range(count):
        members.setdefault((offset + token) // span, []).append(token)
    return [members[block] for block in sorted(members)]


def block_of(token: int, cut: list[list[int]]) -> int:
    """The number of the block, among those that exist, in which a token lies."""
    (number,) = [number for number, members in enumerate(cut) if token in members]
    return number


def naive_pool(x: Tensor, span: int, dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
    pooled: list[Tensor] = []
    for members in blocks(len(x), span, offset):
        total = x[members[0]]
        for token in members[1:]:
            total = total + x[token]
        mean = total / len(members)
        pooled.append(mean + (mean.detach().to(dtype).double() - mean.detach()))  # rounded; the gradient is the mean's
    return pooled


def naive_candidates(spec: Spec, level: int, kept: Kept, query: int, m: int, n: int, offset: int = 0) -> list[int]:
    """The candidates on `level` of the query token over token `query`."""
    tokens = math.ceil(n / spec.span(level))
    if level == spec.num_levels:
        return list(range(tokens))
    block = spec.block(level + 1)
    parent = block_of(query, blocks(m, spec.span(level + 1), offset))
    return [
        j
        for coarse in sorted(kept[level + 1][parent])
        for j in range(coarse * block, (coarse + 1) * block)
        if j < tokens
    ]


def naive_select(spec: Spec, q: Tensor, k: Tensor, dtype: torch.dtype, offset: int = 0) -> Kept:
    kept: Kept = {}
    for level in range(spec.num_levels, 0, -1):
        queries = [t.tolist() for t in naive_pool(q, spec.span(level), dtype, offset)]
        keys = [t.tolist() for t in naive_pool(k, spec.span(level), dtype)]
        kept[level] = []
        for query, members in zip(queries, blocks(len(q), spec.span(level), offset), strict=True):
            scores = {
                j: sum(x * y for x, y in zip(query, keys[j], strict=True))
                for j in naive_candidates(spec, level, kept, members[0], len(q), len(k), offset)
            }
            best = sorted(scores, key=lambda j: (-scores[j], j))
            kept[level].append(best[: spec.topk(level)])
    return kept


def attend(query: Tensor, seen: Sequence[tuple[float, Tensor, Tensor]], scale: float) -> tuple[Tensor, Tensor]:
    """One query over (weight, key, value), each seen: o ``[D]`` and lse ``[]``."""
    if not seen:
        return torch.zeros_like(query), torch.full((), -math.inf, dtype=query.dtype)
    terms = [weight * torch.exp(scale * torch.dot(query, key)) for weight, key, _ in seen]
    total = torch.stack(terms).sum()
    weighted = [term * value for term, (_, _, value) in zip(terms, seen, strict=True)]
    return torch.stack(weighted).sum(0) / total, torch.log(total)


def naive_attention(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Kept,
    scale: float,
    dtype: torch.dtype,
    offset: int = 0,
    everybodys: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[Tensor, Tensor]:
    """o and lse of one head; `everybodys` are the keys and values of the global tokens that take part."""
    m, n = len(q), len(k)
    levels = range(1, spec.num_levels + 1)
    coarse_k = {level: naive_pool(k, spec.span(level), dtype) for level in levels}
    coarse_v = {level: naive_pool(v, spec.span(level), dtype) for level in levels}
    rows: list[tuple[Tensor, Tensor]] = []
    for i in range(m):
        seen: list[tuple[float, Tensor, Tensor]] = [(1, key, value) for key, value in everybodys]
        for j in range(n):
            if j // spec.span(1) in kept[1][block_of(i, blocks(m, spec.span(1), offset))]:
                seen.append((1, k[j], v[j]))
        for level in levels:
            if level in spec.enriched_levels:
                for j in naive_candidates(spec, level, kept, i, m, n, offset):
                    covered = sum(1 for token in range(n) if token // spec.span(level) == j)
                    seen.append((covered if spec.reweight else 1, coarse_k[level][j], coarse_v[level][j]))
        rows.append(attend(q[i], seen, scale))
    if not rows:
        return q, q.sum(-1)
    outputs, lses = zip(*rows, strict=True)
    return torch.stack(outputs), torch.stack(lses)
