"""The bench: whether tile shapes give the right results on a device, and how long their kernels take, each alone.

The host code of the compiled module runs with the shapes that are asked about, so grids, splits and buffers follow from
them as they will when it is used. Its launches are kept, and those of one stage are made again to be timed.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from llsa_gen import aot, fuzz, reference
from llsa_gen.aot.launches import DTYPES, Launch, perform, record
from llsa_gen.compiler import Attention
from llsa_gen.errors import DeviceLost
from llsa_gen.plan import Plan, lower
from llsa_gen.schedule import Entry, Schedule

__all__ = ["DeviceBench", "kernels_of"]

MORE_SPILLS = 512
"""Bytes a thread that a candidate may spill beyond what the present entry spills: a little is not slower, much is."""

SAME = 4.0
"""How far a row may be from that of the present entry, in tolerances of `reference.tolerance`: both are rounded."""

TIES = 1e-3
"""Share of the kept tokens that may differ between two tile shapes of a selection: scores that rounding ties."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def kernels_of(plan: Plan, stage: str) -> set[str]:
    """The kernels that are timed for a stage: its own, and those that only sum up what it leaves."""
    own = [kernel for kernel in plan.kernels if kernel.stage == stage]
    partial = {name for kernel in own for name in kernel.writes if plan.buffers[name].dtype == "partial"}
    return {kernel.name for kernel in (*own, *(one for one in plan.kernels if not partial.isdisjoint(one.reads)))}


