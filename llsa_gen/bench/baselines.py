"""Baselines: what a compiled spec is timed beside. Torch's dense attention, and callables that a user names.

Such a callable attends as it likes, or along the blocks that a spec keeps: then it is made by a factory, which is told
the spec and its lists, so that what it does with them takes none of the time of a call.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen.bench.rows import Kind
from llsa_gen.errors import LlsaGenError, short
from llsa_gen.spec import Spec

__all__ = ["MOST_SAID", "Attend", "Factory", "Implementation", "dense", "factory", "named"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`function(q, k, v)` takes three [B, H, M or N, D] tensors and returns o, of the shape of q."""

Factory = Callable[[Spec, Tensor, int, int], Attend]
"""`factory(spec, kept, m, n)` is told which of the finest blocks each block of queries attends to, int32
[B, H, T_1(M), K_1], -1 for none, and how many queries and keys there are."""

MOST_SAID = 500
"""Characters of an exception that a row or a message repeats."""


@dataclass(frozen=True)
class Implementation:
    """Something that attends."""

    name: str
    kind: Kind
    function: Attend | None = None
    backend: SDPBackend | None = None
    """The one backend of torch's attention that may run; None leaves torch its choice."""
    make: Factory | None = None
    """What makes the function for the lists of a spec, where there is none yet."""

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


def dense(device: str, dtype: str, only: Sequence[str] = ()) -> tuple[Implementation, ...]:
    """Torch's dense attention: on a GPU its flash and cuDNN backends, on a CPU the one that it takes.

    Those two refuse float32, for which the memory-efficient backend stands in beside them. Where names are given, only
    what is called so.
    """
    return tuple(one for one in _dense(device, dtype) if not only or one.name in only)


def _dense(device: str, dtype: str) -> tuple[Implementation, ...]:
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
    return Implementation(text, "other", _imported("--against", text, "f(q, k, v)"))


def factory(text: str) -> Factory:
    """The callable `module:function` that makes what attends along the lists of a spec. Raises LlsaGenError, too."""
    return _imported("--along", text, "f(spec, kept, m, n)")


def _imported(option: str, text: str, signature: str) -> Callable[..., Any]:
    place = f"{option} {short(text)}"
    module_name, colon, attribute = text.partition(":")
    if not (module_name and colon and attribute):
        raise LlsaGenError(f"{option}: expected module:function, got {short(repr(text))}")
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
        raise LlsaGenError(f"{place}: expected a callable {signature}, got {type(found).__name__}")
    return found
