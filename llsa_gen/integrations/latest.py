"""What a hook noted last, thread by thread: threads may run one model at once, each with an input of its own."""

import threading
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Latest"]

T = TypeVar("T")


class _Own(threading.local):
    """Of this thread. Copies and pickles begin with nothing."""

    value: Any = None

    def __reduce__(self) -> Any:
        return _Own, ()


class Latest(Generic[T]):
    """A value, not None, that each thread notes for itself.

    A thread that has noted nothing reads what any thread noted last: autograd runs checkpointed layers again in threads
    of its own, on GPUs. So does torch's compiler, one thread at a time, whose guards know nothing of threads.
    """

    def __init__(self, value: T) -> None:
        self.last = value
        self._own = _Own()

    def note(self, value: T) -> None:
        """From now on this thread reads this value."""
        self.last = value
        if not torch.compiler.is_compiling():
            self._own.value = value

    def get(self) -> T:
        """What this thread noted last."""
        own = None if torch.compiler.is_compiling() else self._own.value
        return self.last if own is None else own
