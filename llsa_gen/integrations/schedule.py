"""A small schedule: what attends by how many kept tokens, and what stays dense, by step and layer of a model."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from llsa_gen.errors import short
from llsa_gen.spec.model import MAX_TOPK, MIN_TOPK

__all__ = ["Rule", "rules"]


@dataclass(frozen=True)
class Rule:
    """What calls of some steps and some layers do: those that are in both, where both are named.

    As a text: "dense for the first 4 steps", "dense for layers 0 and 1", "dense for layers 0 to 3 and 11",
    "topk 16 for steps 4 to 9", "topk 32, 8 for layer 5": a number for all levels, or one a level, the finest first.
    """

    topk: tuple[int, ...] | int | None = None
    """How many tokens of a level are kept, in place of the spec's topk; None for dense attention."""
    steps: Collection[int] | None = None
    """Numbers of steps, from 0 on; None for all."""
    layers: Collection[int] | None = None
    """Numbers of layers, from 0 on; None for all."""

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what is no number of tokens, steps or layers."""
        topk: tuple[Any, ...] = self.topk if isinstance(self.topk, tuple) else (self.topk,)
        if self.topk is not None and not (topk and all(_whole(kept) and MIN_TOPK <= kept <= MAX_TOPK for kept in topk)):
            raise ValueError(
                f"schedule: expected topk of {MIN_TOPK} to {MAX_TOPK}, one or one a level, got {short(repr(self.topk))}"
            )
        for name, numbers in (("steps", self.steps), ("layers", self.layers)):
            known = numbers is None or (isinstance(numbers, Collection) and all(map(_whole, numbers)))
            if not known or isinstance(numbers, str | bytes):
                raise TypeError(
                    f"schedule: expected {name} to be integers of at least 0, or None, got {short(repr(numbers))}"
                )

    def meets(self, step: int | None, layer: int | None) -> bool:
        """Whether a call is one of these."""
        return _among(step, self.steps) and _among(layer, self.layers)

    def __str__(self) -> str:
        kept = "dense" if self.topk is None else f"topk {self.topk}".replace("(", "").replace(")", "")
        parts = [
            f"{name} {_runs(numbers)}"
            for name, numbers in (("steps", self.steps), ("layers", self.layers))
            if numbers is not None
        ]
        return f"{kept} for {' of '.join(parts)}" if parts else kept


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _among(number: int | None, numbers: Collection[int] | None) -> bool:
    """Whether it is one of them, or they are all. By comparing: to a compiler the number may be a symbol."""
    if numbers is None or number is None:
        return numbers is None
    if isinstance(numbers, range) and numbers.step == 1:
        return numbers.start <= number < numbers.stop
    return any(number == one for one in numbers)


def _runs(numbers: Collection[int]) -> str:
    """0, 1, 2, 5 as "0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs) or "none"


EXPECTED = (
    'schedule: expected rules such as "dense for the first 4 steps", "dense for layers 0 and 1", '
    '"topk 16 for steps 4 to 9"'
)
_RULE = re.compile(
    r"(?P<kept>dense|topk (?P<topk>\d+(, ?\d+)*)) for "
    r"(the first (?P<first>\d+) steps?|(?P<axis>step|layer)s? (?P<numbers>\d+( to \d+)?((, | and )\d+( to \d+)?)*))"
)


def rules(schedule: Any) -> tuple[Rule, ...]:
    """The rules of a schedule, each a `Rule` or a text. Raises TypeError or ValueError for anything else."""
    if isinstance(schedule, str | Rule):
        schedule = [schedule]
    if not isinstance(schedule, Iterable):
        raise TypeError(f"{EXPECTED}, got {type(schedule).__name__}")
    return tuple(rule if isinstance(rule, Rule) else _read(rule) for rule in schedule)


def _read(text: Any) -> Rule:
    if not isinstance(text, str):
        raise TypeError(f"{EXPECTED}, got {type(text).__name__}")
    found = _RULE.fullmatch(" ".join(text.split()))
    if found is None:
        raise ValueError(f"{EXPECTED}, got {short(text)!r}")
    topk = None if found["topk"] is None else tuple(int(number) for number in found["topk"].split(","))
    kept: Any = topk[0] if topk is not None and len(topk) == 1 else topk
    if found["first"] is not None:
        return Rule(kept, steps=range(int(found["first"])))
    numbers: set[int] = set()
    for part in re.split(", | and ", found["numbers"]):
        first, _, last = part.partition(" to ")
        run = range(int(first), int(last or first) + 1)
        if not run:  # it would hold for nothing
            raise ValueError(f"schedule: expected the smaller number before the larger one, got {part!r}")
        numbers.update(run)
    chosen = frozenset(numbers)
    return Rule(kept, steps=chosen) if found["axis"] == "step" else Rule(kept, layers=chosen)
