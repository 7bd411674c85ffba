"""Reading PTX: the instructions of one kernel, in the form that Triton writes."""

import re
from dataclasses import dataclass
from functools import cache

from emulator.errors import UnknownInstruction

_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    at: int
    """Its number."""
    guard: str | None
    """The predicate that it is under."""
    negated: bool
    parts: tuple[str, ...]
    """Its name, at the dots."""
    operands: tuple[str, ...]
    """Registers, numbers, `{...}` and `[...]`, as they are written."""
    line: int
    """Of the generated module."""

    @property
    def name(self) -> str:
        return ".".join(self.parts)

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Kernel:
    """What one kernel was compiled to."""

    name: str
    threads: int
    """Of a program."""
    parameters: tuple[str, ...]
    """Their types, with Triton's own two."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Of instructions, by number; that of the end is one more than there are."""


@cache
def parse(text: str) -> Kernel:
    """The only kernel of a module of PTX."""
    _, _, rest = text.partition(".entry")
    name, _, rest = rest.partition("(")
    parameters, _, rest = rest.partition(")")
    directives, _, body = rest.partition("{")
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if not threads or ".entry" in body:
        raise UnknownInstruction(f"{name.strip()}: expected one kernel, with a number of threads")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line = 0
    for statement in _statements(body.partition(".section")[0]):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement.startswith(".loc"):
            line = int(statement.split()[2])
        elif not statement.startswith("."):
            instructions.append(_instruction(statement, len(instructions), line))
    return Kernel(
        name.strip(), int(threads[1]), tuple(re.findall(r"\.param \.(\w+)", parameters)), tuple(instructions), labels
    )


def _statements(body: str) -> list[str]:
    """Statements and labels, without braces around them."""
    lines = [line.partition("//")[0].strip() for line in body.splitlines()]
    text = " ".join(f"{line};" if line.startswith(".loc") else line for line in lines)
    found = []
    for part in re.split(r"(\$L\w+:)|;", text):
        # an inline assembly's scope; braces around operands come after a name
        statement = (part or "").strip(" {}\t") if not re.search(r"\w\s*[{}]", part or "") else (part or "").strip()
        statement = re.sub(r"^[{}\s]+", "", statement)
        if statement:
            found.append(statement)
    return found


def _instruction(statement: str, at: int, line: int) -> Instruction:
    match = _STATEMENT.match(statement)
    if not match:
        raise UnknownInstruction(f"cannot read {statement!r}")
    negated, guard, name, operands = match.groups()
    return Instruction(at, guard, negated == "!", tuple(name.split(".")), tuple(_split(operands)), line)


def _split(operands: str) -> list[str]:
    """At the commas that are in no braces or brackets."""
    found, depth = [""], 0
    for sign in operands:
        depth += (sign in "{[") - (sign in "}]")
        if sign == "," and not depth:
            found.append("")
        else:
            found[-1] += sign
    return [operand.strip() for operand in found if operand.strip()]


def names(operand: str) -> list[str]:
    """The registers of `{...}`, or the one there is."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def address(operand: str) -> tuple[str, int]:
    """The register, or the name, and the offset of `[...]`."""
    match = _ADDRESS.match(operand)
    if not match:
        raise UnknownInstruction(f"cannot read the address {operand!r}")
    return match[1], int(match[2] or "0", 0)
