"""The fuzzer: runs a compiled spec on drawn inputs and compares everything with the float64 reference.

`run(case)` checks one `Case`: the selection by value, attention and its gradients with that selection, or the lists
that are given, held fixed, and that a second run gives the same bits. `check` draws cases with hypothesis, and shrinks
the first that fails to a small one, which `CheckFailed.reproducer` runs again when it is pasted.
"""

from __future__ import annotations

import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import torch
import torch.utils.deterministic as deterministic
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from torch import Tensor

from llsa_gen import reference
from llsa_gen.compiler import Attention, compile
from llsa_gen.errors import CheckFailed
from llsa_gen.fuzz import oracle
from llsa_gen.fuzz.case import Case, DType, Values, cases, on_interpreter, specs
from llsa_gen.reference.selection import SpecSource
from llsa_gen.spec import load
from llsa_gen.store import Store

__all__ = [
    "Case",
    "DType",
    "Outcome",
    "Report",
    "Values",
    "cases",
    "check",
    "poisoned_memory",
    "reproducer",
    "run",
    "same_bits",
    "specs",
]

DENSE_TOKENS = 4096
"""Longest sequence for which torch evaluates the dense formula; it holds some N x N matrices for every head."""

SHRINKING_SECONDS = 30.0
"""How long a failing case is made smaller at most."""

Progress = Callable[[int, float], None]
"""Called with the number of cases done and the seconds since the start."""


@dataclass(frozen=True)
class Outcome:
    """What a case came to."""

    case: Case
    failures: tuple[str, ...]
    """One sentence for everything that is wrong; empty when all is well."""
    margins: Mapping[str, float]
    """For o, lse, dq, dk, dv, with global tokens dk_global, dv_global: the error as a fraction of what is allowed."""

    @property
    def ok(self) -> bool:
        return not self.failures

    def raise_if_failed(self) -> None:
        """Raises CheckFailed, with a reproducer, for a case that failed."""
        if self.failures:
            raise CheckFailed(f"{'; '.join(self.failures)}\nin {self.case!r}", reproducer(self.case))


@dataclass(frozen=True)
class Report:
    """What a check that found nothing did."""

    examples: int
    specs: int
    seconds: float
    seed: int
    device: str
    interpreted: bool
    margins: Mapping[str, float]
    """For o, lse, dq, dk, dv the largest error met, as a fraction of what was allowed; where global tokens were drawn,
    for dk_global, dv_global too."""


def run(case: Case, store: Store | None = None) -> Outcome:
    """Compile the case's spec, attend forward and backward, and compare.

    Selection is compared by value, and by index where scores tie exactly; o, lse, dq, dk, dv and the gradients of
    global tokens with the float64 reference, the selection or the given lists held fixed; and, but in the interpreter,
    a second run bit by bit. Where the given lists are those selected, a run without them has to give the same bits,
    too. The first run gets its memory full of NaN. What the compiled operator raises comes through as it is. `store` as
    for `llsa_gen.compile`.
    """
    attention = compile(case.spec, store=store)
    q, k, v, grad_o = case.tensors()
    with poisoned_memory():
        first = attend(attention, case, q, k, v, grad_o)
    failures: list[str] = []
    if not on_interpreter(case.device):  # which is slow, and runs one program after the other
        second = attend(attention, case, q, k, v, grad_o)
        changed = [name for name in first if not same_bits(first[name], second[name])]
        failures += [f"{name}: a second run gave other bits" for name in changed]
    if case.kept == "own":
        plain = attend(attention, replace(case, kept=None), q, k, v, grad_o)
        changed = [name for name in first if not same_bits(first[name], plain[name])]
        failures += [f"{name}: other bits than without the lists, which are those selected" for name in changed]
    kept = [first[f"kept_l{level}"] for level in range(1, case.spec.num_levels + 1)]
    try:
        reference.check_selection(case.spec, q, k, kept, query_offset=case.query_offset)
        oracle.check_exact_ties(case, q, k, kept)
    except AssertionError as error:  # the reference can not attend with ids that are out of range
        return Outcome(case, (*failures, str(error)), {})
    compared, margins = compare(case, (q, k, v, grad_o), case.lists(q, k, kept) or kept, first)
    return Outcome(case, (*failures, *compared), margins)


