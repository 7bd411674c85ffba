"""What kernels take that were compiled before: the tests compile none twice from the same source and toolchain.

`compile_kernels` is that of `llsa_gen.aot` with a memory, tests/compiled.json, which `make budgets` writes. An entry is
named by all that its compile depends on, so a kernel that changed in a letter is compiled. Of the others, one in
thirty-two is compiled all the same, another one after every change, and has to take what is stored.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton import JITFunction

from llsa_gen import aot, emit
from llsa_gen.aot.kernels import constexprs
from llsa_gen.compiler import Attention
from llsa_gen.schedule import target as known_target

FILE = Path(__file__).resolve().parent / "compiled.json"
TRITON = str(Path(triton.__file__).parent)

FIGURES = ("registers", "spilled_bytes", "shared_memory", "instructions")
"""Of a report, what is stored."""

ONE_IN = 32


def compile_kernels(
    attention: Attention | ModuleType,
    target: str,
    dtype: str,
    n_tokens: int | None = None,
    *,
    kernels: Collection[str] | None = None,
    shared: bool = False,
) -> list[aot.Report]:
    """As `aot.compile_kernels`; what is remembered took no seconds, and has no raw figures."""
    found = []
    for one in aot.distinct(attention, target, dtype, n_tokens, kernels=kernels, shared=shared):
        before = stored().get(key(one, target))
        if before is not None and not has_its_turn(key(one, target)):
            found.append(_remembered(one, target, dtype, before))
            continue
        report = aot.compile_launch(one.launch, target, dtype)
        took = [getattr(report, name) for name in FIGURES]
        assert before in (None, took), f"{report.kernel} took {before}, as {FILE.name} says, and takes {took}"
        found.append(report)
    return found


def _remembered(one: aot.Specialised, target: str, dtype: str, figures: list[int]) -> aot.Report:
    return aot.Report(
        kernel=one.launch.kernel,
        target=target,
        dtype=dtype,
        constexprs=constexprs(one.source),
        num_warps=one.options["num_warps"],
        num_stages=one.options["num_stages"],
        shared_memory_limit=known_target(target).shared_memory,
        seconds=0.0,
        raw={},
        **dict(zip(FIGURES, figures, strict=True)),
    )


def key(one: aot.Specialised, target: str) -> str:
    """The hash of all that a compile depends on, wherever Triton lies and wherever in a file a kernel stands."""
    return hashlib.sha256(f"{triton.__version__} {target} {identity(one)}".encode()).hexdigest()[:16]


def identity(one: aot.Specialised) -> str:
    """Everything that Triton would compile, as text."""
    parts = (text(one.launch.function), one.source.signature, one.source.constants, one.source.attrs, one.options)
    return repr(parts).replace(TRITON, "triton")


def text(function: JITFunction[Any], callers: tuple[JITFunction[Any], ...] = ()) -> str:
    """The source of a kernel with that of the functions it calls and the constants it reads, wherever they stand."""
    callers = (*callers, function)
    used = {name: function.__globals__.get(name) for name in function.fn.__code__.co_names}
    parts = [
        text(value, callers)
        if isinstance(value, JITFunction)
        else f"{name} = {getattr(value, '__name__', repr(value))}"
        for name, value in used.items()
        if value not in callers  # a function may call itself
    ]
    return "\n".join([function.src, *parts])


def _told(value: object) -> str:
    """A constant, or the name of a module or a function of Triton."""
    return getattr(value, "__name__", None) or repr(value)


@cache
def stored() -> dict[str, list[int]]:
    """{key: figures}; empty with another Triton than the one that the file was written with."""
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    return content["kernels"] if content.get("triton") == triton.__version__ else {}


def measured(
    attention: Attention | ModuleType,
    target: str,
    dtype: str,
    n_tokens: int | None,
    kernels: Collection[str] | None,
    shared: bool = False,
) -> list[tuple[str, aot.Report]]:
    """The same, all compiled now: their keys and reports, for `remember`."""
    options: dict[str, Any] = {"kernels": kernels, "shared": shared}
    keys = [key(one, target) for one in aot.distinct(attention, target, dtype, n_tokens, **options)]
    return list(zip(keys, aot.compile_kernels(attention, target, dtype, n_tokens, **options), strict=True))


@cache
def _turn() -> int:
    digests = "".join(emit.template_digests().values())
    return int(hashlib.sha256(digests.encode()).hexdigest(), 16) % ONE_IN


def has_its_turn(name: str) -> bool:
    """Whether an entry is compiled though it is stored."""
    return int(name, 16) % ONE_IN == _turn()


def remember(found: Iterable[tuple[str, aot.Report]], *, all_there_are: bool) -> None:
    """Write the file with these entries: alone if they are all there are, or else beside those that it has."""
    kernels = {} if all_there_are else dict(stored())
    kernels |= {name: [getattr(report, figure) for figure in FIGURES] for name, report in found}
    lines = ",\n".join(f'  "{name}": {json.dumps(kernels[name])}' for name in sorted(kernels))
    FILE.write_text(f'{{\n"triton": "{triton.__version__}",\n"kernels": {{\n{lines}\n}}\n}}\n')
