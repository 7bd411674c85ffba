"""Forward and backward as a GPU does them: kernels in Gluon in the emulator, in place of others `stand_ins`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import triton
from torch import Tensor

from emulator import machine, ptx
from emulator.memory import GlobalMemory
from emulator.stand_ins import StandIns
from llsa_gen import fuzz, reference
from llsa_gen.aot import gpu_target
from llsa_gen.aot.kernels import specialise
from llsa_gen.aot.launches import Launch, _Passes
from llsa_gen.fuzz import oracle
from llsa_gen.fuzz.search import compare

TARGET = "cuda:90"


@dataclass
class Run:
    """One launch of a kernel in Gluon: what was compiled, and the memory before and after."""

    kernel: str
    text: str
    """PTX."""
    arguments: list[int | float]
    shared: int
    programs: int
    before: GlobalMemory
    after: GlobalMemory
    executed: int = 0
    """Instructions, each of some programs together."""

    def again(self, text: str) -> bool:
        """Whether other PTX leaves the same behind. Raises EmulatorError for what it must not do."""
        memory = self.before.copy()
        machine.run(ptx.parse(text), self.arguments, memory, self.shared, self.programs)
        return memory.same(self.after)


@dataclass
class Pass:
    """What a forward and a backward pass came to."""

    found: dict[str, Tensor]
    """o, lse, dq, dk, dv, dk_global, dv_global."""
    kept: Sequence[Tensor]
    runs: dict[str, Run]
    """Of the kernels that ran in the emulator, by name."""


def check(module: ModuleType, case: fuzz.Case) -> Pass:
    """Run a case of the spec that a module is of, and hold it against the float64 reference.

    Raises EmulatorError for what a kernel must not do, AssertionError where results are not as `fuzz.oracle` allows.
    """
    made = run(module, case)
    failures, _ = compare(case, case.tensors(), made.kept, made.found)
    assert not failures, "; ".join(failures)
    return made


def run(module: ModuleType, case: fuzz.Case) -> Pass:
    """Attend to a case, forward and backward."""
    q, k, v, grad_o = case.tensors()
    given = case.lists(q, k, reference.select(case.spec, q, k)) if case.kept else None
    shared = case.shared()
    extras = module.seen_by_all(*map(shared.get, module.SHARED_NAMES))
    emulated = _Emulated(module, case)
    with fuzz.poisoned_memory(), emulated.in_place_of_a_gpu():
        o, lse, saved = module.attend_kernels(q, k, v, case.softmax_scale, extras, given)
        grads = module.grad_kernels(
            grad_o, case.gradient_of_lse(), q, k, v, o, saved, case.softmax_scale, extras, given is not None
        )
    names = ("dq", "dk", "dv", *(oracle.GLOBAL_RESULTS if shared else ()))
    kept = given or [emulated.stand_ins.kept[level] for level in range(1, case.spec.num_levels + 1)]
    return Pass({"o": o, "lse": lse, **dict(zip(names, grads, strict=True))}, kept, emulated.runs)


class _Emulated:
    def __init__(self, module: ModuleType, case: fuzz.Case) -> None:
        self.module = module
        self.stand_ins = StandIns(case.spec)
        self.passes = _Passes(module, module.schedule_for(TARGET, case.torch_dtype))
        self.runs: dict[str, Run] = {}

    @contextmanager
    def in_place_of_a_gpu(self) -> Iterator[None]:
        """The module takes the CPU for an H100, and its launches come here."""

        def run(at: Any, launches: Any, tensors: Any, scale: float = 0.0) -> None:
            at.launch(launches, partial(self._launch, at), tensors, scale)

        self.module.launch_plan.cache_clear()
        try:
            with (
                patch.object(self.module, "target_of", lambda device: TARGET),
                patch.object(self.module.LaunchPlan, "run", run),
            ):
                yield
        finally:
            self.module.launch_plan.cache_clear()

    def _launch(self, at: Any, kernel: Any, *arguments: Any) -> None:
        self.passes._note("forward", at, kernel, *arguments)
        launch = self.passes.launches.pop()
        self.stand_ins.note(launch)
        if not launch.grid[0]:
            return
        if launch.function.is_gluon():
            self.runs[launch.kernel] = self._emulate(launch)
        else:
            self.stand_ins.run(launch)

    def _emulate(self, launch: Launch) -> Run:
        source, options = specialise(launch, gpu_target(TARGET))
        compiled = triton.compile(source, target=gpu_target(TARGET), options=options)
        values = [launch.arguments[name] for name, kind in source.signature.items() if kind != "constexpr"]
        before = GlobalMemory(value for value in values if isinstance(value, Tensor))
        arguments: list[Any] = [before.address(value) if isinstance(value, Tensor) else value for value in values]
        arguments += [0, 0]  # Triton's own two pointers, to nothing
        text, shared, programs = compiled.asm["ptx"], compiled.metadata.shared, launch.grid[0]
        after = before.copy()
        executed = machine.run(ptx.parse(text), arguments, after, shared, programs)
        after.write_back()
        return Run(launch.kernel, text, arguments, shared, programs, before, after, executed)
