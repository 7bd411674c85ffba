"""A cell: one implementation on one input, checked, then timed in every mode, as one row a mode."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llsa_gen import bench_check, bench_kernels, bench_timing, tuned
from llsa_gen.bench_rivals import Implementation
from llsa_gen.bench_rows import Ceilings, KernelRow, Machine, Memory, Mode, Row, Timing
from llsa_gen.bench_timing import Stopwatch
from llsa_gen.compiler import Attention
from llsa_gen.cost import Cost
from llsa_gen.errors import LlsaGenError
from llsa_gen.fuzz_cases import Case
from llsa_gen.plan import lower
from llsa_gen.schedule import schedule
from llsa_gen.store import Store

__all__ = ["OURS", "Cell", "Session", "Step"]

OURS = "llsa_gen"

ON_GPU: tuple[str, ...] = ("host_us", "memory")
NEEDS_BACKWARD: tuple[str, ...] = ("forward_backward", *ON_GPU)
MEASURED: tuple[str, ...] = ("forward", *NEEDS_BACKWARD)

Step = Callable[[str], None]
"""Called with what is measured next."""


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
    """Why an implementation that is not ours cannot be called with these inputs."""


class _Once(NamedTuple):
    """What is measured once, whatever the mode; `missing` says why there is no backward pass, if so."""

    memory: Memory | None
    breakdown: tuple[KernelRow, ...] | None
    missing: dict[str, str]


@dataclass(frozen=True)
class Cell:
    """One implementation on q, k, v and the gradient of o, `inputs` of the case, each [B, H, N, D]."""

    session: Session
    case: Case
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    one: Implementation

    @property
    def on_gpu(self) -> bool:
        """Whether the inputs are there."""
        return self.inputs[0].is_cuda

    def rows(self, step: Step) -> list[Row]:
        """A row a mode; `step` is called for each. Raises CheckFailed or LlsaGenError where a result is wrong."""
        modes = self.session.modes
        texts = [f"{self.one.name}, {self.case.n:,} tokens, {self.case.dtype}, {mode}" for mode in modes]
        step(texts[0])
        with self.one.chosen():
            try:
                error = self._checked()
            except _CannotRun as why:
                for text in texts[1:]:
                    step(text)
                return [self._row(mode, missing=dict.fromkeys(MEASURED, f"not available: {why}")) for mode in modes]
            once = self._once()
            rows = []
            for mode, text in zip(modes, texts, strict=True):
                if rows:
                    step(text)
                rows.append(self._timed(mode, error, once))
            return rows

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
                return bench_check.check_ours(self.session.attention, self.case, self.inputs)
            except torch.OutOfMemoryError as error:
                raise LlsaGenError(f"{self._place()}: {said(error)}") from None
        with warnings.catch_warnings(record=True) as reasons:  # torch says there why a backend refuses
            warnings.simplefilter("always")
            try:
                o = self.forward()
            except Exception as error:  # whatever somebody else's code may raise
                if self.one.kind == "dense" or isinstance(error, torch.OutOfMemoryError):
                    raise _CannotRun("; ".join([said(error), *(said(reason.message) for reason in reasons)])) from None
                raise LlsaGenError(f"{self._place()}: raised {said(error)}") from error
        if self.one.kind == "dense":
            return bench_check.check_dense(self.one, self.case, self.inputs, o)
        bench_check.check_other(self.one, self.case, o)
        return None

    def _check_replay(self, replay: Callable[[], object]) -> None:
        """That a graph writes all of its results, and the same bits as an eager call."""
        eager, replayed = self.forward_backward(), replay()
        assert isinstance(replayed, tuple)
        for x in replayed:
            x.fill_(torch.nan)
        replay()
        bench_check.check_replay(self.case, eager, replayed)

    # ---- measuring ----------------------------------------------------------------------------------------------

    def _once(self) -> _Once:
        try:
            self.forward_backward()
            memory = self._memory() if self.on_gpu else None
        except Exception as error:
            if self.one.kind == "ours":
                raise
            return _Once(None, None, dict.fromkeys(NEEDS_BACKWARD, f"backward raised {said(error)}"))
        missing = {} if self.on_gpu else dict.fromkeys(ON_GPU, "measured on a GPU only")
        return _Once(memory, self._breakdown(), missing)

    def _memory(self) -> Memory:
        tensor = self.inputs[0].numel() * self.inputs[0].element_size()
        peak = bench_timing.peak_bytes(self.forward_backward) + 4 * tensor
        return Memory(peak_bytes=peak, tensors_bytes=8 * tensor, ratio=peak / (8 * tensor))

    def _breakdown(self) -> tuple[KernelRow, ...] | None:
        limits = self.session.limits
        if self.one.kind != "ours" or limits is None:
            return None
        plan, x = lower(self.case.spec), self.inputs[0]
        goal = tuned.targets(Store())[self.session.attention.module.target_of(x.device)]  # as `compile` reads them
        cost = Cost(plan, schedule(plan, goal, x.element_size(), self.case.n), self.case.dtype)
        needed = bench_kernels.work(cost, self.case.n, self.case.batch * self.case.heads)
        happened = bench_kernels.profiled(self.forward_backward, self.session.watch)
        return bench_kernels.breakdown(happened, bench_kernels.PASSES, needed, limits)

    def _timed(self, mode: Mode, error: float | None, once: _Once) -> Row:
        missing = dict(once.missing)
        found: dict[str, Timing] = {}
        host = None
        for name, run in (("forward", self.forward), ("forward_backward", self.forward_backward)):
            if name in missing:
                continue
            try:
                if mode == "graph":
                    run = bench_timing.captured(run)
                    if self.one.kind == "ours" and name == "forward_backward":
                        self._check_replay(run)
                found[name] = bench_timing.measure(self.session.watch, run)
                if self.on_gpu and name == "forward_backward":
                    host = bench_timing.host_us(run, found[name].median_ms)
            except Exception as why:
                if self.one.kind == "ours":
                    raise
                missing[name] = said(why)
                if name == "forward_backward":
                    missing["host_us"] = said(why)
        profiled = {"breakdown": once.breakdown, "ceilings": self.session.limits if once.breakdown else None}
        return self._row(mode, error=error, memory=once.memory, host_us=host, missing=missing, **profiled, **found)

    def _row(self, mode: Mode, **measured: Any) -> Row:
        case = self.case
        return Row(
            date=self.session.date,
            machine=self.session.machine,
            spec=case.spec.canonical(),
            digest=case.spec.digest,
            implementation=self.one.name,
            kind=self.one.kind,
            n_tokens=case.n,
            batch=case.batch,
            heads=case.heads,
            head_dim=case.spec.head_dim,
            dtype=case.dtype,
            mode=mode,
            **measured,
        )

    def _place(self) -> str:
        return f"{self.one.name} at {self.case.n:,} tokens, {self.case.dtype}"


def said(error: object) -> str:
    """An exception or a warning as one line."""
    name = f"{type(error).__name__}: " if isinstance(error, Exception) and not isinstance(error, Warning) else ""
    return name + " ".join(str(error).split())
