"""A cell: one implementation on one input, checked, then timed in every mode, as one row a mode."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llsa_gen.aot import record
from llsa_gen.bench import check, kernels, timing
from llsa_gen.bench.baselines import MOST_SAID, Implementation
from llsa_gen.bench.check import length_of
from llsa_gen.bench.rows import Ceilings, KernelRow, Machine, Memory, Mode, Row, Timing
from llsa_gen.bench.timing import Stopwatch
from llsa_gen.compiler import Attention
from llsa_gen.errors import LlsaGenError, short
from llsa_gen.fuzz.case import Case
from llsa_gen.plan import lower
from llsa_gen.plan.cost import Cost
from llsa_gen.schedule import schedule
from llsa_gen.store import Store, tuned

__all__ = ["OURS", "Cell", "Session", "Step", "empty_rows", "no_memory", "said"]

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

    attention: Attention
    modes: tuple[Mode, ...]
    watch: Stopwatch
    limits: Ceilings | None
    """What kernels are compared with; None where they are not profiled."""
    date: str
    machine: Machine

    @property
    def ours(self) -> Implementation:
        """The compiled spec."""
        return Implementation(OURS, "ours", lambda q, k, v: self.attention(q, k, v))  # type: ignore[arg-type, return-value]


class _CannotRun(Exception):
    """Why an implementation cannot be called with these inputs."""


class _Once(NamedTuple):
    """What is measured once, whatever the mode; `missing` says why there is no backward pass, if so."""

    memory: Memory | None
    breakdown: tuple[KernelRow, ...] | None
    missing: dict[str, str]


@dataclass(frozen=True)
class Cell:
    """One implementation on q, k, v and the gradient of o, `inputs` of the case, [B, H, M or N, D]."""

    session: Session
    case: Case
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    one: Implementation

    @property
    def on_gpu(self) -> bool:
        """Whether the inputs are there."""
        return self.inputs[0].is_cuda

    def rows(self, step: Step) -> Iterator[Row]:
        """A row a mode, each when it is measured; `step` is called before each.

        Raises CheckFailed or LlsaGenError where a result is wrong, and LlsaGenError for whatever else stops ours.
        """
        texts = _texts(self.session, self.case, self.one)
        step(texts[0])
        with self.one.chosen():
            try:
                error = self._checked()
                once = self._once()
                for number, (mode, text) in enumerate(zip(self.session.modes, texts, strict=True)):
                    if number:
                        step(text)
                    yield self._timed(mode, error, once)
            except _CannotRun as why:
                yield from empty_rows(self.session, self.case, self.one, str(why), step, begun=True)
            except LlsaGenError:
                raise
            except Exception as other:
                raise LlsaGenError(f"{self._place()}: raised {said(other)}") from other

    # ---- the calls ----------------------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        """o, without what a backward pass would need."""
        return self.one.function(*self.inputs[:3])

    def forward_backward(self) -> tuple[Tensor, ...]:
        """o, dq, dk, dv."""
        leaves = [x.detach().requires_grad_() for x in self.inputs[:3]]
        o = self.one.function(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves, self.inputs[3])

    # ---- checking -----------------------------------------------------------------------------------------------

    def _checked(self) -> float | None:
        """The error as a fraction of what is allowed, None where there is nothing to compare with."""
        if self.one.kind == "ours":
            try:
                return check.check_ours(self.session.attention, self.case, self.inputs)
            except Exception as error:
                if no_memory(error):
                    raise _CannotRun(said(error)) from None
                raise
        with warnings.catch_warnings(record=True) as reasons:  # torch says there why a backend refuses
            warnings.simplefilter("always")
            try:
                o = self.forward()
            except (Exception, SystemExit) as error:  # whatever somebody else's code may raise
                if self.one.kind == "dense" or no_memory(error):
                    raise _CannotRun("; ".join([said(error), *(said(reason.message) for reason in reasons)])) from None
                raise LlsaGenError(f"{self._place()}: raised {said(error)}") from error
        try:
            if self.one.kind == "dense":
                return check.check_dense(self.one, self.case, self.inputs, o)
            check.check_other(self.one, self.case, o)
        except Exception as error:
            if no_memory(error):
                raise _CannotRun(f"checked in vain: {said(error)}") from None
            raise
        return None

    def _check_replay(self, replay: Callable[[], object]) -> None:
        """That a graph writes all of its results, and the same bits as an eager call."""
        eager, replayed = self.forward_backward(), replay()
        assert isinstance(replayed, tuple)
        for x in replayed:
            x.fill_(torch.nan)
        replay()
        check.check_replay(self.case, eager, replayed)

    # ---- measuring ----------------------------------------------------------------------------------------------

    def _once(self) -> _Once:
        try:
            self.forward_backward()
            memory = self._memory() if self.on_gpu else None
        except (Exception, SystemExit) as error:
            if self.one.kind == "ours" and not no_memory(error):
                raise
            return _Once(None, None, dict.fromkeys(NEEDS_BACKWARD, f"backward raised {said(error)}"))
        missing = {} if self.on_gpu else dict.fromkeys(ON_GPU, "measured on a GPU only")
        return _Once(memory, self._breakdown(), missing)

    def _memory(self) -> Memory:
        given = sum(x.numel() * x.element_size() for x in self.inputs)  # and so much are o, dq, dk and dv
        peak = timing.peak_bytes(self.forward_backward) + given
        return Memory(peak_bytes=peak, tensors_bytes=2 * given, ratio=peak / (2 * given))

    def _breakdown(self) -> tuple[KernelRow, ...] | None:
        limits = self.session.limits
        if self.one.kind != "ours" or limits is None:
            return None
        attention, case, x = self.session.attention, self.case, self.inputs[0]
        plan, target = lower(case.spec), attention.module.target_of(x.device)
        goal = tuned.targets(Store())[target]  # as `compile` reads them
        cost = Cost(plan, schedule(plan, goal, x.element_size()), case.dtype)
        launches = record(
            attention, case.n, case.dtype, target, batch=case.batch, heads=case.heads, m_tokens=case.queries
        )
        needed = kernels.work(cost, case.n, case.batch * case.heads, launches, case.queries)
        happened = kernels.profiled(self.forward_backward, self.session.watch)
        return kernels.breakdown(happened, kernels.PASSES, needed, limits)

    def _timed(self, mode: Mode, error: float | None, once: _Once) -> Row:
        missing = dict(once.missing)
        found: dict[str, Timing] = {}
        host = None
        for name, run in (("forward", self.forward), ("forward_backward", self.forward_backward)):
            if name in missing:
                continue
            try:
                if mode == "graph":
                    run = timing.captured(run)
                    if self.one.kind == "ours" and name == "forward_backward":
                        self._check_replay(run)
                found[name] = timing.measure(self.session.watch, run)
                if self.on_gpu and name == "forward_backward":
                    host = timing.host_us(run, found[name].median_ms)
            except (Exception, SystemExit) as why:
                if self.one.kind == "ours" and not no_memory(why):
                    raise
                missing[name] = said(why)
                if name == "forward_backward":
                    missing["host_us"] = said(why)
        profiled = {"breakdown": once.breakdown, "ceilings": self.session.limits if once.breakdown else None}
        measured = {"error": error, "memory": once.memory, "host_us": host, "missing": missing, **profiled, **found}
        return _row(self.session, self.case, self.one, mode, **measured)

    def _place(self) -> str:
        return f"{self.one.name} at {length_of(self.case)}, {self.case.dtype}"


def empty_rows(
    session: Session, case: Case, one: Implementation, why: str, step: Step, *, begun: bool = False
) -> Iterator[Row]:
    """A row a mode of what cannot run; `step` is called before each but, where it has `begun`, the first."""
    for number, (mode, text) in enumerate(zip(session.modes, _texts(session, case, one), strict=True)):
        if number or not begun:
            step(text)
        yield _row(session, case, one, mode, missing=dict.fromkeys(MEASURED, f"not available: {why}"))


def _texts(session: Session, case: Case, one: Implementation) -> list[str]:
    return [f"{one.name}, {length_of(case)}, {case.dtype}, {mode}" for mode in session.modes]


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
