"""One callable for inference engines: `fn(q, k, v, *, scale, is_causal, grid, n_text, step, layer) -> o`.

An engine has a hook for attention functions, and knows of each call what a compiled operator can't: where in the
sequence the text is, the grid of the patches, the step of the sampler and the number of the layer. `callable` makes of
a spec what such a hook calls. What it can't do it refuses.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen.compiler import Attention, compile
from llsa_gen.integrations.crossing import Least
from llsa_gen.integrations.placed import attend
from llsa_gen.integrations.report import DENSE, SPARSE, Ledger, Report, count
from llsa_gen.integrations.schedule import Rule, rules
from llsa_gen.integrations.sequences import Masks, Place
from llsa_gen.integrations.specs import OneSpec, operator_of
from llsa_gen.spec import Spec, load

__all__ = ["EngineAttention", "callable"]

LAYOUTS = {"BHND": (1, 2), "BNHD": (2, 1)}
"""Where heads and tokens are."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def callable(
    spec: OneSpec,
    *,
    layout: str = "BHND",
    text: str = "first",
    schedule: str | Rule | Iterable[str | Rule] = (),
    min_tokens: int | None = None,
    otherwise: str = "error",
) -> "EngineAttention":
    """An attention function for an engine's hook, by a spec; see `EngineAttention` for its call.

    Args:
        spec: what `llsa_gen.compile` takes, or an operator that it gave.
        layout: "BHND" for tensors [B, H, N, D], "BNHD" for [B, N, H, D]; of o too.
        text: where text tokens stand: "first", before the patches, or "last".
        schedule: rules by step and layer, texts or `llsa_gen.integrations.schedule.Rule`s, such as "dense for the first
            4 steps", "dense for layers 0 and 1" or "topk 16 for steps 4 to 9". The first one that fits a call holds;
            calls that none fits attend by the spec.
        min_tokens: below this many patches attention is dense; unless given, the length from which on the operator is
            faster on the device, measured once and kept.
        otherwise: "error", or "dense" for leaving what the operator does not do, causal and cross-attention, other head
            dims and dtypes, to torch's dense attention.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; what `compile` raises for a spec.
    """
    if layout not in tuple(LAYOUTS):  # which takes what cannot be hashed, too
        raise ValueError(f'layout: expected "BHND" or "BNHD", got {layout!r}')
    if text not in ("first", "last"):
        raise ValueError(f'text: expected "first" or "last", got {text!r}')
    if otherwise not in ("error", "dense"):
        raise ValueError(f'otherwise: expected "error" or "dense", got {otherwise!r}')
    if min_tokens is not None:
        _whole("min_tokens", min_tokens)
    return EngineAttention(operator_of(spec), layout, text, rules(schedule), min_tokens, otherwise)


