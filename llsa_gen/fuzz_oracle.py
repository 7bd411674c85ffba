"""What a case's results should be, and how far from that they may be.

The truth is the formula of SEMANTICS.md and its derivatives written out, in float64, a chunk of queries at a time, so
that long sequences fit too; weights, pooling and selection are those of `llsa_gen.reference`, and the tests compare it
with autograd through `reference.attention`. With each result comes its *size*: the same sum with the absolute value of
every term. It is what rounding errors are proportional to, also where the terms cancel and little or nothing remains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llsa_gen import reference
from llsa_gen.fuzz_cases import Case
from llsa_gen.spec import Spec

CHUNK_ELEMENTS = 1 << 26
"""Elements of the largest intermediate of `truth`: half a gigabyte."""

RESULTS = ("o", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Truth:
    """o, dq, dk, dv, float64 [B, H, N, D], and lse, float64 [B, H, N], with the size of each."""

    values: Mapping[str, Tensor]
    sizes: Mapping[str, Tensor]


@torch.no_grad()
def truth(
    spec: Spec, q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor, kept: Sequence[Tensor], scale: float
) -> Truth:  # fmt: skip
    """The results for q, k, v and grad_o [B, H, N, D], with the selection `kept` held fixed.

    Time N (N + sum T_l) D; memory `CHUNK_ELEMENTS` at a time.
    """
    n = k.shape[2]
    keys, values = (_with_coarse(spec, x) for x in (k, v))
    q, grad_o = q.double(), grad_o.double()
    rows_of_results: dict[str, list[Tensor]] = {name: [] for name in ("o", "lse", "dq", "|o|", "|lse|", "|dq|")}
    sums = {name: torch.zeros_like(keys) for name in ("dk", "dv", "|dk|", "|dv|")}
    for rows in torch.arange(n, device=q.device).split(max(1, CHUNK_ELEMENTS // (keys[..., 0].numel()))):
        query, grad = q[:, :, rows], grad_o[:, :, rows]
        bias = reference.weight_rows(spec, kept, rows, n).log()  # -inf: not attended
        logits = scale * (query @ keys.mT) + bias
        lse = logits.logsumexp(-1)
        p = (logits - lse[..., None]).exp()
        o, o_size = p @ values, p @ values.abs()
        delta, delta_size = (grad * o).sum(-1, keepdim=True), (grad.abs() * o_size).sum(-1, keepdim=True)
        ds = scale * p * (grad @ values.mT - delta)
        ds_size = abs(scale) * p * (grad.abs() @ values.mT.abs() + delta_size)
        # The largest sum of absolute values in the logits of a query that count.
        terms = abs(scale) * (query.abs() @ keys.mT.abs()) + bias.clamp(min=0)
        chunk = {"o": o, "lse": lse, "dq": ds @ keys, "|o|": o_size, "|dq|": ds_size @ keys.abs()}
        chunk["|lse|"] = terms.masked_fill(bias == -math.inf, 0).amax(-1)
        for name, result in chunk.items():
            rows_of_results[name].append(result)
        sums["dk"] += ds.mT @ query
        sums["|dk|"] += ds_size.mT @ query.abs()
        sums["dv"] += p.mT @ grad
        sums["|dv|"] += p.mT @ grad.abs()
    found = {name: torch.cat(parts, dim=2) for name, parts in rows_of_results.items()}
    found |= {name: _unpool(spec, total, n) for name, total in sums.items()}
    return Truth({name: found[name] for name in RESULTS}, {name: found[f"|{name}|"] for name in RESULTS})


def _with_coarse(spec: Spec, x: Tensor) -> Tensor:
    """[tokens | level 1 | ... | level L], float64."""
    coarse = [reference.pool(x, spec.span(level)) for level in range(1, spec.num_levels + 1)]
    return torch.cat([x.double(), *coarse], dim=2)


def _unpool(spec: Spec, grad: Tensor, n: int) -> Tensor:
    """The gradient of the tokens from that of [tokens | level 1 | ... | level L]: 1/c_l(j) to each token under j."""
    levels = range(1, spec.num_levels + 1)
    fine, *coarse = grad.split([n, *(reference.num_tokens(spec, level, n) for level in levels)], dim=2)
    token = torch.arange(n, device=grad.device)
    for level, part in zip(levels, coarse, strict=True):
        shared = part / reference.covered_tokens(spec, level, n, grad.device)[:, None]
        fine = fine + shared[:, :, token // spec.span(level)]
    return fine


def yardstick(
    case: Case, q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor, kept: Sequence[Tensor]
) -> dict[str, Tensor]:  # fmt: skip
    """o, dq, dk, dv of the same dense formula that torch evaluates in the dtype of the inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, _ = reference.dense_in_dtype(case.spec, *leaves, kept, case.scale)
    dq, dk, dv = torch.autograd.grad(o, leaves, grad_o.to(o.dtype))
    return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}
