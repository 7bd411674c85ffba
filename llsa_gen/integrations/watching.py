"""Watching a model run: which of its layers calls torch's attention, and what the model was given.

A watched module gets a class of its own, a subclass that overrides `__call__` and nothing else. So its parameters,
hooks and processors are untouched; copies, replicas and pickles are watched too; and whatever wraps its `forward`, such
as hooks that move weights, lies inside. While an attention layer runs, a TorchFunctionMode of this thread sees what it
calls of torch. Nothing of torch or of another library is replaced.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from llsa_gen.integrations.grids import Shape

__all__ = ["MARK", "Call", "Context", "Watcher", "names_of", "now", "resume", "resumed", "unwatch", "watch"]

MARK = "_llsa_gen"
"""The attribute of a watched module: its `Watcher`, and its name in the model."""
CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})


@dataclass
class Context:
    """What a model was given, while it runs."""

    owner: int
    grids: tuple[Shape, ...]
    batch: int
    texts: tuple[int, ...]
    """Lengths of its inputs beside the latent."""
    parts: list[tuple[int, ...]] = field(default_factory=list)
    """Lengths of what was put together by torch.cat so far."""
    learning: bool = False
    """Whether somebody listens to all of the model for such parts, and not only to its attention layers."""
    more: bool = False
    """Whether its latent, packed as [B, N, C], has other tokens than a grid has: those of pictures for reference."""


@dataclass
class Call:
    """A run of an attention layer."""

    name: str
    tokens: int | None
    """How many tokens the layer was given; None where it was given none."""
    crossed: bool
    """Whether it was given a second sequence too."""
    grid: Shape | None = None
    """That of its own input, where this is a picture [B, C, H, W]."""
    parts: list[tuple[int, ...]] = field(default_factory=list)
    seen: int = 0
    """Calls of torch's attention."""


class Watcher(Protocol):
    """Who is told. One object for a model; its modules, and copies of the model, carry it along."""

    def enter(self, module: nn.Module, arguments: dict[str, Any], around: Context | None) -> Context:
        """What a model, or one that shows a grid within it, was given."""
        ...

    def leave(self, context: Context, result: Any) -> None:
        """It has ended without an error, and returns this."""
        ...

    def begin(self, module: nn.Module, name: str, arguments: dict[str, Any]) -> Call | None:
        """An attention layer is about to run; None if its calls are not to be seen."""
        ...

    def end(self, call: Call) -> None:
        """It has ended without an error."""
        ...

    def attend(self, call: Call, native: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """A call of torch's attention, with its arguments as they came."""
        ...


class _Now(threading.local):
    """What this thread runs."""

    context: Context | None = None
    call: Call | None = None
    resumed: tuple[int, Context] | None = None
    """The backward pass that this thread was last in, by torch's number, and the run that it came from."""


now = _Now()


class _Listener(TorchFunctionMode):
    """Sees what is called while a layer runs; without a call of its own, what is called around the layers."""

    def __init__(self, watcher: Watcher | None = None, call: Call | None = None) -> None:
        super().__init__()
        self.watcher = watcher
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is scaled_dot_product_attention and self.call is not None and now.call is self.call:
            assert self.watcher is not None
            self.call.seen += 1
            return self.watcher.attend(self.call, func, args, kwargs)
        if func in CONCATENATIONS:
            _note(args, kwargs, self.call)
        elif func is Tensor.unflatten:  # whose own text torch.compile cannot trace under a mode
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


def _note(args: Any, kwargs: Any, call: Call | None) -> None:
    """The lengths of what is put together along an axis of tokens."""
    tensors = args[0] if args else kwargs.get("tensors")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(tensors, list | tuple) or not isinstance(dim, int) or not all_floating(tensors):
        return
    if tensors[0].ndim < 2 or dim in (-1, tensors[0].ndim - 1):
        return
    lengths = tuple([x.shape[dim] for x in tensors])
    parts = call.parts if call is not None else now.context.parts if now.context is not None else []
    if lengths not in parts:
        parts.append(lengths)


def all_floating(tensors: Any) -> bool:
    """Whether these are tensors of floats."""
    for x in tensors:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return False
    return len(tensors) > 1


@dataclass(frozen=True)
class _Mark:
    watcher: Watcher
    name: str


def watch(module: nn.Module, watcher: Watcher, name: str, *, attends: bool) -> None:
    """Tell `watcher` of a module's runs: of an attention layer's, or of those of a model that is given a latent."""
    module.__dict__[MARK] = _Mark(watcher, name)
    module.__class__ = _watched(_own(type(module)), attends)


def resume(context: Context, result: Any) -> None:
    """Lets the backward pass of a run know the run, for gradient checkpointing runs its layers again in there.

    A hook of the outputs is called before anything of the run is differentiated, and of several runs in one backward
    pass the last one is differentiated first, and whole.
    """

    def hook(_: Tensor) -> None:
        now.resumed = (torch._C._current_graph_task_id(), context)

    for x in result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else (result,):
        for one in x if isinstance(x, tuple | list) else (x,):
            if isinstance(one, Tensor) and one.grad_fn is not None:
                one.register_hook(hook)


def resumed() -> Context | None:
    """The run that this thread differentiates, as far as its outputs lead to it."""
    task = torch._C._current_graph_task_id()
    return now.resumed[1] if now.resumed is not None and now.resumed[0] == task else None


def unwatch(module: nn.Module) -> None:
    """The module as it was before `watch`."""
    module.__class__ = _own(type(module))
    del module.__dict__[MARK]


def _own(kind: type[nn.Module]) -> type[nn.Module]:
    """The class without what was made of it here: `type(model)(...)` of a watched model is one that nobody watches."""
    return kind.__bases__[0] if MARK in vars(kind) else kind


@cache
def names_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward."""
    return tuple(
        name
        for name, parameter in list(signature(kind.forward).parameters.items())[1:]
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )


@cache
def _watched(kind: type[nn.Module], attends: bool) -> type[nn.Module]:
    """The subclass. Its name is that of the class, which libraries save models and find blocks by."""
    names = names_of(kind)
    run: Any = (
        kind.__call__
    )  # by its own name, for torch.compile does not look into classes that are allowed in its graph

    def run_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        mark = self._llsa_gen
        if mark is None:
            return run(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        call = mark.watcher.begin(self, mark.name, arguments)
        if call is None:
            return run(self, *args, **kwargs)
        before, now.call = now.call, call
        try:
            with _Listener(mark.watcher, call):
                result = run(self, *args, **kwargs)
        finally:
            now.call = before
        mark.watcher.end(call)
        return result

    def run_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        mark = self._llsa_gen
        if mark is None:
            return run(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        context = mark.watcher.enter(self, arguments, now.context)
        before, now.context = now.context, context
        try:
            if context.learning:
                with _Listener():
                    result = run(self, *args, **kwargs)
            else:
                result = run(self, *args, **kwargs)
        finally:
            now.context = before
        mark.watcher.leave(context, result)
        return result

    def reduce(self: Any, protocol: Any) -> Any:
        """As the class that everybody can find, made into this one again."""
        return _again, (kind, attends), self.__getstate__()

    body = {
        MARK: None,
        "__call__": run_layer if attends else run_model,
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    make: Any = type(kind)
    return make(kind.__name__, (kind,), body)


def _again(kind: type[nn.Module], attends: bool) -> nn.Module:
    made = _watched(kind, attends)
    return made.__new__(made)
