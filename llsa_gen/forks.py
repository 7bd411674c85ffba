"""Forks: a child process finds no lock held by a thread that it does not have, and nothing half done.

A fork copies one thread. What the others were in the middle of stays as it is in the child for ever: locks, modules
half executed, Python's own locks of imports, locks of libraries, which nobody can free. So a fork waits, for a while,
until no thread is inside `whole`. A lock of this package is a `Lock`: who holds it is inside, and the child can take it
even if the wait was in vain.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

__all__ = ["COMPILE_SECONDS", "IMPORT_SECONDS", "Lock", "go_first", "in_child", "whole"]

COMPILE_SECONDS = 5.0
"""How long a fork waits for a compile: what it leaves behind in this package can be made good in the child."""

IMPORT_SECONDS = 30.0
"""How long it waits for an import, which the child could neither finish nor begin again."""


class _Gate:
    """Who is inside, and how long a fork waits for them. A fork keeps newcomers out, or it could wait for ever."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside: dict[int, list[float]] = {}  # by thread: for how long a fork waits, once for each `whole`
        self.forking: dict[int, int] = {}  # by thread: how often, where hooks are there more than once

    def enter(self, seconds: float) -> None:
        me = threading.get_ident()
        with self.changed:
            if me not in self.inside:  # or else the fork may be waiting for this very thread
                self.changed.wait_for(lambda: not self.forking.keys() - {me}, IMPORT_SECONDS)
            self.inside.setdefault(me, []).append(seconds)

    def leave(self) -> None:
        me = threading.get_ident()
        with self.changed:
            self.inside[me].pop()
            if not self.inside[me]:
                del self.inside[me]
                self.changed.notify_all()

    def before(self) -> None:
        me, start = threading.get_ident(), time.monotonic()
        with self.changed:
            self.forking[me] = self.forking.get(me, 0) + 1
            if self.forking[me] > 1:  # another hook of the same fork has waited
                return
            while others := [max(seconds) for thread, seconds in self.inside.items() if thread != me]:
                left = start + max(others) - time.monotonic()
                if left <= 0:
                    break
                self.changed.wait(left)

    def after(self) -> None:
        me = threading.get_ident()
        with self.changed:
            often = self.forking.pop(me, 1) - 1
            if often:
                self.forking[me] = often
            self.changed.notify_all()

    def renew(self) -> None:
        """In the child: what the forking thread is inside of goes on there, all else is gone."""
        me = threading.get_ident()
        self.changed = threading.Condition()
        self.inside = {thread: seconds for thread, seconds in self.inside.items() if thread == me}
        self.forking = {}


_gate = _Gate()


@contextmanager
def whole(seconds: float = COMPILE_SECONDS) -> Iterator[None]:
    """What a child must find done or not begun: a fork waits for its end, up to `seconds`. Excludes no other thread."""
    _gate.enter(seconds)
    try:
        yield
    finally:
        _gate.leave()


class Lock:
    """A reentrant lock, `whole` while it is held, that a child process finds free, or its own thread's."""

    def __init__(self, seconds: float = COMPILE_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.RLock()
        in_child(self._renew)

    def __enter__(self) -> None:
        _gate.enter(self._seconds)
        try:
            self._lock.acquire()
        except BaseException:  # an interrupt from the keyboard
            _gate.leave()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        _gate.leave()

    def _renew(self) -> None:
        if self._lock.acquire(blocking=False):  # free, or held by the thread that forked, which goes on in the child
            self._lock.release()
        else:
            self._lock = threading.RLock()


def in_child(renew: Callable[[], None]) -> None:
    """Call `renew` in every child process, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def go_first() -> None:
    """Wait for who is `whole` before any hook runs that a library has registered up to now.

    filelock lets nobody take a lock from the moment when its hook runs: whoever is `whole` and needs one could not
    finish. The hooks registered last run first, so this is called after filelock is imported.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_gate.before, after_in_parent=_gate.after)


def _renew_cached_properties() -> None:
    """Up to Python 3.11 a `cached_property` has a lock for all instances, held while one of them is worked out."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == __package__:
            for kind in [value for value in vars(module).values() if isinstance(value, type)]:
                for value in vars(kind).values():
                    if isinstance(value, cached_property) and hasattr(value, "lock"):
                        value.lock = threading.RLock()  # pyright: ignore[reportAttributeAccessIssue]


in_child(_gate.renew)
go_first()
if sys.version_info < (3, 12):
    in_child(_renew_cached_properties)
