"""Correct first: what is compared before anything is timed, so that no number of a wrong result is stored.

Ours is judged as the fuzzer judges it, by the float64 reference and the tolerances of docs/semantics.md, but for a
sample of the queries, since the reference is quadratic. The gradient of o is zero for all other queries, so that dk and
dv, which sum over queries, can be compared in full. Memory is full of NaN beforehand.
"""

import torch
from torch import Tensor

from llsa_gen import fuzz, reference
from llsa_gen.bench.baselines import Implementation
from llsa_gen.compiler import Attention
from llsa_gen.errors import CheckFailed, LlsaGenError
from llsa_gen.fuzz import oracle
from llsa_gen.fuzz.case import Case

__all__ = ["check_along", "check_dense", "check_other", "check_ours", "check_replay", "length_of"]

LEAST_QUERIES = 16

Tensors = tuple[Tensor, ...]


def sample(case: Case) -> Tensor:
    """Ascending ids of the queries that are compared: the first, the last and others, int64 on the case's device.

    All where they are few; else so many that query-key pairs are some millions on a CPU, some ten millions on a GPU.
    """
    pairs = 1 << (26 if torch.device(case.device).type == "cuda" else 22)
    keys = oracle.keys_of(case.spec, case.n)
    size = min(case.queries, max(LEAST_QUERIES, pairs // (case.batch * case.heads * keys)))
    generator = torch.Generator().manual_seed(case.seed)
    drawn = torch.randperm(case.queries, generator=generator)[:size]
    ends = torch.tensor([0, case.queries - 1])
    return torch.cat([drawn, ends]).unique().to(case.device)


def check_ours(attention: Attention, case: Case, inputs: Tensors) -> float:
    """Selection, o, lse, dq, dk, dv of the compiled spec against the reference, for q, k, v, grad_o of the case.

    Returns the largest error as a fraction of what is allowed. Raises CheckFailed, with a script that runs the case.
    """
    q, k, v, grad_o = inputs
    queries = sample(case)
    sparse = torch.zeros_like(grad_o)
    sparse[:, :, queries] = grad_o[:, :, queries]
    with fuzz.poisoned_memory():
        found = fuzz.attend(attention, case, q, k, v, sparse)
    kept = [found[f"kept_l{level}"] for level in range(1, case.spec.num_levels + 1)]
    try:
        reference.check_selection(case.spec, q, k, kept)
    except AssertionError as error:
        raise _failed(case, str(error)) from None
    true = oracle.truth(case.spec, q, k, v, sparse, kept, case.softmax_scale, queries)
    verdicts = []
    for name in oracle.RESULTS:
        result = found[name]
        if not result.isfinite().all():
            raise _failed(case, f"{name}: expected finite numbers, got {_not_finite(result)} that are not")
        if name == "dq":
            result = result.clone()
            result[:, :, queries] = 0
            if result.any():
                raise _failed(case, "dq: expected zeros for queries without a gradient, got other numbers")
        compared = found[name] if name in ("dk", "dv") else found[name][:, :, queries]
        judged = (
            [oracle.judge_lse(case, compared, true)]
            if name == "lse"
            else oracle.judge(case, name, compared, true, None)
        )
        for verdict in judged:
            if not verdict.ok:
                raise _failed(case, f"{name}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}: {verdict.why}")
        verdicts += judged
    return max(verdict.margin for verdict in verdicts)


def check_replay(case: Case, eager: Tensors, replayed: Tensors) -> None:
    """A graph's o, dq, dk, dv against those of an eager call: the same bits. Raises CheckFailed."""
    for name, x, y in zip(("o", "dq", "dk", "dv"), eager, replayed, strict=True):
        if not fuzz.same_bits(x, y):
            raise _failed(case, f"{name}: the replay of a CUDA graph gave other bits than an eager call")


def check_dense(baseline: Implementation, case: Case, inputs: Tensors, o: Tensor) -> float:
    """o of dense attention, for a sample of the queries, against a float64 softmax, by the same tolerance as ours.

    Returns the error as a fraction of what is allowed; raises LlsaGenError where that is more than one.
    """
    check_other(baseline, case, o)
    q, k, v, _ = inputs
    queries = sample(case)[: max(LEAST_QUERIES, 2**26 // (case.batch * case.heads * case.n))]
    logits = case.softmax_scale * (q[:, :, queries].double() @ k.double().mT)
    wanted = logits.softmax(-1) @ v.double()
    error, allowed = reference.relative_error(o[:, :, queries], wanted), reference.tolerance(case.torch_dtype)
    if error > allowed:
        raise LlsaGenError(f"{_place(baseline, case)}: error of o {error:.3g}, allowed {allowed:.3g}")
    return error / allowed


def check_along(baseline: Implementation, case: Case, inputs: Tensors, kept: Tensors, o: Tensor) -> float:
    """o of what attends along the lists of the spec, for a sample of the queries, by the same tolerance as ours.

    Returns the error as a fraction of what is allowed; raises LlsaGenError where that is more than one.
    """
    check_other(baseline, case, o)
    queries, (q, k, v, grad_o) = sample(case), inputs
    true = oracle.truth(case.spec, q, k, v, grad_o, kept, case.softmax_scale, queries)
    (verdict,) = oracle.judge(case, "o", o[:, :, queries], true, None)
    if not verdict.ok:
        wrong = f"error of o {verdict.error:.3g}, allowed {verdict.allowed:.3g}"
        raise LlsaGenError(f"{_place(baseline, case)}: {wrong}")
    return verdict.margin


def check_other(baseline: Implementation, case: Case, o: object) -> None:
    """What can be said about an attention that nobody has an oracle for: shape, dtype, finite. Raises LlsaGenError."""
    shape = (case.batch, case.heads, case.queries, case.spec.head_dim)
    if not isinstance(o, Tensor) or o.shape != shape or o.dtype != case.torch_dtype:
        came = f"{o.dtype} {list(o.shape)}" if isinstance(o, Tensor) else type(o).__name__
        raise LlsaGenError(f"{_place(baseline, case)}: expected o, {case.torch_dtype} {list(shape)}, got {came}")
    if not o.isfinite().all():
        raise LlsaGenError(f"{_place(baseline, case)}: expected finite numbers in o, got {_not_finite(o)} that are not")


def _place(baseline: Implementation, case: Case) -> str:
    return f"{baseline.name} at {length_of(case)}, {case.dtype}"


def length_of(case: Case) -> str:
    """The lengths of a case in words."""
    return f"{case.n:,} tokens" if case.m is None else f"{case.n:,} keys, {case.m:,} queries"


def _not_finite(x: Tensor) -> str:
    return f"{int((~x.isfinite()).sum()):,} of {x.numel():,}"


def _failed(case: Case, message: str) -> CheckFailed:
    return CheckFailed(f"{message}\nin {case!r}; it is not timed, and no row of it stored", fuzz.reproducer(case))