class DeviceBench:
    """A `tune_search.Bench` for a compiled operator at q, k, v [batch, heads, n_tokens, D] of standard normal values.

    `present` are the entries that candidates are compared with; `target` the table that the device uses; `cases` what
    the whole operator is checked on. On the CPU, in Triton's interpreter, everything but the times can be had.
    """

    def __init__(
        self,
        attention: Attention,
        present: Schedule,
        cases: Sequence[fuzz.Case],
        n_tokens: int,
        dtype: str,
        target: str,
        *,
        device: str = "cuda",
        batch: int = 2,
        heads: int = 4,
    ) -> None:
        self.attention, self.present, self.cases, self.target = attention, present, cases, target
        self.plan = lower(attention.spec)
        self.kept = {f"kept_l{level}" for level in self.plan.levels}
        self.n_tokens, self.dtype, self.device, self.batch, self.heads = n_tokens, dtype, device, batch, heads
        shape = (batch, heads, n_tokens, self.plan.head_dim)
        generator = torch.Generator(device).manual_seed(0)
        self._inputs: Inputs = tuple(  # type: ignore[assignment]
            torch.randn(shape, generator=generator, device=device, dtype=DTYPES[dtype]) for _ in range(4)
        )
        self._wanted, _ = self._run(present, self._inputs, self.plan.head_dim**-0.5)
        self._ready: tuple[str, Entry, list[Launch]] = ("", {}, [])
        """Stage, entry and launches of the last run. Never those of an older one: a stage whose launches were made
        again and again, as a selection counts and counts, leaves nothing that the launches of another may read."""
        self._spills: dict[str, int] = {}

    # ---- is it right? -------------------------------------------------------------------------------------------

    def check(self, stage: str, entry: Entry) -> str | None:
        """Compiled, it fits and hardly spills; and all results are those of the present entry, row by row."""
        reason = None if self.device == "cpu" else self._too_large(stage, entry)
        if reason is not None:
            return reason
        with fuzz.poisoned_memory():
            found = self._prepare(stage, entry)
        selecting = stage in {kernel.stage for kernel in self.plan.forward[:-1]}
        for name, wanted in self._wanted.items():
            if name in self.kept:
                changed = float((found[name].sort(-1).values != wanted.sort(-1).values).double().mean())
                if changed > (TIES if selecting else 0.0):
                    return f"{name}: {changed:.2%} of the tokens kept are others"
            elif not (selecting and self._reselected(found)):
                error = _worst_row(found[name], wanted)
                if not error <= SAME * reference.tolerance(DTYPES[self.dtype]):
                    return f"{name}: a row is off by {error:.3g} of its norm"
            elif not bool(found[name].isfinite().all()):
                return f"{name}: not finite"
        return None

    def _prepare(self, stage: str, entry: Entry) -> dict[str, Tensor]:
        """Run the operator with this entry, and keep the stage's launches; returns the results."""
        found, launches = self._run({**self.present, stage: entry}, self._inputs, self.plan.head_dim**-0.5)
        self._ready = (stage, entry, self._of(stage, launches))
        return found

    def _reselected(self, found: dict[str, Tensor]) -> bool:
        return any(not torch.equal(found[name], x) for name, x in self._wanted.items() if name in self.kept)

    def verify(self, entries: Schedule) -> str | None:
        """The operator with `entries` beside the dense float64 reference, on every case: `fuzz.run`, one run each."""
        for case in self.cases:
            inputs = case.tensors()
            with fuzz.poisoned_memory():
                found, _ = self._run(entries, inputs, case.softmax_scale)
            kept = [found[f"kept_l{level}"] for level in self.plan.levels]
            try:
                reference.check_selection(case.spec, inputs[0], inputs[1], kept)
            except AssertionError as error:
                return f"{error}, in {case!r}"
            failures, _ = fuzz.compare(case, inputs, kept, found)
            if failures:
                return f"{'; '.join(failures)}, in {case!r}"
        return None

    def _run(self, tiles: Schedule, inputs: Inputs, scale: float) -> tuple[dict[str, Tensor], list[Launch]]:
        """o, lse, dq, dk, dv and kept_l1, ... by name, as the fuzzer has them, and the launches."""
        try:
            (dq, dk, dv, o, lse, *saved), launches = perform(self.attention, tiles, *inputs, scale)
            if inputs[0].is_cuda:
                torch.cuda.synchronize(inputs[0].device)
        except torch.AcceleratorError as error:
            raise DeviceLost(f"{type(error).__name__}: {error}") from error
        found = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        kept = {name: x for name, x in zip(self.plan.saved, saved, strict=True) if name in self.kept}
        return found | kept, launches

    def _too_large(self, stage: str, entry: Entry) -> str | None:
        """Why what the compiler makes of it need not be run."""
        for report in self._reports(stage, entry):
            if not report.fits:
                return f"{report.kernel} takes {report.shared_memory:,} bytes of shared memory"
            if stage not in self._spills:
                present = self._reports(stage, self.present[stage])
                self._spills[stage] = max((one.spilled_bytes for one in present), default=0)
            if report.spilled_bytes > self._spills[stage] + MORE_SPILLS:
                spilled = f"spills {report.spilled_bytes:,} bytes a thread, the present one {self._spills[stage]:,}"
                return f"{report.kernel} {spilled}"
        return None

    def _reports(self, stage: str, entry: Entry) -> list[aot.Report]:
        gpu = triton.runtime.driver.active.get_current_target()
        tiles = {**self.present, stage: entry}
        made = record(
            self.attention, self.n_tokens, self.dtype, self.target, batch=self.batch, heads=self.heads, tiles=tiles
        )
        return [aot.compile_launch(launch, self.target, self.dtype, gpu) for launch in self._of(stage, made)]

    # ---- how long does it take? ---------------------------------------------------------------------------------

    def microseconds(self, stage: str, entry: Entry) -> float:
        """The median time of the stage's launches, made again with the tensors of the whole operator's run."""
        if self._ready[:2] != (stage, entry):
            self._prepare(stage, entry)
        launches = self._ready[2]

        def again() -> None:
            for launch in launches:
                launch.function[launch.grid](**launch.arguments, **launch.options)

        try:
            milliseconds = triton.testing.do_bench(again, warmup=10, rep=100, return_mode="median")
        except torch.AcceleratorError as error:
            raise DeviceLost(f"{type(error).__name__}: {error}") from error
        return 1000 * float(milliseconds)  # type: ignore[arg-type]

    def _of(self, stage: str, launches: Sequence[Launch]) -> list[Launch]:
        names: set[str | None] = {*kernels_of(self.plan, stage), *([None] if stage == "attend" else [])}
        return [launch for launch in launches if launch.step in names and launch.phase != "select"]


def _worst_row(found: Tensor, wanted: Tensor) -> float:
    """The largest |x - y| / |y| of a row; |y| at least that of a usual row. Infinite where anything is not finite."""
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    if found.ndim == 3:  # lse: rows are numbers
        return float((found - wanted).abs().max())
    norms = wanted.float().norm(dim=-1)
    usual = norms.square().mean().sqrt()
    errors = (found.float() - wanted.float()).norm(dim=-1) / norms.clamp(min=float(usual))
    return float(errors.nan_to_num().max())