class EngineAttention:
    """What `callable` makes. Copies and pickles count anew."""

    def __init__(
        self, operator: Attention, layout: str, text: str, schedule: tuple[Rule, ...], min_tokens: int | None,
        otherwise: str,
    ) -> None:  # fmt: skip
        self.spec = operator.spec
        self.layout, self.text, self.schedule, self.otherwise = layout, text, schedule, otherwise
        self.least = Least(min_tokens)
        self._of_spec = operator
        self._of_rules = [None if rule.topk is None else compile(_keeping(self.spec, rule)) for rule in schedule]
        self._whys = [str(rule) for rule in schedule]
        self._ledger = Ledger()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        grid: Sequence[int] | None = None,
        n_text: int = 0,
        step: int | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """Attend: q, k, v in the layout to o in the layout, differentiable.

        Args:
            q, k, v: text and patches, or patches alone; k and v may have fewer heads, a divisor of those of q.
            scale: the factor of the logits, 1/sqrt(D) unless given.
            is_causal: False; see `otherwise`.
            grid: shape of the patches, (height, width) or (frames, height, width), which stand in raster order; (N,)
                for N tokens that have no grid, or stand in an order of the caller's own.
            n_text: how many tokens are text: they see and are seen by all.
            step, layer: numbers from 0 on, needed where the schedule speaks of them.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        self._check(q, k, v)
        _whole("n_text", n_text)
        if self.layout == "BNHD":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        operator, why = self._scheduled(step, layer)
        place, tokens = None, q.shape[2]
        if operator is not None:
            why = _refused(operator, q, k, v, is_causal)
            if why is None:
                place = self._place(grid, tokens, n_text)
                least = self.least(operator, q)
                if isinstance(least, str) or place.cells < least:
                    why = least if isinstance(least, str) else f"fewer than {least:,} tokens"
            elif self.otherwise == "error":
                raise ValueError(f'{why}; callable(..., otherwise="dense") leaves such calls to torch')
        name, said = "attention", ""
        if not torch.compiler.is_compiling():  # which counts by constants, and numbers may be symbols
            name = name if layer is None else f"layer {layer}"
            said = f"{tokens - n_text:,} + {n_text} text" if n_text else f"{tokens:,}"
        if why is None and operator is not None and place is not None:
            o = attend(operator, q, k, v, place, Masks(None), None, scale, scaled_dot_product_attention)
            count(self._ledger.key, name, SPARSE, "" if operator is self._of_spec else _kept(operator.spec), said)
        else:
            grouped = q.shape[1] != k.shape[1]
            o = scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped)
            count(self._ledger.key, name, DENSE, why or "", said)
        return o.transpose(1, 2) if self.layout == "BNHD" else o

    def report(self, *, reset: bool = False) -> Report:
        """Print which layers were called, sparse or dense and why. Returns it; reset begins to count anew."""
        result = self._ledger.report(tuple(note for note in (str(self.least),) if note))
        print(result)
        if reset:
            self._ledger.reset()
        return result

    def __repr__(self) -> str:
        rules_ = "".join(f", {rule}" for rule in self.schedule)
        return f"callable({self.spec.name!r}, {self.layout}, text {self.text}{rules_})"

    def _check(self, q: Any, k: Any, v: Any) -> None:
        expected = "expected a tensor [B, H, N, D]" if self.layout == "BHND" else "expected a tensor [B, N, H, D]"
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: {expected}, got {type(x).__name__}")
            if x.ndim != 4:
                raise ValueError(f"{name}: {expected}, got shape {[*x.shape]}")

    def _scheduled(self, step: int | None, layer: int | None) -> tuple[Attention | None, str | None]:
        """The operator for a step and a layer; None, and why, where the schedule says dense."""
        for name, value in (("step", step), ("layer", layer)):
            if value is not None:
                _whole(name, value)
            elif any(getattr(rule, name + "s") is not None for rule in self.schedule):
                raise ValueError(f"{name}: expected an integer, for the schedule speaks of {name}s, got None")
        for rule, operator, why in zip(self.schedule, self._of_rules, self._whys, strict=True):
            if rule.meets(step, layer):
                return operator, why
        return self._of_spec, None

    def _place(self, grid: Any, tokens: int, n_text: int) -> Place:
        expected = "grid: expected the shape of the patches, such as (height, width), or (N,) for a sequence"
        if isinstance(grid, str) or not isinstance(grid, Sequence):
            raise TypeError(f"{expected}, got {type(grid).__name__}")
        shape = tuple(grid)
        if not shape or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape):
            raise ValueError(f"{expected}, of integers of at least 1, got {list(shape)}")
        if math.prod(shape) + n_text != tokens:
            raise ValueError(f"grid: expected {tokens - n_text} patches beside {n_text} of text, got {list(shape)}")
        return Place(shape, n_text, 0) if self.text == "first" else Place(shape, 0, n_text)


def _refused(operator: Attention, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> str | None:
    """What about a call the operator does not do."""
    if is_causal:
        return "is_causal: expected False, got True"
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or k.shape[:3] != v.shape[:3]:
        return f"k, v: expected the lengths of q, self-attention, got {[*k.shape]} and {[*v.shape]} for {[*q.shape]}"
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        return f"k: expected a divisor of {q.shape[1]} heads, got {k.shape[1]}"
    if not q.shape[3] == k.shape[3] == v.shape[3] == operator.spec.head_dim:
        came = f"{q.shape[3]}, {k.shape[3]} and {v.shape[3]}"
        return f"q, k, v: expected head dim {operator.spec.head_dim}, as in the spec, got {came}"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k, v: expected float32, float16 or bfloat16, one for all, got {q.dtype}, {k.dtype} and {v.dtype}"
    return None


def _keeping(spec: Spec, rule: Rule) -> Spec:
    """The spec with the numbers of a rule in the place of its own."""
    topk = rule.topk if isinstance(rule.topk, tuple) else (rule.topk,) * spec.num_levels
    if len(topk) != spec.num_levels:
        raise ValueError(f"schedule: expected topk for {spec.num_levels} levels, finest first, got {list(topk)}")
    fields = spec.model_dump()
    levels = [{**level, "topk": kept} for level, kept in zip(fields["levels"], topk, strict=True)]
    return load({**fields, "levels": levels})


def _kept(spec: Spec) -> str:
    return "topk " + ", ".join(str(level.topk) for level in spec.levels)


def _whole(name: str, value: Any) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer of at least 0, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected an integer of at least 0, got {value}")
