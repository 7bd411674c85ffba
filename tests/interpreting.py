"""Triton's interpreter without the work that it does over and over.

Whenever a kernel calls a device function, such as `tl.sum` or one of its module's own, the interpreter puts its own
functions into `triton.language` once more, though they have been there since the launch began: a third of the time of
a test. Here that is done once a launch and namespace. What is executed stays the same.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Replace the interpreter's `_patch_lang`, where this version of Triton has it."""
    whole: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    if whole is None:
        return
    patched: set[int] = set()
    """Namespaces that are served, by identity; empty between launches."""

    @wraps(whole)
    def once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None  # only what begins a launch asks for more, and then nothing is in the set
        scope = whole(fn)
        if not patched:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        patched.add(id(fn.__globals__))
        return scope

    interpreter._patch_lang = once