def attend(attention: Attention, case: Case, q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor) -> dict[str, Tensor]:
    """o, lse, dq, dk, dv and kept_l1, kept_l2, ... of one run of the compiled operator, by name.

    With global tokens also dk_global and dv_global. The lists are what it selects, whatever attention is given.
    """
    leaves, mask = oracle.leaves_of(case, q, k, v)
    selected = attention.select(leaves["q"], leaves["k"], query_offset=case.query_offset)
    options: dict[str, Any] = {name: leaves[name] for name in leaves if name.endswith("_global")} | mask
    lists = case.lists(q, k, selected)
    if lists is not None:
        options |= {"kept": lists, "check_kept": case.seed % 2 == 1}  # which is to make no difference
    o, lse = attention(
        leaves["q"], leaves["k"], leaves["v"],
        scale=case.scale, return_lse=True, query_offset=case.query_offset, **options,
    )  # fmt: skip
    found = {"o": o.detach(), "lse": lse.detach(), **oracle.gradients(case, leaves, o, lse, grad_o)}
    return found | {f"kept_l{level}": ids for level, ids in enumerate(selected, start=1)}


def compare(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor, Tensor], kept: Sequence[Tensor], found: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, float]]:
    """Failures and margins of all results found for q, k, v and the gradient of o, the lists `kept` held fixed."""
    true = oracle.truth(
        case.spec,
        *inputs,
        kept,
        case.softmax_scale,
        grad_lse=case.gradient_of_lse(),
        query_offset=case.query_offset,
        **case.shared(),
    )
    torchs = oracle.yardstick(case, *inputs, kept) if max(case.n, case.queries) <= DENSE_TOKENS else None
    failures = oracle.check_zeros(case, found, true)
    margins: dict[str, float] = {}
    for name in oracle.results(case):
        wanted = torch.float32 if name == "lse" else case.torch_dtype
        if found[name].dtype != wanted or found[name].shape != true.values[name].shape:
            failures.append(
                f"{name}: expected {wanted} {list(true.values[name].shape)}, "
                f"got {found[name].dtype} {list(found[name].shape)}"
            )
            continue
        if name == "lse":
            verdicts = [oracle.judge_lse(case, found[name], true)]
        else:
            verdicts = oracle.judge(case, name, found[name], true, torchs)
        failures += [
            f"{name}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}: {verdict.why}"
            for verdict in verdicts
            if not verdict.ok
        ]
        margins[name] = max((verdict.margin for verdict in verdicts), default=0.0)
    return failures, margins


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN and the sign of zero included."""
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Whatever torch allocates without filling it holds NaN, integers their largest value."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = filling  # pyright: ignore[reportAttributeAccessIssue]


def reproducer(case: Case) -> str:
    """A Python script that runs a case again and raises what is wrong with it."""
    before = 'import os\n\nos.environ["TRITON_INTERPRET"] = "1"  # before triton is imported\n\n'
    return (
        f"{before if on_interpreter(case.device) else ''}"
        "from llsa_gen import Level, Spec\n"
        "from llsa_gen.fuzz import Case, run\n\n"
        f"run({case!r}).raise_if_failed()\n"
    )


def check(
    spec: SpecSource | None = None,
    *,
    examples: int | None = None,
    seconds: float | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    seed: int | None = None,
) -> Report:
    """Check a spec, or ones that are drawn, on drawn cases.

    Args:
        spec: a spec, or anything that `llsa_gen.load` takes; None draws a spec for every case.
        examples: how many cases; 100 unless `seconds` are given.
        seconds: stop drawing cases after this time.
        device: where the tensors are: `cpu`, `cuda`, `cuda:1`.
        progress: called after every case with their number and the seconds since the start.
        seed: decides what is drawn; without one, something else every time.

    Raises:
        CheckFailed: a case failed; it is the smallest found in half a minute, and the error has a `reproducer`.
    """
    if examples is None and seconds is None:
        examples = 100
    chosen = None if spec is None else load(spec)
    seed = secrets.randbelow(2**32) if seed is None else seed
    drawn_from = seed
    with tempfile.TemporaryDirectory(prefix="llsa_gen_fuzz_") as folder:
        # nobody wants to find specs that were drawn in their cache
        search = _Search(device, examples, seconds, progress, None if chosen else Store(folder))
        while not search.done:
            search.draw(cases(chosen, device), drawn_from)
            drawn_from += 1
        return search.report(seed)


class _Over(BaseException):
    """Leaves hypothesis at once, as an interrupt from the keyboard does."""


class _Search:
    """Draws cases until their number or the time is reached; after a failure, draws smaller ones for a while."""

    def __init__(
        self,
        device: str,
        examples: int | None,
        seconds: float | None,
        progress: Progress | None,
        store: Store | None,
    ) -> None:
        self.device, self.examples, self.progress, self.store = device, examples, progress, store
        self.start = time.monotonic()
        self.end = None if seconds is None else self.start + seconds
        self.seen: set[Case] = set()
        self.margins: dict[str, float] = {name: 0.0 for name in oracle.RESULTS}
        self.smallest: tuple[Case, str] | None = None

    @property
    def done(self) -> bool:
        enough = self.examples is not None and len(self.seen) >= self.examples
        late = self.end is not None and time.monotonic() >= self.end
        return enough or (late and bool(self.seen or self.smallest))

    def draw(self, strategy: st.SearchStrategy[Case], seed: int) -> None:
        """Let hypothesis draw cases, and shrink the first that fails; raises CheckFailed for that."""
        settings = hypothesis.settings(
            max_examples=1000,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]  (its metaclass lists members)
            verbosity=hypothesis.Verbosity.quiet,
        )
        try:
            hypothesis.seed(seed)(settings(hypothesis.given(strategy)(self.attempt)))()
        except (_Over, AssertionError, KeyboardInterrupt) as end:
            if self.smallest is not None:  # also where somebody did not wait for a smaller one
                case, message = self.smallest
                raise CheckFailed(f"{message}\nin {case!r}", reproducer(case)) from None
            if isinstance(end, KeyboardInterrupt):
                raise

    def attempt(self, case: Case) -> None:
        """One case; raises AssertionError when it fails."""
        if self.done:
            raise _Over
        if case in self.seen:
            return  # hypothesis repeats itself
        failure = self._failure(case)
        if self.smallest is None and failure is None:
            self.seen.add(case)
            if self.progress is not None:
                self.progress(len(self.seen), time.monotonic() - self.start)
        if failure is not None:
            if self.smallest is None:  # from here on hypothesis shrinks
                self.examples, self.end = None, time.monotonic() + SHRINKING_SECONDS
            if self.smallest is None or complexity(case) < complexity(self.smallest[0]):
                self.smallest = (case, failure)
            raise AssertionError(failure)

    def _failure(self, case: Case) -> str | None:
        """What is wrong with a case, if anything."""
        try:
            outcome = run(case, self.store)
        except torch.AcceleratorError as error:  # nothing works in this process any more
            self.smallest = (case, f"{type(error).__name__}: {error}")
            raise _Over from error
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        for name, margin in outcome.margins.items():
            self.margins[name] = max(self.margins.get(name, 0.0), margin)
        return "; ".join(outcome.failures) or None

    def report(self, seed: int) -> Report:
        return Report(
            examples=len(self.seen),
            specs=len({case.spec for case in self.seen}),
            seconds=time.monotonic() - self.start,
            seed=seed,
            device=self.device,
            interpreted=on_interpreter(self.device),
            margins=self.margins,
        )


def complexity(case: Case) -> tuple[float, ...]:
    """Orders cases by how much there is to look at: the shrunk case is the least of the failing ones."""
    spec = case.spec
    unusual = sum(layout != "contiguous" for layout in case.layouts) + (case.std != 1.0) + case.popular
    unusual += (case.global_tokens > 0) + case.masked + case.loud + (case.kept is not None)
    work = case.batch * case.heads * case.n
    numbers = sum(level.block + level.topk for level in spec.levels)
    return (spec.num_levels, work, unusual, case.global_tokens, spec.head_dim, numbers)
