"""The search for faster tile shapes: a climb from each kernel's present entry, every step checked before it counts.

What is right and how long it takes is asked of a `Bench`, so that the search itself can be tested without a GPU.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Protocol

from llsa_gen.errors import DeviceLost
from llsa_gen.plan import Plan
from llsa_gen.schedule import Entry, Schedule, Target
from llsa_gen.tune.candidates import Candidate, candidates

__all__ = ["ENDED", "MARGIN", "Bench", "Progress", "StageResult", "Trial", "search"]

MARGIN = 0.03
"""By how much of its time an entry must beat the present one to take its place: less may be noise."""

STEP = 0.01
"""By how much a candidate must beat the best so far for the search to go on from there."""

ENDED = "the search ended here"
"""How the reason of a last trial begins, of a search that did not come to its end."""

ROUNDS = 3
"""How often the present entry and a winner are timed again, in turns."""


class Bench(Protocol):
    """What can be asked about an entry of a stage. An exception: it does not run; DeviceLost: nothing does any more."""

    def check(self, stage: str, entry: Entry) -> str | None:
        """What is wrong with its results, beside those of the present entry; None when they are right."""
        ...

    def microseconds(self, stage: str, entry: Entry) -> float:
        """The median time of the kernels of the stage."""
        ...

    def verify(self, entries: Schedule) -> str | None:
        """What is wrong, beside the float64 reference, with the whole operator when it uses `entries`."""
        ...


@dataclass(frozen=True)
class Trial:
    """A candidate: its time, or why it has none."""

    entry: Entry
    microseconds: float | None = None
    reason: str | None = None


@dataclass
class StageResult:
    """What the search came to for one stage; `after` is the present entry, where nothing beat it."""

    stage: str
    before: Entry
    before_us: float
    after: Entry
    after_us: float
    trials: list[Trial] = field(default_factory=list)

    @property
    def improved(self) -> bool:
        return self.after != self.before


Progress = Callable[[StageResult, float], None]
"""Called after every candidate with what is known of its stage and the share of the time that is spent."""


def search(
    plan: Plan,
    present: Schedule,
    stages: Sequence[str],
    bench: Bench,
    *,
    element: int,
    goal: Target,
    seconds: float,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[StageResult]:
    """Search each of `stages` for about its share of `seconds`; returns what was found.

    Every trial is right before it is timed: `bench.check`. A winner is faster by `MARGIN`, measured again in turns with
    the present entry, and the operator with it, and the winners before it, agrees with the reference. An interrupt from
    the keyboard, a lost device, or a present entry that does not run, ends the search; what was found until then is
    returned, and the last trial says why.
    """
    start, results = clock(), list[StageResult]()

    def spent() -> float:
        return (clock() - start) / seconds

    try:
        for at, stage in enumerate(stages):
            end = spent() + (1 - spent()) / (len(stages) - at)
            before = bench.microseconds(stage, present[stage])
            results.append(result := StageResult(stage, present[stage], before, present[stage], before))
            interrupted = _climb(
                partial(candidates, plan, stage, element=element, goal=goal), result, bench,
                until=end, spent=spent, progress=progress or (lambda result, share: None),
            )  # fmt: skip
            _crown(result, bench, {**present, **{found.stage: found.after for found in results}})
            if interrupted:
                break
    except KeyboardInterrupt:
        pass
    except Exception as error:
        if not results and not isinstance(error, DeviceLost):
            raise
        if results:
            told = error if isinstance(error, DeviceLost) else _told(error)
            results[-1].trials.append(Trial(results[-1].before, reason=f"{ENDED}: {told}"))
    return results


def _climb(
    around: Callable[[Entry], Iterator[Candidate]],
    result: StageResult,
    bench: Bench,
    *,
    until: float,
    spent: Callable[[], float],
    progress: Progress,
) -> bool:
    """Try what is around the best so far until nothing there is better, or the share `until` of the time is spent.

    Returns whether it was interrupted.
    """
    best, best_us = result.before, result.before_us
    seen = {tuple(sorted(best.items()))}
    waiting = around(best)
    try:
        while spent() < until and (candidate := next(waiting, None)) is not None:
            name = tuple(sorted(candidate.entry.items()))
            if name in seen:
                continue
            seen.add(name)
            trial = _try(candidate, result.stage, bench)
            result.trials.append(trial)
            progress(result, min(1.0, spent()))
            if trial.microseconds is not None and trial.microseconds < best_us * (1 - STEP):
                best, best_us = trial.entry, trial.microseconds
                waiting = around(best)
    except KeyboardInterrupt:
        return True
    return False


def _try(candidate: Candidate, stage: str, bench: Bench) -> Trial:
    if candidate.reason is not None:
        return Trial(candidate.entry, reason=candidate.reason)
    try:
        wrong = bench.check(stage, candidate.entry)
        if wrong is not None:
            return Trial(candidate.entry, reason=f"wrong: {wrong}")
        return Trial(candidate.entry, bench.microseconds(stage, candidate.entry))
    except DeviceLost:
        raise
    except Exception as error:
        return Trial(candidate.entry, reason=_told(error))


def _crown(result: StageResult, bench: Bench, others: Schedule) -> None:
    """Make the fastest trial that holds its time, and with which the operator is right, the entry of the stage."""
    timed = [(trial.microseconds, trial) for trial in result.trials if trial.microseconds is not None]
    for microseconds, trial in sorted(timed, key=lambda pair: pair[0]):
        if microseconds > result.before_us * (1 - MARGIN):
            return
        before, after = zip(
            *((bench.microseconds(result.stage, result.before), bench.microseconds(result.stage, trial.entry))
              for _ in range(ROUNDS)),
            strict=True,
        )  # fmt: skip
        if median(after) > median(before) * (1 - MARGIN):
            continue
        wrong = _wrong(bench, {**others, result.stage: trial.entry})
        if wrong is None:
            result.before_us, result.after_us, result.after = median(before), median(after), trial.entry
            return
        result.trials[result.trials.index(trial)] = Trial(trial.entry, reason=f"wrong: {wrong}")


def _wrong(bench: Bench, entries: Schedule) -> str | None:
    try:
        return bench.verify(entries)
    except DeviceLost:
        raise
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
