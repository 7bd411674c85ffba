"""The fewest tokens for which a call is worth being sparse: what the caller says, or what is measured on the device."""

from typing import Any

import torch
from torch import Tensor

from llsa_gen.integrations import crossing

__all__ = ["FASTER", "Least"]

FASTER = "dense attention is faster on this device"


class Least:
    """The bound of one model.

    Args:
        given: what the caller says; None for the length from which on the operator is faster than dense attention.
    """

    def __init__(self, given: int | None) -> None:
        self.given = given
        self.measured: dict[str, int] = {}
        """By device, dtype and spec in words, for the report."""

    def why_dense(self, operator: Any, q: Tensor, tokens: int) -> str | None:
        """Why a call over so many tokens stays dense; None if it does not. Measures where nobody has."""
        if self.given is not None:
            return f"fewer than {self.given:,} tokens" if tokens < self.given else None
        if q.device.type not in crossing.LONGEST:
            return f"nothing is measured on {q.device.type}: min_tokens= says"
        name = f"{q.device.type}, {str(q.dtype).removeprefix('torch.')}, spec {operator.spec.name}"
        if name not in self.measured:
            if torch.compiler.is_compiling():
                return "not measured on this device and dtype: run once uncompiled, or pass min_tokens="
            self.measured[name] = crossing.measured(operator, q.device, q.dtype)
        least = self.measured[name]
        if tokens >= least:
            return None
        return FASTER if least >= crossing.NEVER else f"fewer than {least:,} tokens"

    def note(self) -> str:
        """A line for the report; nothing where nothing is known yet."""
        if self.given is not None:
            return f"sparse from {self.given:,} tokens on: min_tokens"
        found = [
            f"{'nowhere' if length >= crossing.NEVER else f'from {length:,} tokens on'} ({name})"
            for name, length in self.measured.items()
        ]
        return f"sparse is faster than dense on this device: {'; '.join(found)}" if found else ""
