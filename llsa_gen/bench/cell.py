"""A cell: one implementation on one input, checked, then timed in every mode, as one row a mode.

Cells may be timed in turns. Each is checked first, whatever the others do.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llsa_gen.aot import record
from llsa_gen.bench import check, kernels, timing
from llsa_gen.bench.baselines import MOST_SAID, Attend, Implementation
from llsa_gen.bench.check import length_of
from llsa_gen.bench.rows import Ceilings, KernelRow, Machine, Memory, Mode, Row, Timing
from llsa_gen.bench.timing import Call, Stopwatch
from llsa_gen.compiler import Attention
from llsa_gen.errors import LlsaGenError, short
from llsa_gen.fuzz.case import Case
from llsa_gen.plan import lower
from llsa_gen.plan.cost import Cost, evaluate
from llsa_gen.schedule import schedule
from llsa_gen.store import Store, tuned

__all__ = ["OURS", "Cell", "Session", "Step", "empty_rows", "no_memory", "ours", "rows_of", "said"]

OURS = "llsa_gen"

ON_GPU: tuple[str, ...] = ("host_us", "memory")
NEEDS_BACKWARD: tuple[str, ...] = ("forward_backward", *ON_GPU)
MEASURED: tuple[str, ...] = ("forward", *NEEDS_BACKWARD)

Step = Callable[[str], None]
"""Called with what is measured next."""

OUT_OF_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "Storage size calculation overflowed", "STATUS_ALLOC_FAILED")
"""What stands in the RuntimeErrors by which torch says that memory does not suffice, where it has no class for that."""


@dataclass(frozen=True)
class Session:
    """What the cells of one dtype share."""

    modes: tuple[Mode, ...]
    watch: Stopwatch
    limits: Ceilings | None
    """What kernels are compared with; None where they are not profiled."""
    date: str
    machine: Machine
    repeats: int | None = None
    """Timed calls of each number; None for as many as the budget of time holds."""


def ours(attention: Attention) -> Implementation:
    """The compiled spec."""
    return Implementation(OURS, "ours", lambda q, k, v: attention(q, k, v))  # type: ignore[arg-type, return-value]


class _CannotRun(Exception):
    """Why an implementation cannot be called with these inputs."""


class _Once(NamedTuple):
    """What is measured once, whatever the mode; `missing` says why there is no backward pass, or no call, if so."""

    error: float | None
    memory: Memory | None
    breakdown: tuple[KernelRow, ...] | None
    missing: dict[str, str]


@dataclass(frozen=True)
class Cell:
    """One implementation on q, k, v and the gradient of o, `inputs` of the case, [B, H, M or N, D].

    `attention` is the compiled spec that is measured or, for another implementation, one that it stands beside.
    """

    session: Session
    attention: Attention
    case: Case
    one: Implementation
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]

    @property
    def on_gpu(self) -> bool:
        """Whether the inputs are there."""
        return self.inputs[0].is_cuda

    @cached_property
    def lists(self) -> tuple[Tensor, ...]:
        """What the spec keeps, the finest level first."""
        return self.attention.select(*self.inputs[:2])

    @cached_property
    def function(self) -> Attend:
        """What is measured. Raises whatever the maker of one raises."""
        if self.one.make is None:
            assert self.one.function is not None
            return self.one.function
        made = self.one.make(self.case.spec, self.lists[0], self.case.queries, self.case.n)
        if not callable(made):
            raise TypeError(f"expected a callable f(q, k, v), got {type(made).__name__}")
        return made

    # ---- the calls ----------------------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        """o, without what a backward pass would need."""
        return self.function(*self.inputs[:3])

    def forward_backward(self) -> tuple[Tensor, ...]:
        """o, dq, dk, dv."""
        leaves = [x.detach().requires_grad_() for x in self.inputs[:3]]
        o = self.function(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves, self.inputs[3])

    # ---- what is measured once ----------------------------------------------------------------------------------

    def prepared(self) -> _Once:
        """The first call, checked, and what does not depend on the mode.

        Raises CheckFailed or LlsaGenError where a result is wrong, and LlsaGenError for whatever else stops ours.
        """
        with self.one.chosen():
            try:
                return self._once(self._checked())
            except _CannotRun as why:
                return _Once(None, None, None, dict.fromkeys(MEASURED, f"not available: {why}"))
            except LlsaGenError:
                raise
            except Exception as other:
                raise LlsaGenError(f"{self._place()}: raised {said(other)}") from other

    def _checked(self) -> float | None:
        """The error as a fraction of what is allowed, None where there is nothing to compare with."""
        if self.one.kind == "ours":
            try:
                return check.check_ours(self.attention, self.case, self.inputs)
            except Exception as error:
                if no_memory(error):
                    raise _CannotRun(said(error)) from None
                raise
        with warnings.catch_warnings(record=True) as reasons:  # torch says there why a backend refuses
            warnings.simplefilter("always")
            try:
                o = self.forward()
            except (Exception, SystemExit) as error:  # whatever somebody else's code may raise
                if self.one.kind == "dense" or self.one.make is not None or no_memory(error):
                    raise _CannotRun("; ".join([said(error), *(said(reason.message) for reason in reasons)])) from None
                raise LlsaGenError(f"{self._place()}: raised {said(error)}") from error
        try:
            if self.one.kind == "dense":
                return check.check_dense(self.one, self.case, self.inputs, o)
            if self.one.make is not None:
                return check.check_along(self.one, self.case, self.inputs, self.lists, o)
            check.check_other(self.one, self.case, o)
        except Exception as error:
            if no_memory(error):
                raise _CannotRun(f"checked in vain: {said(error)}") from None
            raise
        return None

    def _once(self, error: float | None) -> _Once:
        try:
            self.forward_backward()
            memory = self._memory() if self.on_gpu else None
        except (Exception, SystemExit) as why:
            if self.one.kind == "ours" and not no_memory(why):
                raise
            return _Once(error, None, None, dict.fromkeys(NEEDS_BACKWARD, f"backward raised {said(why)}"))
        missing = {} if self.on_gpu else dict.fromkeys(ON_GPU, "measured on a GPU only")
        return _Once(error, memory, self._breakdown(), missing)

    def _memory(self) -> Memory:
        given = sum(x.numel() * x.element_size() for x in self.inputs)  # and so much are o, dq, dk and dv
        peak = timing.peak_bytes(self.forward_backward) + given
        return Memory(peak_bytes=peak, tensors_bytes=2 * given, ratio=peak / (2 * given))

    def _breakdown(self) -> tuple[KernelRow, ...] | None:
        limits = self.session.limits
        if self.one.kind != "ours" or limits is None:
            return None
        attention, case, x = self.attention, self.case, self.inputs[0]
        plan, target = lower(case.spec), attention.module.target_of(x.device)
        goal = tuned.targets(Store())[target]  # as `compile` reads them
        cost = Cost(plan, schedule(plan, goal, x.element_size()), case.dtype)
        launches = record(
            attention, case.n, case.dtype, target, batch=case.batch, heads=case.heads, m_tokens=case.queries
        )
        needed = kernels.work(cost, case.n, case.batch * case.heads, launches, case.queries)
        happened = kernels.profiled(self.forward_backward, self.session.watch)
        return kernels.breakdown(happened, kernels.PASSES, needed, limits)

    # ---- timing -------------------------------------------------------------------------------------------------

    def run(self, mode: Mode, name: str) -> Callable[[], object]:
        """One of the two calls, captured where the mode is so."""
        run = self.forward if name == "forward" else self.forward_backward
        if mode == "eager":
            return run
        with self.one.chosen():
            replay = timing.captured(run)
            if self.one.kind == "ours" and name == "forward_backward":
                self._check_replay(replay)
        return replay

    def _check_replay(self, replay: Callable[[], object]) -> None:
        """That a graph writes all of its results, and the same bits as an eager call."""
        eager, replayed = self.forward_backward(), replay()
        assert isinstance(replayed, tuple)
        for x in replayed:
            x.fill_(torch.nan)
        replay()
        check.check_replay(self.case, eager, replayed)

    def excuse(self, error: BaseException) -> str:
        """Why a cell stays empty. Ours may only where memory does not suffice: any other exception ends the bench."""
        if self.one.kind != "ours" or no_memory(error):
            return said(error)
        if isinstance(error, LlsaGenError):
            raise error
        raise LlsaGenError(f"{self._place()}: raised {said(error)}") from error

    def _place(self) -> str:
        return f"{self.one.name} at {length_of(self.case)}, {self.case.dtype}"


def rows_of(cells: Sequence[Cell], step: Step) -> Iterator[Row]:
    """A row a mode of each cell, timed in turns, when all are measured; `step` is called once for each.

    Raises what `Cell.prepared` raises.
    """
    ready: list[_Once] = []
    for cell in cells:
        step(_text(cell.case, cell.one, cell.session.modes[0]))
        ready.append(cell.prepared())
        if cell.on_gpu and len(cells) > 1:
            torch.cuda.empty_cache()  # what the reference took
    for number, mode in enumerate(cells[0].session.modes):
        for cell in cells if number else ():
            step(_text(cell.case, cell.one, mode))
        yield from _timed(cells, ready, mode)


def _timed(cells: Sequence[Cell], ready: Sequence[_Once], mode: Mode) -> Iterator[Row]:
    """The rows of a mode."""
    missing = [dict(once.missing) for once in ready]
    found: list[dict[str, Any]] = [{} for _ in cells]
    for name in ("forward", "forward_backward"):
        runs: dict[int, Callable[[], object]] = {}
        for index, cell in enumerate(cells):
            if name in missing[index]:
                continue
            try:
                runs[index] = cell.run(mode, name)
            except (Exception, SystemExit) as why:
                missing[index][name] = cell.excuse(why)
        timings = _timings(cells, runs)
        for index, timed in timings.items():
            cell = cells[index]
            if not isinstance(timed, Timing):
                missing[index][name] = cell.excuse(timed)
                continue
            found[index][name] = timed
            if cell.on_gpu and name == "forward_backward":
                try:
                    with cell.one.chosen():
                        found[index]["host_us"] = timing.host_us(runs[index], timed.median_ms)
                except (Exception, SystemExit) as why:
                    missing[index]["host_us"] = cell.excuse(why)
    for cell, once, lacking, measured in zip(cells, ready, missing, found, strict=True):
        if "forward_backward" in lacking:
            lacking.setdefault("host_us", lacking["forward_backward"])
        profiled = {"breakdown": once.breakdown, "ceilings": cell.session.limits if once.breakdown else None}
        measured |= {"error": once.error, "memory": once.memory, "missing": lacking, **profiled}
        yield _row(cell.session, cell.case, cell.one, mode, **measured)


def _timings(
    cells: Sequence[Cell], runs: Mapping[int, Callable[[], object]]
) -> dict[int, Timing | BaseException]:  # fmt: skip
    """The time of each call, or what it raised."""
    if not runs:
        return {}
    session = cells[0].session
    calls = [Call(run, cells[index].one.chosen) for index, run in runs.items()]
    try:
        return dict(zip(runs, timing.measure(session.watch, calls, session.repeats), strict=True))
    except (Exception, SystemExit) as why:  # outside of the calls
        return dict.fromkeys(runs, why)


def empty_rows(session: Session, case: Case, one: Implementation, why: str, step: Step) -> Iterator[Row]:
    """A row a mode of what cannot run; `step` is called before each."""
    for mode in session.modes:
        step(_text(case, one, mode))
        yield _row(session, case, one, mode, missing=dict.fromkeys(MEASURED, f"not available: {why}"))


def _text(case: Case, one: Implementation, mode: Mode) -> str:
    return f"{one.name}, {length_of(case)}, {case.dtype}, {mode}"


def _keys(case: Case, one: Implementation) -> int | None:
    """How many keys a query attends to, as far as anybody here knows."""
    if one.kind == "ours" or one.make is not None:
        return evaluate(Cost(lower(case.spec), {}, case.dtype).keys, case.n)
    return case.n if one.kind == "dense" else None


def _row(session: Session, case: Case, one: Implementation, mode: Mode, **measured: Any) -> Row:
    return Row(
        date=session.date,
        machine=session.machine,
        spec=case.spec.canonical(),
        digest=case.spec.digest,
        implementation=one.name,
        kind=one.kind,
        n_tokens=case.n,
        batch=case.batch,
        heads=case.heads,
        head_dim=case.spec.head_dim,
        dtype=case.dtype,
        mode=mode,
        m_tokens=case.m,
        keys=_keys(case, one),
        **measured,
    )


def no_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice."""
    if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY):
        return True
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def said(error: object) -> str:
    """An exception or a warning as one line."""
    name = f"{type(error).__name__}: " if isinstance(error, BaseException) and not isinstance(error, Warning) else ""
    return name + short(" ".join(str(error).split()), MOST_SAID)
