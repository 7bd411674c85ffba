"""What a case's results should be, and how far from that they may be.

The truth is the formula of docs/semantics.md and its derivatives, in float64, a chunk of queries at a time, so that
long sequences fit too; weights, pooling and selection are those of `llsa_gen.reference`, and the tests compare it
with autograd through `reference.attention`. With each result comes its *size*: the same sum with the absolute value
of every term. It is what rounding errors are proportional to, also where the terms cancel and little or nothing
remains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import pad

from llsa_gen import reference
from llsa_gen.fuzz.case import Case
from llsa_gen.spec import Spec

CHUNK_ELEMENTS = 1 << 26
"""Elements of the largest intermediate of `truth`: half a gigabyte."""

RESULTS = ("o", "lse", "dq", "dk", "dv")
GLOBAL_RESULTS = ("dk_global", "dv_global")


def results(case: Case) -> tuple[str, ...]:
    """The names of what a case computes."""
    return RESULTS + (GLOBAL_RESULTS if case.global_tokens else ())


@dataclass(frozen=True)
class Truth:
    """o, dq [B, H, M, D], dk, dv [B, H, N, D] and lse [B, H, M], float64, with the size of each.

    Where there are global tokens, dk_global and dv_global [B, H, G, D] too; those that take no part have size 0.
    `through_o` is the part of an error in o, relative to it and independent from element to element, that reaches dq,
    dk and dk_global: the backward pass reads o, as rounded, for delta = grad_o . o.
    """

    values: Mapping[str, Tensor]
    sizes: Mapping[str, Tensor]
    through_o: Mapping[str, Tensor]


@torch.no_grad()
def truth(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_o: Tensor,
    kept: Sequence[Tensor],
    scale: float,
    queries: Tensor | None = None,
    grad_lse: Tensor | None = None,
    query_offset: int = 0,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    global_mask: Tensor | None = None,
) -> Truth:
    """The results for q, grad_o [B, H, M, D], k, v [B, H, N, D], grad_lse [B, H, M], the lists `kept` held fixed.

    `k_global` and `v_global` are [B, H, G, D], `global_mask` is [B, G]; what a token that takes no part holds is not
    read.

    With `queries`, integers [R], o, lse and dq are those of these queries alone, and dk and dv what they contribute:
    all there is where grad_o is zero for every other query. Time R (N + sum T_l + G) D; memory `CHUNK_ELEMENTS` at a
    time.
    """
    n = k.shape[2]
    mask = k.new_ones((k.shape[0], 0 if k_global is None else k_global.shape[2]), dtype=torch.bool)
    mask = mask if global_mask is None else global_mask
    keys, values = (_columns(spec, x, shared, mask) for x, shared in ((k, k_global), (v, v_global)))
    rows_of_results: dict[str, list[Tensor]] = {
        name: [] for name in ("o", "lse", "dq", "|o|", "|lse|", "|dq|", "dq(o)")
    }
    sums = {name: torch.zeros_like(keys) for name in ("dk", "dv", "|dk|", "|dv|", "dk(o)")}
    queries = torch.arange(q.shape[2], device=q.device) if queries is None else queries
    for rows in queries.split(max(1, CHUNK_ELEMENTS // max(1, keys[..., 0].numel()))):
        query, grad = q[:, :, rows].double(), grad_o[:, :, rows].double()
        weights = reference.weight_rows(spec, kept, rows, n, query_offset=query_offset, global_mask=mask)
        bias = weights.log()  # -inf: not attended
        logits = scale * (query @ keys.mT) + bias
        lse = logits.logsumexp(-1)
        p = (logits - lse[..., None]).exp().masked_fill(bias == -math.inf, 0)  # also where lse is -inf
        o, o_size = p @ values, p @ values.abs()
        delta, delta_size = (grad * o).sum(-1, keepdim=True), (grad.abs() * o_size).sum(-1, keepdim=True)
        delta_error = (grad * o).norm(dim=-1, keepdim=True)
        if grad_lse is not None:
            of_lse = grad_lse[:, :, rows, None].double()
            delta, delta_size = delta - of_lse, delta_size + of_lse.abs()
        ds = scale * p * (grad @ values.mT - delta)
        ds_size = abs(scale) * p * (grad.abs() @ values.mT.abs() + delta_size)
        # The largest sum of absolute values in the logits of a query that count.
        terms = abs(scale) * (query.abs() @ keys.mT.abs()) + bias.clamp(min=0)
        chunk = {"o": o, "lse": lse, "dq": ds @ keys, "|o|": o_size, "|dq|": ds_size @ keys.abs()}
        chunk["dq(o)"] = abs(scale) * delta_error * (p @ keys).abs()
        chunk["|lse|"] = pad(terms.masked_fill(bias == -math.inf, 0), (0, 1)).amax(-1)  # 0 also where there is no key
        for name, result in chunk.items():
            rows_of_results[name].append(result)
        sums["dk"] += ds.mT @ query
        sums["|dk|"] += ds_size.mT @ query.abs()
        sums["dk(o)"] += (scale * p * delta_error).mT.square() @ query.square()
        sums["dv"] += p.mT @ grad
        sums["|dv|"] += p.mT @ grad.abs()
    found = {name: torch.cat(parts, dim=2) for name, parts in rows_of_results.items()}
    sums["dk(o)"].sqrt_()
    del keys, values  # a million tokens take gigabytes of each
    names, from_o = RESULTS, ("dq", "dk")
    if k_global is not None:
        names, from_o = RESULTS + GLOBAL_RESULTS, (*from_o, "dk_global")
        columns = keys_of(spec, n)
        for name in list(sums):
            found[name.replace("dk", "dk_global").replace("dv", "dv_global")] = sums[name][:, :, columns:]
            sums[name] = sums[name][:, :, :columns]
    found |= {name: _unpool(spec, sums.pop(name), n) for name in list(sums)}
    return Truth(
        values={name: found[name] for name in names},
        sizes={name: found[f"|{name}|"] for name in names},
        through_o={name: found[f"{name}(o)"] for name in from_o},
    )


def keys_of(spec: Spec, n: int) -> int:
    """How many keys there are of all levels, N + T_1 + ... + T_L."""
    return n + sum(reference.num_tokens(spec, level, n) for level in range(1, spec.num_levels + 1))


def _columns(spec: Spec, x: Tensor, shared: Tensor | None, mask: Tensor) -> Tensor:
    """[tokens | level 1 | ... | level L | globals], float64; zeros for globals that take no part."""
    coarse = [reference.pool(x, spec.span(level)) for level in range(1, spec.num_levels + 1)]
    parts = [] if shared is None else [shared.double().masked_fill(~mask[:, None, :, None], 0)]
    return torch.cat([x.double(), *coarse, *parts], dim=2)


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
    """o, dq, dk, dv, and the gradients of global tokens, of the same dense formula that torch evaluates in the dtype of
    the inputs."""
    leaves, mask = leaves_of(case, q, k, v)
    q, k, v, *_ = leaves.values()
    shared = {name: leaves[name] for name in leaves if name.endswith("_global")} | mask
    o, lse = reference.dense_in_dtype(case.spec, q, k, v, kept, case.scale, query_offset=case.query_offset, **shared)
    return {"o": o.detach(), **gradients(case, leaves, o, lse, grad_o)}


def leaves_of(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What gradients are taken of, by name: q, k, v and, where there are any, k_global, v_global; and the mask, so."""
    tensors = {"q": q, "k": k, "v": v} | case.shared()
    mask = {name: tensors.pop(name) for name in list(tensors) if name == "global_mask"}
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}, mask


