"""What went where: calls of attention counted layer by layer, sparse or dense and why, and the table that says so.

An adapter makes one `Ledger` for a model, declares the model's attention layers, and counts every call. It knows no
library: names of layers, routes and reasons are text.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from llsa_gen import forks

__all__ = ["DENSE", "LEFT", "SPARSE", "Ledger", "Quality", "Report", "Row", "count"]

SPARSE = "sparse"
"""By the compiled operator."""
DENSE = "dense"
"""By the model's own attention, though the adapter saw the call: the reason says why."""
LEFT = "left"
"""The layer ran and called nothing that the adapter could take over."""

_numbers = itertools.count()
_ledgers: "WeakValueDictionary[int, Ledger]" = WeakValueDictionary()
_lock = forks.Lock()


class Quality(NamedTuple):
    """How well a spec does on what a layer attends to, on sampled queries of one call."""

    mass: float
    """The share, 0 to 1, of dense softmax weight that lies on tokens which are attended to one by one."""
    error: float
    """|o - dense| / |dense|, Frobenius, over the sampled queries."""


@dataclass(frozen=True)
class Row:
    """The calls of one layer that went one way for one reason."""

    layer: str
    route: str
    """`SPARSE`, `DENSE` or `LEFT`; "" for a layer that was not called."""
    why: str
    calls: int
    tokens: str
    """Tokens of the last of these calls, such as "4,096 + 77 text"; "" where nobody said."""
    quality: Quality | None = None


@dataclass(frozen=True)
class Report:
    """The rows, in the order of the model's layers, and what is to be said about all; `print` it."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def sparse(self) -> int:
        """How many calls the compiled operator took."""
        return sum(row.calls for row in self.rows if row.route == SPARSE)

    @property
    def dense(self) -> int:
        """How many calls stayed with the model's own attention."""
        return sum(row.calls for row in self.rows if row.route == DENSE)

    def __str__(self) -> str:
        head = ["layer", "calls", "route", "tokens", "why"]
        judged = any(row.quality is not None for row in self.rows)
        if judged:
            head[4:4] = ["mass", "error"]
        lines = [head]
        for row in self.rows:
            cells = [row.layer, f"{row.calls:,}", row.route or "-", row.tokens, row.why]
            if judged:
                cells[4:4] = (
                    ["", ""] if row.quality is None else [f"{row.quality.mass:.1%}", f"{row.quality.error:.2g}"]
                )
            lines.append(cells)
        right = {1, 4, 5} if judged else {1}
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = [
            "  ".join(
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, "", f"{self.sparse:,} calls sparse, {self.dense:,} dense", *self.notes])


@dataclass
class _Layer:
    """What is known of one layer."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: dict[tuple[str, str], str] = field(default_factory=dict)


class Ledger:
    """The counts of one model. Copies and pickles begin with the same layers and no counts.

    Args:
        layers: names of the model's attention layers, in its order; others join the end when they are first counted.
    """

    def __init__(self, layers: Mapping[str, Any] | list[str] | tuple[str, ...] = ()) -> None:
        self._layers = {name: _Layer() for name in layers}
        self.traced = False
        """Whether a count came from torch.compile, which counts when it traces and not when it runs."""
        self.key = next(_numbers)
        """By which `count` finds it: a number, for a compiler takes that for a constant."""
        _ledgers[self.key] = self

    def __deepcopy__(self, memo: object) -> "Ledger":
        return Ledger(list(self._layers))

    def __reduce__(self) -> tuple[type["Ledger"], tuple[list[str]]]:
        return Ledger, (list(self._layers),)

    def count(self, layer: str, route: str, why: str = "", tokens: str = "", traced: bool = False) -> None:
        """One more call of a layer."""
        with _lock:
            found = self._layers.setdefault(layer, _Layer())
            found.counts[route, why] += 1
            found.tokens[route, why] = tokens
            self.traced = self.traced or traced

    def reset(self) -> None:
        """No counts."""
        with _lock:
            self._layers = {name: _Layer() for name in self._layers}
            self.traced = False

    def hold(self) -> Any:
        """The counts as they are, for `restore`."""
        with _lock:
            return copy.deepcopy(self._layers), self.traced

    def restore(self, held: Any) -> None:
        """The counts as `hold` found them."""
        with _lock:
            self._layers, self.traced = held

    def report(self, notes: tuple[str, ...] = (), quality: Mapping[str, Quality] | None = None) -> Report:
        """The table, with how each sparse layer does where `quality` says so."""
        rows: list[Row] = []
        with _lock:
            for name, layer in self._layers.items():
                if not layer.counts:
                    rows.append(Row(name, "", "not called", 0, ""))
                for (route, why), calls in layer.counts.items():
                    judged = None if quality is None or route != SPARSE else quality.get(name)
                    rows.append(Row(name, route, why, calls, layer.tokens[route, why], judged))
            if self.traced:
                notes = (*notes, "compiled by torch: a call is counted when it is traced, not every time that it runs")
        return Report(tuple(rows), notes)


def count(ledger: int, layer: str, route: str, why: str = "", tokens: str = "") -> None:
    """Count a call in the ledger with this key, also from within what torch.compile traces.

    There the strings have to be constants: nothing of a symbolic length may be in them.
    """
    if torch.compiler.is_compiling():
        _count_traced(ledger, layer, route, why, tokens)
    else:
        _ledgers[ledger].count(layer, route, why, tokens)


@torch.compiler.assume_constant_result
def _count_traced(ledger: int, layer: str, route: str, why: str, tokens: str) -> None:
    """Runs while a compiler traces, and leaves nothing in the graph: a count there would be a guard, or a break."""
    _ledgers[ledger].count(layer, route, why, tokens, traced=True)
