"""A CUDA graph that is pretended on a CPU: operations are recorded by torch's dispatcher, replayed on the same memory.

As with a graph, what the host computes in between is as it was when it was recorded, a recording has no effect on any
number, and what the host would wait for is an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]


def tensors_of(values: object) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host waits for a number while a step is recorded")
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for x in tensors_of((args, kwargs)):
                self.before.setdefault(id(x), (x, x.detach().clone()))
        made = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, tensors_of(made)))
        return made


class Tape:
    """A `graphs.Graph`."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.warm_ups, self.captures, self.replays = 0, 0, 0

    def warm_up(self, work: Callable[[], None]) -> None:
        self.warm_ups += 1
        work()

    def capture(self, work: Callable[[], None]) -> None:
        self.captures += 1
        with _Recorder() as recorder:
            work()
        self.operations = recorder.operations
        with torch.no_grad():
            for x, before in recorder.before.values():
                x.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self.operations:
            for old, new in zip(recorded, tensors_of(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