def gradients(
    case: Case, leaves: Mapping[str, Tensor], o: Tensor, lse: Tensor, grad_o: Tensor
) -> dict[str, Tensor]:  # fmt: skip
    """dq, dk, dv and the others, by name, from the gradients of o and, where the case has one, of lse."""
    grad_lse = case.gradient_of_lse()
    results, grads = ((o,), (grad_o,)) if grad_lse is None else ((o, lse), (grad_o, grad_lse.to(lse.dtype)))
    found = torch.autograd.grad(results, tuple(leaves.values()), grads)
    return {f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}


@dataclass(frozen=True)
class Verdict:
    """The error of one result and what it may be at most: in the Frobenius norm, or of the worst row in units of 1."""

    error: float
    allowed: float
    why: str

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # false for NaN

    @property
    def margin(self) -> float:
        """The error as a fraction of what is allowed."""
        return self.error / self.allowed if self.allowed > 0 else math.inf if self.error > 0 else 0.0


def judge_lse(case: Case, lse: Tensor, true: Truth) -> Verdict:
    """lse row by row, in units of its bound: sums of D products in float32, in any order.

    In half precision a pooled key that lies between two numbers may be rounded to the other one; two elements of the
    largest key are taken to be.
    """
    terms = true.sizes["lse"] + 1
    bound = (16 + case.spec.head_dim / 4) * 2.0**-24 * terms
    if case.torch_dtype != torch.float32:
        bound = bound + 2 * torch.finfo(case.torch_dtype).eps * terms / case.spec.head_dim**0.5
    error = (lse.double() - true.values["lse"]).abs() / bound
    nothing = true.values["lse"] == -math.inf
    error = torch.where(nothing, torch.where(lse == -math.inf, 0.0, math.inf), error)
    return Verdict(float(error.max()) if error.numel() else 0.0, 1.0, "float32 sums")


