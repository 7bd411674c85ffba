"""Bench: compiled specs and torch's dense attention in one process, each checked first and then timed.

For every dtype and length the implementations are called on the same inputs, forward and forward with backward, from
Python and as CUDA graphs; what comes of it is a `Row` for each, handed out as soon as it is measured. Specs with heads
of another width have inputs, and dense attention, of their own. A wrong result ends the bench with an error. What
another implementation cannot do leaves an empty cell with the reason, and so does a length that memory does not suffice
for.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from llsa_gen.bench import baselines, kernels
from llsa_gen.bench.baselines import Factory, Implementation
from llsa_gen.bench.cell import Cell, Session, Step, empty_rows, no_memory, ours, rows_of, said
from llsa_gen.bench.machine import machine
from llsa_gen.bench.rows import Mode, Row
from llsa_gen.bench.timing import CpuStopwatch, GpuStopwatch
from llsa_gen.compiler import Attention, compile
from llsa_gen.errors import LlsaGenError, short
from llsa_gen.fuzz.case import Case, DType
from llsa_gen.plan import lower
from llsa_gen.spec import Spec

__all__ = ["Request", "bench"]


@dataclass(frozen=True)
class Request:
    """What to measure: k and v are [batch, heads, n, D] for each of the lengths, in each of the dtypes.

    q is as they are, or [batch, heads, queries, D].
    """

    specs: tuple[Spec, ...]
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
    along: tuple[str, ...] = ()
    """Makers of implementations that attend to what a spec without enrichment keeps, each `module:function`."""
    dense: tuple[str, ...] = ()
    """Which of torch's dense backends, by name; all unless given."""
    in_turns: bool = False
    """Whether the implementations of a length are timed in turns, and not one after the other."""
    repeats: int | None = None
    """Timed calls of each number, in place of as many as a budget of time holds."""

    def __post_init__(self) -> None:
        """Raises LlsaGenError for what can not be measured."""
        if "graph" in self.modes and not self.on_gpu:
            raise LlsaGenError(f"--mode graph: expected a GPU to capture a CUDA graph on, got --device {self.device}")
        known = [one.name for dtype in self.dtypes for one in baselines.dense(self.device, dtype)]
        for name in self.dense:
            if name not in known:
                raise LlsaGenError(f"--dense: expected {', '.join(dict.fromkeys(known))}, got {short(repr(name))}")
        if self.along and not any(map(_keeps_all, self.specs)):
            raise LlsaGenError(f"--along: expected a spec without enrichment, got {self.specs[0].name}")
        for spec in self.specs:
            longest = lower(spec).max_tokens
            for n in self.lengths:
                if not 1 <= n <= longest:
                    raise LlsaGenError(f"n: expected 1 to {longest} tokens, the most that {spec.name} takes, got {n}")
            if self.queries is not None and not 1 <= self.queries <= longest:
                takes = f"the most that {spec.name} takes"
                raise LlsaGenError(f"m: expected 1 to {longest} queries, {takes}, got {self.queries}")

    @property
    def on_gpu(self) -> bool:
        """Whether it is measured on a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def cells(self) -> int:
        """How many rows there will be."""
        of_dtype = (
            len(specs) + len(self.along) * len(list(filter(_keeps_all, specs))) + len(_dense(self, dtype, n))
            + len(self.against)
            for dtype in self.dtypes for n in self.lengths for specs in _alike(self.specs)
        )  # fmt: skip
        return len(self.modes) * sum(of_dtype)


def _keeps_all(spec: Spec) -> bool:
    """Whether the finest level's lists say all that a query attends to."""
    return not spec.enriched_levels


def _alike(specs: Sequence[Spec]) -> list[tuple[Spec, ...]]:
    """Specs that take the same inputs, together."""
    widths = dict.fromkeys(spec.head_dim for spec in specs)
    return [tuple(spec for spec in specs if spec.head_dim == width) for width in widths]


def _dense(request: Request, dtype: DType, n: int) -> tuple[Implementation, ...]:
    """Dense attention, unless there are too many pairs of a query and a key."""
    pairs = n * (n if request.queries is None else request.queries)
    return baselines.dense(request.device, dtype, request.dense) if pairs <= request.dense_up_to**2 else ()


def bench(request: Request, step: Step = lambda _: None) -> Iterator[Row]:
    """Measure everything that is asked for; `Request.cells` rows, ours first at every length, each when it is measured.

    `step` is called with what is measured next, and at the end with an empty text: once more than there are rows.
    Raises CheckFailed where ours disagrees with the reference, LlsaGenError where another implementation is wrong or
    cannot be called at all.
    """
    others = tuple(map(baselines.named, request.against))
    makers = {text: baselines.factory(text) for text in request.along}
    attentions = {spec: compile(spec) for spec in request.specs}
    date, where = datetime.now(UTC).isoformat(timespec="seconds"), machine(request.device)
    with torch.cuda.device(request.device) if request.on_gpu else contextlib.nullcontext():
        watch = GpuStopwatch(torch.device(request.device)) if request.on_gpu else CpuStopwatch()
        for dtype in request.dtypes:
            profiling = request.on_gpu and request.breakdown
            limits = kernels.ceilings(watch, request.device, dtype) if profiling else None
            session = Session(request.modes, watch, limits, date, where, request.repeats)
            for n in request.lengths:
                for specs in _alike(request.specs):
                    alike = [attentions[spec] for spec in specs]
                    yield from _at(request, session, alike, dtype, n, others, makers, step)
    step("")


def _at(
    request: Request,
    session: Session,
    attentions: Sequence[Attention],
    dtype: DType,
    n: int,
    others: Sequence[Implementation],
    makers: Mapping[str, Factory],
    step: Step,
) -> Iterator[Row]:
    """The rows of one length, dtype and width of heads."""
    m = None if request.queries == n else request.queries
    cases = [
        Case(
            attention.spec, n, batch=request.batch, heads=request.heads, dtype=dtype, device=request.device, m=m,
            drawn_there=request.on_gpu,
        )
        for attention in attentions
    ]  # fmt: skip
    own = [*zip(attentions, cases, strict=True)]
    entries = [
        *((attention, case, ours(attention)) for attention, case in own),
        *((*own[0], one) for one in (*_dense(request, dtype, n), *others)),
        *(
            (attention, case, Implementation(f"{text}({case.spec.name})", "other", make=make))
            for text, make in makers.items() for attention, case in own if _keeps_all(case.spec)
        ),
    ]  # fmt: skip
    try:
        inputs = cases[0].tensors()
    except Exception as error:
        if not no_memory(error):
            raise
        for _, case, one in entries:
            yield from empty_rows(session, case, one, f"no memory for the inputs: {said(error)}", step)
        return
    cells = [Cell(session, *entry, inputs) for entry in entries]
    for group in [cells] if request.in_turns else [[cell] for cell in cells]:
        yield from rows_of(group, step)
        if request.on_gpu:
            torch.cuda.empty_cache()
