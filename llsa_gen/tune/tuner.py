"""Tune: search tile shapes for one spec on this machine's GPU, and keep what is faster for the compiles that follow."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from llsa_gen.aot.launches import DTYPES
from llsa_gen.compiler import Attention, compile
from llsa_gen.errors import LlsaGenError, short
from llsa_gen.fuzz.case import Case, DType
from llsa_gen.plan import Plan, lower
from llsa_gen.schedule import Schedule, schedule
from llsa_gen.schedule.table import TRITON, facts_of, stage_kind
from llsa_gen.spec import Spec
from llsa_gen.store import Store, tuned
from llsa_gen.tune.bench import DeviceBench
from llsa_gen.tune.candidates import settable
from llsa_gen.tune.search import Bench, Progress, StageResult, search

__all__ = ["Report", "tune"]

CHECKED_TOKENS = 2053
"""Longest sequence that a winner is compared with the dense reference on: a prime, so that every level has a tail."""

MakeBench = Callable[[Attention, Schedule, str], Bench]
"""A bench for an operator, its present entries and the target whose table it uses."""


@dataclass(frozen=True)
class Report:
    """What a search came to: `rows` as they stand in a table, and `path`, the file that now holds them."""

    spec: str
    target: str
    gpu: str
    n_tokens: int
    dtype: str
    results: tuple[StageResult, ...]
    rows: tuple[dict[str, Any], ...]
    path: Path | None
    unsaved: str | None = None
    """Why rows that were found are in no file."""


def tune(
    spec: Spec,
    *,
    n_tokens: int = 65_536,
    dtype: DType = "bfloat16",
    stages: Sequence[str] = (),
    seconds: float = 600.0,
    store: Store | None = None,
    progress: Progress | None = None,
    make_bench: MakeBench | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Search the entries of `stages`, by default all, for q, k, v [2, 4, n_tokens, D], and store the winners' rows.

    Takes about `seconds`; an interrupt from the keyboard ends it early and keeps what was found. `make_bench` takes the
    place of this machine's GPU, `clock` that of its seconds. Raises LlsaGenError where there is no GPU, for a stage
    that the spec does not have and for a length that it does not take, and OSError where the store could keep nothing,
    all before it searches.
    """
    if make_bench is None and (knobs.runtime.interpret or not torch.cuda.is_available()):
        raise LlsaGenError("tune: expected a CUDA or ROCm GPU to measure on, and torch finds none")
    store = store or Store()
    store.check()  # before anything is measured, which could not be kept
    attention = compile(spec, store=store)
    plan = lower(spec)
    if not 1 <= n_tokens <= plan.max_tokens:
        raise LlsaGenError(
            f"n: expected 1 to {plan.max_tokens} tokens, the most that {spec.name} takes, got {n_tokens}"
        )
    device = torch.device("cpu" if make_bench else "cuda")
    name, element = attention.module.target_of(device), DTYPES[dtype].itemsize
    goal = tuned.targets(store)[name]
    present = schedule(plan, goal, element)
    launched = {kernel.stage for kernel in plan.usual}  # no calls with global tokens or given lists are timed
    known = [stage for stage in present if stage in launched]
    for stage in stages:
        if stage not in known:
            raise LlsaGenError(f"stage: expected one of {', '.join(known)}, got {short(repr(stage))}")
    tuned.must_keep(store, name)
    bench = (make_bench or _on_gpu(n_tokens, dtype))(attention, present, name)
    results = search(
        plan, present, stages or known, bench,
        element=element, goal=goal, seconds=seconds, progress=progress, clock=clock,
    )  # fmt: skip
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    rules = schedule(plan, replace(goal, rows=()), element)
    rows = tuple(_row(plan, result, element, n_tokens, gpu, rules) for result in results if result.improved)
    path = unsaved = None
    try:
        path = tuned.add(store, name, rows) if rows else None
    except OSError as error:  # the disk is full by now, say
        unsaved = f"{error.filename}: {error.strerror}"
    return Report(spec.name, name, gpu, n_tokens, dtype, tuple(results), rows, path, unsaved)


def _on_gpu(n_tokens: int, dtype: DType) -> MakeBench:
    def make(attention: Attention, present: Schedule, target: str) -> Bench:
        n = min(n_tokens, CHECKED_TOKENS)
        cases = [
            Case(attention.spec, n, heads=2, dtype=dtype, popular=popular, device="cuda") for popular in (False, True)
        ]
        return DeviceBench(attention, present, cases, n_tokens, dtype, target)

    return make


def _row(plan: Plan, result: StageResult, element: int, n_tokens: int, gpu: str, rules: Schedule) -> dict[str, Any]:
    """A winner as a row of a table, which names the backend if there are two."""
    kind = stage_kind(plan, result.stage)
    backend = {"backend": result.after.get("backend", TRITON)} if "backend" in rules[result.stage] else {}
    return {
        "stage": kind,
        "when": facts_of(plan, result.stage, element),
        "set": {name: result.after[name] for name in settable(kind) if name in result.after} | backend,
        "measured": {
            "gpu": gpu,
            "date": datetime.now(UTC).date().isoformat(),
            "before_us": round(result.before_us, 1),
            "after_us": round(result.after_us, 1),
            "spec": plan.spec.name,
            "n_tokens": n_tokens,
            "triton": version("triton"),
        },
    }