def check_zeros(case: Case, found: Mapping[str, Tensor], true: Truth) -> list[str]:
    """What is wrong where docs/semantics.md asks for exact zeros, if anything.

    A query with nothing to attend to has o = 0, lse = -inf and no gradient; a global token that takes no part has none
    either.
    """
    nothing = true.values["lse"] == -math.inf
    rows = {"o": nothing, "dq": nothing}
    mask = case.shared().get("global_mask")
    if mask is not None:
        rows |= dict.fromkeys(GLOBAL_RESULTS, ~mask[:, None].expand(-1, case.heads, -1))
    why = {"o": "queries with nothing to attend to", "dq": "queries with nothing to attend to"}
    return [
        f"{name}: expected zeros for {why.get(name, 'global tokens that take no part')}, got other numbers"
        for name, which in rows.items()
        if found[name].shape == true.values[name].shape and found[name][which].ne(0).any()  # NaN is another number
    ]


def judge(case: Case, name: str, found: Tensor, true: Truth, torchs: Mapping[str, Tensor] | None) -> list[Verdict]:
    """`found` by the two rules of docs/semantics.md: o or a gradient; `torchs` is the `yardstick` or None.

    On standard normal inputs the error is at most `reference.tolerance` times the norm of the truth. Where almost
    everything cancels in the truth (one key, so that dq and dk are zero), a part of its size stands for it: 1/256,
    less than what remains when terms merely have random signs. In float32 that allows 0.7 roundoffs of the size. dq
    and dk, and dk_global, may be off by what a roundoff of o makes of them besides: little beside the tolerance, but
    for a few tokens whose gradients nearly cancel.

    On any inputs the error is at most twice that of the yardstick, which may by luck have none at all (a softmax over
    one key is exactly 1, equal terms may add up without rounding), and so eight roundoffs of the size more: four are
    a GPU's exponential (2 ulp), the others what the division and the last operations of a sum may lose; and one of the
    largest logit, times the size: who works the logits out anew, for the backward pass or in another tile, may add
    them up in another order, and weights are off by as much. A mistake in the formula changes results by a fraction of
    their norm, some 10^4 times as much in float32. Where the yardstick overflows (float16 does), the roundoff of the
    logits takes its place.
    """
    dtype, size, roundoff = case.torch_dtype, _norm(true.sizes[name]), torch.finfo(case.torch_dtype).eps / 2
    error = _norm(found.double() - true.values[name])
    verdicts: list[Verdict] = []
    if case.standard:
        allowed = reference.tolerance(dtype) * max(_norm(true.values[name]), size / 256)
        if name in true.through_o:
            allowed += roundoff * _norm(true.through_o[name])
        verdicts.append(Verdict(error, allowed, f"the tolerance of {case.dtype} on standard normal inputs"))
    if torchs is not None:
        torch_error = _norm(torchs[name].double() - true.values[name])
        logit = 2.0**-24 * (float(true.sizes["lse"].max()) if true.sizes["lse"].numel() else 0.0)
        if math.isfinite(torch_error):
            allowed = 2 * torch_error + (8 * roundoff + logit) * size
            verdicts.append(Verdict(error, allowed, "twice torch's own error in that dtype"))
        else:
            verdicts.append(Verdict(error, (4 * roundoff + 16 * logit) * size, "the roundoff of logits and sums"))
    return verdicts


def _norm(x: Tensor) -> float:
    """NaN or infinite if anything in `x` is."""
    return float(x.norm())


def check_exact_ties(case: Case, q: Tensor, k: Tensor, kept: Sequence[Tensor]) -> None:
    """Of equal scores the lower index is kept: compares with `reference.select` where float32 scores have no rounding.

    Raises AssertionError naming the level, batch, head and query token.
    """
    levels = range(case.spec.num_levels, 0, -1)
    exact = list(takewhile(lambda level: _scores_are_exact(case, level, q, k), levels))
    expected = reference.select(case.spec, q, k, query_offset=case.query_offset) if exact else ()
    for level in exact:  # below a level that is not, what is kept depends on what was kept there
        found, wanted = (ids[level - 1].sort(dim=-1).values for ids in (kept, expected))
        wrong = (found != wanted).any(-1)
        if wrong.any():
            batch, head, row = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"selection, level {level}, batch {batch}, head {head}, query token {row}: of equal scores the lower "
                f"index, {wanted[batch, head, row].tolist()}, got {found[batch, head, row].tolist()}"
            )


def _scores_are_exact(case: Case, level: int, q: Tensor, k: Tensor) -> bool:
    """Whether every float32 sum and quotient in the scores of a level is exact, in whatever order it is computed."""
    if not q.any():
        return True
    if case.values != "integers" or case.popular or case.loud or math.log2(case.std) % 1:
        return False
    if case.query_offset:
        return False  # the means of cut blocks are not those of the reference, but multiples of them
    for tokens in (case.queries, case.n):
        covered = reference.covered_tokens(case.spec, level, tokens)
        if (covered & (covered - 1)).any():
            return False  # quotients by other numbers than powers of two
    span = case.spec.span(level)
    largest = reference.pool(q.abs(), span) @ reference.pool(k.abs(), span).mT
    return bool((largest < 2**24 * (case.std / span) ** 2).all())
