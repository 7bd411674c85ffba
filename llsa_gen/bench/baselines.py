"""Baselines: what a compiled spec is timed beside. Torch's dense attention, and callables that a user names."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen.bench.rows import Kind
from llsa_gen.errors import LlsaGenError, short

__all__ = ["MOST_SAID", "Implementation", "dense", "named"]

MOST_SAID = 500
"""Characters of an exception that a row or a message repeats."""


@dataclass(frozen=True)
class Implementation:
    """Something that attends: `function(q, k, v)` takes three [B, H, N, D] tensors and returns o of the same shape."""

    name: str
    kind: Kind
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    backend: SDPBackend | None = None
    """The one backend of torch's attention that may run; None leaves torch its choice."""

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Torch's attention runs the backend inside. Entered once, not at every call, or each would pay for it."""
        if self.backend is None:
            yield
        else:
            with sdpa_kernel(self.backend):
                yield


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def dense(device: str, dtype: str) -> tuple[Implementation, ...]:
    """Torch's dense attention: on a GPU its flash and cuDNN backends, on a CPU the one that it takes.

    Those two refuse float32, for which the memory-efficient backend stands in beside them.
    """
    if torch.device(device).type != "cuda":
        return (Implementation("sdpa", "dense", _attend),)
    backends = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
    if dtype == "float32":
        backends["sdpa-efficient"] = SDPBackend.EFFICIENT_ATTENTION
    return tuple(Implementation(name, "dense", _attend, backend) for name, backend in backends.items())


def named(text: str) -> Implementation:
    """The callable `module:function`; modules in the working directory are found too.

    Raises LlsaGenError where it cannot be imported or called.
    """
    place = f"--against {short(text)}"
    module_name, colon, attribute = text.partition(":")
    if not (module_name and colon and attribute):
        raise LlsaGenError(f"--against: expected module:function, got {short(repr(text))}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        reason = f"{type(error).__name__}: {short(str(error), MOST_SAID)}"
        raise LlsaGenError(f"{place}: importing {short(module_name)} raised {reason}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise LlsaGenError(f"{place}: expected {short(repr(part))} in {short(module_name)}, got no such name")
        found = getattr(found, part)
    if not callable(found):
        raise LlsaGenError(f"{place}: expected a callable f(q, k, v), got {type(found).__name__}")
    return Implementation(text, "other", found)  # type: ignore[arg-type]
