"""One exception class per mistake that a person can make or meet; `except LlsaGenError` catches them all.

Every message is meant to be read alone: it names the place, what came and what was expected. All of them survive
pickling (each passes its whole argument list to `Exception`), so that a worker process can hand one to its parent.
"""

from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "CacheError",
    "CacheRefused",
    "CheckFailed",
    "DeviceLost",
    "KernelCompileError",
    "LlsaGenError",
    "MissingSpecFile",
    "Mistake",
    "ScheduleTableError",
    "SharedMemoryError",
    "SpecError",
    "TemplateError",
    "UnknownTargetError",
    "short",
]

MOST_MISTAKES = 20
"""How many mistakes of one spec are printed. Of more only their number is told."""


def short(text: str, most: int = 60) -> str:
    """A text that somebody else wrote, as a message may repeat it: all of it, or its two ends and its length.

    On one line, and with what cannot be printed escaped: what is quoted must not act on a terminal.
    """
    size = len(text)
    if size > most:
        tail = most // 4
        text = f"{text[: most - tail]}...{text[size - tail :]} ({size} characters)"
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class LlsaGenError(Exception):
    """The base of every error that llsa_gen raises on purpose."""


class Mistake(NamedTuple):
    """One thing that is wrong in a spec.

    `where` is `file:line:column` (both from 1) or, for a spec that came from Python, `<dict>`, `<Spec>` or `<Level>`;
    `path` says which field, such as `levels[1].topk`, and is empty when the spec as a whole is meant; `message` says
    what was expected and what came.
    """

    where: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class SpecError(LlsaGenError, ValueError):
    """A spec that says something it may not say: `mistakes` are all of them, in the order of the file.

    As text one a line, the first 20 and how many more there are.
    """

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__(self.mistakes)

    def __str__(self) -> str:
        lines = [str(mistake) for mistake in self.mistakes[:MOST_MISTAKES]]
        more = len(self.mistakes) - len(lines)
        return "\n".join([*lines, f"... and {more:,} more"] if more else lines)


class MissingSpecFile(LlsaGenError, FileNotFoundError):
    """There is no spec file at the path that was given."""


class TemplateError(LlsaGenError):
    """A template could not be rendered."""

    def __init__(self, reason: str, template: str, line: int | None, spec: str, reproduce: str) -> None:
        super().__init__(reason, template, line, spec, reproduce)
        self.reason, self.template, self.line, self.spec, self.reproduce = reason, template, line, spec, reproduce

    def __str__(self) -> str:
        return f"{_at(self.template, self.line)}: {self.reason} (spec {self.spec}); to reproduce: {self.reproduce}"


class KernelCompileError(LlsaGenError):
    """Triton could not compile a kernel of a generated module; `line` is the line of that module."""

    def __init__(self, reason: str, kernel: str, line: int | None, template: str, spec: str, reproduce: str) -> None:
        super().__init__(reason, kernel, line, template, spec, reproduce)
        self.reason, self.kernel, self.line = reason, kernel, line
        self.template, self.spec, self.reproduce = template, spec, reproduce

    def __str__(self) -> str:
        place = _at(f"{self.spec}.py", self.line)
        made = f"kernel {self.kernel}, from {self.template}, spec {self.spec}"
        return f"{place}: {self.reason} ({made}); to reproduce: {self.reproduce}"


class SettingError(LlsaGenError, ValueError):
    """An environment variable has a value that it cannot have: the variable, what came, what was expected."""


class CacheError(LlsaGenError):
    """The store could not do what it was asked, and doing without it would hide the fault."""


class CacheRefused(CacheError):
    """What is in the cache may come from somebody else than the user or root: it is not executed."""


class UnknownTargetError(LlsaGenError):
    """A compile target that llsa_gen does not know, such as `cuda:9000`."""


class SharedMemoryError(LlsaGenError):
    """Compiled kernels that a target has not the shared memory for, so that every launch of them would fail there.

    `kernels` says how many bytes each of them takes, `limit` how many a program may use.
    """

    def __init__(self, spec: str, target: str, dtype: str, kernels: dict[str, int], limit: int) -> None:
        super().__init__(spec, target, dtype, kernels, limit)
        self.spec, self.target, self.dtype, self.kernels, self.limit = spec, target, dtype, kernels, limit

    def __str__(self) -> str:
        needed = ", ".join(f"{kernel} takes {size:,}" for kernel, size in self.kernels.items())
        has = f"{self.target} has {self.limit:,}"
        return f"{self.spec}: {needed} bytes of shared memory, and {has} ({self.dtype}); nothing was written"


class ScheduleTableError(LlsaGenError, ValueError):
    """A table of tile shapes that says something it may not say: the file, the row, what came, what was expected."""


class DeviceLost(LlsaGenError):
    """A kernel failed in a way after which nothing runs on the GPU any more in this process."""


class CheckFailed(LlsaGenError):
    """A compiled spec and the dense reference disagree; `reproducer` is Python text that shows it when pasted."""

    def __init__(self, message: str, reproducer: str) -> None:
        super().__init__(message, reproducer)
        self.message, self.reproducer = message, reproducer

    def __str__(self) -> str:
        return self.message


def _at(file: str, line: int | None) -> str:
    return file if line is None else f"{file}:{line}"
