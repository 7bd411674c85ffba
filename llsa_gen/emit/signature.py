"""A kernel's parameters and the arguments of its launch, both from the buffers and numbers that the plan gives it."""

import re
import textwrap
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby

from llsa_gen.plan import Buffer, Kernel, Plan, Role

OWN_DTYPE = {"input", "partial"}
"""Dtypes that depend on that of q: a signature does not name them."""


def parameters(plan: Plan, kernel: Kernel) -> str:
    """The parameters of a kernel but for its tile shapes, with the shape of every pointer: indented lines.

    Buffers that hold the same stand in one line. An index list is followed by its width, once in a kernel.
    """
    known: set[str] = set()
    told = [(_comment(plan, kernel, name), _names(plan.buffers[name], known)) for name in kernel.takes]
    lines = [f"{', '.join(names)},  # {comment}" for comment, names in _together(told)]
    numbers = ", ".join(number.name for number in kernel.scalars)
    lines.append(f"{numbers},  # {', '.join(dict.fromkeys(number.says for number in kernel.scalars))}")
    return "\n    ".join(lines)


def launch(plan: Plan, in_gluon: Collection[str], kernel: Kernel) -> str:
    """The host code's launch of a kernel, with what it takes in the order of `parameters`.

    Of a kernel with a twin, which a stage `in_gluon` has, both are named.
    """
    known: set[str] = set()
    both = kernel.twin and kernel.stage in in_gluon
    given = [f"({kernel.name}, {kernel.name_in_gluon})" if both else kernel.name]
    for name in kernel.takes:
        buffer = plan.buffers[name]
        own = f"handed_{name}" if name in kernel.handed else name
        given += [own, f"*{name}_steps"] if buffer.strides else [own]
        given += [f"at.{width}" for width in _width(buffer, known)]
    given += ["scale" if number.name == "scale" else f"at.{number.host or number.name}" for number in kernel.scalars]
    lines = textwrap.wrap(", ".join(given) + ",", 112, break_long_words=False, break_on_hyphens=False)
    return "\n        ".join(["launch(", *lines]) + "\n    )"


def base(plan: Plan, name: str) -> str:
    """Where the rows of one head of a buffer begin, as a kernel has it that knows `head` and, of keys, `kv_head`."""
    buffer = plan.buffers[name]
    heads, rows, *width = buffer.axes
    head = {"B*H_kv": "kv_head", "B": "head // heads_per_batch"}.get(heads, "head")
    if buffer.role is Role.SAVED:
        return f"of_saved({name}_ptr, {head}, saved_step)"
    if buffer.strides:
        return f"head_base({name}_ptr, {head}, stride_{buffer.strides}b, stride_{buffer.strides}h, heads_per_batch)"
    count, _, factor = _COUNT.sub(_count, rows).partition(" * ")
    columns = factor or (width[0] if width else "1")
    return f"of_head({name}_ptr, {head}, {count}, {'HEAD_DIM' if columns == 'D' else columns})"


_COUNT = re.compile(r"T_(\d+)\(([MN])\)|^([MNG])$")


def _count(found: re.Match[str]) -> str:
    """An axis of tokens, as a kernel works it out."""
    level, length, tokens = found.groups()
    return f"tl.cdiv({length.lower()}_tokens, SPAN_{level})" if level else f"{tokens.lower()}_tokens"


def unspecialised(plan: Plan) -> list[str]:
    """Parameters that differ from call to call, whatever kernel they are of.

    Strides among them where rows are no multiples of 16: they are such multiples at some lengths and not at others.
    """
    names = [number.name for kernel in plan.kernels for number in kernel.scalars if number.name != "scale"]
    names += [buffer.width for buffer in plan.buffers.values() if buffer.width]
    if plan.head_dim % 16:
        names += [stride for buffer in plan.buffers.values() for stride in _strides(buffer)]
    return list(dict.fromkeys(names))


def _strides(buffer: Buffer) -> list[str]:
    return [f"stride_{buffer.strides}{axis}" for axis in "bhn"] if buffer.strides else []


def _width(buffer: Buffer, known: set[str]) -> list[str]:
    """The parameter that says how wide a list is, unless it is known already."""
    new = [] if not buffer.width or buffer.width in known else [buffer.width]
    known.update(new)
    return new


def _names(buffer: Buffer, known: set[str]) -> list[str]:
    return [f"{buffer.name}_ptr", *_strides(buffer), *_width(buffer, known)]


def _comment(plan: Plan, kernel: Kernel, name: str) -> str:
    buffer = plan.buffers[name]
    axes = ", ".join(buffer.axes)
    shape = f"[{axes.replace('B*H', 'B, H') if buffer.strides else axes}]"
    dtype = "" if buffer.dtype in OWN_DTYPE else f" {buffer.dtype}"
    out = ", out" if name in kernel.writes else ""
    says = f": {buffer.says}" if buffer.says and name not in kernel.reads else ""
    return f"{shape}{dtype}{out}{says}"


def _together(told: Iterable[tuple[str, list[str]]]) -> Iterator[tuple[str, list[str]]]:
    """Neighbours of the same comment in one line, but those with strides."""
    for comment, group in groupby(told, key=lambda one: one[0]):
        names = [names for _, names in group]
        if len(names[0]) > 2:
            yield from ((comment, own) for own in names)
        else:
            yield comment, [name for own in names for name in own]
