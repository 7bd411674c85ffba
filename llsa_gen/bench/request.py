"""Bench: a compiled spec and torch's dense attention in one process, each checked first and then timed.

For every dtype and length the implementations are called on the same inputs, forward and forward with backward, from
Python and as CUDA graphs; what comes of it is a `Row` for each, handed out as soon as it is measured. A wrong result
ends the bench with an error. What another implementation cannot do leaves an empty cell with the reason, and so does a
length that memory does not suffice for.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from llsa_gen.bench import baselines, kernels
from llsa_gen.bench.baselines import Implementation
from llsa_gen.bench.cell import OURS, Cell, Session, Step, empty_rows, no_memory, said
from llsa_gen.bench.machine import machine
from llsa_gen.bench.rows import Mode, Row
from llsa_gen.bench.timing import CpuStopwatch, GpuStopwatch
from llsa_gen.compiler import compile
from llsa_gen.errors import LlsaGenError
from llsa_gen.fuzz.case import Case, DType
from llsa_gen.plan import lower
from llsa_gen.spec import Spec

__all__ = ["Request", "bench"]


@dataclass(frozen=True)
class Request:
    """What to measure: k and v are [batch, heads, n, D] for each of the lengths, in each of the dtypes.

    q is as they are, or [batch, heads, queries, D].
    """

    spec: Spec
    lengths: tuple[int, ...]
    dtypes: tuple[DType, ...]
    device: str = "cpu"
    batch: int = 2
    heads: int = 4
    modes: tuple[Mode, ...] = ("eager",)
    against: tuple[str, ...] = ()
    """Further implementations, each `module:function`."""
    dense_up_to: int = 262_144
    """Longest sequence for dense attention, in tokens; its square is the most pairs of a query and a key."""
    breakdown: bool = True
    """Whether our kernels are profiled one by one, on a GPU."""
    queries: int | None = None
    """Queries, where they are not as many as keys."""

    def __post_init__(self) -> None:
        """Raises LlsaGenError for what can not be measured."""
        if "graph" in self.modes and not self.on_gpu:
            raise LlsaGenError(f"--mode graph: expected a GPU to capture a CUDA graph on, got --device {self.device}")
        longest = lower(self.spec).max_tokens
        for n in self.lengths:
            if not 1 <= n <= longest:
                raise LlsaGenError(f"n: expected 1 to {longest} tokens, the most that {self.spec.name} takes, got {n}")
        if self.queries is not None and not 1 <= self.queries <= longest:
            takes = f"the most that {self.spec.name} takes"
            raise LlsaGenError(f"m: expected 1 to {longest} queries, {takes}, got {self.queries}")

    @property
    def on_gpu(self) -> bool:
        """Whether it is measured on a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def cells(self) -> int:
        """How many rows there will be."""
        return len(self.modes) * sum(len(_names(self, dtype, n)) for dtype in self.dtypes for n in self.lengths)


def _names(request: Request, dtype: DType, n: int) -> tuple[str, ...]:
    """The implementations at a length and dtype, in order."""
    return (OURS, *(baseline.name for baseline in _dense(request, dtype, n)), *request.against)


def _dense(request: Request, dtype: DType, n: int) -> tuple[Implementation, ...]:
    """Dense attention, unless there are too many pairs of a query and a key."""
    pairs = n * (n if request.queries is None else request.queries)
    return baselines.dense(request.device, dtype) if pairs <= request.dense_up_to**2 else ()


def bench(request: Request, step: Step = lambda _: None) -> Iterator[Row]:
    """Measure everything that is asked for; `Request.cells` rows, ours first at every length, each when it is measured.

    `step` is called with what is measured next, and at the end with an empty text: once more than there are rows.
    Raises CheckFailed where ours disagrees with the reference, LlsaGenError where another implementation is wrong or
    cannot be called at all.
    """
    others = tuple(map(baselines.named, request.against))
    attention = compile(request.spec)
    date, where = datetime.now(UTC).isoformat(timespec="seconds"), machine(request.device)
    with torch.cuda.device(request.device) if request.on_gpu else contextlib.nullcontext():
        watch = GpuStopwatch(torch.device(request.device)) if request.on_gpu else CpuStopwatch()
        for dtype in request.dtypes:
            profiling = request.on_gpu and request.breakdown
            limits = kernels.ceilings(watch, request.device, dtype) if profiling else None
            session = Session(attention, request.modes, watch, limits, date, where)
            for n in request.lengths:
                case = Case(
                    request.spec,
                    n,
                    batch=request.batch,
                    heads=request.heads,
                    dtype=dtype,
                    device=request.device,
                    m=None if request.queries == n else request.queries,
                )
                implementations = session.ours, *_dense(request, dtype, n), *others
                yield from _at(session, case, implementations, step)
    step("")


def _at(session: Session, case: Case, implementations: Sequence[Implementation], step: Step) -> Iterator[Row]:
    """The rows of one length and dtype."""
    try:
        inputs = case.tensors()
    except Exception as error:
        if not no_memory(error):
            raise
        for one in implementations:
            yield from empty_rows(session, case, one, f"no memory for the inputs: {said(error)}", step)
        return
    for one in implementations:
        yield from Cell(session, case, inputs, one).rows(step)
        if case.device != "cpu":
            torch.cuda.empty_cache()
