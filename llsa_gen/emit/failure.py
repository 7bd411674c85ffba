"""A kernel that Triton could not compile: which one, where in the generated module, from which line of a template."""

import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

from llsa_gen.emit.origin import origin

REASON_LENGTH = 400


@dataclass(frozen=True)
class Failure:
    """Where and why a compile failed."""

    function: str
    line: int
    """Of the generated module, from 1."""
    template: str
    """`select.py.j2:83`."""
    reason: str


def locate(error: BaseException, module: ModuleType, kernel: JITFunction[Any] | None = None) -> Failure:
    """Read a Triton error. `kernel` is what was being compiled, where that is known.

    Raises ValueError when neither the error nor the caller says which function of `module` it was about.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__
    function, line = kernel, _definition(kernel) if kernel else 1
    inside = {value.src: value for value in vars(module).values() if isinstance(value, JITFunction)}
    for link in chain:  # the deepest place that is in the module: below it there may be functions of triton.language
        if isinstance(link, CompilationError) and link.src in inside:
            function = inside[link.src]
            line = _definition(function) + getattr(link.node, "lineno", 1) - 1
    if function is None:
        raise ValueError("error: expected one about a kernel of the module")
    said = (link.error_message if isinstance(link, CompilationError) else str(link) for link in reversed(chain))
    reason = next((" ".join(text.split()) for text in said if text), type(error).__name__)
    if function is not kernel:
        reason = f"in {function.__name__}: {reason}"
    template = origin(inspect.getsource(module), line).template
    return Failure(function.__name__, line, template, reason[:REASON_LENGTH])


def _definition(function: JITFunction[Any]) -> int:
    """The line, from 1, of `def`, which is where Triton counts from: decorators stand above it."""
    above = next(at for at, line in enumerate(function.raw_src) if line.lstrip().startswith("def "))
    return function.starting_line_number + above
