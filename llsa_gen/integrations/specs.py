"""Which operator a layer gets: from one spec, from specs by head dim, or from a function of the caller's."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from llsa_gen.compiler import Attention, compile
from llsa_gen.module import AttentionModule
from llsa_gen.spec import Spec

__all__ = ["OneSpec", "Operators", "Specs", "operator_of", "operators_of"]

OneSpec = str | os.PathLike[str] | Mapping[str, object] | Spec | Attention | AttentionModule
"""What gives one operator: what `llsa_gen.compile` takes, an operator that it gave, or a module of one."""
Specs = OneSpec | Mapping[int, OneSpec] | Callable[[str, int], OneSpec | None]

Operators = Callable[[str, int], Attention | None]
"""Gives the operator for a layer, by its name and head dim; None if the layer is to stay dense."""


def operators_of(specs: Specs, sizes: Mapping[str, int | None]) -> Operators:
    """The operators of the argument `spec_or_specs`, compiled.

    Args:
        specs: what `llsa_gen.compile` takes, or an operator that it gave; or a mapping from head dims to such; or a
            function of the name of a layer and its head dim that gives one, or None.
        sizes: the head dims of the model's layers, by name; None where a layer does not say it.

    Raises:
        ValueError: where a spec has another head dim than is asked for, or none has one of `sizes`; what `compile`
            raises for a spec.
    """
    found = _operators(specs)
    known = {name: size for name, size in sizes.items() if size is not None}
    if known and not any(found(name, size) for name, size in known.items()):
        wanted = " or ".join(str(size) for size in sorted(set(known.values())))
        came = " and ".join(str(size) for size in found.operators) if isinstance(found, _ByHeadDim) else "none"
        raise ValueError(f"spec_or_specs: expected a spec for head_dim {wanted}, as the model has it, got {came}")
    return found


class _ByHeadDim:
    """Operators by head dim: of one spec, or of a mapping."""

    def __init__(self, operators: Mapping[int, Attention]) -> None:
        self.operators = dict(operators)

    def __call__(self, name: str, head_dim: int) -> Attention | None:
        return self.operators.get(head_dim)


class _ByLayer:
    """Operators that a function of the caller's chooses, by layer and head dim; asked once for each."""

    def __init__(self, choose: Callable[[str, int], Any]) -> None:
        self.choose = choose
        self.chosen: dict[tuple[str, int], Attention | None] = {}

    def __call__(self, name: str, head_dim: int) -> Attention | None:
        if (name, head_dim) not in self.chosen:
            spec = self.choose(name, head_dim)
            operator = None if spec is None else operator_of(spec)
            if operator is not None and operator.spec.head_dim != head_dim:
                raise ValueError(
                    f"spec_or_specs: expected a spec of head_dim {head_dim} for {name}, got {operator.spec.head_dim}"
                )
            self.chosen[name, head_dim] = operator
        return self.chosen[name, head_dim]


def _operators(specs: Any) -> _ByHeadDim | _ByLayer:
    if isinstance(specs, Mapping) and specs and all(isinstance(size, int) for size in specs):
        found = {}
        for size, spec in specs.items():
            operator = operator_of(spec)
            if operator.spec.head_dim != size:
                raise ValueError(
                    f"spec_or_specs[{size}]: expected a spec of head_dim {size}, got {operator.spec.head_dim}"
                )
            found[size] = operator
        return _ByHeadDim(found)
    if callable(specs) and not isinstance(specs, Attention | AttentionModule):
        return _ByLayer(specs)
    operator = operator_of(specs)
    return _ByHeadDim({operator.spec.head_dim: operator})


def operator_of(spec: OneSpec) -> Attention:
    """The operator of one spec, compiled unless it is. Raises what `compile` raises for a spec."""
    if isinstance(spec, AttentionModule):
        return spec.attention
    return spec if isinstance(spec, Attention) else compile(spec)
