"""One callable for inference engines: `fn(q, k, v, *, scale, is_causal, grid, n_text, step, layer) -> o`.

An engine has a hook for attention functions, and knows of each call what a compiled operator can't: where in the
sequence the text is, the grid of the patches, the step of the sampler and the number of the layer. `callable` makes of
a spec what such a hook calls. What it can't do it refuses.
"""

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen.compiler import Attention, compile
from llsa_gen.integrations import report as reports
from llsa_gen.integrations.schedule import Rule, rules
from llsa_gen.integrations.tokens import attend, repeat_heads
from llsa_gen.spec import Spec, load

__all__ = ["EngineAttention", "callable"]

LAYOUTS = {"BHND": (1, 2), "BNHD": (2, 1)}
"""Where heads and tokens are."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def callable(
    spec: str | os.PathLike[str] | Mapping[str, object] | Spec,
    *,
    layout: str = "BHND",
    text: str = "first",
    schedule: str | Rule | Iterable[str | Rule] = (),
    min_tokens: int | None = None,
    otherwise: str = "error",
) -> "EngineAttention":
    """An attention function for an engine's hook, by a spec; see `EngineAttention` for its call.

    Args:
        spec: what `llsa_gen.compile` takes.
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
    if layout not in LAYOUTS:
        raise ValueError(f'layout: expected "BHND" or "BNHD", got {layout!r}')
    if text not in ("first", "last"):
        raise ValueError(f'text: expected "first" or "last", got {text!r}')
    if otherwise not in ("error", "dense"):
        raise ValueError(f'otherwise: expected "error" or "dense", got {otherwise!r}')
    if min_tokens is not None:
        _whole("min_tokens", min_tokens)
    return EngineAttention(load(spec), layout, text, rules(schedule), min_tokens, otherwise)


class EngineAttention:
    """What `callable` makes. It may be copied and pickled; `report()` says what it was called for and what it did.

    `spec` and `schedule` are what it was made of.
    """

    def __init__(
        self, spec: Spec, layout: str, text: str, schedule: tuple[Rule, ...], min_tokens: int | None, otherwise: str
    ) -> None:
        self.spec, self.layout, self.text, self.schedule = spec, layout, text, schedule
        self.min_tokens, self.otherwise = min_tokens, otherwise
        self._operators: dict[Rule | None, Attention] = {None: compile(spec)}
        self._operators |= {rule: compile(_kept(spec, rule)) for rule in schedule if rule.topk is not None}
        self._ledger = reports.Ledger()

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
            q, k, v: text and patches, or patches alone; of k and v a divisor of as many heads.
            scale: the factor of the logits, 1/sqrt(D) unless given.
            is_causal: False; see `otherwise`.
            grid: shape of the patches, (height, width) or (frames, height, width), which stand in raster order; (N,)
                for N tokens that have no grid, or stand in an order of the caller's own.
            n_text: how many tokens are text: they see and are seen by all.
            step, layer: numbers from 0 on; needed where the schedule speaks of them.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        self._check(q, k, v, n_text)
        heads, tokens = LAYOUTS[self.layout]
        rule = self._rule(step, layer)
        name = "attention" if layer is None else f"layer {layer}"
        dense = rule is not None and rule.topk is None
        if dense:
            why = "the schedule"
        else:
            why = self._refused(q, k, v, is_causal)
            if why is None:
                shape = self._grid(grid, q.shape[tokens], n_text)
                why, dense = self._short(q, math.prod(shape))
            elif self.otherwise == "error":
                raise ValueError(f'{why}; callable(..., otherwise="dense") leaves such calls to torch')
            else:
                dense = True
        said = "" if torch.compiler.is_compiling() else f"{q.shape[tokens]:,}"
        if self.layout == "BNHD":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if dense:
            o = scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            reports.count(self._ledger.key, name, reports.DENSE, why or "", said)
        else:
            k, v = repeat_heads(q, k, v)
            operator_ = self._operators[rule]
            first, last = (n_text, 0) if self.text == "first" else (0, n_text)
            o = attend(operator_, q, k, v, spec=operator_.spec, grid=shape, first=first, last=last, scale=scale)
            reports.count(self._ledger.key, name, reports.SPARSE, "" if rule is None else f"topk {rule.topk}", said)
        return o.transpose(1, 2) if self.layout == "BNHD" else o
